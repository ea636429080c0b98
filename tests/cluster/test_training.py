"""The training engine in this process: one worker, a real DeepSpeed engine, every ZeRO stage."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from goldcrest.cluster import checkpoints
from goldcrest.cluster.api import Objective, Trained
from goldcrest.cluster.errors import InputError, StepError
from goldcrest.cluster.schedules import learning_rate
from goldcrest.cluster.training import train_local
from goldcrest.cluster.training_config import TrainingConfig
from goldcrest.cluster.training_deepspeed import deepspeed_config
from goldcrest.cluster.training_sampling import epoch_batches, seed_chunk, seed_model
from goldcrest.cluster.training_shards import Fragment, HeldMasks

_spec = importlib.util.spec_from_file_location(
    "training_toys", Path(__file__).with_name("training_toys.py")
)
assert _spec is not None and _spec.loader is not None
toys = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toys)

BASE: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 12,
    "learning_rate": 0.01,
    "weight_decay": 0.05,
    "clip_norm": 0.5,
    "schedule": "cosine",
    "warmup_steps": 3,
}


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**(BASE | changes))


def train(objective: Objective, scratch: Path, **changes: Any) -> Trained:
    return train_local(objective, config(**changes), scratch=scratch, seed=5)


def assert_same(one: Trained, two: Trained) -> None:
    """The same bytes: weights, extra state, history."""
    assert one.history == two.history
    assert set(one.model_state) == set(two.model_state)
    for name, value in one.model_state.items():
        assert torch.equal(value, two.model_state[name]), name
    for name, value in one.extra_state.items():
        assert torch.equal(value, two.extra_state[name]), name


def plain_loop(settings: TrainingConfig) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training written without DeepSpeed: torch's AdamW, clip_grad_norm_, backward()."""
    objective = toys.Toy()
    seed_model(5)
    model = objective.build_model()
    optimizer = torch.optim.AdamW(
        [{"weight_decay": settings.weight_decay} | g for g in objective.parameter_groups(model)],
        lr=1.0,
    )
    step, curve = 0, []
    for epoch in range(settings.epochs):
        batches = epoch_batches(settings, len(objective), seed=5, epoch=epoch)
        losses = []
        for number, indices in enumerate(batches):
            for group in optimizer.param_groups:
                rate = learning_rate(settings, step, len(batches))
                group["lr"] = rate * group.get("lr_scale", 1.0)
            batch = objective.batch(indices, seed_chunk(5, epoch, number, 0))
            loss = objective.losses(model, batch, epoch=epoch)["ce"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or 0.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        curve.append(float(np.mean(losses)))
    return model.state_dict(), curve


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_as_a_plain_torch_loop_does(tmp_path: Path, stage: int) -> None:
    """Reference: `plain_loop` above. Tolerance: the clipping factor is rounded differently."""
    weights, curve = plain_loop(config())
    trained = train(toys.Toy(), tmp_path, zero_stage=stage)
    assert [row["ce"] for row in trained.history] == pytest.approx(curve, rel=1e-6)
    assert [row["loss"] for row in trained.history] == [row["ce"] for row in trained.history]
    for name, value in weights.items():
        torch.testing.assert_close(trained.model_state[name], value, rtol=1e-5, atol=1e-7)
    assert curve[-1] < curve[0]


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")]
)
@pytest.mark.parametrize("epoch", [0, 2])
def test_stopped_and_continued_is_undisturbed(
    tmp_path: Path, stage: int, precision: str, epoch: int
) -> None:
    """Bitwise: stopped in the middle of an epoch, continued from the last checkpoint."""
    changes = {"zero_stage": stage, "precision": precision, "micro_batch_size": 5}
    whole = train(toys.Toy(), tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(toys.Stopping(epoch, 3), tmp_path / "stopped", **changes)
    assert_same(whole, train(toys.Toy(), tmp_path / "stopped", **changes))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_checkpoint_serves_every_stage(tmp_path: Path, optimizer: str) -> None:
    """Written under one ZeRO stage, continued under another: bitwise in fp32 without clipping
    (the stages add up the gradient's norm in different orders)."""
    changes = {"optimizer": optimizer, "clip_norm": None}
    whole = train(toys.Toy(), tmp_path / "whole", **changes)
    for number, (before, after) in enumerate([(0, 2), (1, 3), (3, 0), (2, 1)]):
        folder = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            train(toys.Stopping(2, 1), folder, zero_stage=before, **changes)
        assert_same(whole, train(toys.Toy(), folder, zero_stage=after, **changes))


def test_a_damaged_last_checkpoint_costs_an_epoch_not_the_result(tmp_path: Path) -> None:
    whole = train(toys.Toy(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(toys.Stopping(3, 2), tmp_path / "cut")
    shard = checkpoints.folder_after(tmp_path / "cut", 3) / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    assert_same(whole, train(toys.Toy(), tmp_path / "cut"))


def test_checkpoints_every_other_epoch_and_a_finished_training_returns_at_once(
    tmp_path: Path,
) -> None:
    first = train(toys.Toy(), tmp_path, checkpoint_every=3)
    names = sorted(p.name for p in checkpoints.folder_of(tmp_path).iterdir())
    assert names == ["epoch-00003", "epoch-00004"]
    assert_same(first, train(toys.Stopping(0, 1), tmp_path, checkpoint_every=3))


@pytest.mark.parametrize("stage", [0, 3])
def test_bf16_follows_fp32(tmp_path: Path, stage: int) -> None:
    """bf16 keeps 8 bits: losses within 2 %, fp32 master weights come back."""
    exact = train(toys.NoNoise(), tmp_path / "fp32", zero_stage=stage)
    rounded = train(toys.NoNoise(), tmp_path / "bf16", zero_stage=stage, precision="bf16")
    for one, two in zip(exact.history, rounded.history, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0.02)
    weight = rounded.model_state["0.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())  # bits that bf16 cannot hold


def test_fp16_trains_or_is_refused_in_words(tmp_path: Path) -> None:
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        with pytest.raises(InputError, match="cannot compute in fp16"):
            train(toys.NoNoise(), tmp_path, precision="fp16")
        return
    whole = train(toys.NoNoise(), tmp_path / "whole", precision="fp16")
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro", [4, 5])
def test_micro_batches_add_up_to_the_batch(tmp_path: Path, stage: int, micro: int) -> None:
    """Also where they differ in size, and with a smaller last batch of the epoch (48 = 4*11+4)."""
    changes = {"batch_size": 11, "drop_last": False}
    whole = train(toys.NoNoise(), tmp_path / "whole", **changes)
    parts = train(
        toys.NoNoise(), tmp_path / "parts", micro_batch_size=micro, zero_stage=stage, **changes
    )
    for one, two in zip(whole.history, parts.history, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for name, value in whole.model_state.items():
        torch.testing.assert_close(parts.model_state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_by_units_are_the_same_however_they_are_cut(tmp_path: Path, stage: int) -> None:
    """Chunks of a step hold different numbers of rows: the mean is over the rows of the step."""
    whole = train(toys.Uneven(), tmp_path / "whole", batch_units=60)
    parts = train(
        toys.Uneven(), tmp_path / "parts", batch_units=60, micro_batch_units=20, zero_stage=stage
    )
    for one, two in zip(whole.history, parts.history, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for name, value in whole.model_state.items():
        torch.testing.assert_close(parts.model_state[name], value, rtol=1e-4, atol=1e-6)


def test_a_step_weighs_its_examples_also_by_count(tmp_path: Path) -> None:
    whole = train(toys.Uneven(), tmp_path / "whole")
    parts = train(toys.Uneven(), tmp_path / "parts", micro_batch_size=5)
    assert parts.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=1e-5)
    for name, value in whole.model_state.items():
        torch.testing.assert_close(parts.model_state[name], value, rtol=1e-4, atol=1e-6)


def test_steps_by_units_stopped_and_continued_are_undisturbed(tmp_path: Path) -> None:
    changes = {"batch_units": 40, "micro_batch_units": 20}
    whole = train(toys.Uneven(), tmp_path / "whole", **changes)

    class Stopped(toys.Uneven):  # type: ignore[misc]
        def losses(self, model: Any, batch: Any, *, epoch: int) -> Any:
            if epoch == 2:
                raise KeyboardInterrupt
            return super().losses(model, batch, epoch=epoch)

    with pytest.raises(KeyboardInterrupt):
        train(Stopped(), tmp_path / "cut", **changes)
    assert_same(train(toys.Uneven(), tmp_path / "cut", **changes), whole)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_masks_hold_and_a_teacher_follows(tmp_path: Path, stage: int, precision: str) -> None:
    """Zeros and after_step's changes reach the master weights in every stage and precision."""
    trained = train(toys.Sparse(), tmp_path, zero_stage=stage, precision=precision)
    student = trained.model_state["student.0.weight"]
    assert (student[:, ::2] == 0).all() and (student[:, 1::2] != 0).all()
    teacher = trained.model_state["teacher.0.weight"]
    assert (teacher[:, ::2] == 0).all() and not torch.equal(teacher, student)
    assert {"ce", "kd"} <= set(trained.history[0])
    row = trained.history[1]
    assert row["loss"] == pytest.approx(row["ce"] + row["kd"], rel=1e-6)
    if (stage, precision) == (3, "fp32"):
        plain = train(toys.Sparse(), tmp_path / "plain")
        torch.testing.assert_close(plain.model_state["teacher.0.weight"], teacher)
        torch.testing.assert_close(plain.model_state["student.0.weight"], student)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each gathering of ZeRO 3; no parameter is small enough to stay whole."""
    import deepspeed

    sizes: list[int] = []

    class Spy(deepspeed.zero.GatheredParameters):  # type: ignore[misc]
        def __init__(self, params: Any, **settings: Any) -> None:
            sizes.append(sum(parameter.ds_numel for parameter in params))
            super().__init__(params, **settings)

    def all_cut_up(*arguments: Any, **settings: Any) -> dict[str, Any]:
        made = deepspeed_config(*arguments, **settings)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    monkeypatch.setattr("deepspeed.zero.GatheredParameters", Spy)
    monkeypatch.setattr("goldcrest.cluster.training_deepspeed.deepspeed_config", all_cut_up)
    return sizes


def test_zero_3_gathers_what_after_step_asks_for_and_no_more(
    tmp_path: Path, gathered: list[int]
) -> None:
    """Masks and an empty after_step cost no gathering. A teacher costs one weight and its copy at a
    time (8 x 16 each, of 2 x 192 in all), and each frozen weight by itself for a checkpoint."""
    held = train(toys.Held(), tmp_path / "held", zero_stage=3, clip_norm=None)
    assert gathered == []
    assert_same(held, train(toys.Held(), tmp_path / "plain-held", clip_norm=None))
    taught = train(toys.Sparse(), tmp_path / "taught", zero_stage=3, clip_norm=None)
    assert max(gathered) == 2 * 8 * 16
    assert_same(taught, train(toys.Sparse(), tmp_path / "plain-taught", clip_norm=None))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_masks_survive_fifty_steps_with_momentum_and_weight_decay(
    tmp_path: Path, optimizer: str
) -> None:
    """Property 8 of the spec of sparse fine-tuning; the pruned weights begin dense here."""
    trained = train(toys.Held(), tmp_path, optimizer=optimizer, weight_decay=0.1, epochs=13)
    for name in ("0.weight", "2.weight"):
        weight = trained.model_state[name]
        assert (weight[:, ::2] == 0).all() and (weight[:, 1::2] != 0).all()


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), (1, False), (2, False), (2, True), (3, False), (3, True)]
)
def test_pruned_weights_have_no_part_in_the_clipped_norm(
    tmp_path: Path, stage: int, offload: bool
) -> None:
    """One step of SGD by hand: its length shows what the gradient's norm was taken over."""
    objective = toys.Held()
    seed_model(5)
    model = objective.build_model()
    batch = objective.batch(np.arange(48), np.random.default_rng(0))
    objective.losses(model, batch, epoch=0)["ce"].backward()
    whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])  # type: ignore[misc]
    for name, keep in objective.masks(model).items():
        model.get_parameter(name).grad[~keep] = 0
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert 0.01 < norm < 0.9 * whole
    rates = {1: 0.5, 2: 1.0}  # the toy's lr_scale for biases and for matrices
    expected = {n: p.detach() - rates[p.ndim] * p.grad for n, p in model.named_parameters()}
    for name, keep in objective.masks(model).items():
        expected[name][~keep] = 0
    trained = train_local(
        objective,
        TrainingConfig(
            epochs=1,
            batch_size=48,
            learning_rate=1.0,
            optimizer="sgd",
            momentum=0.0,
            weight_decay=0.0,
            schedule="constant",
            clip_norm=0.01,
            zero_stage=stage,  # type: ignore[arg-type]
            offload_optimizer=offload,
        ),
        scratch=tmp_path,
        seed=5,
    )
    for name, value in expected.items():
        torch.testing.assert_close(trained.model_state[name], value, rtol=1e-4, atol=1e-6)


def test_zero_reaches_master_weights_that_fp16_cannot_tell_from_zero() -> None:
    """1e-8 is below fp16's smallest number (6e-8): the model has a zero already, the master not."""
    layer = torch.nn.Linear(4, 1, bias=False).half()
    master = torch.tensor([1e-8, 1e-8, 0.5, 0.5])
    layer.weight.data.copy_(master)
    view = layer.weight.data.view(-1)
    piece = Fragment(
        name="weight", parameter=layer.weight, start=0,
        module=view, master=master, flat=master, offset=0,
    )  # fmt: skip
    keep = torch.tensor([[False, True, False, True]])
    held = HeldMasks(layer, [piece], {"weight": keep}, torch.device("cpu"))
    held.apply()
    assert master.tolist() == [0.0, pytest.approx(1e-8), 0.0, 0.5]
    assert layer.weight.tolist() == [[0.0, 0.0, 0.0, 0.5]]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_inside_the_loss_and_batch_statistics(tmp_path: Path, stage: int) -> None:
    """VAT: three forwards and an autograd.grad in one loss; equal to stage 0, and continues."""
    trained = train(toys.Adversarial(), tmp_path / str(stage), zero_stage=stage)
    assert trained.history[-1]["ce"] < trained.history[0]["ce"]
    assert trained.model_state["1.num_batches_tracked"].item() == 3 * 4 * 4
    plain = train(toys.Adversarial(), tmp_path / "plain")
    for one, two in zip(plain.history, trained.history, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_the_objectives_own_state_is_kept(tmp_path: Path) -> None:
    first = train(toys.Remembering(), tmp_path)
    assert first.extra_state["seen"].item() == 16
    objective = toys.Remembering()
    train(objective, tmp_path)
    assert objective.seen.item() == 16


def test_a_loss_that_is_not_finite_fails_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"not finite in epoch 1, step 2 of 4: ce=nan"):
        train(toys.Exploding(), tmp_path)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16")]
)
def test_or_its_step_is_skipped(tmp_path: Path, stage: int, precision: str) -> None:
    changes = {"on_nan": "skip", "zero_stage": stage, "precision": precision}
    trained = train(toys.Exploding(), tmp_path, **changes)
    assert [row["skipped_steps"] for row in trained.history] == [0, 1, 0, 0]
    assert all(torch.isfinite(value).all() for value in trained.model_state.values())
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


def test_logs_and_progress_are_told_once_and_in_order(tmp_path: Path) -> None:
    rows: list[Any] = []
    notes: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        train_local(toys.Stopping(2, 1), config(), scratch=tmp_path, seed=5, on_log=rows.append)
    assert [row["epoch"] for row in rows] == [0, 1]
    rows.clear()
    trained = train_local(
        toys.Toy(),
        config(),
        scratch=tmp_path,
        seed=5,
        on_log=rows.append,
        on_progress=lambda done, note: notes.append((done, note)),
    )
    assert rows == trained.history
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert set(rows[0]) == {"epoch", "loss", "ce", "learning_rate", "skipped_steps", "accuracy"}
    assert all(0 < done <= 1 for done, _ in notes) and "epoch 3/4" in notes[0][1]


def test_measurements(tmp_path: Path) -> None:
    """16 steps of 12 examples of 2 s each; energy from the stated formula."""
    facts = train(toys.Toy(), tmp_path, cpus_per_worker=2).measurements
    assert facts["optimizer_steps"] == 16
    assert facts["examples_per_second"] == pytest.approx(192 / facts["training_seconds"])
    assert facts["audio_seconds_per_second"] == pytest.approx(384 / facts["training_seconds"])
    assert facts["cpu_hours"] == pytest.approx(2 * facts["training_seconds"] / 3600)
    assert facts["gpu_hours"] == 0
    assert facts["energy_kwh_estimate"] == pytest.approx(facts["cpu_hours"] * 10 / 1000)
    assert facts["peak_memory_bytes"] > 1e8
    assert "tokens_per_second" not in facts


def test_the_callers_process_is_left_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    threads = torch.get_num_threads()
    expected = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    train(toys.Toy(), tmp_path)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    assert np.random.get_state()[1].tolist() == expected[2]
    assert torch.get_num_threads() == threads
    assert not torch.distributed.is_initialized()


def test_importing_deepspeed_leaves_no_trace(tmp_path: Path) -> None:
    """Its autotuner would import mlflow (4 of 4.6 seconds), its first engine would run g++."""
    import subprocess
    import sys

    code = (
        "import os, sys\n"
        "from goldcrest.cluster.training_deepspeed import load_deepspeed, single_process_group\n"
        "with single_process_group(gpu=False): pass\n"
        "assert 'mlflow' not in sys.modules and 'pandas' not in sys.modules\n"
        "assert 'DS_ACCELERATOR' not in os.environ and 'LOCAL_RANK' not in os.environ\n"
        "import mlflow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.02}, "learning_rate was 0.01 and is 0.02"),
        ({"epochs": 9}, "epochs was 4 and is 9"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(toys.Stopping(2, 1), tmp_path)
    with pytest.raises(InputError, match=said):
        train(toys.Toy(), tmp_path, **changes)
    with pytest.raises(InputError, match="seed was 5 and is 6"):
        train_local(toys.Toy(), config(), scratch=tmp_path, seed=6)


class OtherParameter(toys.NoNoise):  # type: ignore[misc]
    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        return [{"params": [torch.nn.Parameter(torch.ones(1))]}]


class NoParameter(toys.NoNoise):  # type: ignore[misc]
    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        return [{"params": []}]


class VectorLoss(toys.NoNoise):  # type: ignore[misc]
    def losses(self, model: torch.nn.Module, batch: Any, *, epoch: int) -> dict[str, torch.Tensor]:
        return {"ce": model(batch["x"]).sum(1)}


class StrangeMask(toys.NoNoise):  # type: ignore[misc]
    def masks(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {"9.weight": torch.ones(16, 8, dtype=torch.bool)}


class LongMask(toys.NoNoise):  # type: ignore[misc]
    def masks(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {"0.weight": torch.ones(16, 9, dtype=torch.bool)}


class NanMetric(toys.NoNoise):  # type: ignore[misc]
    def evaluate(self, model: torch.nn.Module, *, epoch: int) -> dict[str, float]:
        return {"eer": float("nan")}


class ClashingMetric(toys.NoNoise):  # type: ignore[misc]
    def evaluate(self, model: torch.nn.Module, *, epoch: int) -> dict[str, float]:
        return {"ce": 1.0}


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (OtherParameter, "a parameter that is not in the model"),
        (NoParameter, "no trainable parameter"),
        (StrangeMask, r"masks\(\) names '9.weight', which is no parameter of the model"),
        (LongMask, r"mask of '0.weight' is torch.bool of shape \(16, 9\)"),
        (VectorLoss, r"loss 'ce' has shape \(12,\)"),
        (NanMetric, r"epoch 0: evaluate\(\) returned \{'eer': nan\}"),
        (ClashingMetric, r"evaluate\(\) returned \['ce'\]"),
    ],
)
def test_an_objective_that_breaks_its_contract_is_told(
    tmp_path: Path, objective: Any, said: str
) -> None:
    with pytest.raises(StepError, match=said):
        train(objective(), tmp_path)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="48 examples are fewer than batch_size=64"):
        train(toys.Toy(), tmp_path, batch_size=64)
    with pytest.raises(InputError, match="offload_optimizer needs zero_stage"):
        train(toys.Toy(), tmp_path, offload_optimizer=True)
    with pytest.raises(InputError, match="offload_parameters needs zero_stage 3"):
        train(toys.Toy(), tmp_path, offload_parameters=True, zero_stage=2)


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_optimizer_state_trains_the_same(tmp_path: Path, stage: int) -> None:
    plain = train(toys.Toy(), tmp_path / "plain", zero_stage=stage)
    away = train(toys.Toy(), tmp_path / "away", zero_stage=stage, offload_optimizer=True)
    for name, value in plain.model_state.items():
        torch.testing.assert_close(away.model_state[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offloaded_parameters_train_and_continue_the_same(tmp_path: Path, precision: str) -> None:
    """Masks, too, reach weights that lie in CPU memory."""
    changes: dict[str, Any] = {"zero_stage": 3, "precision": precision}
    away = {"offload_parameters": True, "offload_optimizer": True, **changes}
    plain = train(toys.Sparse(), tmp_path / "plain", **changes)
    assert_same(train(toys.Sparse(), tmp_path / "away", **away), plain)
    whole = train(toys.Toy(), tmp_path / "whole", **away)
    with pytest.raises(KeyboardInterrupt):
        train(toys.Stopping(2, 1), tmp_path / "stopped", **away)
    assert_same(train(toys.Toy(), tmp_path / "stopped", **away), whole)


class Tied(toys.NoNoise):  # type: ignore[misc]
    def build_model(self) -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        model[2].weight = model[0].weight
        return model


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_shared_parameters_come_back_under_both_names(tmp_path: Path, stage: int) -> None:
    trained = train(Tied(), tmp_path, zero_stage=stage)
    seed_model(0)
    model = Tied().build_model()
    model.load_state_dict(trained.model_state)  # strict: every name is there
    assert torch.equal(trained.model_state["0.weight"], trained.model_state["2.weight"])


def test_what_does_not_change_the_result_may_change_between_checkpoints() -> None:
    """A field that keys leave out and checkpoints insist on would make a checkpoint useless."""
    from goldcrest.cluster.markers import DoesNotChangeResult
    from goldcrest.cluster.training_loop import _FREE_SETTINGS

    free = {
        name
        for name, field in TrainingConfig.model_fields.items()
        if DoesNotChangeResult in field.metadata
    }
    assert {"max_failures", "max_preemptions", "checkpoint_every"} <= free
    assert free <= _FREE_SETTINGS
