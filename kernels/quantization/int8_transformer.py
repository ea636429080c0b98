"""From a trained transformer to INT8: smooth, choose what to skip, calibrate, round.

Source: E. Kurtic et al., "Sparse Fine-Tuning for Inference Acceleration of Large Language Models",
arXiv 2310.06927, section 3.4, in its order: smoothing, skipping by kurtosis, activation ranges,
GPTQ. Quantized are all linear layers, both products of every attention (and with them the cache of
keys and values), the embedding's rows, and the head, untied from the embedding first.

Blocks are quantized in order, each calibrated on what the quantized blocks before it give, so that
GPTQ also answers for their rounding; memory is the activations of one block. Pruned weights stay
exactly zero: 0 is on every grid, and GPTQ corrects only what is left.

    description = quantize(model, batches, settings)      # in place; plain JSON
    tensors = state(model, description)                   # what to store
    install(fresh_model, description)                     # puts the modules in place
    fresh_model.load_state_dict(tensors, assign=True)
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from goldcrest.kernels.language.sequential import Batch, walk
from goldcrest.kernels.language.stacks import LINEAR_TYPES, check_compressible
from goldcrest.kernels.quantization import gptq, smoothing
from goldcrest.kernels.quantization.calibration import MinMax, Percentile
from goldcrest.kernels.quantization.int8 import grid_of_range, quantize_weight, weight_scales
from goldcrest.kernels.quantization.int8_attention import (
    AttentionGrids,
    UnknownAttentionError,
    put_grids,
    use_attention,
)
from goldcrest.kernels.quantization.int8_linear import Activations, Int8Embedding, Int8Linear
from goldcrest.kernels.quantization.int8_sensitivity import (
    SkipBy,
    highest,
    input_statistics,
    measured_losses,
)
from goldcrest.kernels.quantization.transformer_inputs import (
    attention_names,
    masks_of,
    observed,
    outside_linears,
    see_block,
    see_outside,
)
from goldcrest.kernels.quantization.transformer_smoothing import smooth_model
from goldcrest.kernels.sparsity.hessian import HessianAccumulator, weight_matrix


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the quantization of a transformer."""

    weights: Literal["gptq", "rtn"] = "gptq"  # rounding with corrections, or to nearest
    damping: float = 0.01  # GPTQ's lambda as a share of mean(diag H)
    activations: Activations = "static"  # one calibrated grid per tensor, or one per token
    # How static ranges are found: of what linear layers read, and of queries, keys and values (by
    # channel). Probabilities need none: they are rounded relative to the largest of their row.
    ranges: Literal["minmax", "percentile"] = "minmax"
    percentile: float = 0.9999  # share of the values inside a range, for "percentile"
    smooth: bool = True  # move outlier channels into weights first
    alpha: float = 0.5  # smoothing: share of a range that goes into the weights; Llama 0.8-0.85
    smooth_pairs: bool = False  # also from value to output, from up to down, where it is exact
    attention: bool = True  # both products of attention, and the cache
    embedding: bool = True  # its rows; a table that does more than look up and scale stays float
    head: bool = True  # what makes the logits
    # Operations that stay in floating point, the most harmful by `criterion`; both products of an
    # attention are one operation (a Llama-2-7B has 257), so that its cache is of one kind.
    skip: int = 0
    criterion: SkipBy = "kurtosis"  # what ranks them
    skip_names: tuple[str, ...] = ()  # operations to skip in any case, by module name

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip_names", tuple(self.skip_names))  # JSON gives lists
        for name, allowed in (
            ("weights", ("gptq", "rtn")),
            ("activations", ("static", "dynamic")),
            ("ranges", ("minmax", "percentile")),
            ("criterion", ("kurtosis", "max_abs", "range", "measured")),
        ):
            if getattr(self, name) not in allowed:
                options = ", ".join(allowed)
                raise ValueError(f"{name} must be one of {options}, not '{getattr(self, name)}'")
        if not 0 < self.percentile <= 1:
            raise ValueError(f"percentile must be a share in (0, 1], not {self.percentile}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha}")
        if self.skip < 0 or self.damping < 0:
            raise ValueError("skip and damping must be at least 0")


