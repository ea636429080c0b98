"""INT8 of every architecture: accuracy, storage, generation, what is skipped, what padding does."""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from goldcrest.kernels.language.architectures import settle
from goldcrest.kernels.language.sequential import walk
from goldcrest.kernels.language.stacks import LINEAR_TYPES, block_linears
from goldcrest.kernels.quantization.int8_cache import (
    Int8CacheLayer,
    Int8SlidingCacheLayer,
    cache_bytes,
)
from goldcrest.kernels.quantization.int8_linear import Int8Embedding, Int8Linear
from goldcrest.kernels.quantization.int8_sensitivity import mean_loss
from goldcrest.kernels.quantization.int8_transformer import (
    Settings,
    check_quantizable,
    install,
    quantize,
    state,
)
from goldcrest.kernels.quantization.transformer_inputs import masks_of, see_block
from goldcrest.kernels.sparsity.hessian import weight_matrix
from tests.kernels.language import tiny_models

SMALL: dict[str, dict[str, int]] = {
    "llama": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 2},
    "mpt": {"n_layers": 2},
    "opt": {"num_hidden_layers": 2},
    "t5": {"num_layers": 2},
    "bert": {"num_hidden_layers": 2},
    "whisper": {"encoder_layers": 1, "decoder_layers": 2},
}
ARCHITECTURES = sorted(SMALL)


def float_model(architecture: str) -> Any:
    torch.manual_seed(0)
    return tiny_models.MODELS[architecture](**SMALL[architecture]).eval()


def batches(architecture: str, count: int = 2) -> list[dict[str, Tensor]]:
    return [tiny_models.batch(architecture, rows=3, seed=seed) for seed in range(count)]


@dataclass
class Pair:
    """A model before and after."""

    dense: Any
    int8: Any
    description: dict[str, Any]


@functools.cache
def pair(architecture: str) -> Pair:
    """Shared by tests, which must not change it."""
    dense, model = float_model(architecture), float_model(architecture)
    return Pair(dense, model, quantize(model, batches(architecture)))


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_is_quantized_and_logits_stay_close(architecture: str) -> None:
    made = pair(architecture)
    unseen = tiny_models.batch(architecture, rows=3, seed=9)
    assert 0 < relative_error(logits(made.int8, unseen), logits(made.dense, unseen)) < 0.1
    left = [name for name, each in made.int8.named_modules() if isinstance(each, LINEAR_TYPES)]
    assert left == []
    assert isinstance(made.int8.get_input_embeddings(), Int8Embedding)
    linears = [name for name, each in made.dense.named_modules() if isinstance(each, LINEAR_TYPES)]
    assert sorted(made.description["linears"]) == sorted(linears)
    layers = {"t5": 2 + 2 * 2, "whisper": 1 + 2 * 2}.get(architecture, 2)
    assert len(made.description["attentions"]) == layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stored_model_is_the_same_model(architecture: str) -> None:
    """Onto "meta", as bundles are loaded: names stored once, ties neither lost nor made anew."""
    made = pair(architecture)
    description = json.loads(json.dumps(made.description))
    stored = {name: each.clone() for name, each in state(made.int8, description).items()}
    with torch.device("meta"):
        again = tiny_models.MODELS[architecture](**SMALL[architecture]).eval()
    install(again, description)
    assert not again.load_state_dict(stored, assign=True).missing_keys
    settle(again)
    batch = tiny_models.batch(architecture, seed=9)
    assert torch.equal(logits(again, batch), logits(made.int8, batch))
    tables = sum(name.endswith(("embed_tokens.weight", "shared.weight")) for name in stored)
    assert tables == (architecture in ("llama", "opt", "t5", "whisper"))
    small = sum(each.numel() * each.element_size() for each in stored.values())
    assert small < sum(4 * each.numel() for each in made.dense.parameters()) * 0.7


def bart() -> BartForConditionalGeneration:
    """One table for encoder, decoder and head, whose rows are multiplied by sqrt(D)."""
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "scale_embedding": True}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=64, max_position_embeddings=32, **heads, **widths, **layers, **ends)
    )


def gemma() -> GemmaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GemmaForCausalLM(GemmaConfig(vocab_size=64, **sizes, **heads, **ends))


