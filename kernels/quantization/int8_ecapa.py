"""ECAPA-TDNN on integers: every convolution and the last layer multiply uint8 by int8.

Source of the network: `goldcrest.kernels.speaker.ecapa_tdnn`; of the arithmetic: `integer_conv`.
`quantize_ecapa` makes the tensors that this file runs.

How BatchNorm, which follows ReLU here, disappears. y = a ReLU(z) + c is kept as codes of
r = |a| ReLU(z) / step (a factor per output channel, free in the kernel), and what reads it knows
the sign of a and c:

* a 1x1 convolution takes them into its weights and bias, exactly;
* a Res2 convolution pads with y = 0, so its input must be y: codes of u_k + y_(k-1) are the codes
  of the two r's, which share their step, plus a constant code per channel (c rounded to the grid;
  the remainder is in the bias). Integer additions, no rounding.

The residual stream, squeeze-excitation (a vector per utterance) and the statistics of the pooling
are float32. Matrices that meet one vector per utterance (squeeze, excite, the attention's view of
the utterance's statistics) are stored as int8 and multiplied in float32: nothing is gained there.

Measured (batch of 1, 1 thread, AVX2 without VNNI, CPU time), float32 against integers, 300 frames:
C = 128: 13.7 and 10.2 ms, C = 256: 23.4 and 13.4 ms, C = 512: 63.9 and 28.4 ms; tensors 3.86 to
3.94 times smaller (`tests/bench/test_int8_bench.py` repeats it). One convolution of 512 to 512
channels: float32 2.0 ms; oneDNN's integer kernel on channels-last uint8 0.88 ms; onnxruntime's
QLinearConv 0.87 ms, the same, for a dependency and a second description of the network to keep;
torch's older quantized conv1d 1.2 ms, on tensor types that torch is about to remove;
`torch._int_mm` 170 ms.

B utterances   F features   T frames   C channels   M aggregated channels   E embedding dimensions
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.quantization.integer_conv import (
    TOP,
    Execution,
    IntegerConv,
    QuantizingConv,
    onednn_available,
)
from goldcrest.kernels.speaker.pooling import VARIANCE_FLOOR

TANH_STEP, TANH_ZERO = 1 / 63, 64
"""Grid of the attention's tanh, whose range is known."""