def quantize(
    model: PreTrainedModel, batches: Sequence[Batch], settings: Settings | None = None
) -> dict[str, Any]:
    """Quantize a trained model in place.

    Args:
        model: dense or pruned (zero weights stay zero); float32.
        batches: keyword arguments of the model, some hundred rows like those to come; with labels
            where the criterion is "measured". An encoder-decoder needs labels or decoder inputs.
        settings: see `Settings`; None for the defaults.

    Returns:
        the description that `install` takes, as plain JSON: names of what was quantized, and of
        what was skipped, with the scores that chose it.

    Raises:
        ValueError: no batches, activations that are not finite, an unknown operation to skip, an
            architecture whose attention can't be reached or does what is not built, a mixture of
            experts.
    """
    settings = settings or Settings()
    if not batches:
        raise ValueError("quantization needs at least one calibration batch")
    check_compressible(model)
    model.eval()
    _untie(model)
    attentions = _attentions(model, batches[0]) if settings.attention else []
    _check_names(model, attentions, settings.skip_names)
    smoothed = []
    if settings.smooth:
        rule = smoothing.Settings(alpha=settings.alpha)
        smoothed = smooth_model(model, batches, rule, pairs=settings.smooth_pairs)
    scores = _scores(model, batches, attentions, settings)
    skipped = _skipped(model, scores, settings)
    tables = _quantize_embedding(model) if settings.embedding else []
    wanted = _Wanted(
        attentions=[name for name in attentions if name not in skipped],
        outside=[name for name in outside_linears(model) if name not in skipped],
        skipped=skipped,
    )
    _quantize_linears(model, batches, wanted, settings)
    return {
        "form": "int8",
        "activations": settings.activations,
        "linears": {
            name: {"shape": [each.out_features, each.in_features], "bias": each.bias is not None}
            for name, each in model.named_modules()
            if isinstance(each, Int8Linear)
        },
        "attentions": {
            name.removesuffix(".int8"): [each.key_scale.shape[0], each.key_scale.shape[2]]
            for name, each in model.named_modules()
            if isinstance(each, AttentionGrids)
        },
        "embeddings": tables,
        "aliases": _aliases(model),
        "skipped": sorted(skipped),
        "scores": scores,
        "smoothed": smoothed,
        "settings": {**asdict(settings), "skip_names": list(settings.skip_names)},
    }


def check_quantizable(model: PreTrainedModel, batch: Batch, settings: Settings) -> None:
    """Raise the ValueError of `quantize` that can be told of a model on "meta", which is changed.

    `batch`: the least that the model takes, on "meta" too. Where the model's own code asks for
    values, which "meta" has none of, nothing is said of its attention.
    """
    check_compressible(model)
    attentions = []
    if settings.attention:
        try:
            attentions = _attentions(model.eval(), batch)
        except UnknownAttentionError:
            raise
        except Exception:  # noqa: BLE001 - whatever the library's code raises without values
            return
    _check_names(model, attentions, settings.skip_names)


def _attentions(model: PreTrainedModel, batch: Batch) -> list[str]:
    """Names of the attention modules, which from now on go through `int8_attention`."""
    use_attention(model)
    names = attention_names(model, batch)
    if not names:
        raise UnknownAttentionError(
            f"{type(model).__name__} multiplies queries and keys in code of its own, which can't "
            "be quantized; set settings.attention to false to leave attention and its cache in "
            "floating point"
        )
    return names


# --- what to skip ---------------------------------------------------------------------------


def _scores(
    model: PreTrainedModel, batches: Sequence[Batch], attentions: list[str], settings: Settings
) -> dict[str, float]:
    """The criterion of each operation that calibration reaches."""
    statistics = input_statistics(model, batches, attentions)
    if settings.criterion == "measured":
        dynamic = settings.activations == "dynamic"
        return measured_losses(model, batches, statistics, dynamic=dynamic)
    return statistics.scores(settings.criterion)


