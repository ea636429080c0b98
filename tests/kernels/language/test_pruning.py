"""Pruning block after block: exact shares, the right inputs, no padding, nothing else touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from goldcrest.kernels.language import pruning
from goldcrest.kernels.language.block_outputs import block_masks, recorded_outputs
from goldcrest.kernels.language.offloading import Visits
from goldcrest.kernels.language.pruning import check_prunable, prunable_linears, prune_blocks
from goldcrest.kernels.language.stacks import block_linears, stacks
from goldcrest.kernels.sparsity import magnitude, sparsegpt, wanda
from goldcrest.kernels.sparsity.model import prune_model
from tests.kernels.language import tiny_models
from tests.kernels.language.elsewhere import AWAY, HOME, Elsewhere

SPARSEGPT = sparsegpt.Settings(block=16)


def inputs(architecture: str, **changes: Any) -> list[dict[str, Any]]:
    batches = [tiny_models.batch(architecture, seed=seed, **changes) for seed in range(3)]
    for batch in batches:
        if "labels" in batch:  # as the training steps call a model: labels are theirs
            batch["decoder_input_ids"] = batch.pop("labels")
    return batches


def prune(model: Any, batches: list[dict[str, Any]], **changes: Any) -> dict[str, torch.Tensor]:
    source = [batch.get("attention_mask") for batch in batches]
    none = [None] * len(batches)
    target = none if model.config.is_encoder_decoder else source
    settings: dict[str, Any] = {"method": "sparsegpt", "sparsity": 0.75, "settings": SPARSEGPT}
    return prune_blocks(
        model, batches, **{"source": source, "target": target, **settings, **changes}
    )


def test_every_architecture_is_pruned_exactly_and_nothing_else_is(
    model: Any, architecture: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    masks = prune(model, inputs(architecture))
    assert list(masks) == block_linears(model)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert int((~mask).sum()) == round(0.75 * mask.numel()), name
        assert bool((weight[~mask] == 0).all())
    pruned = {f"{name}.weight" for name in masks}
    for name, value in model.state_dict().items():
        if name not in pruned:
            assert torch.equal(value, before[name]), name


def test_each_block_is_fed_by_the_pruned_blocks_before_it() -> None:
    """Reference: whole passes of the model for every block."""
    torch.manual_seed(0)
    model = tiny_models.llama().eval()
    other = copy.deepcopy(model)
    batches = inputs("llama")
    masks = prune(model, batches)

    def calibrate(whole: Any) -> Any:
        for batch in batches:
            whole(**batch)
            yield batch["attention_mask"]

    groups = [block.linears() for stack in stacks(other) for block in stack.blocks]
    expected = prune_model(other, groups, calibrate, "sparsegpt", 0.75, SPARSEGPT)
    for name, mask in expected.items():
        assert torch.equal(masks[name], mask), name
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(weight, other.get_submodule(name).weight)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "t5"])
def test_padding_never_enters_a_hessian(architecture: str) -> None:
    """Two rows padded to one length, against each row alone; a decoder's cross-attention reads
    the encoder's states, whose padding is not that of the decoder."""
    torch.manual_seed(0)
    model = tiny_models.MODELS[architecture]().eval()
    other = copy.deepcopy(model)
    short, long, decoder = (torch.randint(3, 64, (1, n)) for n in (4, 9, 9))
    together = {
        "input_ids": torch.cat([torch.cat([short, torch.zeros(1, 5, dtype=torch.long)], 1), long]),
        "attention_mask": torch.tensor([[1] * 4 + [0] * 5, [1] * 9]),
    }
    alone = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in (short, long)]
    if architecture == "t5":
        together["decoder_input_ids"] = decoder.repeat(2, 1)
        alone = [{**batch, "decoder_input_ids": decoder} for batch in alone]
    expected = prune(other, alone)
    masks = prune(model, [together])
    for name, mask in expected.items():
        assert float((masks[name] == mask).float().mean()) > 0.99, name
        weight = model.get_submodule(name).weight
        close = torch.isclose(weight, other.get_submodule(name).weight, atol=1e-4)
        assert float(close.float().mean()) > 0.99, name


