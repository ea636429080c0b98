"""Every architecture through the weight-only flow: block after block, folded, installed again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from goldcrest.kernels import weight_only
from goldcrest.kernels.language.sequential import walk
from goldcrest.kernels.language.stacks import block_linears, stacks
from goldcrest.kernels.language.wiring import linear_makers, shared_inputs
from goldcrest.kernels.weight_only import gptq, rtn, transformer
from goldcrest.kernels.weight_only.block import of_linears
from goldcrest.kernels.weight_only.grid import GridSettings, round_to_grid
from goldcrest.kernels.weight_only.linear import WeightOnlyLinear
from goldcrest.kernels.weight_only.packing import stored_bytes
from goldcrest.kernels.weight_only.transformer import Options, install, quantize, sensitivities
from tests.kernels.language import tiny_models

GRID = GridSettings(group_size=16)
EXACT = Options(compute="float32")
SMALL: dict[str, dict[str, int]] = {
    "llama": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 2},
    "mpt": {"n_layers": 1},
    "opt": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1},
    "bert": {"num_hidden_layers": 1},
    "whisper": {"encoder_layers": 1, "decoder_layers": 1},
}
"""Blocks of each: enough to see that the second is fed by the first."""
QUICK = {"autoround": {"iterations": 4}, "teq": {"steps": 4}, "awq": {"steps": 3}}


def fresh(architecture: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return tiny_models.MODELS[architecture](**{**SMALL[architecture], **settings}).eval()


def loud(model: nn.Module) -> nn.Module:
    """Norm gains far from 1 and channels of different size, as trained models have them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" in name or ("norm" in name.lower() and name.endswith("weight")):
                spread = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + spread.abs()))
    return model


