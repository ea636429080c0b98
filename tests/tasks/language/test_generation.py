"""Decoding: against transformers' own, against itself beside other prompts, and piece by piece."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from goldcrest.cluster.api import InputError
from goldcrest.kernels.weight_only.grid import GridSettings
from goldcrest.kernels.weight_only.transformer import Options, quantize, quantized_layers
from goldcrest.tasks.language import sampling
from goldcrest.tasks.language.bundle import LanguageModel
from goldcrest.tasks.language.generation import GenerationSettings, Generator, Piece
from goldcrest.tasks.language.sampling import GumbelNoise
from goldcrest.tasks.language.transcript import Transcript, overlap
from tests.kernels.language import tiny_models
from tests.tasks.language.writing_models import SPECIAL, byte_tokenizer, tiny_bundle

PROMPTS = ["the quick brown fox", "a", "jumps over the lazy dog, twice"]
WAYS = {
    "greedy": GenerationSettings(max_new_tokens=9),
    "beams": GenerationSettings(max_new_tokens=9, beams=3),
    "sampling": GenerationSettings(max_new_tokens=9, temperature=0.8, top_k=40, top_p=0.9, seed=5),
}


@pytest.fixture(scope="module")
def generators() -> dict[str, Generator]:
    return {name: Generator(tiny_bundle(name)) for name in ("llama", "gpt2", "mpt", "t5")}


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mpt", "t5"])
def test_a_prompt_is_answered_alike_alone_and_beside_others(
    generators: dict[str, Generator], architecture: str, way: str
) -> None:
    """Padding on the left changes nothing, nor does the order of the batches."""
    generator, chosen = generators[architecture], WAYS[way]
    together = generator.generate(PROMPTS, chosen)
    assert [each.prompt_tokens for each in together] == [len(p) + 1 for p in PROMPTS]
    if way == "sampling":  # a place of its own, so a stream of its own
        assert generator.generate(PROMPTS[:1], chosen)[0] == together[0]
        assert generator.generate(PROMPTS, chosen) == together
        other = chosen.model_copy(update={"seed": 6})
        assert generator.generate(PROMPTS, other) != together
    else:
        assert [generator.generate([prompt], chosen)[0] for prompt in PROMPTS] == together


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beams_are_transformers_own(
    generators: dict[str, Generator], architecture: str, beams: int
) -> None:
    generator = generators[architecture]
    ids = torch.tensor([generator.encode(PROMPTS[0])])
    expected = generator.model.generate(
        ids, max_new_tokens=9, num_beams=beams, do_sample=False, pad_token_id=0
    )
    start = 1 if architecture == "t5" else ids.shape[1]
    (made,) = generator.generate(PROMPTS[:1], GenerationSettings(max_new_tokens=9, beams=beams))
    tokens = [token for token in expected[0, start:].tolist() if token not in (0, 2)]
    assert list(made.tokens) == tokens


def int4_bundle(architecture: str) -> LanguageModel:
    """A tiny bundle with 4-bit weights, computing on inputs in float32 as its twin does."""
    bundle = tiny_bundle(architecture)
    grid, options = GridSettings(group_size=16), Options(compute="float32")
    batches = [tiny_models.batch(architecture)]
    quantize(bundle.model, batches, method="rtn", grid=grid, options=options)
    return bundle


def decoded(bundle: LanguageModel) -> Any:
    """The model with a plain linear layer of the decoded weight for every 4-bit one."""
    model = copy.deepcopy(bundle.model)
    for name, layer in quantized_layers(model).items():
        weight = layer.quantized().effective()
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        plain.weight = torch.nn.Parameter(weight)
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias)
        model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_beams_of_an_int4_model_are_those_of_its_decoded_weights(
    architecture: str, beams: int
) -> None:
    """The reference: transformers' own search, without a cache, without a 4-bit product.

    Texts end with </s>, and with padding, after which nothing sensible comes.
    """
    bundle = int4_bundle(architecture)
    generator, model = Generator(bundle), decoded(bundle)
    chosen = GenerationSettings(max_new_tokens=9, beams=beams)
    for prompt, made in zip(PROMPTS, generator.generate(PROMPTS, chosen), strict=True):
        ids = torch.tensor([generator.encode(prompt)])
        expected = model.generate(
            ids, max_new_tokens=9, num_beams=beams, do_sample=False, use_cache=False,
            pad_token_id=0, eos_token_id=[0, 2],
        )  # fmt: skip
        start = 1 if architecture == "t5" else ids.shape[1]
        found = [token for token in expected[0, start:].tolist() if token not in (0, 2)]
        assert list(made.tokens) == found
    assert Generator(tiny_bundle(architecture)).generate(PROMPTS, chosen) != generator.generate(
        PROMPTS, chosen
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_an_int4_model_samples_by_its_probabilities(architecture: str) -> None:
    """The reference: token by token over the whole text, the likeliest of noisy cut logits."""
    bundle = int4_bundle(architecture)
    generator, model, chosen = Generator(bundle), decoded(bundle), WAYS["sampling"]
    for made, prompt in zip(generator.generate(PROMPTS, chosen), PROMPTS, strict=True):
        ids = torch.tensor([generator.encode(prompt)])
        text = torch.tensor([[0]]) if architecture == "t5" else ids
        start, noise = text.shape[1], np.random.default_rng([chosen.seed, PROMPTS.index(prompt)])
        while text.shape[1] < start + 9 and text[0, start:].tolist()[-1:] not in ([0], [2]):
            given = {"input_ids": ids, "decoder_input_ids": text}
            with torch.no_grad():
                logits = (model(**given) if architecture == "t5" else model(text)).logits[0, -1]
            scores = cut(logits / chosen.temperature, chosen.top_k or 0, chosen.top_p)
            likeliest = (scores + torch.from_numpy(noise.gumbel(size=len(scores)))).argmax()
            text = torch.cat([text, likeliest.reshape(1, 1)], dim=1)
        assert list(made.tokens) == [
            each for each in text[0, start:].tolist() if each not in (0, 2)
        ]


def cut(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """The k likeliest tokens' scores, and of those the fewest with the share p; -inf elsewhere."""
    values, order = scores.sort(descending=True)
    values[top_k:] = -torch.inf
    shares = values.softmax(-1)
    values[shares.cumsum(-1) - shares >= top_p] = -torch.inf
    return torch.empty_like(scores).scatter(0, order, values)


