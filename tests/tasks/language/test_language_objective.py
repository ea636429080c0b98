"""The losses of language models by themselves: which tokens count, and what a teacher changes."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.cluster.api import Objective, TrainingConfig, UnevenObjective
from goldcrest.cluster.training import train_local
from goldcrest.kernels.distillation import feature_mse, logit_kd, squarehead
from goldcrest.kernels.language.losses import cross_entropy, decoder_inputs, predictions
from goldcrest.tasks.data.tokens import TokenReader
from goldcrest.tasks.language.collator import Collator
from goldcrest.tasks.language.objective import (
    LanguageObjective,
    SparseObjective,
    Text,
    read_masks,
    write_masks,
)
from tests.kernels.language import tiny_models
from tests.tasks.language import language_toys as toys
from tests.tasks.language.test_language_bundle import written

MODELS = {"causal": "llama", "seq2seq": "t5", "masked": "bert"}
KINDS = {"logits": logit_kd, "squarehead": squarehead, "feature_mse": feature_mse}


def fresh(architecture: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return tiny_models.MODELS[architecture]().eval()


def text(folder: Path, family: str, *, packed: bool = False) -> Text:
    toys.tokens_artifact(folder, family=family, rows=20, packed=packed)
    train, validation = (TokenReader(folder / f"{s}.arrow") for s in ("train", "validation"))
    collate = Collator(family=family, pad=0, mask=3, special=(0, 1, 2, 3))
    return Text(train=train, validation=validation, collate=collate)


def sparse(folder: Path, family: str, kind: str, **changes: Any) -> SparseObjective:
    """An objective whose student (seed 1) is taught by another model (seed 0)."""
    teacher = written(folder / "teacher", fresh(MODELS[family], 0))
    masks = folder / "masks.safetensors"
    write_masks(masks, {})
    return SparseObjective(
        text(folder / "tokens", family),
        start=functools.partial(fresh, MODELS[family], 1),
        teacher=teacher,
        masks=masks,
        distillation=kind,  # type: ignore[arg-type]
        distillation_settings=KINDS[kind].Settings() if kind in KINDS else None,
        **changes,
    )


def widened(batch: dict[str, Any], columns: int) -> dict[str, Any]:
    """The same rows with more padding, on the encoder's and on the labels' side."""
    fill = {"input_ids": 7, "attention_mask": 0, "decoder_input_ids": 7, "labels": -100}
    return {
        name: torch.cat([value, value.new_full((len(value), columns), fill[name])], 1)
        if name in fill
        else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("family", sorted(MODELS))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_padding_changes_no_loss(family: str, kind: str, tmp_path: Path) -> None:
    objective = sparse(tmp_path, family, kind)
    student = objective.build_model().eval()
    batch = objective.batch(np.arange(6), np.random.default_rng(0))
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        found = objective.losses(student, batch, epoch=0)
        padded = objective.losses(student, widened(batch, 5), epoch=0)
    assert set(found) == {"cross_entropy", kind}
    for name, value in found.items():
        assert float(value) > 0
        assert float(padded[name]) == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize("family", sorted(MODELS))
def test_the_cross_entropy_is_the_librarys(family: str, tmp_path: Path) -> None:
    model = fresh(MODELS[family], 0)
    rows = text(tmp_path / "tokens", family)
    objective = LanguageObjective(rows, start=lambda: model)
    batch = objective.batch(np.arange(6), np.random.default_rng(0))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    if batch["attention_mask"].ndim == 4:
        inputs["position_ids"] = batch["position_ids"]
    with torch.no_grad():
        expected = model(**inputs).loss
        found = objective.losses(model, batch, epoch=0)["cross_entropy"]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mpt"])
def test_documents_of_a_packed_row_do_not_see_each_other(architecture: str, tmp_path: Path) -> None:
    """The loss over packed rows is that over their documents, one by one."""
    model = fresh(architecture, 0)
    packed = LanguageObjective(text(tmp_path / "p", "causal", packed=True), start=lambda: model)
    total, tokens = 0.0, 0
    for row in (packed.text.train[index] for index in range(4)):
        for document in np.split(row.answer, row.starts[1:]):
            ids = torch.from_numpy(document.astype(np.int64))[None]
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            total += float(cross_entropy(*predictions(logits, ids, shifted=True))) * (
                len(document) - 1
            )
            tokens += len(document) - 1
    batch = packed.batch(np.arange(4), np.random.default_rng(0))
    assert packed.weights()[:4].sum() == tokens
    with torch.no_grad():
        found = packed.losses(model, batch, epoch=0)["cross_entropy"]
    assert float(found) == pytest.approx(total / tokens, rel=1e-5)


def test_the_divergence_is_taken_where_a_label_is_predicted(tmp_path: Path) -> None:
    """Eq. 6.1 by a loop; the study's code took positions whose own label is valid instead."""
    objective = sparse(tmp_path, "causal", "logits")
    student, teacher = objective.build_model().eval(), fresh("llama", 0)
    batch = objective.batch(np.arange(5), np.random.default_rng(0))
    with torch.no_grad():
        found = objective.losses(student, batch, epoch=0)["logits"]
        p, q = (
            torch.log_softmax(
                m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, -1
            )
            for m in (teacher, student)
        )
    terms = [
        float((p[b, t].exp() * (p[b, t] - q[b, t])).sum())
        for b, row in enumerate(batch["labels"])
        for t in range(len(row) - 1)
        if row[t + 1] != -100
    ]
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-4)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_a_student_that_equals_its_teacher_has_no_distance(
    kind: str, family: str, tmp_path: Path
) -> None:
    objective = sparse(tmp_path, family, kind)
    batch = objective.batch(np.arange(5), np.random.default_rng(0))
    twin = fresh(MODELS[family], 0)
    with torch.no_grad():
        assert float(objective.losses(twin, batch, epoch=0)[kind]) == pytest.approx(0, abs=1e-6)