@pytest.mark.parametrize(("make", "like"), [(bart, "t5"), (gemma, "llama")])
def test_tables_that_multiply_their_rows_are_quantized_too(make: Any, like: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batch = tiny_models.batch(like)
    expected = logits(model, batch)
    description = quantize(model, [batch])
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert relative_error(logits(model, batch), expected) < 0.1
    stored = {name: each.clone() for name, each in state(model, description).items()}
    with torch.device("meta"):
        again = make().eval()
    install(again, description)
    again.load_state_dict(stored, assign=True)
    settle(again)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_a_table_of_a_kind_of_its_own_stays_float() -> None:
    class Shifted(torch.nn.Embedding):
        embed_scale = 2.0

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale + 1

    model = float_model("gpt2")
    weight = model.transformer.wte.weight
    model.transformer.wte = Shifted(*weight.shape, _weight=weight.detach().clone())
    description = quantize(model, batches("gpt2"))
    assert description["embeddings"] == []
    assert isinstance(model.transformer.wte, Shifted)


def test_a_description_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit GPT2LMHeadModel"):
        install(float_model("gpt2"), pair("llama").description)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mpt", "t5", "whisper"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_the_int8_cache_equals_generation_without(
    architecture: str, beams: int
) -> None:
    model = pair(architecture).int8
    batch = tiny_models.batch(architecture, length=6)
    prompt = {name: each for name, each in batch.items() if name != "labels"}
    if "attention_mask" in prompt and architecture != "t5":
        prompt = {name: each.flip(1) for name, each in prompt.items()}  # decoders pad on the left
    rule: dict[str, Any] = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "num_beams": beams,
    }
    rule |= {"return_dict_in_generate": True}
    made = model.generate(**prompt, **rule, use_cache=True)
    plain = model.generate(**prompt, **rule, use_cache=False)
    assert torch.equal(made.sequences, plain.sequences)
    # Whisper's own generate gives back a cache that it has cut up and put together again.
    cache = made.past_key_values if architecture != "whisper" else model(**batch).past_key_values
    if isinstance(cache, EncoderDecoderCache):
        layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    else:
        layers = cache.layers
    assert layers
    assert all(isinstance(layer, Int8CacheLayer) for layer in layers)


def mistral() -> MistralForCausalLM:
    """Queries see four tokens back, themselves included."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return MistralForCausalLM(MistralConfig(vocab_size=64, **sizes, **heads, **ends))


def neox() -> GPTNeoXForCausalLM:
    """Attention is called with `layer_past`, where others say `past_key_values`."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, num_attention_heads=4, **sizes, **ends))


@pytest.mark.parametrize("make", [mistral, neox])
@pytest.mark.parametrize("beams", [1, 3])
def test_pasts_of_other_kinds_are_int8_too(make: Any, beams: int) -> None:
    """Windows that slide, on both sides of the first full one, and another name for the cache."""
    torch.manual_seed(0)
    model = make().eval()
    dense = copy.deepcopy(model)
    quantize(model, batches("llama"))
    prompt = {name: x.flip(1) for name, x in tiny_models.batch("llama", length=3).items()}
    rule = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    made = model.generate(**prompt, **rule, return_dict_in_generate=True)
    plain = model.generate(**prompt, **rule, use_cache=False)
    assert torch.equal(made.sequences, plain)
    kinds = (Int8CacheLayer, Int8SlidingCacheLayer)
    assert all(isinstance(layer, kinds) for layer in made.past_key_values.layers)
    floats = dense.generate(**prompt, **rule, return_dict_in_generate=True).past_key_values
    assert cache_bytes(made.past_key_values) * 4 == cache_bytes(floats)


def test_a_cache_that_is_given_is_used_and_takes_a_quarter() -> None:
    made = pair("llama")
    prompt = tiny_models.batch("llama", rows=1, length=12)
    small, big = DynamicCache(), DynamicCache()
    rule = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    made.int8.generate(**prompt, **rule, past_key_values=small)
    made.dense.generate(**prompt, **rule, past_key_values=big)
    assert cache_bytes(small) * 4 == cache_bytes(big)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_one_grid_per_token_needs_no_calibrated_range(architecture: str) -> None:
    model = float_model(architecture)
    description = quantize(model, batches(architecture, 1), Settings(activations="dynamic"))
    assert not any(name.endswith("input_scale") for name in state(model, description))
    unseen = tiny_models.batch(architecture, rows=3, seed=9)
    error = relative_error(logits(model, unseen), logits(float_model(architecture), unseen))
    assert error < 0.1
    again = float_model(architecture)
    install(again, description)
    again.load_state_dict(state(model, description), assign=True)
    assert torch.equal(logits(again, unseen), logits(model, unseen))


def test_pruned_weights_stay_zero() -> None:
    model = float_model("gpt2")  # transposed weights
    masks = {}
    for name in block_linears(model):
        layer = model.get_submodule(name)
        with torch.no_grad():
            layer.weight[torch.rand_like(layer.weight) < 0.7] = 0.0
        masks[name] = weight_matrix(layer)[0] != 0
    quantize(model, batches("gpt2"))
    for name, mask in masks.items():
        assert bool((model.get_submodule(name).weight[~mask] == 0).all())
        assert bool(model.get_submodule(name).weight[mask].any())


