"""From a trained ECAPA-TDNN to its INT8 tensors: smooth, choose skips, calibrate, round.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language
Models", arXiv 2310.06927, section 3.4, in its order: smoothing, skipping by kurtosis, activation
ranges, GPTQ. The arithmetic that the tensors are for is in `int8_ecapa`.

Steps per code (s) of an activation may differ from channel to channel wherever a convolution reads
it without padding: they go into the weights, whose own scales are taken afterwards.

C channels   M aggregated channels   A attention channels   R, D rows and columns of a weight
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from goldcrest.kernels.quantization import gptq
from goldcrest.kernels.quantization.ecapa_calibration import (
    Batch,
    Seen,
    blocks,
    groups,
    observe,
    smooth_ecapa,
)
from goldcrest.kernels.quantization.int8 import (
    grid_of_range,
    quantize_weight,
    weight_scales,
)
from goldcrest.kernels.quantization.int8_ecapa import TANH_STEP, TANH_ZERO, Int8Ecapa
from goldcrest.kernels.quantization.integer_conv import TOP
from goldcrest.kernels.quantization.kurtosis import Criterion, rank, to_skip
from goldcrest.kernels.speaker.ecapa_tdnn import EcapaTdnn, SERes2Block


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the quantization of an ECAPA-TDNN."""

    weights: Literal["gptq", "rtn"] = "gptq"  # rounding with corrections, or to nearest
    damping: float = 0.01  # GPTQ's lambda as a share of mean(diag H)
    smooth: bool = True  # move outlier channels into weights first
    alpha: float = 0.5  # smoothing: share of an activation's range that goes into the weights
    ranges: Literal["minmax", "percentile"] = "minmax"  # how activation ranges are found
    percentile: float = 0.9999  # share of the values inside a range, for "percentile"
    skip: int = 0  # operations whose input stays float32, the most harmful by `criterion`
    criterion: Criterion = "kurtosis"  # what ranks them
    skip_names: tuple[str, ...] = ()  # operations to skip in any case, see `skippable`

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip_names", tuple(self.skip_names))  # JSON gives lists
        if self.weights not in ("gptq", "rtn"):
            raise ValueError(f"weights must be 'gptq' or 'rtn', not '{self.weights}'")
        if self.ranges not in ("minmax", "percentile"):
            raise ValueError(f"ranges must be 'minmax' or 'percentile', not '{self.ranges}'")
        if self.criterion not in ("kurtosis", "max_abs", "range"):
            raise ValueError(
                f"criterion must be kurtosis, max_abs or range, not '{self.criterion}'"
            )
        if not 0 < self.percentile <= 1:
            raise ValueError(f"percentile must be a share in (0, 1], not {self.percentile}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha}")
        if self.skip < 0 or self.damping < 0:
            raise ValueError("skip and damping must be at least 0")


def skippable(model: EcapaTdnn) -> list[str]:
    """Operations that quantize a float input of their own, so may be skipped.

    A Res2 convolution reads codes that another made, and stays integer.
    """
    enters = [f"layers.{i}.enter" for i in range(len(model.layers))]
    return ["enter", *enters, "aggregate", "pooling.reduce", "pooling.expand", "embed"]


def check_skip_names(model: EcapaTdnn, names: Iterable[str]) -> None:
    """ValueError for names that are not `skippable`, with the nearest and with all that are."""
    allowed = skippable(model)
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        near = difflib.get_close_matches(unknown[0], allowed, n=1)
        guess = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"cannot skip {', '.join(unknown)}{guess}; allowed: {', '.join(allowed)}")


