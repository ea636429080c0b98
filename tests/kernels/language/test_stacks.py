"""Blocks, wiring and sequential calibration, on every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, BloomConfig, BloomForCausalLM

from goldcrest.kernels.language.sequential import calibration, rows_of, walk
from goldcrest.kernels.language.stacks import block_linears, check_compressible, stacks
from goldcrest.kernels.language.wiring import shared_inputs
from goldcrest.kernels.sparsity.model import hessians
from tests.kernels.language import tiny_models

STACKS = {
    "llama": [("model.layers", 3)],
    "gpt2": [("transformer.h", 3)],
    "mpt": [("transformer.blocks", 3)],
    "opt": [("model.decoder.layers", 3)],
    "t5": [("encoder.block", 3), ("decoder.block", 3)],
    "bert": [("bert.encoder.layer", 3)],
    "whisper": [("model.encoder.layers", 2), ("model.decoder.layers", 3)],
}


def block_outputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every block's output in a plain forward pass: the reference of the replays."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, __, y: found.update({name: y if isinstance(y, Tensor) else y[0]})

    handles = [
        block.module.register_forward_hook(keep(block.name))
        for stack in stacks(model)
        for block in stack.blocks
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def test_stacks_are_found_by_structure(architecture: str, model: Any) -> None:
    assert [(s.name, len(s.blocks)) for s in stacks(model)] == STACKS[architecture]


def test_head_and_embeddings_are_no_block_layers(model: Any) -> None:
    names = block_linears(model)
    assert len(names) == len(set(names))
    assert model.get_output_embeddings() not in [model.get_submodule(name) for name in names]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no list of blocks"):
        stacks(nn.Sequential(nn.Linear(2, 2)))


def test_experts_that_nothing_would_compress_are_refused() -> None:
    """They are no linear layers: attention alone would be pruned, and 75 % reported."""
    message = (
        r"MixtralForCausalLM keeps 86% of its blocks' weights outside of linear layers "
        r"\(model\.layers\.0\.mlp\.experts\.gate_up_proj, .*without experts"
    )
    with pytest.raises(ValueError, match=message):
        check_compressible(tiny_models.mixtral())


def test_a_block_that_serves_as_several_layers_is_refused() -> None:
    """Its later uses would be fed what no calibration has seen."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = AlbertConfig(vocab_size=64, embedding_size=16, num_hidden_layers=5, **sizes)
    with pytest.raises(ValueError, match="has 5 layers of 1 blocks of weights"):
        check_compressible(AlbertForMaskedLM(config))


def test_tables_and_convolutions_in_blocks_are_let_pass(model: Any) -> None:
    """Relative positions of T5 and the like are no reason to refuse."""
    check_compressible(model)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))
    check_compressible(bloom)


def test_replays_equal_the_plain_forward_pass(architecture: str, model: Any) -> None:
    batch = tiny_models.batch(architecture)
    expected = block_outputs(model, batch)
    for step in walk(model, [batch]):
        with torch.no_grad():
            assert torch.equal(step.run(0), expected.pop(step.block.name))
    assert not expected


def test_later_blocks_see_what_earlier_ones_became(architecture: str, model: Any) -> None:
    """Also a decoder: its blocks read the states of the changed encoder."""
    batch = tiny_models.batch(architecture)
    seen: dict[str, Tensor] = {}
    for step in walk(model, [batch]):
        with torch.no_grad():
            for name in step.block.linears():
                model.get_submodule(name).weight.mul_(0.5)
            seen[step.block.name] = step.run(0)
    for name, expected in block_outputs(model, batch).items():
        torch.testing.assert_close(seen[name], expected)


def test_the_mode_comes_back_also_when_the_walk_is_left(model: Any, architecture: str) -> None:
    model.train()
    steps = walk(model, [tiny_models.batch(architecture)])
    next(steps)
    assert not model.training
    steps.close()
    assert model.training


def test_the_mode_comes_back_where_there_is_nothing_to_walk() -> None:
    bare = nn.Sequential(nn.Linear(2, 2)).train()
    with pytest.raises(ValueError, match="Sequential"):
        next(walk(bare, [{"x": torch.zeros(1, 2)}]))
    assert bare.training


def test_no_batches_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="no calibration batches"):
        next(walk(model, []))


def test_hessians_block_by_block_equal_those_of_the_whole_model(
    architecture: str, model: Any
) -> None:
    """Without padding: what a mask leaves out is the caller's to say."""
    batches = [tiny_models.batch(architecture, rows=1, seed=seed) for seed in (0, 1)]
    for batch in batches:
        batch.pop("attention_mask", None)

    def whole(each: nn.Module) -> Any:
        for batch in batches:
            each(**batch)
            yield None

    expected = hessians(model, block_linears(model), whole)
    for step in walk(model, batches):
        prefix = f"{step.block.name}."
        names = [name.removeprefix(prefix) for name in step.block.linears()]
        found = hessians(step.block.module, names, calibration(step, [None] * len(step)))
        for name in names:
            torch.testing.assert_close(found[name], expected[prefix + name])


def test_readers_of_one_tensor_are_one_group(architecture: str, model: Any) -> None:
    for step in walk(model, [tiny_models.batch(architecture)]):
        groups = shared_inputs(step.block.module, lambda step=step: step.run(0), step.block.name)
        layers = [name for group in groups for name in group.layers]
        assert sorted(layers) == sorted(step.block.linears())
        for group in groups:
            prefix = f"{step.block.name}."
            inputs = [
                rows_of(step, step.block.module.get_submodule(name.removeprefix(prefix)), 0)
                for name in group.layers
            ]
            assert all(torch.equal(inputs[0], other) for other in inputs[1:])


def test_norms_of_llama_and_none_of_bert_can_be_folded_into() -> None:
    """BERT's norm feeds the residual sum too: dividing its gain would change the function."""
    for name, expected in (
        ("llama", ["input_layernorm", None, "post_attention_layernorm", None]),
        ("bert", [None, None, None, None]),
    ):
        model = tiny_models.MODELS[name]().eval()
        step = next(walk(model, [tiny_models.batch(name)]))
        before = {key: value.clone() for key, value in step.block.module.state_dict().items()}
        groups = shared_inputs(step.block.module, lambda step=step: step.run(0))
        assert [group.norm for group in groups] == expected
        after = step.block.module.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
