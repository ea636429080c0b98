"""Smoothing of transformers: the function stays, outliers go, pairs are found where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from goldcrest.kernels.language.sequential import walk
from goldcrest.kernels.language.wiring import is_norm
from goldcrest.kernels.quantization.smoothing import Settings
from goldcrest.kernels.quantization.transformer_inputs import masks_of, see_block
from goldcrest.kernels.quantization.transformer_smoothing import linear_pairs, smooth_model
from tests.kernels.language import tiny_models


def outlying(architecture: str, **settings: Any) -> Any:
    """A model whose norms give some channels a hundred times the size of others."""
    torch.manual_seed(0)
    model = tiny_models.MODELS[architecture](**settings).eval()
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for module in model.modules():
            if is_norm(module):
                module.weight[3] *= 100
                module.weight[11] *= 30
    return model


def spread(model: Any, batch: dict[str, Tensor], names: set[str]) -> float:
    """max over channels of max |x|, over the median: the mean over the named layers."""
    found = []

    def see(name: str, _: nn.Module, x: Tensor) -> None:
        if name in names:
            largest = x.abs().amax(dim=0)
            found.append(float(largest.max() / largest.median()))

    for step in walk(model, [batch]):
        see_block(step, [masks_of(model, batch)], see)
    return sum(found) / len(found)


@pytest.mark.parametrize("architecture", sorted(tiny_models.MODELS))
@pytest.mark.parametrize("pairs", [False, True])
def test_the_function_stays_and_outliers_shrink(architecture: str, pairs: bool) -> None:
    model = outlying(architecture)
    batch = tiny_models.batch(architecture)
    with torch.no_grad():
        expected = model(**batch).logits.double()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    groups = smooth_model(model, [batch], Settings(alpha=0.5), pairs=pairs)
    with torch.no_grad():
        found = model(**batch).logits.double()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    after = {name: each.clone() for name, each in model.state_dict().items()}
    readers = {name for group in groups for name in group[1:] if "." in name}
    inside = {name for name in readers if any(part.isdigit() for part in name.split("."))}
    if architecture == "bert" and not pairs:
        assert len(groups) == 1  # only the head's norm feeds nothing else
        return
    model.load_state_dict(before)
    wide = spread(model, batch, inside)
    model.load_state_dict(after)
    assert spread(model, batch, inside) < 0.7 * wide


def test_query_key_and_value_share_a_scale() -> None:
    groups = smooth_model(outlying("llama"), [tiny_models.batch("llama")], Settings())
    first = [name.removeprefix("model.layers.0.") for name in groups[0]]
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert first == ["input_layernorm", *attention]
    assert groups[-1] == ["model.norm", "lm_head"]


CROSS = {
    "t5": ("encoder.final_layer_norm", "decoder.block.{}.layer.1.EncDecAttention.{}", "k v"),
    "whisper": (
        "model.encoder.layer_norm",
        "model.decoder.layers.{}.encoder_attn.{}",
        "k_proj v_proj",
    ),
}


@pytest.mark.parametrize("architecture", sorted(CROSS))
def test_keys_and_values_of_cross_attention_share_the_encoders_scale(architecture: str) -> None:
    """They read what the encoder's last norm gives, in every block of the decoder."""
    norm, name, kinds = CROSS[architecture]
    model, batch = outlying(architecture), tiny_models.batch(architecture)
    groups = smooth_model(model, [batch], Settings())
    (group,) = (each for each in groups if each[0] == norm)
    assert group[1:] == [name.format(block, kind) for block in range(3) for kind in kinds.split()]
    assert len([each for group in groups for each in group[1:]]) == len(
        {each for group in groups for each in group[1:]}
    )


def test_padding_of_the_encoder_changes_no_scale_of_cross_attention() -> None:
    """The decoder's tokens are fewer: its mask would not even fit."""
    made = []
    for padding in (0, 7):
        batch = tiny_models.batch("t5")
        real = batch["attention_mask"] == 1
        batch["input_ids"] = torch.where(real, batch["input_ids"], padding)
        batch["labels"] = batch["labels"][:, :5].contiguous()
        model = outlying("t5")
        with torch.no_grad():
            model.shared.weight[7] *= 50  # and it is not small
            model.shared.weight[7, 20] *= 50
        smooth_model(model, [batch], Settings())
        made.append(model.encoder.final_layer_norm.weight)
    torch.testing.assert_close(*made)


@pytest.mark.parametrize(
    ("architecture", "settings", "expected"),
    [
        ("llama", {}, [["mlp.up_proj", "mlp.down_proj"]]),
        (
            "llama",
            {"num_key_value_heads": 4},
            [["self_attn.v_proj", "self_attn.o_proj"], ["mlp.up_proj", "mlp.down_proj"]],
        ),
        ("gpt2", {}, []),  # value is a part of one layer with query and key; GELU is not linear
        ("gpt2", {"activation_function": "relu"}, [["mlp.c_fc", "mlp.c_proj"]]),
        ("bert", {}, [["attention.self.value", "attention.output.dense"]]),
    ],
)
def test_pairs_are_found_by_trying(
    architecture: str, settings: dict[str, Any], expected: list[list[str]]
) -> None:
    torch.manual_seed(0)
    model = tiny_models.MODELS[architecture](**settings).eval()
    step = next(walk(model, [tiny_models.batch(architecture)]))
    before = {name: each.clone() for name, each in step.block.module.state_dict().items()}
    assert linear_pairs(step.block.module, lambda: step.run(0)) == expected
    for name, each in step.block.module.state_dict().items():
        assert torch.equal(each, before[name])