def test_special_tokens_stand_where_the_model_was_trained_with_them() -> None:
    causal, encoder = Generator(tiny_bundle("llama")), Generator(tiny_bundle("t5"))
    assert causal.encode("ab") == [1, *byte_tokenizer()("ab")["input_ids"]]
    assert encoder.encode("ab") == [*byte_tokenizer()("ab")["input_ids"], 2]
    assert causal.encode("") == [1]
    assert 2 not in causal.encode("ends here</s>")
    bundle = tiny_bundle("llama")
    without = Generator(
        type(bundle)({**bundle.facts, "bos": False}, bundle.model, bundle.tokenizer)
    )
    assert without.encode("ab") == causal.encode("ab")[1:]
    with pytest.raises(InputError, match="empty"):
        without.encode("")


@pytest.mark.parametrize("stop", [(), ("\x41",), ("zz", "qq")])
@pytest.mark.parametrize("way", ["greedy", "sampling"])
def test_a_stream_is_the_whole_answer_in_pieces(
    generators: dict[str, Generator], way: str, stop: tuple[str, ...]
) -> None:
    chosen = WAYS[way].model_copy(update={"stop": stop, "max_new_tokens": 30})
    for generator in generators.values():
        (whole,) = generator.generate(PROMPTS[:1], chosen)
        pieces = list(generator.stream(PROMPTS[0], chosen))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [p.token for p in pieces[:-1]] == list(whole.tokens)
        assert pieces[-1] == Piece(pieces[-1].text, None, whole.finish_reason)
        assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_stop_strings_end_an_answer_and_are_cut_off(generators: dict[str, Generator]) -> None:
    for generator in generators.values():
        chosen = GenerationSettings(max_new_tokens=36, temperature=1.0, seed=1)
        free = generator.generate(PROMPTS, chosen)
        for place, answer in enumerate(free):
            stop = next(letter for letter in answer.text[8:] if "!" < letter < "\x7f")
            again = chosen.model_copy(update={"stop": (stop, "never this one")})
            stopped = generator.generate(PROMPTS, again)[place]
            assert stopped.text == answer.text[: answer.text.index(stop)]
            assert stopped.finish_reason == "stop"
            assert stopped.tokens == answer.tokens[: len(stopped.tokens)]