def quantize_ecapa(
    model: EcapaTdnn, batches: Iterable[Batch], settings: Settings | None = None
) -> Int8Ecapa:
    """Quantize a trained network; `model` is not changed.

    Args:
        model: the network, dense or with pruned (zero) weights; zeros stay zeros.
        batches: calibration batches (features (B, F, T), lengths (B,) or None), some hundred
            utterances like those to come. They are kept in memory.
        settings: see `Settings`; None for the defaults.

    Returns:
        the integer network; `.tensors()` and `.config()` are what to store.

    Raises:
        ValueError: no batches, activations that are not finite, an unknown operation to skip.
    """
    settings = settings or Settings()
    batches = list(batches)
    if not batches:
        raise ValueError("quantization needs at least one calibration batch")
    check_skip_names(model, settings.skip_names)
    work = copy.deepcopy(model).float().eval()
    if settings.smooth:
        smooth_ecapa(work, observe(work, batches, settings, hessians=False), settings)
    seen = observe(work, batches, settings, hessians=settings.weights == "gptq")
    ranking = rank(
        settings.criterion,
        {name: seen[name].moments for name in skippable(work)},
        {name: seen[name].extremes for name in skippable(work)},
    )
    ranking = [name for name in ranking if name not in settings.skip_names]
    skipped = {*settings.skip_names, *to_skip(ranking, settings.skip)}
    config = {
        **asdict(model.settings),
        "dilations": list(model.settings.dilations),
        "skipped": sorted(skipped),
    }
    return Int8Ecapa(config, _Builder(work, seen, settings, skipped).build())


# --- tensors --------------------------------------------------------------------------------


def affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as y = a x + c: (a, c), each (channels,) float64."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    a = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return a, norm.bias.detach().double() - a * norm.running_mean.double()


