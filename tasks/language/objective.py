"""Objectives of language models for the training engine, over rows of tokens.

`LanguageObjective` minimises the cross-entropy of the family: next token, label sequence or hidden
tokens. `SparseObjective` goes on with masks held, and may distil the dense model that was pruned:

    cross-entropy                                   distillation "none"
    cross-entropy + KL of the logits (Eq. 6.1)      "logits"
    cross-entropy + SquareHead over all blocks      "squarehead"
    cross-entropy + MSE over all blocks             "feature_mse"

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language Models",
arXiv 2310.06927, section 3. Losses are means over tokens: the KL over positions that predict a
label, features over all tokens that are not padding, each stack with the mask of its own tokens.

B batch   T tokens   V vocabulary
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from goldcrest.kernels.language.block_outputs import block_masks, recorded_outputs
from goldcrest.kernels.language.losses import NO_LOSS, cross_entropy, predictions
from goldcrest.kernels.language.padding import token_mask
from goldcrest.tasks.data.tokens import TokenReader
from goldcrest.tasks.language.collator import Collator
from goldcrest.tasks.language.documents import check_reading

Distillation = Literal["none", "logits", "squarehead", "feature_mse"]
_EVALUATION_BATCH = 16  # rows of a forward pass without gradients
_LARGEST_EXPONENT = 700.0  # e^709 is the end of float64: a diverged model has a finite perplexity


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is trained on, and how rows become batches."""

    train: TokenReader
    validation: TokenReader
    collate: Collator

    @property
    def family(self) -> str:
        """Of the model that reads it."""
        return self.collate.family


_INPUTS = ("input_ids", "input_features", "attention_mask", "position_ids", "decoder_input_ids")


def model_inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """A batch as the model's keyword arguments, without labels: the loss is ours.

    Features, and a mask of numbers, take the precision of the model's weights.
    """
    parameters = inspect.signature(model.forward).parameters
    dtype = next(model.parameters()).dtype
    inputs: dict[str, Any] = {}
    for name in _INPUTS:
        if name in batch and name in parameters:
            value = batch[name]
            inputs[name] = value.to(dtype) if value.is_floating_point() else value
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


def feature_masks(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Any]:
    """The real tokens (B, T) of each block's output: an encoder's, a decoder's, or the only.

    None: all are. An encoder of speech reads windows of one length, silence and all.
    """
    tokens = token_mask(batch)
    encoder_decoder = model.config.is_encoder_decoder  # type: ignore[union-attr]
    return block_masks(model, tokens, batch["labels"] != NO_LOSS if encoder_decoder else tokens)


class LanguageObjective:
    """Cross-entropy over rows of tokens."""

    def __init__(
        self,
        text: Text,
        *,
        start: Callable[[], Any],
        activation_checkpointing: bool = False,
        evaluation_rows: int = 256,
    ) -> None:
        """`start` makes the model that training starts from (it travels to the workers);
        `activation_checkpointing` computes blocks again in the backward pass; `evaluation_rows` of
        each split are looked at after an epoch.
        """
        self.text, self.start = text, start
        self.activation_checkpointing = activation_checkpointing
        self.evaluation_rows = evaluation_rows

    def build_model(self) -> nn.Module:
        """The model that training starts from, all trainable but what the library keeps fixed.

        InputError for a model that does not read the rows as it should (documents.py).
        """
        from goldcrest.kernels.language.architectures import library_frozen
        from goldcrest.tasks.language.models import checkpoint_activations

        model = self.start().train().requires_grad_(True)
        check_reading(model, self.text.collate, self.text.train, self.text.validation)
        for name in library_frozen(model.config, self.text.family):
            model.get_parameter(name).requires_grad_(False)
        if self.activation_checkpointing:
            checkpoint_activations(model)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Matrices, and apart from them gains and biases, which do not decay."""
        parameters = list(model.parameters())
        return [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def __len__(self) -> int:
        return len(self.text.train)

    def sizes(self) -> np.ndarray:
        """Tokens of each row (N,): `batch_units` counts tokens."""
        return self.text.train.lengths

    def weights(self) -> np.ndarray:
        """Tokens of each row (N,) that a loss is about; for a masked model, tokens."""
        train = self.text.train
        return np.maximum(train.lengths if self.text.family == "masked" else train.predicted, 1)

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """The rows as a batch, with `tokens` (B,): how many each holds."""
        made = self.text.collate([self.text.train[int(index)] for index in indices], rng)
        return {**made, "tokens": torch.from_numpy(self.text.train.lengths[indices])}

    def losses(
        self, model: nn.Module, batch: dict[str, Tensor], *, epoch: int
    ) -> dict[str, Tensor]:
        """The cross-entropy in nats per token."""
        logits, targets = self._predict(model, batch)
        return {"cross_entropy": cross_entropy(logits, targets)}

    def _predict(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and the targets (B, T) that they predict."""
        logits = model(**model_inputs(model, batch)).logits
        return predictions(logits, batch["labels"], shifted=self.text.family == "causal")

    def masks(self, model: nn.Module) -> Mapping[str, Tensor]:
        """No weight is held at zero."""
        return {}

    def after_step(self, model: nn.Module, whole: Any) -> None:
        """Nothing follows a step."""

    def evaluate(self, model: nn.Module, *, epoch: int) -> dict[str, float]:
        """Loss, perplexity and entropy of the predictions on a fixed sample of both splits.

        The entropy is the study's diagnostic (its figure 6.3): a sparse model that is fine-tuned
        without a teacher grows over-confident, and its entropy collapses.
        """
        found: dict[str, float] = {}
        for name, reader in (("train", self.text.train), ("validation", self.text.validation)):
            if len(reader):
                loss, entropy = self._measure(model, reader)
                found[f"{name}_entropy"] = entropy
                if name == "validation":
                    found["validation_loss"] = loss
                    found["validation_perplexity"] = math.exp(min(loss, _LARGEST_EXPONENT))
        return found

    def _measure(self, model: nn.Module, reader: TokenReader) -> tuple[float, float]:
        """Mean cross-entropy and entropy per token, in nats."""
        from goldcrest.kernels.distillation.logit_kd import entropy

        sums, tokens = np.zeros(2), 0
        device = next(model.parameters()).device
        for batch in self._evaluation_batches(reader):
            moved = {name: value.to(device) for name, value in batch.items()}
            logits, targets = self._predict(model, moved)
            valid = targets != NO_LOSS
            count = int(valid.sum())
            losses = [cross_entropy(logits, targets), entropy(logits, valid)]
            sums += count * np.array([float(each) for each in losses])
            tokens += count
        loss, spread = sums / max(tokens, 1)
        return float(loss), float(spread)

    def _evaluation_batches(self, reader: TokenReader) -> Iterator[dict[str, Tensor]]:
        """A fixed sample of a split; rows of like length together, for less padding."""
        rng = np.random.default_rng(0)
        sample = rng.permutation(len(reader))[: self.evaluation_rows]
        order = sample[np.argsort(reader.lengths[sample], kind="stable")]
        for start in range(0, len(order), _EVALUATION_BATCH):
            rows = [reader[int(index)] for index in order[start : start + _EVALUATION_BATCH]]
            yield self.text.collate(rows, rng)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing besides model and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