def test_a_stop_string_stops_the_model_too() -> None:
    """Not only the text is cut: the model writes nothing behind it."""
    generator = Generator(tiny_bundle("llama"))
    chosen = GenerationSettings(max_new_tokens=40, temperature=1.0, seed=1)
    (answer,) = generator.generate(["x"], chosen)
    steps = 0
    run = generator.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return run(*args, **kwargs)

    generator.model.forward = counted
    stop = next(letter for letter in answer.text[8:] if letter not in answer.text[:8])
    place = answer.text.index(stop)
    generator.generate(["x"], chosen.model_copy(update={"stop": (stop,)}))
    assert steps <= len(answer.text[: place + 1].encode()) + 1 < 40


def quote_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one token of a space with two of the three bytes of a quotation mark."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *letters, "Ġâ", "ĠâĢ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "â"), ("Ġâ", "Ģ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


class Writes(LogitsProcessor):
    """Leaves one choice at each step: the next token of a text."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = iter(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, next(self._tokens)] = 0.0
        return chosen


@pytest.mark.parametrize("said", ["say \u201chello", "say hello"])
def test_a_stop_string_beside_half_a_character_ends_a_stream_alike(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token may hold a stop string and the beginning of a character that is never completed."""
    base, tokenizer = tiny_bundle("llama"), quote_tokenizer()
    base.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = Generator(LanguageModel(base.facts, base.model, tokenizer))
    tokens = tokenizer.backend_tokenizer.encode(said, add_special_tokens=False).ids
    monkeypatch.setattr(
        sampling, "processors", lambda *_: LogitsProcessorList([Writes([*tokens, 2])])
    )
    for length in (4, len(tokens)):  # it ends with the half, or goes on
        chosen = GenerationSettings(max_new_tokens=length, stop=(" ",))
        (whole,) = generator.generate(["hi"], chosen)
        pieces = list(generator.stream("hi", chosen))
        assert "".join(piece.text for piece in pieces) == whole.text == "say"
        assert pieces[-1].finish_reason == whole.finish_reason == "stop"


def test_the_end_of_text_token_ends_an_answer(generators: dict[str, Generator]) -> None:
    generator = Generator(tiny_bundle("gpt2"))
    (free,) = generator.generate(["x"], GenerationSettings(max_new_tokens=20))
    generator.model.generation_config.eos_token_id = [2, free.tokens[0]]
    (ended,) = generator.generate(["x"], GenerationSettings(max_new_tokens=20))
    assert (ended.text, ended.tokens, ended.finish_reason) == ("", (), "stop")
    assert list(generator.stream("x", GenerationSettings())) == [Piece("", None, "stop")]


def test_the_context_ends_an_answer_and_refuses_a_prompt() -> None:
    """GPT-2 has 64 positions; a row at its end must not be carried beyond it by the others."""
    generator = Generator(tiny_bundle("gpt2"))
    assert generator.context == 64
    prompts = ["p" * 60, "short", "q" * 61, "s" * 62]
    made = generator.generate(prompts, GenerationSettings(max_new_tokens=20, temperature=1.0))
    assert [len(each.tokens) for each in made] == [3, 20, 2, 1]
    assert {each.finish_reason for each in made} == {"length"}
    with pytest.raises(InputError, match="64 tokens, which leaves no room"):
        generator.generate(["p" * 63], GenerationSettings())
    with pytest.raises(InputError, match="no room"):
        generator.stream("p" * 63, GenerationSettings())  # before a piece is asked for


def learned_positions(places: int) -> LanguageModel:
    """A tiny BART, whose encoder and decoder have a table of so many positions each."""
    tokenizer = byte_tokenizer()
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": places}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(
        vocab_size=len(tokenizer), **sizes, **ends, forced_eos_token_id=None, init_std=0.7
    )
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias[:, : len(SPECIAL)] = -1e9  # its answers end where its room does
    return LanguageModel({"name": "dense", "family": "seq2seq"}, model, tokenizer)


def test_an_encoder_decoder_has_as_many_places_as_its_positions() -> None:
    """The prompt has those of the encoder, the answer those of the decoder, up to the last."""
    generator = Generator(learned_positions(16))
    chosen = GenerationSettings(max_new_tokens=20)
    made = generator.generate(["p" * 15, "short"], chosen)  # and the token that ends a text
    assert [(each.prompt_tokens, len(each.tokens)) for each in made] == [(16, 16), (6, 16)]
    assert [each.token for each in generator.stream("short", chosen)][:-1] == list(made[1].tokens)
    with pytest.raises(InputError, match="has 17 tokens; the model's encoder reads 16"):
        generator.generate(["p" * 16], chosen)