def test_corrections_lower_the_error_of_the_model() -> None:
    """SparseGPT's model stays nearer to the dense one than magnitude's, at equal sparsity."""
    torch.manual_seed(0)
    dense = tiny_models.llama(num_hidden_layers=2).eval()
    batches = inputs("llama", rows=16)
    ways = {
        "sparsegpt": SPARSEGPT,
        "wanda": wanda.Settings(),
        "magnitude": magnitude.Settings(),
    }
    errors = {}
    with torch.no_grad():
        for method, settings in ways.items():
            model = copy.deepcopy(dense)
            prune(model, batches, method=method, settings=settings, sparsity=0.5)
            with recorded_outputs(dense) as wanted, recorded_outputs(model) as found:
                dense(**batches[0])
                model(**batches[0])
            real = batches[0]["attention_mask"].bool()
            errors[method] = float((wanted[-1] - found[-1])[real].square().mean())
    assert errors["sparsegpt"] < errors["magnitude"]


def test_a_global_threshold_holds_over_all_blocks() -> None:
    model = tiny_models.llama().eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(10)
    settings = magnitude.Settings(scope="global")
    masks = prune(model, inputs("llama"), method="magnitude", settings=settings, sparsity=0.5)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.5 * total)
    shares = {name: float((~mask).float().mean()) for name, mask in masks.items()}
    assert shares["model.layers.0.mlp.up_proj"] < 0.1 < max(shares.values())


