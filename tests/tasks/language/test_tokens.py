"""From examples to rows of tokens: nothing is lost, all is predicted once and counted."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.cluster.api import Artifact, InputError
from goldcrest.tasks.data.tokens import TokenReader, TokenRow, TokenWriter, cut, has_loss
from goldcrest.tasks.language.examples import SPLITS, read_examples
from goldcrest.tasks.language.packing import EncodedText, PackedRow, Packer
from goldcrest.tasks.language.prepare import TextConfig, prepare_text
from goldcrest.tasks.language.tokenizer import (
    TokenizerConfig,
    load_tokenizer,
    tokenizer,
    tokenizer_folder,
)
from goldcrest.tasks.language.tokens import TokensConfig, tokens

RunTask = Callable[..., Artifact]


def document(first: int, size: int) -> EncodedText:
    """Distinct tokens; the first covers no text, every other one character of two bytes."""
    ends = np.arange(size)
    return EncodedText(np.arange(first, first + size, dtype=np.int32), ends, 2 * ends)


def packed(sizes: list[int], length: int, **how: bool) -> tuple[list[EncodedText], list[PackedRow]]:
    firsts = np.cumsum([0, *sizes])
    documents = [document(int(f), s) for f, s in zip(firsts, sizes, strict=False)]
    packer = Packer(length, **how)
    rows = [row for number, each in enumerate(documents) for row in packer.add(each, number)]
    return documents, [*rows, *packer.close()]


@pytest.mark.parametrize(
    ("prompt", "answer", "starts", "family", "length", "expected"),
    [
        (5, 3, [], "causal", 6, True),
        (5, 3, [], "causal", 5, False),  # the answer is cut off
        (5, 3, [], "seq2seq", 2, True),  # cut on either side
        (0, 8, [0, 4], "causal", 8, True),
        (0, 8, [0, 1], "causal", 2, False),  # first tokens of documents
        (0, 8, [], "causal", 1, False),  # nothing comes before it
        (0, 8, [], "speech", 1, True),  # predicted from what is heard
        (0, 8, [], "masked", 3, True),
        (0, 8, [], "masked", 2, False),  # special tokens
    ],
)
def test_rows_that_have_a_loss_are_told_from_others(
    prompt: int, answer: int, starts: list[int], family: str, length: int, expected: bool
) -> None:
    ids = np.arange(prompt + answer, dtype=np.int32)
    row = TokenRow(ids[:prompt], ids[prompt:], np.array(starts, np.int32))
    assert has_loss(cut(row, length, family), family, special=(0, 1)) is expected


@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(2, 12))
@settings(max_examples=100, deadline=None)
def test_every_token_of_a_document_is_predicted_once(sizes: list[int], length: int) -> None:
    documents, rows = packed(sizes, length)
    predicted: list[tuple[int, int]] = []
    for each in rows:
        answer, starts = each.row.answer, each.row.starts.tolist()
        assert len(answer) <= length
        assert starts[0] == 0
        predicted += [
            (int(answer[place - 1]), int(answer[place]))
            for place in range(len(answer))
            if place not in starts
        ]
    expected = [
        (int(a), int(b))
        for each in documents
        for a, b in zip(each.tokens, each.tokens[1:], strict=False)
    ]
    assert predicted == expected
    assert sum(row.characters for row in rows) == sum(size - 1 for size in sizes)
    assert all(row.bytes == 2 * row.characters for row in rows)
    assert all(len(row.row) >= length - 1 for row in rows[:-1]), "a row is not full"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(2, 12), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_masked_model_is_given_every_token_once(
    sizes: list[int], length: int, alone: bool
) -> None:
    """Of both sides of a border that cuts a document, too: its bits are counted once."""
    _, rows = packed(sizes, length, causal=False, alone=alone)
    given = np.concatenate([row.row.answer for row in rows])
    assert given.tolist() == list(range(sum(sizes)))
    assert sum(row.characters for row in rows) == sum(size - 1 for size in sizes)
    assert all(row.bytes == 2 * row.characters for row in rows)
    assert all(0 < len(row.row) <= length for row in rows)
    assert all(len(row.row) == length for row in rows[:-1]) or alone


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(2, 12), st.booleans())
@settings(max_examples=100, deadline=None)
def test_rows_of_one_document_each(sizes: list[int], length: int, causal: bool) -> None:
    documents, rows = packed(sizes, length, causal=causal, alone=True)
    assert all(row.row.starts.tolist() == [0] for row in rows)
    whole = packed(sizes, length, causal=causal)[1]
    for total in ("characters", "bytes"):
        assert sum(getattr(row, total) for row in rows) == sum(getattr(r, total) for r in whole)
    for row in rows:
        inside = documents[row.example].tokens
        assert set(row.row.answer.tolist()) <= set(inside.tolist())


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_the_longest_document_of_a_file(rows: list[list[int]], prompt: int) -> None:
    """A row is documents one after the other, or (of none) a prompt and an answer of one token."""
    longest = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.arrow"
        with TokenWriter(path) as writer:
            for sizes in rows:
                starts = np.cumsum([0, *sizes])[:-1].astype(np.int32)
                row = TokenRow(np.zeros(0, np.int32), np.zeros(sum(sizes), np.int32), starts)
                if not sizes:
                    row = TokenRow(np.zeros(prompt, np.int32), np.zeros(1, np.int32))
                longest = max(longest, *(sizes or [prompt + 1]))
                writer.write(row, example=0, characters=1, size=1)
        found = TokenReader(path)
        assert found.longest_document == longest
        assert found.documents.tolist() == [len(sizes) for sizes in rows]


def test_where_documents_start_and_go_on() -> None:
    _, rows = packed([3, 6, 2], 5)
    assert [each.row.answer.tolist() for each in rows] == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [9, 10],
    ]
    assert [each.row.starts.tolist() for each in rows] == [[0, 3], [0], [0]]
    assert [each.example for each in rows] == [0, 1, 2]


def test_a_document_of_one_token_has_nothing_to_predict() -> None:
    assert packed([1, 1], 4)[1] == []
    with pytest.raises(ValueError, match="nothing to predict"):
        Packer(1)


@pytest.fixture
def pair_corpus(run_task: RunTask, tmp_path: Path) -> Artifact:
    rows = [
        {"question": f"Wie viel ist {n}?", "answer": f"Es ist «{n}» € und " + "mehr " * (n % 7)}
        for n in range(40)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_task(prepare_text, TextConfig(paths=(str(path),)))


@pytest.fixture
def plain_corpus(run_task: RunTask, tmp_path: Path) -> Artifact:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Größe {n}: {'naïve café ' * n}</s>" for n in range(25)))
    cfg = TextConfig(paths=(str(path),), documents={"min_bytes": 1})  # type: ignore[arg-type]
    return run_task(prepare_text, cfg)


@pytest.fixture
def by_bytes(run_task: RunTask, pair_corpus: Artifact) -> Artifact:
    return run_task(tokenizer, TokenizerConfig(method="bytes"), pair_corpus)


def reader(made: Artifact, split: str = "train") -> TokenReader:
    return TokenReader(made.file(f"{split}.arrow"))


def test_prompts_and_answers_of_a_causal_model(
    run_task: RunTask, pair_corpus: Artifact, by_bytes: Artifact
) -> None:
    made = run_task(tokens, TokensConfig(length=200), pair_corpus, by_bytes)
    decode = load_tokenizer(tokenizer_folder(by_bytes)).decode
    for split in ("train", "validation", "test"):
        found, examples = reader(made, split), list(read_examples(pair_corpus, split))
        assert len(found) == len(examples)
        for number, example in enumerate(examples):
            row = found[number]
            assert decode(row.prompt) == f"<s>{example.prompt}"
            assert decode(row.answer) == f"{example.answer}</s>"
            assert found.examples[number] == number
            assert found.characters[number] == len(example.answer)
            assert found.bytes[number] == len(example.answer.encode()) == len(row.answer) - 1
    facts = made.json("facts")["splits"]["train"]
    assert facts["predicted"] == facts["bytes"] + facts["rows"]
    assert facts["dropped"] == facts["truncated"] == 0
    assert facts["longest"] == reader(made).lengths.max()


@pytest.mark.parametrize("method", ["bytes", "bpe"])
def test_plain_text_is_packed_without_loss(
    run_task: RunTask, plain_corpus: Artifact, method: str
) -> None:
    vocabulary = run_task(tokenizer, TokenizerConfig(method=method, vocab_size=300), plain_corpus)
    made = run_task(tokens, TokensConfig(length=32), plain_corpus, vocabulary)
    found, decode = reader(made), load_tokenizer(tokenizer_folder(vocabulary)).decode
    texts = [example.answer for example in read_examples(plain_corpus, "train")]
    ids: list[int] = []
    for number in range(len(found)):
        row = found[number]
        assert len(row.prompt) == 0
        # A row that goes on begins with the last token of the row before.
        goes_on = bool(ids) and ids[-1] != 2
        ids += row.answer[1 if goes_on else 0 :].tolist()
    assert decode(ids) == "".join(f"<s>{text}</s>" for text in texts)
    facts = made.json("facts")["splits"]["train"]
    assert facts["characters"] == sum(len(text) for text in texts)
    assert facts["bytes"] == sum(len(text.encode()) for text in texts)
    assert found.bytes.sum() == facts["bytes"]
    assert found.lengths[:-1].min() >= 31
    if method == "bytes":
        assert facts["predicted"] == facts["bytes"] + len(texts)


def test_everything_can_be_packed_for_pretraining(
    run_task: RunTask, pair_corpus: Artifact, by_bytes: Artifact
) -> None:
    made = run_task(tokens, TokensConfig(length=64, pack="everything"), pair_corpus, by_bytes)
    examples = list(read_examples(pair_corpus, "train"))
    facts = made.json("facts")["splits"]["train"]
    assert facts["characters"] == sum(len(e.prompt + e.answer) for e in examples)
    assert facts["examples"] == len(examples)
    assert all(len(reader(made)[n].prompt) == 0 for n in range(facts["rows"]))


@pytest.mark.parametrize("family", ["causal", "masked"])
def test_nothing_is_packed_where_that_is_asked(
    run_task: RunTask, plain_corpus: Artifact, family: str
) -> None:
    """Whole texts that fit have a row each; the text that the loss is about is all the text."""
    cfg = TokenizerConfig(method="bytes", mask="<mask>" if family == "masked" else None)
    vocabulary = run_task(tokenizer, cfg, plain_corpus)
    settings = TokensConfig(family=family, length=64, pack="nothing")  # type: ignore[arg-type]
    made = run_task(tokens, settings, plain_corpus, vocabulary)
    found, facts = reader(made), made.json("facts")["splits"]["train"]
    texts = [example.answer for example in read_examples(plain_corpus, "train")]
    assert set(found.documents.tolist()) == {1}
    assert sorted(set(found.examples.tolist())) == list(range(len(texts)))
    assert facts["characters"] == sum(len(text) for text in texts)
    assert facts["bytes"] == sum(len(text.encode()) for text in texts)
    specials = 2 if family == "masked" else 1  # the token that begins a text is not predicted
    assert facts["predicted"] == facts["bytes"] + specials * len(texts)


def test_pairs_of_an_encoder_decoder_are_never_packed(
    run_task: RunTask, pair_corpus: Artifact, by_bytes: Artifact
) -> None:
    """A pipeline's rows for pretraining are packed unless told otherwise; these have two sides."""
    pairs = TokensConfig(family="seq2seq", length=200)
    wanted = run_task(tokens, pairs, pair_corpus, by_bytes)
    packed = pairs.model_copy(update={"pack": "everything"})
    made = run_task(tokens, packed, pair_corpus, by_bytes)
    assert made.json("facts")["splits"] == wanted.json("facts")["splits"]
    for number in range(wanted.json("facts")["splits"]["train"]["rows"]):
        one, other = reader(made)[number], reader(wanted)[number]
        assert one.prompt.tolist() == other.prompt.tolist() != []
        assert one.answer.tolist() == other.answer.tolist()


