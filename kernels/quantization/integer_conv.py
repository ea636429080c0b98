"""A convolution over time on integers: uint8 activations, int8 weights, int32 sums.

Source: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, section 2.2-2.4:

    output_r = scale_r sum_k (q_x - z) q_w + bias_r,   then ReLU, then float32 or codes 0..127

`scale_r` holds everything that multiplies a channel (weight step, input step, output step), so the
result is requantized by one multiplication inside the kernel. Zero padding is exact: it pads z.

Two executions: `onednn`, the integer kernels of oneDNN that torch carries (channels-last, weights
packed once), and `reference`, plain float64 arithmetic on the same codes.

B utterances   C input channels   R output channels   T frames   K taps
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Execution = Literal["onednn", "reference"]
"""`onednn`: integer kernels; `reference`: the same integers in float64, slow, on any machine."""

TOP = 127
"""Largest activation code: 7 bits, so that pairs of products cannot saturate (see `int8`)."""


def onednn_available() -> bool:
    """Whether this build of torch carries the integer convolutions."""
    return hasattr(torch.ops.onednn, "qconv2d_pointwise") and torch.backends.mkldnn.is_available()


class IntegerConv:
    """One convolution; its input is (B, C, 1, T) uint8 codes, channels last."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        zero_point: int,
        dilation: int,
        execution: Execution,
    ) -> None:
        """Prepare a convolution that keeps the number of frames.

        Args:
            weight: (R, C, K) int8, K odd.
            scale: (R,) float32, what one unit of the integer sum is worth in the output.
            bias: (R,) float32, added after `scale`.
            zero_point: the code of zero in the input, which is also what pads it.
            dilation: frames between taps.
            execution: see `Execution`.

        Raises:
            ValueError: codes of a wrong type or shape, a zero point that is no code.
        """
        if weight.dtype != torch.int8 or weight.ndim != 3 or weight.shape[2] % 2 == 0:
            raise ValueError(
                f"weight codes must be (R, C, odd K) int8, not {tuple(weight.shape)} {weight.dtype}"
            )
        if not scale.shape == bias.shape == (weight.shape[0],):
            raise ValueError("scale and bias must have one entry per output channel")
        if not 0 <= zero_point <= TOP:
            raise ValueError(f"zero_point must be a code 0..{TOP}, not {zero_point}")
        self.weight, self.scale, self.bias = weight, scale.float(), bias.float()
        self.zero_point, self.dilation, self.execution = zero_point, dilation, execution
        self.padding = dilation * (weight.shape[2] - 1) // 2
        self._zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
        if execution == "onednn":
            self._packed = torch.ops.onednn.qconv_prepack(
                weight[:, :, None, :].contiguous(), self.scale, 1.0, zero_point,
                [1, 1], [0, self.padding], [1, dilation], 1, None,
            )  # fmt: skip

    def to_codes(self, codes: Tensor) -> Tensor:
        """Convolve, ReLU, round and clamp to codes 0..127: (B, R, 1, T) uint8."""
        if self.execution == "onednn":
            return self._onednn(codes, torch.uint8, "hardtanh", [0.0, float(TOP)])
        return self._reference(codes).round().clamp(0, TOP).to(torch.uint8)

    def to_float(self, codes: Tensor, *, relu: bool) -> Tensor:
        """Convolve, ReLU if asked for: (B, R, 1, T) float32."""
        if self.execution == "onednn":
            return self._onednn(codes, torch.float32, "relu" if relu else "none", [])
        result = self._reference(codes)
        return (result.relu() if relu else result).float()

    def _onednn(self, codes: Tensor, kind: torch.dtype, post: str, bounds: list[float]) -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise(
            codes, 1.0, self.zero_point, self._packed, self.scale, self._zeros, self.bias,
            [1, 1], [0, self.padding], [1, self.dilation], 1, 1.0, 0, kind, post, bounds, "",
        )  # fmt: skip

    def _reference(self, codes: Tensor) -> Tensor:
        sums = F.conv2d(
            codes.double() - self.zero_point,
            self.weight[:, :, None, :].double(),
            padding=(0, self.padding),
            dilation=(1, self.dilation),
        )
        result = sums * self.scale.double()[:, None, None] + self.bias.double()[:, None, None]
        return result.contiguous(memory_format=torch.channels_last)


class QuantizingConv:
    """A convolution with float input: quantizes it first, or (skipped) stays in floating point."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        *,
        input_step: Tensor | None,
        zero_point: int,
        execution: Execution,
    ) -> None:
        """As `IntegerConv` without dilation; `input_step` (1 or C,) is the input's step per code.

        `input_step` None skips quantization of the input: weights are dequantized once, products
        are float32, and `zero_point` has no meaning.
        """
        self.weight = None
        if input_step is None:
            self.bias = bias.float()
            self.weight = (weight.float() * scale[:, None, None])[:, :, None, :].contiguous(
                memory_format=torch.channels_last
            )
            return
        self.conv = IntegerConv(
            weight, scale, bias, zero_point=zero_point, dilation=1, execution=execution
        )
        if not bool((input_step > 0).all()):
            raise ValueError("steps of the input must be above 0")
        self.per_code = 1 / input_step.float().reshape(-1, 1, 1)
        self.per_code_scalar = float(self.per_code) if self.per_code.numel() == 1 else None
        self.shift = torch.tensor(zero_point + 0.5)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of a float input, rounding halves up: one multiply-add, one clamp, one cast."""
        if self.per_code_scalar is None:
            shifted = torch.addcmul(self.shift, x, self.per_code)
        else:
            shifted = torch.add(self.shift, x, alpha=self.per_code_scalar)
        # int8 first: the cast to uint8 is four times slower, and codes end at 127.
        return shifted.clamp_(0, TOP).to(torch.int8).view(torch.uint8)

    def to_float(self, x: Tensor, *, relu: bool) -> Tensor:
        """Convolve (B, C, 1, T) float32 to (B, R, 1, T) float32."""
        if self.weight is not None:
            result = F.conv2d(x, self.weight, self.bias, padding=(0, self.weight.shape[3] // 2))
            return result.relu_() if relu else result
        return self.conv.to_float(self.codes(x), relu=relu)

    def to_codes(self, x: Tensor) -> Tensor:
        """Convolve (B, C, 1, T) float32, ReLU, codes (B, R, 1, T) uint8."""
        if self.weight is not None:
            shifted = F.conv2d(x, self.weight, self.bias, padding=(0, self.weight.shape[3] // 2))
            return shifted.add_(0.5).clamp_(0, TOP).to(torch.int8).view(torch.uint8)
        return self.conv.to_codes(self.codes(x))
