"""Weight-only quantization of a whole transformer, block after block.

Sources: H. Shen et al., "Efficient LLM Inference on CPUs", arXiv 2311.00502, section 2; E. Frantar
et al., "GPTQ", ICLR 2023, section 4 and the authors' code ("true sequential"); W. Cheng et al.,
"Optimize Weight Rounding via Signed Gradient Descent", EMNLP Findings 2024, algorithm 1 (a block
is fed by the quantized blocks before it and imitates what the float model's block gives).

Of a block the method sees its layers, the inputs that the quantized model feeds it, and the outputs
of the float model. Then every layer is replaced by a `WeightOnlyLinear`, and the next block is
fed by what this one now computes. Memory: one block's float weights and H, and the hidden states
of the calibration batches, twice where the float model's outputs are the target (then the float
encoder's states are kept for its decoder, too).

Embeddings, norms and the head are no block's linear layers and stay as they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goldcrest.kernels import weight_only as family
from goldcrest.kernels.language.padding import is_decoder, token_mask
from goldcrest.kernels.language.sequential import Batch, BlockStep, Call, enter, walk
from goldcrest.kernels.language.stacks import block_linears, check_compressible, stacks
from goldcrest.kernels.language.wiring import SharedInput, linear_makers, shared_inputs
from goldcrest.kernels.sparsity.hessian import weight_matrix
from goldcrest.kernels.weight_only import calibrated, folding, sensitivity
from goldcrest.kernels.weight_only.block import Block
from goldcrest.kernels.weight_only.grid import GridSettings, QuantizedWeight, round_to_grid
from goldcrest.kernels.weight_only.linear import Compute, WeightOnlyLinear

GROUP_SIZES = (1024, 512, 256, 128, 64, 32)
"""Group sizes that are offered where another one does not fit."""

QUERIES_AND_KEYS = (
    *("q_proj", "k_proj", "q", "k", "query", "key"),
    *("Wqkv", "c_attn", "query_key_value", "qkv_proj", "qkv"),  # with the values in one matrix
)
"""Layers whose range AWQ keeps: their outputs meet in a product, where clipping does harm."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a method is driven through a model, whatever the method."""

    true_sequential: bool = True  # GPTQ: inputs anew after every set of layers, not every block
    insert_scales: bool = True  # AWQ, TEQ: divide inputs where no layer before takes the scales
    compute: Compute = "bfloat16"  # precision of inputs on a CPU, see `linear`


def quantize(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    method: str,
    grid: GridSettings,
    settings: Any = None,
    high_precision: Collection[str] = (),
    eight_bits: Collection[str] = (),
    options: Options | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, blocks: None,
) -> dict[str, Any]:
    """Quantize the linear layers of a model's blocks, in place.

    Args:
        model: a transformer of any architecture, float, on any device.
        batches: calibration inputs, keyword arguments of the model; each is a sample to methods
            that train or search. Tokens that their masks call padding count nowhere.
        method: a file of this folder.
        grid: bits, groups, scheme.
        settings: the method's `Settings`; None: its defaults.
        high_precision: names of layers, or of modules above them, that stay float.
        eight_bits: names of such that get 8 bits, rounded to nearest.
        options: how the method is driven.
        seed: orders samples.
        progress: called with the number of blocks done and of all.

    Returns a description as plain JSON, enough for `install`.

    Raises ValueError for a name that fits no layer, layers whose inputs do not divide into groups,
    no batches, a mixture of experts, and what the method refuses. A model that raised while it ran
    is half quantized.
    """
    check_compressible(model)
    rule = family.load(method)
    plan = _Plan(
        method=rule,
        settings=rule.Settings() if settings is None else settings,
        grid=grid,
        float_layers=layers_at(model, high_precision),
        eight_bits=layers_at(model, eight_bits),
        options=options or Options(),
        seed=seed,
    )
    check_groups(model, grid, plan.float_layers)
    total = sum(len(stack.blocks) for stack in stacks(model))
    run = _Run(model, batches, plan)
    for done, step in enumerate(walk(model, batches)):
        run.quantize_block(step)
        progress(done + 1, total)
    return {
        "form": "weight_only",
        "method": method,
        "grid": asdict(grid),
        "settings": asdict(plan.settings),
        "options": asdict(plan.options),
        "seed": seed,
        "high_precision": sorted(plan.float_layers),
        "eight_bits": sorted(plan.eight_bits - plan.float_layers),
        "uncalibrated": run.uncalibrated,
        "layers": {name: layer.description() for name, layer in quantized_layers(model).items()},
    }