def test_what_is_too_long_is_left_out_or_cut_and_counted(
    run_task: RunTask, pair_corpus: Artifact, by_bytes: Artifact
) -> None:
    examples = list(read_examples(pair_corpus, "train"))
    sizes = [len((e.prompt + e.answer).encode()) + 2 for e in examples]
    length = sorted(sizes)[len(sizes) // 2]
    over = sum(size > length for size in sizes)
    dropped = run_task(tokens, TokensConfig(length=length), pair_corpus, by_bytes)
    facts = dropped.json("facts")["splits"]["train"]
    assert (facts["dropped"], facts["rows"]) == (over, len(sizes) - over)
    kept = [n for n, size in enumerate(sizes) if size <= length]
    assert reader(dropped).examples.tolist() == kept
    cfg = TokensConfig(length=length, overlong="truncate")
    cut = run_task(tokens, cfg, pair_corpus, by_bytes)
    facts = cut.json("facts")["splits"]["train"]
    assert (facts["truncated"], facts["rows"], facts["longest"]) == (over, len(sizes), length)
    found = reader(cut)
    for number, size in enumerate(sizes):
        if size > length:
            assert found.bytes[number] == pytest.approx(len(found[number].answer), abs=3)


def test_rows_of_an_encoder_decoder(
    run_task: RunTask, pair_corpus: Artifact, by_bytes: Artifact, plain_corpus: Artifact
) -> None:
    cfg = TokensConfig(family="seq2seq", length=60, answer_length=90)
    made = run_task(tokens, cfg, pair_corpus, by_bytes)
    decode = load_tokenizer(tokenizer_folder(by_bytes)).decode
    example = next(read_examples(pair_corpus, "train"))
    row = reader(made)[0]
    assert decode(row.prompt) == f"{example.prompt}</s>"
    assert decode(row.answer) == f"{example.answer}</s>"
    short = TokensConfig(family="seq2seq", length=9, answer_length=5, overlong="truncate")
    row = reader(run_task(tokens, short, pair_corpus, by_bytes))[0]
    assert decode(row.prompt) == f"{example.prompt[:8]}</s>"
    assert decode(row.answer) == example.answer[:5], "a cut answer must not teach to stop there"
    with pytest.raises(InputError, match="no prompts"):
        run_task(tokens, cfg, plain_corpus, by_bytes)


def test_the_same_corpus_gives_the_same_bytes(
    run_task: RunTask, pair_corpus: Artifact, by_bytes: Artifact
) -> None:
    one, two = (run_task(tokens, TokensConfig(), pair_corpus, by_bytes) for _ in range(2))
    assert one.manifest["files"] == two.manifest["files"]


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_too_little_is_left(
    family: Any, run_task: RunTask, pair_corpus: Artifact, by_bytes: Artifact
) -> None:
    """What is left of a split must stand for it; the length that the error names has room."""

    def sizes_of(split: Any) -> list[int]:
        rows = [(e.prompt, e.answer) for e in read_examples(pair_corpus, split)]
        whole = sum if family == "causal" else max
        return sorted(whole(len(text.encode()) + 1 for text in row) for row in rows)

    def refused(**given: Any) -> InputError:
        with pytest.raises(InputError, match="do not fit into") as error:
            run_task(tokens, TokensConfig(family=family, **given), pair_corpus, by_bytes)
        return error.value

    sizes = {split: sizes_of(split) for split in SPLITS}
    train = sizes["train"]
    enough = next(size for size in train if sum(s <= size for s in train) >= 0.95 * len(train))
    error = refused(length=8)
    assert f"{len(train)} of {len(train)} examples of the split 'train'" in str(error)
    assert f"set tokens.length to {enough}, which" in str(error.hint)
    third = train[len(train) // 3]
    share = max(sum(size > third for size in each) / len(each) for each in sizes.values())
    lenient = TokensConfig(family=family, length=third, max_dropped_share=share)
    left = run_task(tokens, lenient, pair_corpus, by_bytes).json("facts")["splits"]
    for split, each in sizes.items():
        assert left[split]["rows"] == sum(size <= third for size in each)
        assert left[split]["length_95"] == next(
            size for size in each if sum(s <= size for s in each) >= 0.95 * len(each)
        )
    refused(length=third, max_dropped_share=share - 0.01)
    refused(length=2, max_dropped_share=1.0)  # nothing at all is never enough


def test_without_bos_the_first_token_is_not_counted(
    run_task: RunTask, plain_corpus: Artifact, by_bytes: Artifact
) -> None:
    settings: dict[str, Any] = {"length": 4096}
    counts = [
        run_task(tokens, TokensConfig(bos=bos, **settings), plain_corpus, by_bytes).json("facts")
        for bos in (True, False)
    ]
    texts = len(list(read_examples(plain_corpus, "train")))
    with_bos, without = (each["splits"]["train"] for each in counts)
    assert with_bos["predicted"] - without["predicted"] == texts
    assert with_bos["characters"] - without["characters"] == texts