@pytest.mark.parametrize("architecture", ["llama", "opt", "t5"])
def test_padding_changes_nothing(architecture: str) -> None:
    """What stands in padded places, and how many there are, must not reach any grid or weight."""
    given = tiny_models.batch(architecture, rows=2, seed=1)
    more = {name: each for name, each in given.items() if name == "labels"}  # of another length
    for name in ("input_ids", "attention_mask"):
        more[name] = torch.nn.functional.pad(given[name], (0, 3))
    more["input_ids"] = more["input_ids"].masked_fill(more["attention_mask"] == 0, 7)
    made = []
    for batch in (given, more):
        model = float_model(architecture)
        description = quantize(model, [batch], Settings(weights="rtn"))
        made.append(state(model, description))
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name].float(), tensor.float(), rtol=1e-4, atol=1.01)
        if name.endswith("_scale"):  # of inputs, queries, keys, values
            torch.testing.assert_close(made[1][name], tensor, rtol=1e-4, atol=0)


def test_ranges_by_percentile_are_those_of_attention_too() -> None:
    found = {}
    for ranges in ("minmax", "percentile"):
        model = float_model("llama")
        settings = Settings(ranges=ranges, percentile=0.9, smooth=False)  # type: ignore[arg-type]
        quantize(model, batches("llama"), settings)
        found[ranges] = model.model.layers[0].self_attn.int8.state_dict()
    for name, most in found["minmax"].items():
        assert bool((found["percentile"][name] < most).all()), name


def test_an_attention_that_can_not_be_quantized_is_refused_in_words() -> None:
    """BLOOM multiplies by itself; Gemma 2 caps its scores. Both work without INT8 attention."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    bloom = BloomForCausalLM(BloomConfig(**sizes, n_layer=1, n_head=4))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    gemma = Gemma2ForCausalLM(
        Gemma2Config(**sizes, **heads, intermediate_size=48, num_hidden_layers=1, pad_token_id=0)
    )
    ids = {"input_ids": torch.zeros(1, 4, dtype=torch.long, device="meta")}
    for model, told in ((bloom, "code of its own"), (gemma, "computes with softcap")):
        with pytest.raises(ValueError, match=f"{told}.* set settings.attention to false") as late:
            quantize(copy.deepcopy(model.eval()), batches("llama", 1))
        with pytest.raises(ValueError, match=re.escape(str(late.value))):
            check_quantizable(bare(model), ids, Settings())
        check_quantizable(bare(model), ids, Settings(attention=False))
        expected = logits(model, tiny_models.batch("llama"))
        description = quantize(model, batches("llama", 1), Settings(attention=False))
        assert description["attentions"] == {}
        assert relative_error(logits(model, tiny_models.batch("llama")), expected) < 0.1


def bare(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_without_weights_has_the_same_operations(architecture: str) -> None:
    """On "meta" what can be quantized passes, and an unknown name is told from a known one."""
    batch = {name: each.to("meta") for name, each in tiny_models.batch(architecture).items()}
    batch.pop("attention_mask", None)
    description = pair(architecture).description
    known = (*description["linears"], *description["attentions"])
    check_quantizable(bare(float_model(architecture)), batch, Settings(skip_names=known))
    if architecture == "gpt2":  # its code asks for values: nothing is said
        return
    unknown = Settings(skip_names=(f"{known[-1]}.x",))
    with pytest.raises(ValueError, match="no operation is called so"):
        check_quantizable(bare(float_model(architecture)), batch, unknown)


def test_parts_can_be_left_in_floating_point() -> None:
    settings = Settings(
        attention=False, embedding=False, head=False, smooth=False, weights="rtn",
        skip_names=("model.layers.1.mlp.down_proj",),
    )  # fmt: skip
    model = float_model("llama")
    description = quantize(model, batches("llama", 1), settings)
    assert description["skipped"] == ["lm_head", "model.layers.1.mlp.down_proj"]
    assert description["attentions"] == {}
    assert description["embeddings"] == []
    assert description["smoothed"] == []
    assert type(model.lm_head) is torch.nn.Linear
    assert len(description["linears"]) == 13
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)


def with_outlier() -> tuple[Any, str, list[dict[str, Tensor]]]:
    """A model with a huge channel whose effect is undone, its reader's name, labelled batches."""
    model, name = float_model("llama"), "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        for layer in model.model.layers:  # large enough to matter beside the residual stream
            layer.mlp.down_proj.weight *= 20
        model.model.layers[1].mlp.up_proj.weight[5] *= 1000
        model.get_submodule(name).weight[:, 5] /= 1000
    given = batches("llama")
    for batch in given:  # what the model itself says: any change of it costs
        said = logits(model, batch).argmax(dim=-1)
        batch["labels"] = torch.cat([batch["input_ids"][:, :1], said[:, :-1]], dim=1)
    return model, name, given