def test_squarehead_of_a_silent_student_is_one_per_block(tmp_path: Path) -> None:
    """All blocks of encoder and decoder count: 3 + 3 of this T5."""
    objective = sparse(tmp_path, "seq2seq", "squarehead")
    silent = fresh("t5", 1)
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()
        batch = objective.batch(np.arange(5), np.random.default_rng(0))
        found = objective.losses(silent, batch, epoch=0)["squarehead"]
    assert float(found) == pytest.approx(6.0, rel=1e-4)


def test_the_teacher_stays_outside_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    objective = sparse(tmp_path, "causal", "squarehead")
    student = objective.build_model()
    batch = objective.batch(np.arange(5), np.random.default_rng(0))
    sum(objective.losses(student, batch, epoch=0).values()).backward()  # type: ignore[union-attr]
    teacher = objective._teacher
    assert student.training and not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    inside = {id(parameter) for parameter in student.parameters()}
    assert inside.isdisjoint(id(parameter) for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    again = pickle.loads(pickle.dumps(objective))  # as it travels to the workers
    assert again._teacher is None and objective._teacher is teacher


def test_the_teacher_has_the_student_s_precision_but_in_its_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine casts a student's parameters only; rotary frequencies stay float32 in both. What
    moves to the student's device is cast already."""
    objective = sparse(tmp_path, "causal", "squarehead")
    student = objective.build_model()
    for parameter in student.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    batch = objective.batch(np.arange(5), np.random.default_rng(0))
    moved: set[torch.dtype] = set()
    move = torch.nn.Module.to

    def to(self: torch.nn.Module, *given: Any, **named: Any) -> torch.nn.Module:
        moved.update(parameter.dtype for parameter in self.parameters())
        return move(self, *given, **named)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    objective.losses(student, batch, epoch=0)
    assert moved == {torch.bfloat16}  # a GPU may not hold it in float32
    teacher = objective._teacher
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    mine, its = dict(student.named_buffers()), dict(teacher.named_buffers())
    assert mine.keys() == its.keys() and any("inv_freq" in name for name in mine)
    for name, value in mine.items():
        assert its[name].dtype == value.dtype and torch.equal(its[name], value)


@pytest.mark.parametrize("family", sorted(MODELS))
def test_checkpointed_activations_give_the_same_gradients(family: str, tmp_path: Path) -> None:
    """Also through the features that SquareHead takes inside the checkpointed blocks."""
    gradients = []
    for checkpointing in (False, True):
        objective = sparse(
            tmp_path / str(checkpointing),
            family,
            "squarehead",
            activation_checkpointing=checkpointing,
        )
        student = objective.build_model()
        assert bool(getattr(student, "is_activation_checkpointing", False)) == checkpointing
        batch = objective.batch(np.arange(5), np.random.default_rng(0))
        torch.manual_seed(0)  # dropout
        sum(objective.losses(student, batch, epoch=0).values()).backward()  # type: ignore[union-attr]
        gradients.append({n: p.grad for n, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_masks_and_their_file(tmp_path: Path) -> None:
    objective = sparse(tmp_path, "causal", "none")
    student = objective.build_model()
    name = "model.layers.1.mlp.up_proj"
    mask = torch.rand(student.get_submodule(name).weight.shape) > 0.7
    write_masks(objective.masks_file, {name: mask})
    assert torch.equal(read_masks(objective.masks_file)[name], mask)
    found = objective.masks(student)
    assert list(found) == [f"{name}.weight"] and torch.equal(found[f"{name}.weight"], mask)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(2, 6),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_means_are_over_valid_targets(rows: int, columns: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, 5, generator=generator)
    labels = torch.randint(0, 5, (rows, columns), generator=generator)
    labels[torch.rand(rows, columns, generator=generator) < share] = -100
    shifted, targets = predictions(logits, labels, shifted=True)
    terms = [
        -float(torch.log_softmax(logits[b, t], -1)[labels[b, t + 1]])
        for b in range(rows)
        for t in range(columns - 1)
        if labels[b, t + 1] != -100
    ]
    expected = float(np.mean(terms)) if terms else 0.0
    assert float(cross_entropy(shifted, targets)) == pytest.approx(expected, rel=1e-5)


def test_a_decoder_is_fed_the_labels_moved_right() -> None:
    labels = torch.tensor([[5, 6, 2], [7, 2, -100], [2, -100, -100]])
    expected = fresh("t5", 0)._shift_right(labels)
    assert torch.equal(decoder_inputs(labels, start=0, pad=0), expected)


def test_evaluation_tells_loss_perplexity_and_entropy(tmp_path: Path) -> None:
    """A model that knows nothing: every word alike, entropy and loss ln 64, perplexity 64."""
    model = fresh("llama", 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    objective = LanguageObjective(text(tmp_path / "tokens", "causal"), start=lambda: model)
    assert isinstance(objective, Objective) and isinstance(objective, UnevenObjective)
    with torch.no_grad():
        found = objective.evaluate(model, epoch=0)
    assert set(found) == {
        "train_entropy", "validation_entropy", "validation_loss", "validation_perplexity"
    }  # fmt: skip
    assert found["validation_perplexity"] == pytest.approx(64, rel=1e-5)
    assert found["train_entropy"] == pytest.approx(np.log(64), rel=1e-5)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 1e6)
        assert np.isfinite(list(objective.evaluate(model, epoch=0).values())).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("precision", "stage", "offload"), [("fp32", 0, False), ("bf16", 3, False), ("bf16", 3, True)]
)
def test_a_student_trains_on_a_gpu(
    precision: str, stage: int, offload: bool, tmp_path: Path
) -> None:
    """Masks, teacher and batches follow the model to its device."""
    objective = sparse(tmp_path, "causal", "squarehead")
    mask = torch.rand(48, 32) > 0.7
    name = "model.layers.1.mlp.up_proj"
    write_masks(objective.masks_file, {name: mask})
    config = TrainingConfig(
        epochs=2,
        batch_size=10,
        gpus_per_worker=1,
        precision=precision,  # type: ignore[arg-type]
        zero_stage=stage,  # type: ignore[arg-type]
        offload_parameters=offload,
        offload_optimizer=offload,
    )
    trained = train_local(objective, config, scratch=tmp_path / "scratch", seed=0)
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    assert bool((trained.model_state[f"{name}.weight"][~mask] == 0).all())
