"""Text of tokenizers that write what they don't know as bytes: Llama 2, Mistral, TinyLlama, Gemma.

Their decoder turns each token of a run of bytes that is not UTF-8 into U+FFFD.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from goldcrest.tasks.language.stopping import StopStrings
from goldcrest.tasks.language.transcript import Transcript
from tests.tasks.language.writing_models import byte_tokenizer

WORDS = ["▁", "▁Yes", "▁and", "es", "é", ".", "▁▁"]


def fallback_tokenizer(*, strip: bool) -> PreTrainedTokenizerFast:
    """The decoder of Llama 2, which takes the text's first space, or of Gemma, which does not."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


LLAMA, GEMMA = fallback_tokenizer(strip=True), fallback_tokenizer(strip=False)


def ids(*parts: str | bytes) -> list[int]:
    """Tokens of words, and of bytes one by one."""
    found: list[int] = []
    for part in parts:
        found += [3 + byte for byte in part] if isinstance(part, bytes) else [word(part)]
    return found


def word(name: str) -> int:
    token: int = LLAMA.backend_tokenizer.token_to_id(name)
    return token


def pieces(tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """What a transcript hands out after each token and at the end."""
    transcript = Transcript(LLAMA, stop, ends=[word("</s>")])
    return [*(transcript.add(token) for token in tokens), transcript.finish()]


def readable(tokens: Sequence[int]) -> str:
    """The text by Python's own UTF-8: of a broken run what is complete, a U+FFFD for each byte
    after that. No space is taken from the beginning."""
    text = ""
    for is_byte, run in groupby(tokens, lambda token: 3 <= token < 259):
        names = LLAMA.convert_ids_to_tokens(list(run))
        if not is_byte:
            text += "".join(each for each in names if not each.startswith("<")).replace("▁", " ")
            continue
        raw = bytes(int(each[3:5], 16) for each in names)
        try:
            text += raw.decode()
        except UnicodeDecodeError as error:
            text += raw[: error.start].decode() + "\ufffd" * (len(raw) - error.start)
    return text


CHARACTERS = st.sampled_from([*"\né日🙂a"]).map(lambda each: ids(each.encode()))
BYTES = st.sampled_from([0x0A, 0x61, 0xF0, 0x9F, 0xE2, 0x82]).map(lambda byte: [3 + byte])
KNOWN = st.sampled_from([[word(each)] for each in WORDS])
WHOLE = st.lists(CHARACTERS | KNOWN, max_size=12).map(lambda parts: [*chain(*parts)])
ANY = st.lists(CHARACTERS | BYTES | KNOWN, max_size=12).map(lambda parts: [*chain(*parts)])


@settings(max_examples=200, deadline=None)
@given(tokens=WHOLE, strip=st.booleans(), stop=st.lists(st.sampled_from(["\n", "🙂 ", "a"])))
def test_whole_characters_are_the_decoded_text(
    tokens: list[int], strip: bool, stop: list[str]
) -> None:
    tokenizer = LLAMA if strip else GEMMA
    transcript = Transcript(tokenizer, stop, ends=[])
    text = "".join(transcript.add(token) for token in tokens) + transcript.finish()
    whole = tokenizer.decode(tokens)
    assert text == whole[: min([whole.find(each) for each in stop if each in whole], default=None)]


@settings(max_examples=300, deadline=None)
@given(tokens=ANY)
def test_broken_characters_leave_the_complete_ones_alone(tokens: list[int]) -> None:
    assert "".join(pieces(tokens)) == readable(tokens).removeprefix(" ")


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, len(LLAMA) - 1), max_size=12))
def test_no_tokens_are_too_broken_to_read(tokens: list[int]) -> None:
    """Any text at all, special tokens in it: what is handed out is UTF-8."""
    "".join(pieces(tokens)).encode()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (ids("▁Yes", b"\n\xf0\x9f", "▁and"), ["Yes", "\n", "", "", "\ufffd\ufffd and", ""]),
        (ids("🙂".encode(), b"\xf0\x9f"), ["", "", "", "🙂", "", "", "\ufffd\ufffd"]),
    ],
)
def test_only_bytes_that_were_held_are_broken(tokens: list[int], expected: list[str]) -> None:
    assert pieces(tokens) == expected


@pytest.mark.parametrize("before", [ids("🙂".encode()), ids("▁Yes", "日本🙂".encode()), ids("es")])
def test_the_model_stops_where_the_transcript_does(before: list[int]) -> None:
    """The line's end is the last of a run of bytes; another row has none there."""
    rows = torch.tensor([[1, *before, *ids(b"\n")], [1, *[word("▁and")] * (len(before) + 1)]])
    assert StopStrings(LLAMA, ["\n"], start=1)(rows, None).tolist() == [True, False]
    assert pieces(rows[0, 1:].tolist(), ["\n"])[-2:] == ["", ""]


def test_a_prompts_bytes_are_not_the_answers() -> None:
    rows = torch.tensor([ids("🙂\n".encode(), b"a")])
    assert not StopStrings(LLAMA, ["\n"], start=5)(rows, None).any()


@settings(deadline=None)
@given(st.text("🙂é\nab", max_size=8), st.sampled_from(["\n", "é", "ab"]))
def test_byte_level_tokens_stop_as_before(text: str, stop: str) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    found = [
        bool(StopStrings(tokenizer, [stop], 0)(torch.tensor([tokens[:n]]), None))
        for n in range(1, len(tokens) + 1)
    ]
    assert any(found) == (stop in text)