@pytest.mark.parametrize("criterion", ["kurtosis", "max_abs", "range", "measured"])
def test_a_planted_outlier_is_skipped_first(criterion: Any) -> None:
    model, name, given = with_outlier()
    settings = Settings(skip=1, criterion=criterion, smooth=False, weights="rtn")
    assert quantize(model, given, settings)["skipped"] == [name]


def test_kurtosis_finds_what_the_largest_magnitude_does_not() -> None:
    """A constant offset is large, but an asymmetric grid has no trouble with it."""
    model, name, given = with_outlier()
    with torch.no_grad():
        model.model.norm.weight *= 1e6
        model.lm_head.weight /= 1e6
    for criterion, expected in (("kurtosis", name), ("max_abs", "lm_head")):
        settings = Settings(skip=1, criterion=criterion, smooth=False, weights="rtn")  # type: ignore[arg-type]
        assert quantize(copy.deepcopy(model), given, settings)["skipped"] == [expected]


def test_measuring_needs_labels() -> None:
    with pytest.raises(ValueError, match="need labels"):
        quantize(float_model("llama"), batches("llama", 1), Settings(criterion="measured"))


def test_a_loss_is_that_of_tokens_however_they_are_batched() -> None:
    """Batches are sorted by length: short ones must not count for more."""
    model = float_model("llama")
    tokens = torch.randint(3, 60, (6, 12), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, 0] = -100
    labels[:3, 4:] = -100
    batch = {"input_ids": tokens, "labels": labels}
    uneven = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 6))]
    assert mean_loss(model, uneven) == pytest.approx(mean_loss(model, [batch]), rel=1e-5)


def test_skipping_what_hurts_most_gives_the_loss_back() -> None:
    model, _, given = with_outlier()
    expected = mean_loss(model, given)
    losses = []
    for skip in (0, 1):
        work = copy.deepcopy(model)
        quantize(work, given, Settings(skip=skip, smooth=False))
        losses.append(mean_loss(work, given) - expected)
    assert abs(losses[1]) < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "awq"}, "weights must be one of gptq, rtn"),
        ({"criterion": "luck"}, "criterion must be one of"),
        ({"percentile": 0.0}, "percentile must be a share"),
        ({"alpha": 1.5}, "alpha must be in"),
        ({"skip": -1}, "at least 0"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_wrong_input_is_told() -> None:
    with pytest.raises(ValueError, match="at least one calibration batch"):
        quantize(float_model("llama"), [])
    with pytest.raises(ValueError, match=r"no operation is called so; did you mean model.layers.1"):
        quantize(
            float_model("llama"), batches("llama", 1), Settings(skip_names=("model.layers.1.down",))
        )
    broken = float_model("llama")
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(broken, batches("llama", 1))


def test_linear_layers_that_calibration_does_not_reach_stay_float() -> None:
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForPreTraining(config).eval()
    model.cls.seq_relationship.spare = torch.nn.Linear(3, 3)
    description = quantize(model, batches("bert", 1), Settings(smooth=False))
    assert "cls.seq_relationship.spare" not in description["linears"]
    assert isinstance(model.bert.pooler.dense, Int8Linear)


def test_cross_attention_is_shown_the_encoders_tokens() -> None:
    """Both sides are 9 long here: only where an input comes from tells which mask is its own."""
    model = float_model("t5")
    batch = tiny_models.batch("t5", rows=2)
    batch["labels"][0, 4:] = -100
    encoder, decoder = int(batch["attention_mask"].sum()), 4 + 9
    shown: dict[str, int] = {}

    def see(name: str, _: torch.nn.Module, x: Tensor) -> None:
        shown[name] = len(x)

    for step in walk(model, [batch]):
        see_block(step, [masks_of(model, batch)], see)
    assert shown["encoder.block.0.layer.0.SelfAttention.q"] == encoder
    for name in (
        "layer.0.SelfAttention.k",
        "layer.1.EncDecAttention.q",
        "layer.2.DenseReluDense.wi",
    ):
        assert shown[f"decoder.block.1.{name}"] == decoder
    for name in ("k", "v"):
        assert shown[f"decoder.block.1.layer.1.EncDecAttention.{name}"] == encoder