def test_relative_positions_have_no_end() -> None:
    """Whatever T5's configs say of positions that the model does not have."""
    bundle = tiny_bundle("t5", n_positions=16)
    bundle.model.generation_config.eos_token_id = None
    (made,) = Generator(bundle).generate(["p" * 40], GenerationSettings(max_new_tokens=20))
    assert made.prompt_tokens == 41


def test_a_prompt_may_be_given_as_tokens_of_the_vocabulary() -> None:
    generator = Generator(tiny_bundle("llama"))
    chosen = GenerationSettings(max_new_tokens=3)
    assert generator.generate([generator.encode("ab")], chosen) == generator.generate(
        ["ab"], chosen
    )
    for token in (-1, 260):
        with pytest.raises(InputError, match=f"holds the token {token}; the vocabulary ends at"):
            generator.generate([[1, token]], chosen)


@pytest.mark.parametrize(
    "taste",
    [
        {"do_sample": True, "temperature": 9.0, "num_beams": 4},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"exponential_decay_length_penalty": (0, 9.0), "min_length": 40, "max_length": 3},
        {"sequence_bias": [[[100], 50.0]]},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_what_a_models_folder_says_of_taste_does_not_count(
    architecture: str, taste: dict[str, Any]
) -> None:
    chosen = GenerationSettings(max_new_tokens=12)
    before = Generator(tiny_bundle(architecture)).generate(PROMPTS, chosen)
    bundle = tiny_bundle(architecture)
    bundle.model.generation_config.update(**taste)
    assert Generator(bundle).generate(PROMPTS, chosen) == before


def test_tokens_that_a_model_never_writes_stay_out() -> None:
    chosen = GenerationSettings(max_new_tokens=6)
    (before,) = Generator(tiny_bundle("llama")).generate(PROMPTS[:1], chosen)
    bundle = tiny_bundle("llama")
    bundle.model.generation_config.suppress_tokens = [before.tokens[0]]
    (after,) = Generator(bundle).generate(PROMPTS[:1], chosen)
    assert before.tokens[0] not in after.tokens


def test_a_cancelled_stream_stops_at_once() -> None:
    generator = Generator(tiny_bundle("llama"))
    cancelled = threading.Event()
    pieces = []
    for piece in generator.stream("x", GenerationSettings(max_new_tokens=500), cancelled):
        pieces.append(piece)
        if len(pieces) == 3:
            cancelled.set()
    assert pieces[-1].finish_reason == "cancelled"
    assert len(pieces) < 100


def test_a_stream_that_is_left_takes_its_thread_along() -> None:
    generator = Generator(tiny_bundle("llama"))
    stream = generator.stream("x", GenerationSettings(max_new_tokens=500))
    next(stream)
    assert any(thread.name == "generate" for thread in threading.enumerate())
    stream.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "generate" for thread in threading.enumerate())


def test_what_goes_wrong_in_the_model_reaches_the_reader() -> None:
    generator = Generator(tiny_bundle("llama"))

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    generator.model.forward = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        list(generator.stream("x", GenerationSettings()))


def test_streams_in_two_threads_give_what_each_gives_alone() -> None:
    """Sampling draws from a generator of the request, not from one that threads share."""
    generator = Generator(tiny_bundle("llama"))
    chosen = [GenerationSettings(max_new_tokens=25, temperature=1.0, seed=s) for s in (1, 2)]
    alone = [generator.generate(["x"], each)[0].text for each in chosen]
    streams = [generator.stream("x", each) for each in chosen]
    texts = ["", ""]
    open_streams = {0, 1}
    while open_streams:
        for place in sorted(open_streams):
            piece = next(streams[place], None)
            if piece is None:
                open_streams.remove(place)
            else:
                texts[place] += piece.text
    assert texts == alone


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"beams": 2, "temperature": 0.5}, "does not sample"),
        ({"stop": ("a", "")}, "stop string is empty"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"top_p": -0.1}, "greater than or equal to 0"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GenerationSettings(**values)