def test_what_is_skipped_stays_dense_and_bad_input_is_told() -> None:
    model = tiny_models.llama().eval()
    names = prunable_linears(model, ["model.layers.1", "model.layers.0.mlp"])
    assert names == [
        name
        for name in block_linears(model)
        if not name.startswith(("model.layers.1.", "model.layers.0.mlp"))
    ]
    with pytest.raises(ValueError, match="no layer is called 'lm_head'"):
        prunable_linears(model, ["lm_head"])
    with pytest.raises(ValueError, match="no calibration batches"):
        prune(model, [])
    with pytest.raises(ValueError, match="can't be compressed, take a model without experts"):
        prune(tiny_models.mixtral().eval(), inputs("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        prune(model, inputs("llama"))


def test_a_pattern_that_does_not_divide_is_told_before_anything_changes() -> None:
    """Of 48 inputs runs of 32 leave 16: the first such layer comes after others were pruned."""
    model = tiny_models.llama().eval()
    before = copy.deepcopy(model.state_dict())
    settings = sparsegpt.Settings(block=32, pattern=(16, 32))
    told = (
        r"16:32 does not divide the inputs of 3 of 21 layers: model\.layers\.0\.mlp\.down_proj has"
    )
    with pytest.raises(ValueError, match=told):
        prune(model, inputs("llama"), sparsity=0.5, settings=settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.device("meta"):
        bare = tiny_models.llama()
    with pytest.raises(ValueError, match=told):
        check_prunable(bare, pattern=settings.pattern)
    skip = [f"model.layers.{place}.mlp.down_proj" for place in range(3)]
    names = check_prunable(bare, skip=skip, pattern=settings.pattern)
    assert names == [name for name in block_linears(bare) if name not in skip]
    assert list(prune(model, inputs("llama"), sparsity=0.5, settings=settings, skip=skip)) == names


def test_on_another_device_is_one_block_at_a_time_and_all_of_its_work(
    model: Any, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, batches = copy.deepcopy(model), inputs(architecture)
    expected = prune(model, batches)
    with Elsewhere(other, batches, monkeypatch) as device:
        masks = prune(other, batches, device=AWAY)
        assert device.away() == 0
        assert all(device.place(mask) == HOME for mask in masks.values())
    blocks = [block.module for stack in stacks(other) for block in stack.blocks]
    sizes = [sum(each.numel() for each in block.parameters()) for block in blocks]
    assert device.peak == max(sizes)
    assert device.computed["linalg_cholesky_ex"] == {AWAY}
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name]), name
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)


def test_a_gpu_has_its_hessians_in_exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in TF32, which training may have chosen; on a CPU nothing is changed."""
    torch.manual_seed(0)
    model = tiny_models.llama().eval()
    other = copy.deepcopy(model)
    torch.set_float32_matmul_precision("high")
    blocks = [block.module for stack in stacks(model) for block in stack.blocks]
    found = {}
    try:
        for device in ("cuda", "cpu"):
            with Visits(blocks, device):
                found[device] = torch.get_float32_matmul_precision()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found == {"cuda": "highest", "cpu": "high"}

    assert pruning._hessian_dtype(torch.device("cpu")) == torch.float64
    assert pruning._hessian_dtype(torch.device("cuda")) == torch.float32
    expected = prune(model, inputs("llama"))
    monkeypatch.setattr(pruning, "_hessian_dtype", lambda _: torch.float32)
    for name, mask in prune(other, inputs("llama")).items():
        assert float((mask == expected[name]).float().mean()) > 0.99, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_as_on_a_cpu(model: Any, architecture: str) -> None:
    other, batches = copy.deepcopy(model), inputs(architecture)
    expected = prune(model, batches)
    masks = prune(other, batches, device="cuda")
    assert {each.device.type for each in (*other.parameters(), *masks.values())} == {"cpu"}
    for name, mask in masks.items():
        assert float((mask == expected[name]).float().mean()) > 0.98, name


def test_an_error_on_another_device_leaves_nothing_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.llama().eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    batches = inputs("llama")
    with Elsewhere(model, batches, monkeypatch) as device:
        with pytest.raises(ValueError, match="hold NaN"):
            prune(model, batches, device=AWAY)
        assert device.away() == 0
    blocks = [block.module for stack in stacks(model) for block in stack.blocks]
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)


def test_errors_name_the_layer_and_what_to_do() -> None:
    """By its name in the model, not in its block."""
    unreached = tiny_models.llama().eval()
    unreached.model.layers[1].mlp.spare = torch.nn.Linear(4, 4)
    with pytest.raises(
        ValueError, match=r"reached layer 'model\.layers\.1\.mlp\.spare': leave it out by 'skip'"
    ):
        prune(unreached, inputs("llama"))
    broken = tiny_models.llama().eval()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"layer 'model\.layers\.1\.mlp\.down_proj': .* hold NaN .*: look for"
    ):
        prune(broken, inputs("llama"))


def test_outputs_of_all_blocks_are_recorded_with_the_masks_of_their_tokens(
    model: Any, architecture: str
) -> None:
    """The study's code missed blocks 10 and 11: none is missed here, in either stack."""
    batch = inputs(architecture)[0]
    with torch.no_grad(), recorded_outputs(model) as outputs:
        model(**batch)
    found = stacks(model)
    assert len(outputs) == sum(len(stack.blocks) for stack in found)
    source, target = torch.ones(2, 9), torch.zeros(2, 9)
    masks = block_masks(model, source, target)
    encoder = len(found[0].blocks) if model.config.is_encoder_decoder else 0
    assert all(mask is source for mask in masks[:encoder])
    assert all(mask is target for mask in masks[encoder:])
    with torch.no_grad():
        model(**batch)
    assert len(outputs) == len(masks), "nothing is recorded once the context has ended"


def test_the_last_output_is_the_blocks_not_the_norms() -> None:
    model = tiny_models.llama(num_hidden_layers=12).eval()
    batch = inputs("llama")[0]
    with torch.no_grad(), recorded_outputs(model) as outputs:
        hidden = model(**batch, output_hidden_states=True).hidden_states
        normed = model.model.norm(outputs[-1])
    assert len(outputs) == 12
    assert torch.equal(outputs[3], hidden[4])
    assert torch.equal(normed, hidden[-1]) and not torch.equal(outputs[-1], hidden[-1])