class _Builder:
    """Makes the tensors, layer after layer, in the order of the network."""

    def __init__(
        self, model: EcapaTdnn, seen: dict[str, Seen], settings: Settings, skipped: set[str]
    ) -> None:
        self.model, self.seen, self.settings, self.skipped = model, seen, settings, skipped
        self.tensors: dict[str, Tensor] = {}

    def build(self) -> dict[str, Tensor]:
        """All tensors by name, contiguous."""
        model = self.model
        step, zero = self._step("enter")
        self._conv("enter", model.enter.conv, step, zero)
        self._put(
            **dict(zip(("enter.gain", "enter.offset"), affine(model.enter.norm), strict=True))
        )
        for i, block in enumerate(blocks(model)):
            self._block(f"layers.{i}", block)
        step, zero = self._step("aggregate")
        self._conv("aggregate", model.aggregate, step, zero)
        self._pooling()
        gain, offset = affine(model.pooling_norm)
        self._put(**{"pooled.gain": gain, "pooled.offset": offset})
        self._embed()
        return {name: tensor.contiguous() for name, tensor in self.tensors.items()}

    def _put(self, **tensors: Tensor) -> None:
        self.tensors.update({name: tensor.detach().float() for name, tensor in tensors.items()})

    def _step(self, name: str) -> tuple[Tensor | None, int]:
        """Step per code, (1,) or (D,), and zero point of an operation's input; None if skipped.

        Slices have steps of their own but one zero point: it is the largest any of them needs, and
        their steps are widened to keep both ends of their ranges.
        """
        if name in self.skipped:
            return None, 0
        bounds = [observer.range() for observer in self.seen[name].ranges]
        grids = [grid_of_range(low, high) for low, high in bounds]
        zero = max(grid.zero_point for grid in grids)
        if len(grids) == 1:
            return torch.tensor([grids[0].scale]), zero
        steps = [
            max(-min(low, 0.0) / max(zero, 1), max(high, 0.0) / max(TOP - zero, 1), 1e-30)
            for low, high in bounds
        ]
        width = self.seen[name].largest().numel() // len(grids)
        return torch.tensor(steps).repeat_interleave(width), zero

    def _conv(
        self,
        name: str,
        layer: nn.Linear | nn.Conv1d,
        step: Tensor | None,
        zero_point: int,
        *,
        output: Tensor | float = 1.0,
        gain: Tensor | float = 1.0,
        extra_bias: Tensor | float = 0.0,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        input_gain: Tensor | float = 1.0,
    ) -> None:
        """Tensors of one convolution, (R, D, K).

        The stored convolution gives gain * (W x + b + extra_bias) / output for codes of x / step,
        where x enters multiplied by `input_gain` (signs). `weight`, `bias` replace the layer's.
        """
        w = (layer.weight if weight is None else weight).detach().double()
        w = w[:, :, None] if w.ndim == 2 else w
        b = layer.bias if bias is None else bias
        b = w.new_zeros(w.shape[0]) if b is None else b.detach().double()
        per_code = torch.ones(w.shape[1]) if step is None else step.expand(w.shape[1])
        units = per_code.double() * input_gain
        folded = w * units[:, None]
        scales = weight_scales(folded)
        self.tensors[f"{name}.weight"] = self._codes(name, folded, scales, units)
        factor = torch.as_tensor(gain, dtype=torch.float64) / output
        self._put(**{f"{name}.scale": scales * factor, f"{name}.bias": (b + extra_bias) * factor})
        self.tensors[f"{name}.zero_point"] = torch.tensor(zero_point, dtype=torch.int32)
        if step is not None and name in skippable(self.model):
            self._put(**{f"{name}.input_step": step})

    def _codes(self, name: str, folded: Tensor, scales: Tensor, units: Tensor) -> Tensor:
        """Weight codes (R, D, K) int8 of a folded weight, by GPTQ where H was accumulated."""
        accumulator = self.seen[name].hessian if name in self.seen else None
        if accumulator is None:
            return quantize_weight(folded, scales)
        columns = units.repeat_interleave(folded.shape[2])  # inputs are codes: x / unit
        columns = torch.where(columns == 0, 1.0, columns)
        hessian = accumulator.hessian()[0] / torch.outer(columns, columns)
        matrix = folded.flatten(1)
        rule = gptq.Settings(damping=self.settings.damping)
        codes = gptq.quantize(matrix, hessian, scales, rule, mask=matrix != 0)
        return codes.reshape(folded.shape)

    def _matrix(self, name: str, weight: Tensor) -> None:
        """A matrix stored as int8 for its size and multiplied in float32."""
        scales = weight_scales(weight)
        self.tensors[f"{name}.weight"] = quantize_weight(weight, scales)
        self._put(**{f"{name}.scale": scales})

    def _block(self, name: str, block: SERes2Block) -> None:
        """An SE-Res2Block; see `int8_ecapa` for how codes of sums are made."""
        parts = block.res2.scale
        a_u, c_u = affine(block.enter.norm)
        affines = [affine(group.norm) for group in groups(block)]
        a_y, c_y = (torch.cat(list(items)) for items in zip(*affines, strict=True))
        width = c_u.numel() // parts
        # Channel by channel: the step of u (shared with the y added to it), constant code, rest.
        steps, zeros, constants, rests = self._sums(name, c_u, c_y, width, parts)
        enter_step, enter_zero = self._step(f"{name}.enter")
        self._conv(
            f"{name}.enter", block.enter.conv, enter_step, enter_zero,
            output=steps, gain=a_u.abs(),
        )  # fmt: skip
        last_step = self._free_step(name, slice((parts - 2) * width, (parts - 1) * width), c_y, a_y)
        y_steps = torch.cat([steps[width : (parts - 1) * width], last_step.expand(width)])
        for k, group in enumerate(groups(block)):
            here = slice(k * width, (k + 1) * width)
            rest = group.conv.weight.detach().double().sum(dim=2) @ rests[here]
            self._conv(
                f"{name}.res2.{k}", group.conv, steps[here][:1].float(), int(zeros[k]),
                output=y_steps[here], gain=affines[k][0].abs(), extra_bias=rest,
            )  # fmt: skip
        self.tensors[f"{name}.constant"] = constants.to(torch.uint8)
        ones = torch.ones(width, dtype=torch.float64)
        signs = torch.stack([_sign(a_u), torch.cat([_sign(a_y), ones])])
        # u of the last group goes to the leaving convolution as it is: constant, sign and all.
        tail = slice((parts - 1) * width, None)
        leave_step = torch.cat([y_steps, steps[tail]])
        known = torch.cat([c_y, c_u[tail] - (constants[tail] * steps[tail])])
        self._conv(
            f"{name}.leave", block.leave.conv, leave_step.float(), 0,
            input_gain=torch.cat([_sign(a_y), ones]),
            extra_bias=block.leave.conv.weight.detach().double()[:, :, 0] @ known,
        )  # fmt: skip
        self.tensors[f"{name}.signs"] = signs.to(torch.int8)
        gain, offset = affine(block.leave.norm)
        self._put(**{f"{name}.leave.gain": gain, f"{name}.leave.offset": offset})
        for part, layer in (("squeeze", block.gate.squeeze), ("excite", block.gate.excite)):
            self._matrix(f"{name}.{part}", layer.weight.detach())
            self._put(**{f"{name}.{part}.bias": layer.bias})

    def _sums(
        self, name: str, c_u: Tensor, c_y: Tensor, width: int, parts: int
    ) -> tuple[Tensor, list[int], Tensor, Tensor]:
        """Grids of the Res2 convolutions' inputs p_k = u_k + y_(k-1).

        Returns steps (C,), zero points per group, constant codes (C,), and what of the constants
        the codes cannot hold (C,), in units of p. The last group has no p: codes of u alone, with
        a constant only where its BatchNorm turns ReLU upside down.
        """
        steps, zeros, constants, rests = [], [], [], []
        for k in range(parts - 1):
            here = slice(k * width, (k + 1) * width)
            offset = c_u[here].clone()
            if k:
                offset += c_y[(k - 1) * width : k * width]
            low, high = self.seen[f"{name}.res2.{k}"].ranges[0].range()
            # All ReLUs silent gives the constants themselves: the grid must hold those.
            grid = grid_of_range(min(low, float(offset.min())), max(high, float(offset.max())))
            codes = (grid.zero_point + (offset / grid.scale).round()).clamp(0, TOP)
            steps.append(torch.full((width,), grid.scale, dtype=torch.float64))
            zeros.append(grid.zero_point)
            constants.append(codes)
            rests.append(offset - (codes - grid.zero_point) * grid.scale)
        tail = slice((parts - 1) * width, parts * width)
        a_u = affine(self.model.get_submodule(f"{name}.enter.norm"))[0]  # type: ignore[arg-type]
        steps.append(self._free_step(name, tail, c_u, a_u).expand(width))
        constants.append(torch.where(a_u[tail] < 0, float(TOP), 0.0).double())
        rests.append(torch.zeros(width, dtype=torch.float64))
        return torch.cat(steps), zeros, torch.cat(constants), torch.cat(rests)

    def _free_step(self, name: str, part: slice, c: Tensor, a: Tensor) -> Tensor:
        """Step of codes that only the leaving convolution reads: (1,) of r = |y - c| there."""
        seen = self.seen[f"{name}.leave"]
        assert seen.low is not None
        assert seen.high is not None
        above = (seen.high[part].double() - c[part]).where(a[part] >= 0, seen.low.new_zeros(()))
        below = (c[part] - seen.low[part].double()).where(a[part] < 0, seen.low.new_zeros(()))
        largest = float(above.maximum(below).max())
        return torch.tensor([largest / TOP if largest > 0 else 1.0], dtype=torch.float64)

    def _pooling(self) -> None:
        pooling, wide = self.model.pooling, self.model.settings.mfa_channels
        step, zero = self._step("pooling.reduce")
        weight = pooling.reduce.weight
        self._conv("pooling.reduce", pooling.reduce, step, zero, weight=weight[:, :wide])
        self._matrix("pooling.context", weight.detach()[:, wide:, 0])
        if pooling.norm is not None:
            gain, offset = affine(pooling.norm)
            self._put(**{"pooling.norm.gain": gain, "pooling.norm.offset": offset})
        skipped = "pooling.expand" in self.skipped
        step = None if skipped else torch.tensor([TANH_STEP])
        self._conv("pooling.expand", pooling.expand, step, 0 if skipped else TANH_ZERO)

    def _embed(self) -> None:
        """The last layer; its BatchNorm follows at once and goes into it whole."""
        gain, offset = affine(self.model.embed_norm)
        step, zero = self._step("embed")
        weight = self.model.embed.weight.detach().double() * gain[:, None]
        bias = self.model.embed.bias.detach().double() * gain + offset
        self._conv("embed", self.model.embed, step, zero, weight=weight, bias=bias)


def _sign(a: Tensor) -> Tensor:
    return torch.where(a < 0, -1.0, 1.0).double()