def install(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Put empty quantized layers in place of float ones, ready for `load_state_dict(assign=True)`.

    `model` may be on the meta device. Raises ValueError for a description that does not fit it.
    """
    try:
        layers = dict(description["layers"])
        for name, form in layers.items():
            linear = _linear(model, name)
            made = WeightOnlyLinear.empty(form)
            if made.weight.shape != weight_matrix(linear)[0].shape:
                raise ValueError(f"'{name}' is {tuple(made.weight.shape)} in the description")
            model.set_submodule(name, made)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the description of the quantized layers is damaged: {error}") from error


def check(model: nn.Module) -> None:
    """Raise ValueError naming a quantized layer whose loaded tensors are not of its form."""
    for name, layer in quantized_layers(model).items():
        try:
            layer.check()
        except ValueError as error:
            raise ValueError(f"the quantized weight '{name}' is damaged: {error}") from error


def quantized_layers(model: nn.Module) -> dict[str, WeightOnlyLinear]:
    """The quantized layers of a model by name, in module order."""
    return {
        name: each for name, each in model.named_modules() if isinstance(each, WeightOnlyLinear)
    }


def sensitivities(
    model: nn.Module, batches: Sequence[Batch], grid: GridSettings, skip: Collection[str] = ()
) -> dict[str, float]:
    """How much each block layer spoils its block's output when it alone is rounded to the grid.

    Mean square error over mean square of the output, so that blocks compare. `skip` names layers
    that are not asked about. The model is left as it was.
    """
    left_out = layers_at(model, skip)
    check_groups(model, grid, left_out)
    plan = _Plan(
        method=family.load("rtn"), settings=None, grid=grid, float_layers=left_out,
        eight_bits=frozenset(), options=Options(), seed=0,
    )  # fmt: skip
    run = _Run(model, batches, plan)
    found: dict[str, float] = {}
    for step in walk(model, batches):
        groups, _ = run.groups(step)
        if groups:
            block = run.block(step, groups, frozenset({"outputs"}))
            power = float(block.targets.square().mean()) or 1.0
            errors = sensitivity.output_errors(block, grid)
            found.update({name: error / power for name, error in errors.items()})
    return found


def layers_at(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """The block layers called so or lying below a module called so.

    Raises ValueError for a name that fits none, with the nearest that would.
    """
    layers = block_linears(model)
    found: set[str] = set()
    for name in names:
        at = [each for each in layers if each == name or each.startswith(f"{name}.")]
        if not at:
            near = difflib.get_close_matches(name, layers, n=1)
            guess = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"no layer of a block is called '{name}' or lies below it{guess}")
        found.update(at)
    return frozenset(found)


def check_groups(model: nn.Module, grid: GridSettings, skip: Collection[str] = ()) -> None:
    """Raise ValueError naming the layers whose inputs do not divide into groups, and what would do.

    `skip` are layers that are not quantized.
    """
    size = grid.group_size
    if size == -1 or grid.ragged:
        return
    names = [name for name in block_linears(model) if name not in skip]
    widths = {name: weight_matrix(_linear(model, name)).shape[2] for name in names}
    odd = {name: width for name, width in widths.items() if width % size}
    if not odd:
        return
    listed = [f"{name} has {width} ({_fitting([width])})" for name, width in odd.items()]
    more = f", and {len(listed) - 6} more layers" if len(listed) > 6 else ""
    raise ValueError(
        f"groups of {size} do not divide the inputs of {len(odd)} of {len(widths)} layers: "
        f"{', '.join(listed[:6])}{more}. For all layers {_fitting(widths.values(), below=size)}, "
        "or groups whose last one is shorter (ragged)"
    )


def _fitting(widths: Iterable[int], below: int = GROUP_SIZES[0] + 1) -> str:
    """The largest group sizes that divide all widths, in words."""
    known = list(widths)
    fits = [g for g in GROUP_SIZES if g < below and all(width % g == 0 for width in known)]
    return f"g = {fits[0]} fits, or -1" if fits else "only -1 fits, one group a row"


def _linear(model: nn.Module, name: str) -> nn.Linear | Conv1D:
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear | Conv1D):
        raise ValueError(f"'{name}' is a {type(layer).__name__}, not a linear layer")
    return layer


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be done with each block."""

    method: family.WeightOnlyMethod
    settings: Any
    grid: GridSettings
    float_layers: frozenset[str]
    eight_bits: frozenset[str]
    options: Options
    seed: int


class _Run:
    """A walk through one model: masks, the float model's hidden states, what was found."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], plan: _Plan) -> None:
        self.model, self.plan, self.batches = model, plan, batches
        names = [stack.name for stack in stacks(model)]
        self.masks = {
            name: [token_mask(batch, decoder=is_decoder(model, place)) for batch in batches]
            for place, name in enumerate(names)
        }
        self.outside = self.masks[names[0]]
        self.uncalibrated: list[str] = []
        self._makers: dict[SharedInput, str] = {}  # of the block at hand
        self._stack = ""
        self._hidden: list[Tensor] = []  # the float model's, of the stack that is walked
        self._entered: dict[str, tuple[list[Tensor], list[list[Call]]]] = {}  # by its later stacks

    def quantize_block(self, step: BlockStep) -> None:
        """Quantize the layers of one block and put them in place."""
        plan = self.plan
        groups, missed = self.groups(step)
        targets = self._targets(step) if "outputs" in plan.method.READS else None
        by_hessian = "outputs" not in plan.method.READS
        one_by_one = [[group] for group in groups]
        for portion in one_by_one if plan.options.true_sequential and by_hessian else [groups]:
            if not portion:
                continue
            block = self.block(step, portion, plan.method.READS, targets)
            quantized = plan.method.quantize(
                block, grid=plan.grid, settings=plan.settings, seed=plan.seed
            )
            for group in portion:
                self._place(group, quantized)
        self.uncalibrated += missed
        eight = replace(plan.grid, bits=8)
        for name in step.block.linears():
            if name in plan.eight_bits - plan.float_layers:
                self._put(name, round_to_grid(self._weight(name), eight))
            elif name in missed:
                self._put(name, round_to_grid(self._weight(name), plan.grid))

    def groups(self, step: BlockStep) -> tuple[list[SharedInput], list[str]]:
        """Layers that share an input where any is quantized, and layers that no input reached.

        Of the latter, those that stay float or get 8 bits are left out.
        """
        found = shared_inputs(step.block.module, lambda: step.run(0), step.block.name)
        reached = {name for group in found for name in group.layers}
        kept = self.plan.float_layers | self.plan.eight_bits
        self._makers = {}
        if "outputs" in self.plan.method.READS:
            self._makers = linear_makers(
                step.block.module, found, lambda: step.run(0), step.block.name
            )
        missed = [n for n in step.block.linears() if n not in reached and n not in kept]
        return [group for group in found if self._low([group])], missed

    def block(
        self,
        step: BlockStep,
        groups: Sequence[SharedInput],
        reads: Collection[str],
        targets: Tensor | None = None,
    ) -> Block:
        """The layers of some groups that are quantized, with what calibration shows of them."""
        masks = self.masks[step.stack.name]
        sets = tuple(tuple(n for n in group.layers if n in self._low([group])) for group in groups)
        if targets is None:
            length = calibrated.longest(step, masks)
            everything = range(len(step)) if "outputs" in reads else range(1)
            with torch.no_grad():
                targets = calibrated.outputs(step, masks, everything, length)
        unfolded = [g for g in groups if g.norm is None and g not in self._makers]
        inserted = self.plan.options.insert_scales
        return calibrated.block_of(
            step,
            {name: _linear(self.model, name) for names in sets for name in names},
            sets,
            masks=masks,
            outside=self.outside,
            targets=targets,
            reads=reads,
            unscaled=frozenset() if inserted else frozenset(self._low(unfolded)),
            unclipped=frozenset(
                name for name in self._low(groups) if name.rpartition(".")[2] in QUERIES_AND_KEYS
            ),
        )

    def _targets(self, step: BlockStep) -> Tensor:
        """The float model's outputs of this block, which also feed its next one."""
        imitated, masks = self._float_step(step), self.masks[step.stack.name]
        length = calibrated.longest(step, masks)
        with torch.no_grad():
            self._hidden = [imitated.run(index, each) for index, each in enumerate(self._hidden)]
        return calibrated.real_tokens(self._hidden, masks, length)

    def _float_step(self, step: BlockStep) -> BlockStep:
        """The block as the float model calls it, a decoder's with the float encoder's states."""
        name = step.stack.name
        if not self._stack:  # before anything is quantized, which later stacks would see
            later = stacks(self.model)[1:]
            self._entered = {each.name: enter(self.model, each, self.batches) for each in later}
        fed, calls = self._entered.get(name, (step.hidden, []))
        if self._stack != name:
            self._stack, self._hidden = name, list(fed)
        if not calls:
            return step
        place = step.stack.blocks.index(step.block)
        return BlockStep(step.stack, step.block, self._hidden, [each[place] for each in calls])

    def _low(self, groups: Iterable[SharedInput]) -> list[str]:
        """Layers of the groups that get the grid's bits."""
        kept = self.plan.float_layers | self.plan.eight_bits
        return [name for group in groups for name in group.layers if name not in kept]

    def _weight(self, name: str) -> Tensor:
        return weight_matrix(_linear(self.model, name))[0]

    def _place(self, group: SharedInput, quantized: Mapping[str, QuantizedWeight]) -> None:
        """Put a group's quantized layers in place, their input scales into the layer before."""
        names = self._low([group])
        scales = quantized[names[0]].input_scales
        if scales is not None and (group.norm is not None or group in self._makers):
            self._fold(group, scales)
            quantized = {name: folding.folded(quantized[name]) for name in names}
        for name in names:
            self._put(name, quantized[name])

    @torch.no_grad()
    def _fold(self, group: SharedInput, scales: Tensor) -> None:
        """Divide what the layer before gives, and multiply the float layers that read it too."""
        if group.norm is not None:
            norm = self.model.get_submodule(group.norm)
            _divide(norm, folding.into_norm(*_affine(norm), scales))
        else:
            self._fold_into_linear(self._makers[group], scales)
        for name in set(group.layers) - set(self._low([group])):
            layer = _linear(self.model, name)
            layer.weight.mul_(scales[:, None] if isinstance(layer, Conv1D) else scales)

    def _fold_into_linear(self, name: str, scales: Tensor) -> None:
        layer = self.model.get_submodule(name)
        if isinstance(layer, WeightOnlyLinear):  # quantized just now: its scales are divided
            codes, bias = folding.into_quantized(layer.quantized(), layer.bias, scales)
            self._put_quantized(name, codes, bias, layer.weight.dtype)
        else:
            layer = _linear(self.model, name)
            weight, bias = folding.into_linear(self._weight(name), layer.bias, scales)
            _divide(layer, (weight.t() if isinstance(layer, Conv1D) else weight, bias))

    def _put(self, name: str, quantized: QuantizedWeight) -> None:
        layer = _linear(self.model, name)
        self._put_quantized(name, quantized, layer.bias, layer.weight.dtype)

    def _put_quantized(
        self, name: str, quantized: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        compute = self.plan.options.compute
        made = WeightOnlyLinear.of(quantized, bias, dtype=dtype, compute=compute)
        self.model.set_submodule(name, made.to(quantized.codes.device))


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Gain and bias of a norm."""
    return norm.get_parameter("weight"), getattr(norm, "bias", None)


@torch.no_grad()
def _divide(layer: nn.Module, divided: tuple[Tensor, Tensor | None]) -> None:
    """Give a layer the weight and bias that `folding` made of its own."""
    weight, bias = divided
    layer.get_parameter("weight").copy_(weight)
    if bias is not None:
        layer.get_parameter("bias").copy_(bias)
