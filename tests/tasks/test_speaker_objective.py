"""The speaker network's objectives on the real engine: every precision and ZeRO stage, and GPUs.

The engine's own tests train toys. What they cannot show is that this network follows: batch norms
in half precision, a classifier that ZeRO 3 really cuts up (DeepSpeed leaves parameters of fewer
than 100,000 values whole), a teacher beside the engine, frames that start on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from goldcrest.cluster.api import StepError, TrainingConfig
from goldcrest.cluster.training import train_local
from goldcrest.cluster.training_sampling import chunks_of, epoch_batches
from goldcrest.kernels.distillation import feature_mse, logit_kd, squarehead
from goldcrest.kernels.margin import aam
from goldcrest.kernels.speaker.ecapa_tdnn import EcapaSettings
from goldcrest.tasks.data.frames import FrameReader, FrameWriter
from goldcrest.tasks.speaker.cluster import ClusterConfig
from goldcrest.tasks.speaker.objective import Examples, SparseObjective, SpeakerObjective
from goldcrest.tasks.speaker.pretrain import PretrainConfig
from goldcrest.tasks.speaker.sparse_finetune import SparseConfig
from goldcrest.tasks.speaker.training import fitting

CLASSES, FEATURES = 800, 6
NETWORK = EcapaSettings(
    input_dim=FEATURES, channels=8, mfa_channels=12, attention_channels=4, se_channels=4,
    embedding_dim=128, scale=4,
)  # fmt: skip
SHARED: dict[str, Any] = {
    "network": NETWORK,
    "margin": "aam",
    "margin_settings": aam.Settings(scale=10.0, margin=0.1),
    "margin_warmup": 0,
    "crop_frames": (12, 12),
    "augment": None,
    "weight_decay_head": 0.0,
    "balance": 0.0,
}
STAGES = [(3, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    """One utterance of noise around a class's mean, for each of many classes."""
    path = tmp_path_factory.mktemp("objective") / "fbank.arrow"
    rng = np.random.default_rng(0)
    with FrameWriter(path, FEATURES, "float16") as writer:
        names = [str(n) for n in range(CLASSES)]
        rows = [rng.normal(rng.normal(size=FEATURES), 0.3, (16, FEATURES)) for _ in names]
        writer.write(names, [0] * CLASSES, [row.astype("<f2").tobytes() for row in rows])
    return Examples.of(FrameReader(path), names, np.arange(CLASSES))


def train(objective: SpeakerObjective, scratch: Path, **changes: Any) -> Any:
    config = TrainingConfig(epochs=1, batch_size=200, learning_rate=5e-3, **changes)
    return train_local(objective, config, scratch=scratch, seed=1)


