"""Objectives of the speaker network for the training engine.

`SpeakerObjective` trains an ECAPA-TDNN with a margin loss on (pseudo-)labels; `SparseObjective`
goes on with masks held, optionally distilling a dense teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from goldcrest.kernels.frontend.crop import random_crop
from goldcrest.kernels.frontend.specaugment import spec_augment
from goldcrest.kernels.speaker.ecapa_tdnn import EcapaTdnn
from goldcrest.tasks.data.frames import FrameReader, JoinedFrames

Distillation = Literal["none", "squarehead", "logits", "feature_mse"]


class SpeakerClassifier(nn.Module):
    """A speaker network with the classification head that trains it."""

    def __init__(self, network: EcapaTdnn, head: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.head = head


@dataclass(frozen=True)
class Examples:
    """Which rows of a frame file train which class: rows (N, copies) int, labels (N,) int64.

    Column 0 of `rows` is the clean copy, the others are augmented copies of the same utterance.
    Every utterance is there `speeds` times, each time with a class of its own.
    """

    reader: FrameReader | JoinedFrames
    rows: np.ndarray
    labels: np.ndarray
    speeds: int = 1

    @classmethod
    def of(cls, reader: FrameReader, ids: list[str], labels: np.ndarray) -> Examples:
        """The examples of utterances `ids`, with every copy that all of them have."""
        places = [reader.rows(int(copy)) for copy in np.unique(reader.copies)]
        complete = [rows for rows in places if all(name in rows for name in ids)]
        return cls(reader, np.array([[rows[n] for rows in complete] for n in ids]), labels)

    def with_speeds(self, speeds: FrameReader) -> Examples:
        """Also the same utterances at other speeds, every class a new one at every speed."""
        assert isinstance(self.reader, FrameReader)
        joined = JoinedFrames([self.reader, speeds])
        utterances = [self.reader.ids[int(row)] for row in self.rows[:, 0]]
        rows, labels = [self.rows], [self.labels]
        for number in np.unique(speeds.copies):
            at = speeds.rows(int(number))
            found = np.array([at[name] for name in utterances]) + len(self.reader)
            rows.append(np.repeat(found[:, None], self.rows.shape[1], axis=1))
            labels.append(self.labels + int(number) * self.classes)
        return Examples(joined, np.concatenate(rows), np.concatenate(labels), speeds=len(rows))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1


class SpeakerObjective:
    """Cross-entropy with a margin over crops of filterbank frames."""

    def __init__(
        self,
        examples: Examples,
        *,
        network: Any,
        margin: str,
        margin_settings: Any,
        margin_warmup: int,
        crop_frames: tuple[int, int],
        augment: Any,
        weight_decay_head: float,
        balance: float,
    ) -> None:
        """`network` EcapaSettings; `margin` a file of kernels/margin, whose margin grows over
        `margin_warmup` epochs; `crop_frames` the range of a batch's crop length; `augment`
        SpecAugment's settings; `balance` in [0, 1] draws classes between as they come and evenly.
        """
        self.examples, self.network, self.margin = examples, network, margin
        self.margin_settings, self.crop_frames, self.augment = margin_settings, crop_frames, augment
        self.margin_warmup = margin_warmup
        self.weight_decay_head, self.balance = weight_decay_head, balance
        counts = np.bincount(examples.labels).astype(np.float64)
        share = (counts[examples.labels]) ** -balance
        self._share = share / share.sum()

    def build_model(self) -> nn.Module:
        """The untrained network and head."""
        from goldcrest.kernels import margin

        method = margin.load(self.margin)
        head = method.Head(self.network.embedding_dim, self.examples.classes, self.margin_settings)
        return SpeakerClassifier(EcapaTdnn(self.network), head)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Network and head apart: the head has a weight decay of its own (Tao's recipe)."""
        assert isinstance(model, SpeakerClassifier)
        return [
            {"params": list(model.network.parameters())},
            {"params": list(model.head.parameters()), "weight_decay": self.weight_decay_head},
        ]

    def __len__(self) -> int:
        return len(self.examples.labels)

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """Random crops (B, F, L) of random copies, with labels (B,)."""
        if self.balance > 0:
            indices = rng.choice(len(self), size=len(indices), p=self._share)
        reader, rows = self.examples.reader, self.examples.rows
        length = int(rng.integers(self.crop_frames[0], self.crop_frames[1] + 1))
        crops = []
        for index in indices:
            row = rows[index, int(rng.integers(rows.shape[1]))]
            crops.append(random_crop(torch.from_numpy(reader[int(row)]), length, rng))
        frames = torch.stack(crops)
        if self.augment is not None:
            frames = spec_augment(frames, None, self.augment, rng)
        labels = torch.from_numpy(self.examples.labels[indices].astype(np.int64))
        seconds = torch.tensor(frames.shape[0] * frames.shape[1] / 100.0)
        return {"features": frames.mT.contiguous(), "labels": labels, "seconds": seconds}

    def losses(
        self, model: nn.Module, batch: dict[str, Tensor], *, epoch: int
    ) -> dict[str, Tensor]:
        """The margin loss."""
        assert isinstance(model, SpeakerClassifier)
        self._grow_margin(model.head, epoch)
        return {"margin": model.head(model.network(batch["features"]), batch["labels"])}

    def _grow_margin(self, head: Any, epoch: int) -> None:
        """A margin from the first step on stalls a network whose classes still overlap."""
        if self.margin_warmup and hasattr(self.margin_settings, "margin"):
            share = min(1.0, epoch / self.margin_warmup)
            margin = share * self.margin_settings.margin
            head.settings = dataclasses.replace(self.margin_settings, margin=margin)

    def masks(self, model: nn.Module) -> Mapping[str, Tensor]:
        """No weight is held at zero."""
        return {}

    def after_step(self, model: nn.Module, whole: Any) -> None:
        """Nothing follows a step."""

    def evaluate(self, model: nn.Module, *, epoch: int) -> dict[str, float]:
        """Share of a fixed sample of training utterances whose class is the highest."""
        assert isinstance(model, SpeakerClassifier)
        sample = np.random.default_rng(0).permutation(len(self))[:256]
        found = [self.examples.reader[int(row)] for row in self.examples.rows[sample, 0]]
        order = np.argsort([len(frames) for frames in found])  # alike lengths pad little
        device = next(model.parameters()).device
        right = 0
        for places in np.array_split(order, -(-len(order) // 16)):
            features = [torch.from_numpy(found[place]) for place in places]
            lengths = torch.tensor([len(each) for each in features])
            padded = nn.utils.rnn.pad_sequence(features, batch_first=True).mT
            logits = model.head(model.network(padded.to(device), lengths.to(device)))
            labels = torch.from_numpy(self.examples.labels[sample[places]])
            right += int((logits.argmax(dim=1).cpu() == labels).sum())
        return {"train_accuracy": right / len(sample)}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing besides model and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


class SparseObjective(SpeakerObjective):
    """Fine-tuning of a pruned network: masks held in every step, features of a dense teacher.

    Source: Kurtic et al. 2023 (spec "sparse fine-tuning", section 3.3): task loss, plus SquareHead
    over the outputs of the SE-Res2 blocks, or logit distillation, or neither.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        initial: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        distillation: Distillation,
        distillation_settings: Any,
        **settings: Any,
    ) -> None:
        """`initial`, `teacher`: states of SpeakerClassifier; `masks`: of its network's layers."""
        super().__init__(examples, **settings)
        self.initial, self.teacher_state = dict(initial), dict(teacher)
        self.layer_masks = dict(masks)
        self.distillation, self.distillation_settings = distillation, distillation_settings
        self._teacher: SpeakerClassifier | None = None

    def build_model(self) -> nn.Module:
        """The pruned network; its dense teacher stays outside the trained module."""
        model = super().build_model()
        model.load_state_dict(self.initial)
        return model

    def _frozen_teacher(self, device: torch.device) -> SpeakerClassifier:
        """The dense network in float32, whatever the student computes in."""
        if self._teacher is None:
            teacher = super().build_model()
            teacher.load_state_dict(self.teacher_state)
            assert isinstance(teacher, SpeakerClassifier)
            self._teacher = teacher.eval().requires_grad_(False).to(device)
        return self._teacher

    def losses(
        self, model: nn.Module, batch: dict[str, Tensor], *, epoch: int
    ) -> dict[str, Tensor]:
        """Task loss and, unless distillation is "none", the distance to the teacher."""
        from goldcrest.kernels.distillation import feature_mse, logit_kd, squarehead

        assert isinstance(model, SpeakerClassifier)
        self._grow_margin(model.head, epoch)
        embeddings, blocks = model.network.blocks(batch["features"])
        found = {"margin": model.head(embeddings, batch["labels"])}
        if self.distillation == "none":
            return found
        with torch.no_grad():
            teacher = self._frozen_teacher(batch["features"].device)
            wanted_embeddings, wanted = teacher.network.blocks(batch["features"])
        if self.distillation == "logits":
            found["logits"] = logit_kd.loss(
                teacher.head(wanted_embeddings),
                model.head(embeddings),
                None,
                self.distillation_settings,
            )
            return found
        method = squarehead if self.distillation == "squarehead" else feature_mse
        # Blocks are (B, C, T); the losses take (B, T, D). The embedding counts as one more block.
        pairs = [
            [block.mT for block in (*outputs, vectors[..., None])]
            for outputs, vectors in ((wanted, wanted_embeddings), (blocks, embeddings))
        ]
        found[self.distillation] = method.loss(pairs[0], pairs[1], None, self.distillation_settings)
        return found

    def masks(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The pruned weights stay zero; momentum and weight decay would bring them back."""
        return {f"network.{name}.weight": mask for name, mask in self.layer_masks.items()}