def _skipped(model: PreTrainedModel, scores: Mapping[str, float], settings: Settings) -> set[str]:
    """Names of the operations to leave: those asked for, the head if so, the worst by score."""
    named = set(settings.skip_names)
    if not settings.head:
        named |= {name for name in scores if model.get_submodule(name) is _head(model)}
    ranked = {name: score for name, score in scores.items() if name not in named}
    return named | set(highest(ranked, settings.skip))


def _check_names(model: nn.Module, attentions: Sequence[str], names: Sequence[str]) -> None:
    linears = [name for name, each in model.named_modules() if isinstance(each, LINEAR_TYPES)]
    known = [*linears, *attentions]
    unknown = sorted(set(names) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        guess = (
            f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(known)}"
        )
        raise ValueError(f"cannot skip '{unknown[0]}': no operation is called so{guess}")


# --- rounding -------------------------------------------------------------------------------


class _Seen:
    """What one linear layer reads: its range and its Hessian."""

    def __init__(self, settings: Settings) -> None:
        self.range: MinMax | Percentile = MinMax()
        if settings.ranges == "percentile":
            self.range = Percentile(settings.percentile)
        self.hessian = HessianAccumulator() if settings.weights == "gptq" else None

        self.tokens = 0

    def observe(self, x: Tensor) -> None:
        """Take rows (N, D)."""
        self.tokens += x.shape[0]
        self.range.observe(x)
        if self.hessian is not None:
            self.hessian.add(x.t()[None])


class _SeenInputs:
    """What the named layers read."""

    def __init__(self, names: Sequence[str], settings: Settings) -> None:
        self.layers = {name: _Seen(settings) for name in names}

    def see(self, name: str, _: nn.Module, x: Tensor) -> None:
        """Take rows (N, D) of a layer; those of others are let go."""
        if name in self.layers:
            self.layers[name].observe(x)


@dataclass(frozen=True)
class _Wanted:
    """Names of what is to be quantized, apart from the linear layers of blocks."""

    attentions: list[str]
    outside: list[str]
    skipped: set[str]


def _quantize_linears(
    model: PreTrainedModel, batches: Sequence[Batch], wanted: _Wanted, settings: Settings
) -> None:
    """Block after block, then what is outside: observe, then put low precision in its place."""
    masks = [masks_of(model, batch) for batch in batches]
    dynamic = settings.activations == "dynamic"
    share = settings.percentile if settings.ranges == "percentile" else None
    for step in walk(model, batches):
        names = [name for name in step.block.linears() if name not in wanted.skipped]
        inside = [name for name in wanted.attentions if name.startswith(f"{step.block.name}.")]
        modules = {name: model.get_submodule(name) for name in inside}
        seen = _SeenInputs(names, settings)
        with observed(modules, share) as observers:
            see_block(step, masks, seen.see)
        _put_linears(model, seen, settings)
        for name, observer in observers.items():
            put_grids(modules[name], observer.grids(dynamic=dynamic))
    seen = _SeenInputs(wanted.outside, settings)
    see_outside(model, wanted.outside, batches, [mask.decoder for mask in masks], seen.see)
    _put_linears(model, seen, settings)


def _put_linears(model: nn.Module, seen: _SeenInputs, settings: Settings) -> None:
    """Layers that calibration did not reach stay as they are."""
    for name, each in seen.layers.items():
        if each.tokens:
            model.set_submodule(name, _rounded(model.get_submodule(name), each, settings))


def _rounded(layer: nn.Module, seen: _Seen, settings: Settings) -> Int8Linear:
    """The INT8 layer of a linear layer; its zeros stay zeros."""
    weight = weight_matrix(layer)[0]  # type: ignore[arg-type]
    scales = weight_scales(weight)
    if seen.hessian is None:
        codes = quantize_weight(weight, scales)
    else:
        rule = gptq.Settings(damping=settings.damping)
        codes = gptq.quantize(weight, seen.hessian.hessian()[0], scales, rule, mask=weight != 0)
    grid = None if settings.activations == "dynamic" else grid_of_range(*seen.range.range())
    bias = getattr(layer, "bias", None)
    return Int8Linear.from_codes(codes, scales, bias, grid)