@pytest.fixture(scope="module")
def dense(examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The training that the others are compared with: stage 0 in float32."""
    return train(SpeakerObjective(examples, **SHARED), tmp_path_factory.mktemp("dense"))


def sparse_objective(examples: Examples, dense: Any, distillation: str) -> SparseObjective:
    """A network with every other weight of one convolution taken away."""
    name = "layers.0.enter.conv"
    weight = dense.model_state[f"network.{name}.weight"]
    mask = (torch.arange(weight.numel()) % 2 == 0).reshape(weight.shape)
    initial = {**dense.model_state, f"network.{name}.weight": weight * mask}
    settings = {"squarehead": squarehead, "logits": logit_kd, "feature_mse": feature_mse}
    kind = settings.get(distillation)
    return SparseObjective(
        examples,
        initial=initial,
        teacher=dense.model_state,
        masks={name: mask},
        distillation=distillation,  # type: ignore[arg-type]
        distillation_settings=None if kind is None else kind.Settings(),
        **SHARED,
    )


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_the_network_trains_in_every_stage_and_precision(
    examples: Examples, dense: Any, tmp_path: Path, stage: int, precision: str
) -> None:
    trained = train(
        SpeakerObjective(examples, **SHARED), tmp_path, zero_stage=stage, precision=precision
    )
    tolerance = 1e-4 if precision == "fp32" else 0.03
    for row, reference in zip(trained.history, dense.history, strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=tolerance)
        assert 0 <= row["train_accuracy"] <= 1
    for name, value in trained.model_state.items():
        assert value.dtype == dense.model_state[name].dtype, name
        if name.endswith("running_mean"):
            assert float((value - dense.model_state[name]).abs().max()) < 0.1, name
            assert float(value.abs().max()) > 0, name


@pytest.mark.parametrize(
    ("stage", "precision", "distillation"),
    [
        *((0, "fp32", kind) for kind in ("none", "squarehead", "logits", "feature_mse")),
        *((3, "bf16", kind) for kind in ("squarehead", "logits")),
    ],
)
def test_a_pruned_network_is_taught_in_every_stage_and_precision(
    examples: Examples, dense: Any, tmp_path: Path, stage: int, precision: str, distillation: str
) -> None:
    objective = sparse_objective(examples, dense, distillation)
    trained = train(objective, tmp_path, zero_stage=stage, precision=precision)
    assert all(np.isfinite(row["loss"]) for row in trained.history)
    if distillation != "none":
        assert trained.history[0][distillation] > 0
    for name, mask in objective.layer_masks.items():
        assert bool((trained.model_state[f"network.{name}.weight"][~mask] == 0).all())


@pytest.mark.parametrize(
    ("changes", "examples", "smallest"),
    [
        ({"batch_size": 8}, 20, 8),
        ({"batch_size": 8, "micro_batch_size": 3}, 20, 2),  # 3 + 3 + 2
        ({"batch_size": 8, "workers": 4}, 20, 2),
        ({"batch_size": 8, "drop_last": False}, 18, 2),
        ({"batch_size": 64}, 5, 5),  # lowered to what there is
    ],
)
def test_no_forward_pass_sees_one_example(
    changes: dict[str, Any], examples: int, smallest: int
) -> None:
    fitted = fitting(TrainingConfig(**changes), examples)
    sizes = [
        len(chunk.indices)
        for batch in epoch_batches(fitted, examples, seed=0, epoch=0)
        for rank in range(fitted.workers)
        for chunk in chunks_of(batch, fitted, rank=rank, world=fitted.workers)
    ]
    assert min(sizes) == smallest


def test_one_example_alone_is_refused_in_words() -> None:
    """Batch normalisation of one vector has no variance (spec "speaker embedding", pitfalls)."""
    with pytest.raises(StepError, match="see one alone"):
        fitting(TrainingConfig(batch_size=8, drop_last=False), 17)
    for changes in ({"batch_size": 1}, {"micro_batch_size": 1}, {"batch_size": 4, "workers": 4}):
        for config in (PretrainConfig, SparseConfig, ClusterConfig):
            with pytest.raises(ValueError, match="leave one example to a forward pass"):
                config(training=changes)


def test_frames_follow_the_model_to_its_device(examples: Examples) -> None:
    """Without a GPU: the device "meta" takes no tensor of another one either."""
    objective = SpeakerObjective(examples, **SHARED)
    model = objective.build_model().eval().to("meta")
    with pytest.raises(RuntimeError, match="meta"):  # a value is asked of it, not a device refused
        objective.evaluate(model, epoch=0)
    batch = objective.batch(np.arange(4), np.random.default_rng(0))
    taught = SparseObjective(
        examples,
        initial={},
        teacher=objective.build_model().state_dict(),
        masks={},
        distillation="squarehead",
        distillation_settings=squarehead.Settings(),
        **SHARED,
    )
    moved = {name: value.to("meta") for name, value in batch.items()}
    losses = taught.losses(model, moved, epoch=0)
    assert {value.device.type for value in losses.values()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (3, "bf16")])
def test_both_objectives_train_on_a_gpu(
    examples: Examples, dense: Any, tmp_path: Path, stage: int, precision: str
) -> None:
    changes = {"zero_stage": stage, "precision": precision, "gpus_per_worker": 1}
    for number, objective in enumerate(
        (
            SpeakerObjective(examples, **SHARED),
            sparse_objective(examples, dense, "squarehead"),
            sparse_objective(examples, dense, "logits"),
        )
    ):
        trained = train(objective, tmp_path / str(number), **changes)
        assert all(np.isfinite(row["loss"]) for row in trained.history)
        if number == 0:
            assert trained.history[0]["loss"] == pytest.approx(dense.history[0]["loss"], rel=0.05)