class SparseObjective(LanguageObjective):
    """Fine-tuning of a pruned model: masks held in every step, a dense teacher beside it."""

    def __init__(
        self,
        text: Text,
        *,
        teacher: Path | None,
        masks: Path,
        distillation: Distillation,
        distillation_settings: Any,
        task_weight: float = 1.0,
        **settings: Any,
    ) -> None:
        """`teacher` is the folder of the dense bundle, `masks` a file of `write_masks`: neither
        travels to the workers. `task_weight` is the factor of the cross-entropy.
        """
        super().__init__(text, **settings)
        self.teacher, self.masks_file = teacher, masks
        self.distillation, self.distillation_settings = distillation, distillation_settings
        self.task_weight = task_weight
        self._teacher: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_teacher": None}

    def losses(
        self, model: nn.Module, batch: dict[str, Tensor], *, epoch: int
    ) -> dict[str, Tensor]:
        """Task loss and, unless distillation is "none", the distance to the teacher.

        The distance of features is a ratio within the rows that are given: of a batch that is cut
        into micro-batches it is the mean over these, by their tokens with a loss.
        """
        from goldcrest.kernels.distillation import feature_mse, logit_kd, squarehead

        features = self.distillation in ("squarehead", "feature_mse")
        watch: AbstractContextManager[list[Tensor]] = nullcontext([])
        if features:
            watch = recorded_outputs(model)
        with watch as outputs:
            logits, targets = self._predict(model, batch)
        found = {"cross_entropy": self.task_weight * cross_entropy(logits, targets)}
        if self.distillation == "none":
            return found
        teacher = self._frozen_teacher(model)
        with torch.no_grad(), recorded_outputs(teacher) as wanted:
            wanted_logits, _ = self._predict(teacher, batch)
        if not features:
            valid = targets != NO_LOSS
            distance = logit_kd.loss(wanted_logits, logits, valid, self.distillation_settings)
        else:
            method = squarehead if self.distillation == "squarehead" else feature_mse
            masks = feature_masks(model, batch)
            distance = method.loss(wanted, outputs, masks, self.distillation_settings)
        return {**found, self.distillation: distance}

    def _frozen_teacher(self, model: nn.Module) -> Any:
        """The dense model in eval mode, in the student's precision, on its device.

        Its buffers stay as they are, as the student's do: rotary frequencies in bfloat16 are off by
        whole radians at far positions.
        """
        if self._teacher is None:
            from goldcrest.tasks.language.bundle import load_model

            assert self.teacher is not None
            like = next(model.parameters())
            teacher: nn.Module = load_model(self.teacher)
            for parameter in teacher.parameters():  # before it moves: a GPU may hold it just so
                parameter.data = parameter.data.to(like.dtype)
            self._teacher = teacher.to(like.device)
        return self._teacher

    def masks(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The pruned weights stay zero; momentum and weight decay would bring them back."""
        found = read_masks(self.masks_file)
        return {f"{name}.weight": mask for name, mask in found.items()}


def write_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Masks of layers by name, one bit a weight, as safetensors."""
    from safetensors.torch import save_file

    from goldcrest.kernels.sparsity.packing import pack_bits

    tensors = {f"{name}.bits": pack_bits(mask) for name, mask in masks.items()}
    shapes = {f"{name}.shape": torch.tensor(mask.shape) for name, mask in masks.items()}
    save_file(tensors | shapes, path)


def read_masks(path: Path) -> dict[str, Tensor]:
    """What `write_masks` wrote."""
    from safetensors.torch import load_file

    from goldcrest.kernels.sparsity.packing import unpack_bits

    held = load_file(path)
    names = [name.removesuffix(".bits") for name in held if name.endswith(".bits")]
    return {
        name: unpack_bits(held[f"{name}.bits"], held[f"{name}.shape"].tolist()) for name in names
    }