def batches(architecture: str, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of different lengths, each with padding where the architecture has any."""
    return [tiny_models.batch(architecture, seed=i, length=7 + i) for i in range(count)]


def run(model: Any, method: str, given: list[dict[str, Tensor]], **changes: Any) -> dict[str, Any]:
    settings = weight_only.load(method).Settings(**QUICK.get(method, {}))
    changes = {"grid": GRID, "options": EXACT, "settings": settings, **changes}
    return quantize(model, given, method=method, seed=3, **changes)


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


@pytest.mark.parametrize("architecture", sorted(tiny_models.MODELS))
@pytest.mark.parametrize("method", weight_only.methods())
def test_every_method_on_every_architecture(method: str, architecture: str) -> None:
    """All block layers hold codes, the head and embeddings do not, and the model still works.

    What `install` puts into a model on the meta device takes the state and computes the same.
    """
    model, given = loud(fresh(architecture)), batches(architecture)
    wanted = logits(model, given[0])
    names = block_linears(model)
    before = {n: p.clone() for n, p in model.named_parameters() if "embed" in n or "head" in n}
    description = json.loads(json.dumps(run(model, method, given)))
    got = logits(model, given[0])
    assert 0 < float((got - wanted).norm() / wanted.norm()) < 0.5
    assert list(description["layers"]) == names
    assert all(isinstance(model.get_submodule(name), WeightOnlyLinear) for name in names)
    assert not model.training
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.device("meta"):
        other = fresh(architecture)
    install(other, description)
    other.load_state_dict(model.state_dict(), assign=True)
    for name in names:
        x = torch.randn(2, description["layers"][name]["columns"])
        assert torch.equal(other.get_submodule(name)(x), model.get_submodule(name)(x))


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
@pytest.mark.parametrize("method", weight_only.methods())
def test_the_same_seed_gives_the_same_codes(method: str, architecture: str) -> None:
    one, two = (fresh(architecture) for _ in range(2))
    first, second = (run(each, method, batches(architecture)) for each in (one, two))
    assert first == second
    state = two.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_calibrated_methods_beat_rtn_on_calibration_data(architecture: str) -> None:
    """The model's outputs on real tokens; layers and blocks have tests of their own."""
    given = batches(architecture, 4)

    def error(method: str, **settings: Any) -> float:
        model = loud(fresh(architecture))
        wanted = [logits(model, batch) for batch in given]
        rule = weight_only.load(method).Settings(**settings)
        run(model, method, given, grid=GridSettings(group_size=16, bits=3), settings=rule)
        pairs = zip((logits(model, batch) for batch in given), wanted, strict=True)
        return float(sum((got - want).square().mean() for got, want in pairs))

    rtn = error("rtn")
    assert error("gptq") < rtn
    assert error("awq", steps=5) < rtn
    assert error("autoround", iterations=20) < rtn


@pytest.mark.parametrize("method", ["awq", "teq"])
@pytest.mark.parametrize("architecture", sorted(tiny_models.MODELS))
def test_scales_are_folded_into_norms_or_kept(architecture: str, method: str) -> None:
    """Q(W diag t) next to an input over t, whoever divides it (property 2).

    Of a norm before, t is its old gain over its new one; else it stands beside the codes, but where
    a linear layer before takes it. Codes have 8 bits here, so that every weight is within half a
    step of W diag t.
    """
    model, given = loud(fresh(architecture)), batches(architecture)
    before = {name: value.clone() for name, value in model.named_parameters()}
    groups, makers = [], {}
    for step in walk(model, given):
        where = (step.block.module, lambda s=step: s.run(0), step.block.name)
        groups += (found := shared_inputs(*where))
        makers |= linear_makers(where[0], found, *where[1:])
    rule = weight_only.load(method)
    settings = rule.Settings(steps=3, clip=False) if method == "awq" else rule.Settings(steps=3)
    run(model, method, given, grid=GridSettings(group_size=16, bits=8), settings=settings)
    after = dict(model.named_parameters())
    folded = kept = 0
    for group in groups:
        if group in makers:
            continue
        t = torch.ones(())
        if group.norm is not None:
            t = before[f"{group.norm}.weight"] / after[f"{group.norm}.weight"]
            folded += not torch.equal(before[f"{group.norm}.weight"], after[f"{group.norm}.weight"])
            bias = f"{group.norm}.bias"
            if bias in before:
                torch.testing.assert_close(after[bias] * t, before[bias])
        for name in group.layers:
            layer = model.get_submodule(name)
            weight = before[f"{name}.weight"]
            weight = weight.t() if architecture == "gpt2" else weight
            scales = layer.input_scales
            assert scales is None or group.norm is None
            kept += scales is not None
            wanted = weight * (t if scales is None else scales)
            quantized = layer.quantized()
            if name in makers.values():  # rows were divided after they were rounded
                own = round_to_grid(wanted, GridSettings(group_size=16, bits=8))
                quantized = replace(quantized, scales=own.scales)
            step = quantized.scales[:, quantized.column_groups()]
            assert bool(((quantized.decode() - wanted).abs() <= 0.501 * step).all())
    assert folded or architecture == "bert"  # whose norms stand behind the residual sums
    assert kept or architecture in ("opt", "t5")  # where linear layers take all the others


def test_scales_of_attention_and_gated_layers_go_into_v_and_up() -> None:
    """Rows of v over t, columns of o times t: the scales of the quantized v are divided."""
    given = batches("llama")
    model = loud(fresh("llama", num_key_value_heads=4))
    before = {name: value.clone() for name, value in model.named_parameters()}
    grid, moved = GridSettings(group_size=16, bits=3), 0
    description = run(model, "teq", given, grid=grid)
    assert not any("input_scales" in form["parts"] for form in description["layers"].values())
    for place in range(2):
        block = model.model.layers[place]
        prefix = f"model.layers.{place}"
        pairs = (
            ("input_layernorm", "self_attn.v_proj", "self_attn.o_proj"),
            ("post_attention_layernorm", "mlp.up_proj", "mlp.down_proj"),
        )
        for norm, maker, reader in pairs:
            gain = f"{prefix}.{norm}.weight"
            own = before[gain] / model.get_parameter(gain)
            rounded = round_to_grid(before[f"{prefix}.{maker}.weight"] * own, grid)
            made = block.get_submodule(maker).quantized()
            t = (rounded.scales / made.scales)[:, 0]
            assert torch.equal(made.codes, rounded.codes)
            moved += not bool((t == 1).all())
            wanted = before[f"{prefix}.{reader}.weight"] * t
            got = block.get_submodule(reader).quantized()
            step = got.scales[:, got.column_groups()]
            assert bool(((got.decode() - wanted).abs() <= 0.501 * step).all())
    assert moved


def test_scales_go_into_layers_before_that_stay_float() -> None:
    given = batches("t5")
    model = fresh("t5", num_layers=1)
    kept = "encoder.block.0.layer.0.SelfAttention.v"
    before = model.get_submodule(kept).weight.clone()
    run(model, "teq", given, high_precision=[kept])
    after = model.get_submodule(kept).weight
    rows = (after / before)[:, :1]
    assert not bool((rows == 1).all())
    assert not model.get_submodule(kept.replace(".v", ".o")).description()["parts"][1:]


@pytest.mark.parametrize(
    ("architecture", "settings", "found"),
    [
        ("llama", {}, {"mlp.down_proj": "mlp.up_proj"}),  # fewer v heads than o reads
        ("llama", {"num_key_value_heads": 4},
         {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}),
        ("gpt2", {}, {}),  # v is a third of a fused layer; GELU does not scale
        ("whisper", {}, {"self_attn.out_proj": "self_attn.v_proj"}),
    ],
)  # fmt: skip
def test_linear_layers_that_can_take_scales_are_found(
    architecture: str, settings: dict[str, Any], found: dict[str, str]
) -> None:
    """And the model is left as it was, to the last bit."""
    model = fresh(architecture, **settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = next(walk(model, batches(architecture)))
    where = (step.block.module, lambda: step.run(0))
    makers = linear_makers(where[0], shared_inputs(*where), where[1])
    assert {group.layers[0]: maker for group, maker in makers.items()} == found
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scales_that_no_norm_takes_can_be_forbidden() -> None:
    for method in ("awq", "teq"):
        model = loud(fresh("llama"))
        options = Options(compute="float32", insert_scales=False)
        description = run(model, method, batches("llama"), options=options)
        assert not any("input_scales" in form["parts"] for form in description["layers"].values())


def test_layers_kept_float_are_scaled_with_the_norm_they_share() -> None:
    """`k_proj` reads the norm that takes the scales of q and v: its weight makes up for it."""
    given = batches("llama")
    model = loud(fresh("llama"))
    kept = [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    eight = ["model.layers.1.mlp.up_proj"]
    before = {name: value.clone() for name, value in model.named_parameters()}
    description = run(
        model, "teq", given, grid=GridSettings(group_size=16, bits=3),
        high_precision=kept, eight_bits=eight,
    )  # fmt: skip
    assert description["high_precision"] == kept
    assert description["eight_bits"] == eight
    assert not set(kept) & set(description["layers"])
    assert description["layers"][eight[0]]["bits"] == 8
    moved = 0
    for place, name in enumerate(kept):
        gain = f"model.layers.{place}.input_layernorm.weight"
        t = before[gain] / model.get_parameter(gain)
        moved += not bool((t == 1).all())
        torch.testing.assert_close(
            model.get_parameter(f"{name}.weight"), before[f"{name}.weight"] * t
        )
    assert moved
    gain = "model.layers.1.post_attention_layernorm.weight"
    wanted = before[f"{eight[0]}.weight"] * (before[gain] / model.get_parameter(gain))
    torch.testing.assert_close(
        model.get_submodule(eight[0]).quantized().decode(), wanted, rtol=0.02, atol=0.01
    )


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        *((method, "t5") for method in weight_only.methods()),
        *(("gptq", "bert"), ("awq", "llama"), ("gptq", "opt"), ("awq", "opt")),
    ],
)
def test_padding_counts_nowhere(method: str, architecture: str) -> None:
    """Other tokens under the mask, the same codes: in H, in inputs, in outputs."""
    found = []
    for filler in (0, 17):
        given = batches(architecture)
        for batch in given:
            padding = batch["attention_mask"] == 0
            batch["input_ids"] = batch["input_ids"].masked_fill(padding, filler)
            if "labels" in batch:
                batch["labels"] = batch["labels"].clone()
                batch["labels"][1, 5:] = -100
                # A decoder's padding is what the labels leave out.
                batch["decoder_input_ids"] = torch.where(
                    batch["labels"] == -100, filler, batch["labels"].clamp(min=0)
                )
        model = fresh(architecture)
        run(model, method, given)
        found.append({n: t for n, t in model.state_dict().items() if n.endswith("codes")})
    assert found[0]
    differing = [name for name, codes in found[0].items() if not torch.equal(codes, found[1][name])]
    assert not differing


@pytest.mark.parametrize(
    ("architecture", "fused"), [("gpt2", "transformer.h.0.attn.c_attn"),
                                ("mpt", "transformer.blocks.0.attn.Wqkv")]
)  # fmt: skip
def test_awq_does_not_clip_queries_and_keys_that_share_a_matrix(
    architecture: str, fused: str
) -> None:
    """Of the first block, whose inputs clipping elsewhere can't change."""
    given = batches(architecture)
    found = []
    for clip in (True, False):
        model = loud(fresh(architecture))
        run(model, "awq", given, settings=weight_only.load("awq").Settings(steps=3, clip=clip))
        found.append(model.get_submodule(fused).quantized().scales)
    assert torch.equal(*found)


def test_the_next_block_is_fed_by_the_quantized_prefix() -> None:
    """GPTQ's codes of the second block are those of an H that the quantized first block made."""
    given = batches("gpt2")
    model, half = fresh("gpt2"), fresh("gpt2")
    run(model, "gptq", given)
    run(half, "gptq", given, high_precision=["transformer.h.1"])

    def codes(prefix: nn.Module) -> Tensor:
        """Of the second block's first layer, from the tokens that reach its norm."""
        seen: list[Tensor] = []
        block = prefix.transformer.h[1]
        handle = block.ln_1.register_forward_hook(lambda _, __, y: seen.append(y))
        for batch in given:
            logits(prefix, batch)
        handle.remove()
        masks = [batch["attention_mask"] != 0 for batch in given]
        x = torch.cat([y[mask] for y, mask in zip(seen, masks, strict=True)])
        layer = of_linears({"w": block.attn.c_attn.weight.t().contiguous()}, x)
        return gptq.quantize(layer, grid=GRID, settings=gptq.Settings())["w"].codes

    found = model.transformer.h[1].attn.c_attn.quantized().codes
    assert float((codes(half) == found).float().mean()) > 0.999
    assert float((codes(fresh("gpt2")) == found).float().mean()) < 0.999


def test_true_sequential_sees_the_layers_before_in_its_block() -> None:
    given = batches("llama")
    one, two = fresh("llama"), fresh("llama")
    run(one, "gptq", given)
    run(two, "gptq", given, options=Options(compute="float32", true_sequential=False))
    first, second = one.state_dict(), two.state_dict()
    q, down = ("model.layers.0.self_attn.q_proj.codes", "model.layers.0.mlp.down_proj.codes")
    assert torch.equal(first[q], second[q])
    assert not torch.equal(first[down], second[down])


def test_group_128_takes_less_than_16_hundredths_of_float32() -> None:
    """Counted in the bytes of the quantized weights' tensors, headers too."""
    model = fresh("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    run(model, "rtn", batches("llama"), grid=GridSettings(group_size=128))
    stored = plain = 0
    for layer in transformer.quantized_layers(model).values():
        stored += sum(each.numel() * each.element_size() for each in layer.buffers())
        plain += 4 * layer.form.rows * layer.form.columns
        assert stored_bytes(layer.quantized()) <= 0.14 * 4 * layer.form.rows * layer.form.columns
    assert stored <= 0.16 * plain


def test_sizes_that_do_not_divide_are_told_before_anything_changes() -> None:
    model = fresh("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (
        lambda grid: quantize(model, batches("llama"), method="rtn", grid=grid),
        lambda grid: sensitivities(model, batches("llama"), grid),
    ):
        with pytest.raises(ValueError) as raised:
            call(GridSettings(group_size=32))
        told = str(raised.value)
        assert "groups of 32 do not divide the inputs of 2 of 14 layers" in told
        assert "model.layers.0.mlp.down_proj has 48 (only -1 fits, one group a row)" in told
    wide = fresh("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"down_proj has 96 \(g = 32 fits, or -1\)"):
        quantize(wide, batches("llama"), method="rtn", grid=GridSettings(group_size=64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ragged = GridSettings(group_size=32, ragged=True)
    assert run(model, "gptq", batches("llama"), grid=ragged)["layers"]
    run(fresh("llama"), "awq", batches("llama"), grid=GridSettings(group_size=-1))


def test_sensitivity_finds_the_planted_outlier_layer() -> None:
    """A column of a hundred times the others spoils the grids of one layer (property 6).

    It reads a channel that the norm before always sets to 0, so the float model is the same.
    """
    model = fresh("llama")
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[::16] = 0
        model.get_submodule(name).weight[:, ::16] = 5.0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    errors = sensitivities(model, batches("llama"), GRID, skip=["model.layers.0.self_attn"])
    assert max(errors, key=errors.__getitem__) == name
    assert set(errors) == {n for n in block_linears(model) if ".layers.0.self_attn" not in n}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_pruned_weights_stay_zero() -> None:
    for method in weight_only.methods():
        model = fresh("llama")
        with torch.no_grad():
            for name in block_linears(model):
                weight = model.get_submodule(name).weight
                weight.mul_(torch.rand(weight.shape) > 0.7)
        zeros = {name: model.get_submodule(name).weight == 0 for name in block_linears(model)}
        keep = {"keep_zeros": True} if method in ("gptq", "autoround") else {}
        settings = weight_only.load(method).Settings(**QUICK.get(method, {}), **keep)
        run(model, method, batches("llama"), settings=settings)
        for name, zero in zeros.items():
            assert bool((model.get_submodule(name).quantized().effective()[zero] == 0).all())


def test_layers_that_no_token_reached_are_rounded_to_nearest() -> None:
    model = fresh("llama")
    extra = nn.Linear(32, 32)
    model.model.layers[1].register_module("spare", extra)
    wanted = round_to_grid(extra.weight, GRID).codes
    for method in ("gptq", "autoround"):
        model = fresh("llama")
        model.model.layers[1].register_module("spare", extra)
        assert run(model, method, batches("llama"))["uncalibrated"] == ["model.layers.1.spare"]
        assert torch.equal(model.model.layers[1].spare.quantized().codes, wanted)


def test_what_cannot_be_done_is_refused() -> None:
    model, given = fresh("gpt2"), batches("gpt2")
    with pytest.raises(ValueError, match=r"did you mean 'transformer\.h\.0\.attn\.c_attn'"):
        run(model, "rtn", given, high_precision=["transformer.h.0.attn.c_atn"])
    with pytest.raises(ValueError, match="no calibration batches"):
        run(model, "rtn", [])
    with pytest.raises(ValueError, match="unknown weight-only method 'int3'"):
        run(model, "int3", given)
    description = run(model, "rtn", given)
    for damage, message in (
        ({}, "damaged: 'layers'"),
        ({"layers": {"nowhere": {}}}, "damaged"),
        ({"layers": {"lm_head": description["layers"]["transformer.h.0.attn.c_attn"]}}, "lm_head"),
    ):
        with pytest.raises(ValueError, match=message):
            install(fresh("gpt2"), damage)


def test_progress_counts_blocks() -> None:
    told: list[tuple[int, int]] = []
    run(fresh("t5"), "rtn", batches("t5"), progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]
    assert sum(len(stack.blocks) for stack in stacks(fresh("t5"))) == 2


@pytest.mark.parametrize("architecture", ["t5", "whisper"])
def test_targets_of_a_decoder_are_the_float_models(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fed by the float decoder *and* by the states of the float encoder, not the quantized one."""
    model, given = loud(fresh(architecture)), batches(architecture)
    last = [stack.blocks[-1] for stack in stacks(model)][-1]
    outputs: list[Tensor] = []
    handle = last.module.register_forward_hook(lambda _, __, y: outputs.append(y))
    for batch in given:
        logits(model, batch)
    handle.remove()
    expected = [y if isinstance(y, Tensor) else y[0] for y in outputs]
    seen: list[Tensor] = []
    quantize_block = rtn.quantize

    def look(block: Any, **settings: Any) -> Any:
        seen.append(block.targets)
        return quantize_block(block, **settings)

    monkeypatch.setattr(rtn, "quantize", look)
    monkeypatch.setattr(rtn, "READS", frozenset({"outputs"}))
    run(model, "rtn", given, grid=GridSettings(group_size=16, bits=2))
    for found, wanted in zip(seen[-1], expected, strict=True):
        real = wanted.flatten(0, 1)
        torch.testing.assert_close(found[: len(real)], real)


def test_a_mixture_of_experts_is_refused_before_anything_changes() -> None:
    model = tiny_models.mixtral().eval()
    with pytest.raises(ValueError, match=r"outside of linear layers .* a model without experts"):
        run(model, "rtn", batches("llama"))
    assert not transformer.quantized_layers(model)