# --- embedding and head ---------------------------------------------------------------------


def _head(model: PreTrainedModel) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def _untie(model: PreTrainedModel) -> None:
    """Give the head a weight of its own: it is rounded by GPTQ, the embedding row by row.

    Nothing may tie them again either: the library would give the head the embedding's codes.
    """
    head = _head(model)
    if isinstance(head, nn.Linear):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._tied_weights_keys = {}
            module.all_tied_weights_keys = {}


def _quantize_embedding(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Round the input embedding; every module that shares its table gets the same new one.

    Some libraries' tables multiply what they look up by a constant (BART, Gemma): it goes into the
    steps of the rows. A table that does anything else stays float.
    """
    weight: Any = model.get_input_embeddings().weight
    sharing = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) and module.weight is weight
    }
    factors = {_factor(module) for module in sharing.values()}
    factor = factors.pop() if len(factors) == 1 else None
    if factor is None:
        return []
    table = Int8Embedding.from_weight(weight)
    table.scale *= factor
    for name in sharing:
        model.set_submodule(name, table)
    return [{"names": list(sharing), "shape": list(weight.shape)}]


def _factor(embedding: nn.Embedding) -> float | None:
    """The constant that a table multiplies its rows by; None if it is no constant."""
    if type(embedding) is nn.Embedding:
        return 1.0
    factor = float(getattr(embedding, "embed_scale", 1.0))  # the library's name for it
    ids = torch.arange(min(64, embedding.num_embeddings), device=embedding.weight.device)
    with torch.no_grad():
        plain = nn.functional.embedding(ids, embedding.weight)
        same = torch.allclose(embedding(ids), plain * factor, rtol=1e-6, atol=0.0)
    return factor if same else None


# --- storage --------------------------------------------------------------------------------


def state(model: nn.Module, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors to store: those with several names once, under the first."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in description["aliases"]
    }


def _aliases(model: nn.Module) -> dict[str, str]:
    """Names of tensors that are stored under another name already, and that name."""
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in model.state_dict().items():
        kept = first.setdefault(tensor.data_ptr(), name)
        if kept != name and tensor.numel() > 0:
            aliases[name] = kept
    return aliases


def install(model: PreTrainedModel, description: Mapping[str, Any]) -> None:
    """Put low-precision modules into a float model of the same config, in place.

    The model may lie on the "meta" device. Afterwards `load_state_dict(state, assign=True)` takes
    what `state` gave. Raises ValueError where the description names what the model does not have.
    """
    if description["attentions"]:
        use_attention(model)
    _untie(model)
    try:
        for item in description["embeddings"]:
            old = model.get_submodule(item["names"][0])
            with torch.device(_device(old)):
                table = Int8Embedding(*item["shape"])
            for name in item["names"]:
                model.set_submodule(name, table)
        for name, facts in description["linears"].items():
            outputs, inputs = facts["shape"]
            with torch.device(_device(model.get_submodule(name))):
                layer = Int8Linear(
                    inputs, outputs, bias=facts["bias"], activations=description["activations"]
                )
            model.set_submodule(name, layer)
        for name, (heads, width) in description["attentions"].items():
            with torch.device(_device(model)):  # on "meta" a step that is missing shows
                grids = AttentionGrids(heads, width)
            put_grids(model.get_submodule(name), grids)
    except AttributeError as error:
        raise ValueError(
            f"the INT8 description does not fit {type(model).__name__}: {error}"
        ) from error
    aliases = dict(description["aliases"])

    def name_again(_: nn.Module, tensors: dict[str, Tensor], prefix: str, *__: Any) -> None:
        for name, kept in aliases.items():
            if prefix + kept in tensors:
                tensors.setdefault(prefix + name, tensors[prefix + kept])

    model.register_load_state_dict_pre_hook(name_again)


def check(model: nn.Module) -> None:
    """Raise ValueError naming a layer whose loaded grid is none."""
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Linear):
            try:
                layer.grid()
            except ValueError as error:
                raise ValueError(f"the grid of '{name}' is damaged: {error}") from error


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