def test_models_that_do_not_write_are_refused() -> None:
    for architecture in ("bert", "whisper"):
        with pytest.raises(InputError, match="does not write"):
            Generator(tiny_bundle(architecture))
    with pytest.raises(InputError, match="can't be streamed"):
        Generator(tiny_bundle("llama")).stream("x", GenerationSettings(beams=2))


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-40, 1e-300, 5e-324])
def test_the_colder_the_surer(temperature: float) -> None:
    """Far below what float32 can divide by, the likeliest token is still the one that is drawn."""
    scores = torch.tensor([[2.0, 5.0, -torch.inf, 4.9]])
    chosen = GenerationSettings(temperature=temperature, seed=1)
    drawn = sampling.processors(chosen, [0])(torch.zeros(1, 1, dtype=torch.long), scores)
    assert drawn.argmax() == 1
    assert not drawn.isnan().any()


def test_no_probability_leaves_the_likeliest_token(generators: dict[str, Generator]) -> None:
    """top_p = 0 is greedy, whatever the temperature."""
    chosen = GenerationSettings(max_new_tokens=9, temperature=2.0, top_p=0, seed=3)
    for generator in generators.values():
        assert generator.generate(PROMPTS, chosen) == generator.generate(PROMPTS, WAYS["greedy"])


def test_gumbel_noise_samples_the_softmax() -> None:
    """Shares of 4000 draws against the probabilities, within four standard errors."""
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    noise = GumbelNoise(seed=0, streams=[3])
    ids = torch.zeros(1, 1, dtype=torch.long)
    drawn = [int(noise(ids, scores).argmax()) for _ in range(4000)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    expected = scores.softmax(-1).numpy()[0]
    assert np.all(np.abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / 4000))


def space_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their space in front, as sentencepiece has them."""
    words = ["<unk>", "</s>", "▁", "▁a", "▁the", "b", "c", "▁b", "."]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


TOKENIZERS = {"bytes": byte_tokenizer(), "spaces": space_tokenizer()}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_make_up_the_decoded_text(data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[data.draw(st.sampled_from(sorted(TOKENIZERS)))]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    stops = data.draw(st.lists(st.text("ab .", min_size=1, max_size=3), max_size=2))
    transcript = Transcript(tokenizer, stops, ends=[])
    text = "".join(transcript.add(token) for token in tokens) + transcript.finish()
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    found = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    _, cut = min(found, default=(0, len(whole)))  # at the one that is complete first
    assert text == whole[:cut]
    assert transcript.ended == (cut < len(whole) or any(stop in whole for stop in stops))


@pytest.mark.parametrize("words", [["xyz"], ["x", "y", "z"], ["xy", "z"], ["x", "yz"]])
def test_the_stop_string_that_is_complete_first_ends_a_text(words: list[str]) -> None:
    """Also where it stands inside of another one, and whatever the tokens are."""
    transcript = Transcript(space_tokenizer(), ["xyz", "y"], ends=[])
    text = "".join(transcript._take(word) for word in words if not transcript.ended)
    assert text == "x"
    assert transcript.ended


def test_each_of_several_stop_strings_is_held_back() -> None:
    """What one of them could begin with is held, though another one could not."""
    tokenizer = byte_tokenizer()
    transcript = Transcript(tokenizer, ["a b", "."], ends=[])
    pieces = [transcript.add(token) for token in tokenizer("xa aa b.")["input_ids"]]
    assert pieces == ["x", "", "", "a ", "a", "", "", ""]
    assert transcript.ended
    assert transcript.finish() == ""


@pytest.mark.parametrize("text", ["€uro", "日本", "🐦!"])
def test_a_character_is_handed_out_whole(text: str) -> None:
    tokenizer = byte_tokenizer()
    transcript = Transcript(tokenizer, [], ends=[2])
    pieces = [transcript.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    broken = Transcript(tokenizer, [], ends=[2])
    first = [broken.add(token) for token in tokenizer("🐦")["input_ids"][:2]]
    assert first == ["", ""]
    assert broken.finish() == "\ufffd"


@given(st.text("ab", max_size=6), st.text("ab", min_size=1, max_size=4))
def test_overlap_is_the_longest_beginning_at_the_end(text: str, stop: str) -> None:
    length = overlap(text, stop)
    assert length < len(stop)
    assert text.endswith(stop[:length])
    assert not any(text.endswith(stop[:n]) for n in range(length + 1, len(stop)))


def test_the_special_tokens_are_where_the_models_expect_them() -> None:
    assert [byte_tokenizer().convert_tokens_to_ids(each) for each in SPECIAL] == [0, 1, 2, 3]