def layout(config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and, on "meta", shapes and precisions of the tensors that go with a `config()`."""
    inputs, skipped = config["input_dim"], config["skipped"]
    channels, wide, blocks = config["channels"], config["mfa_channels"], len(config["dilations"])
    middle, squeezed = config["attention_channels"], config["se_channels"]
    width = channels // config["scale"]

    def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[str, Tensor]:
        return name, torch.empty(shape, dtype=dtype, device="meta")

    def conv(
        name: str, rows: int, columns: int, taps: int = 1, *, steps: int = 0
    ) -> Iterator[tuple[str, Tensor]]:
        yield put(f"{name}.weight", rows, columns, taps, dtype=torch.int8)
        yield put(f"{name}.scale", rows)
        yield put(f"{name}.bias", rows)
        yield put(f"{name}.zero_point", dtype=torch.int32)
        if steps and name not in skipped:
            yield put(f"{name}.input_step", steps)

    def matrix(name: str, rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
        yield put(f"{name}.weight", rows, columns, dtype=torch.int8)
        yield put(f"{name}.scale", rows)

    def norm(name: str, size: int) -> Iterator[tuple[str, Tensor]]:
        yield put(f"{name}.gain", size)
        yield put(f"{name}.offset", size)

    yield from conv("enter", channels, inputs, 5, steps=1)
    yield from norm("enter", channels)
    for name in (f"layers.{i}" for i in range(blocks)):
        yield from conv(f"{name}.enter", channels, channels, steps=1)
        for k in range(config["scale"] - 1):
            yield from conv(f"{name}.res2.{k}", width, width, 3)
        yield put(f"{name}.constant", channels, dtype=torch.uint8)
        yield put(f"{name}.signs", 2, channels, dtype=torch.int8)
        yield from conv(f"{name}.leave", channels, channels)
        yield from norm(f"{name}.leave", channels)
        yield from matrix(f"{name}.squeeze", squeezed, channels)
        yield put(f"{name}.squeeze.bias", squeezed)
        yield from matrix(f"{name}.excite", channels, squeezed)
        yield put(f"{name}.excite.bias", channels)
    joined = blocks * channels  # each block's slice has a step of its own
    yield from conv("aggregate", wide, joined, steps=1 if blocks == 1 else joined)
    yield from conv("pooling.reduce", middle, wide, steps=1)
    yield from matrix("pooling.context", middle, 2 * wide)
    if config["asp_variant"] == "tao":
        yield from norm("pooling.norm", middle)
    yield from conv("pooling.expand", wide, middle, steps=1)
    yield from norm("pooled", 2 * wide)
    yield from conv("embed", config["embedding_dim"], 2 * wide, steps=1)


class _Tensors:
    """The tensors of a bundle by name, with sentences for what is missing."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[self._prefix + name]
        except KeyError:
            raise ValueError(f"the INT8 tensors lack '{self._prefix}{name}'") from None

    def get(self, name: str) -> Tensor | None:
        return self._tensors.get(self._prefix + name)

    def below(self, name: str) -> _Tensors:
        return _Tensors(self._tensors, f"{self._prefix}{name}.")

    def column(self, name: str) -> Tensor:
        """A vector per channel, shaped to meet (B, C, 1, T)."""
        return self[name].float()[:, None, None]

    def matrix(self, name: str) -> Tensor:
        """A weight kept as int8 for its size only, as float32."""
        return self[f"{name}.weight"].float() * self[f"{name}.scale"].float()[:, None]

    def quantizing_conv(self, name: str, execution: Execution) -> QuantizingConv:
        part = self.below(name)
        return QuantizingConv(
            part["weight"],
            part["scale"],
            part["bias"],
            input_step=part.get("input_step"),
            zero_point=int(part["zero_point"]),
            execution=execution,
        )

    def integer_conv(self, name: str, dilation: int, execution: Execution) -> IntegerConv:
        part = self.below(name)
        return IntegerConv(
            part["weight"],
            part["scale"],
            part["bias"],
            zero_point=int(part["zero_point"]),
            dilation=dilation,
            execution=execution,
        )


class _Block:
    """An SE-Res2Block."""

    def __init__(self, tensors: _Tensors, scale: int, dilation: int, execution: Execution) -> None:
        self.enter = tensors.quantizing_conv("enter", execution)
        self.groups = [
            tensors.integer_conv(f"res2.{k}", dilation, execution) for k in range(scale - 1)
        ]
        self.constant = tensors["constant"][:, None, None]  # (C, 1, 1) uint8
        signs = tensors["signs"]  # (2, C): of the entering convolution, of the groups
        self.signs = None if bool((signs > 0).all()) else signs.to(torch.int16)[:, :, None, None]
        self.leave = tensors.integer_conv("leave", 1, execution)
        self.gain, self.offset = tensors["leave.gain"], tensors["leave.offset"]
        self.squeeze, self.squeeze_bias = tensors.matrix("squeeze"), tensors["squeeze.bias"]
        self.excite, self.excite_bias = tensors.matrix("excite"), tensors["excite.bias"]

    def __call__(self, total: Tensor) -> Tensor:
        """(B, C, 1, T) float32 -> (B, C, 1, T) float32."""
        r = self.leave.to_float(self.res2(self.enter.to_codes(total)), relu=True)
        mean = torch.addcmul(self.offset, r.mean(dim=(2, 3)), self.gain)
        hidden = F.linear(mean, self.squeeze, self.squeeze_bias).relu_()
        gate = F.linear(hidden, self.excite, self.excite_bias).sigmoid_()
        # x + s v with v = gain r + offset
        shifted = total + (gate * self.offset)[:, :, None, None]
        return shifted.addcmul_(r, (gate * self.gain)[:, :, None, None])

    def res2(self, r: Tensor) -> Tensor:
        """Codes of the entering convolution -> codes that the leaving one reads, (B, C, 1, T)."""
        u = self._add(self.constant, r, 0, slice(None))
        width = self.groups[0].weight.shape[1]
        outputs: list[Tensor] = []
        for k, conv in enumerate(self.groups):
            part = u[:, k * width : (k + 1) * width]
            if outputs:
                part = self._add(part, outputs[-1], 1, slice((k - 1) * width, k * width))
            outputs.append(conv.to_codes(part))
        return torch.cat([*outputs, u[:, len(self.groups) * width :]], dim=1)

    def _add(self, codes: Tensor, r: Tensor, row: int, channels: slice) -> Tensor:
        """codes +- r, clamped to 0..127. Without a minus, sums of two codes fit a byte."""
        if self.signs is None:
            return (codes + r).clamp_max_(TOP)
        sums = codes.to(torch.int16) + r.to(torch.int16) * self.signs[row, channels]
        return sums.clamp_(0, TOP).to(torch.uint8)


class _Pooling:
    """Attentive statistics pooling."""

    def __init__(self, tensors: _Tensors, execution: Execution) -> None:
        self.reduce = tensors.quantizing_conv("reduce", execution)
        self.context = tensors.matrix("context")
        self.expand = tensors.quantizing_conv("expand", execution)
        self.norm = None
        if tensors.get("norm.gain") is not None:  # the "tao" variant
            self.norm = tensors.column("norm.gain"), tensors.column("norm.offset")

    def __call__(self, h: Tensor) -> Tensor:
        """(B, M, 1, T) float32 -> [mean; deviation] (B, 2M)."""
        # Channels last: the frames of an utterance are rows, sums over them run along memory.
        h_BTM = h[:, :, 0].transpose(1, 2)
        mean = h_BTM.mean(dim=1)
        deviation = _deviation((h_BTM - mean[:, None]).square_().mean(dim=1))
        seen = F.linear(torch.cat([mean, deviation], dim=1), self.context)
        hidden = self.reduce.to_float(h, relu=False).add_(seen[:, :, None, None])
        if self.norm is not None:
            hidden = torch.addcmul(self.norm[1], hidden.relu_(), self.norm[0])
        energy = self.expand.to_float(hidden.tanh_(), relu=False)[:, :, 0].transpose(1, 2)
        weights = energy.sub_(energy.amax(dim=1, keepdim=True)).exp_()
        total = weights.sum(dim=1)
        mean = (weights * h_BTM).sum(dim=1) / total
        variance = (h_BTM - mean[:, None]).square_().mul_(weights).sum(dim=1) / total
        return torch.cat([mean, _deviation(variance)], dim=1)


def _deviation(variance: Tensor) -> Tensor:
    return variance.clamp(min=VARIANCE_FLOOR).sqrt()


class Int8Ecapa(nn.Module):
    """Features (B, F, T) -> embeddings (B, E), not length-normalised, on integers."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        execution: Execution | None = None,
    ) -> None:
        """From `config()` and `tensors()` of another; see `from_tensors`."""
        super().__init__()
        if execution is None:
            execution = "onednn" if onednn_available() else "reference"
        self._config, self._tensors = dict(config), dict(tensors)
        found = _Tensors(self._tensors)
        self.input_dim = int(config["input_dim"])
        self.enter = found.quantizing_conv("enter", execution)
        self.gain, self.offset = found.column("enter.gain"), found.column("enter.offset")
        self.layers = [
            _Block(found.below(f"layers.{i}"), int(config["scale"]), int(dilation), execution)
            for i, dilation in enumerate(config["dilations"])
        ]
        self.aggregate = found.quantizing_conv("aggregate", execution)
        self.pooling = _Pooling(found.below("pooling"), execution)
        self.pooled_gain, self.pooled_offset = found["pooled.gain"], found["pooled.offset"]
        self.embed = found.quantizing_conv("embed", execution)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        execution: Execution | None = None,
    ) -> Int8Ecapa:
        """Rebuild the network from what `tensors` and `config` gave.

        `execution` is "onednn" where torch has the kernels, else "reference".
        Raises ValueError naming a tensor that is missing or of a wrong type.
        """
        return cls(config, tensors, execution)

    def tensors(self) -> dict[str, Tensor]:
        """Everything to store, for safetensors: int8 weights, uint8 constants, float32 scales."""
        return dict(self._tensors)

    def config(self) -> dict[str, Any]:
        """Sizes and settings to store beside the tensors, plain JSON values."""
        return dict(self._config)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embed a batch.

        Args:
            features: (B, F, T) float32, utterances padded at the end with anything finite.
            lengths: (B,) int, real frames of each utterance; None if all T frames are real.

        Returns:
            (B, E) float32. Utterances of equal length run together, without their padding, so the
            result is that of each utterance alone.

        Raises:
            ValueError: features that are not (B, F, T), or a length outside 1..T.
        """
        if features.ndim != 3 or features.shape[1] != self.input_dim:
            raise ValueError(
                f"features must be (batch, {self.input_dim}, frames), not {tuple(features.shape)}"
            )
        with torch.no_grad():
            if lengths is None:
                return self._embed(features)
            if bool((lengths < 1).any()) or bool((lengths > features.shape[2]).any()):
                raise ValueError(
                    f"lengths must be from 1 to the {features.shape[2]} frames of the batch, "
                    f"not {lengths.tolist()}"
                )
            embeddings: Tensor | None = None
            for length in sorted(set(lengths.tolist())):
                chosen = (lengths == length).nonzero()[:, 0]
                part = self._embed(features[chosen, :, :length])
                if embeddings is None:
                    embeddings = part.new_empty(features.shape[0], part.shape[1])
                embeddings[chosen] = part
            if embeddings is None:
                raise ValueError("the batch is empty")
            return embeddings

    def _embed(self, features: Tensor) -> Tensor:
        x = features.float()[:, :, None, :].contiguous(memory_format=torch.channels_last)
        total = torch.addcmul(self.offset, self.enter.to_float(x, relu=True), self.gain)
        outputs: list[Tensor] = []
        for layer in self.layers:
            outputs.append(layer(total))
            total = total + outputs[-1]
        h = self.aggregate.to_float(torch.cat(outputs, dim=1), relu=True)
        pooled = torch.addcmul(self.pooled_offset, self.pooling(h), self.pooled_gain)
        return self.embed.to_float(pooled[:, :, None, None], relu=False)[:, :, 0, 0]
