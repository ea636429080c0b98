"""Speech corpora with texts: what is read, held out, quarantined; rows of labels and features."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import pre_tokenizers
from transformers import WhisperFeatureExtractor, WhisperTokenizer

from goldcrest.cluster.api import InputError, StepError
from goldcrest.kernels.frontend.whisper_mel import window
from goldcrest.pipelines import language
from goldcrest.tasks.data.audio import from_pcm16
from goldcrest.tasks.data.speech_rows import SpeechReader, features_file
from goldcrest.tasks.data.tokens import TokenReader, TokenRow, TokenWriter, cut
from goldcrest.tasks.language.batches import speech_batch
from goldcrest.tasks.language.examples import SPLITS, count_examples, read_examples
from goldcrest.tasks.language.prepare import TextConfig, prepare_text
from goldcrest.tasks.language.prepare_speech import SpeechCorpusConfig, prepare_speech
from goldcrest.tasks.language.splits import sides
from goldcrest.tasks.language.tokenizer import (
    TokenizerConfig,
    load_tokenizer,
    tokenizer,
    tokenizer_folder,
    transcript_prefix,
)
from goldcrest.tasks.language.tokens import TokensConfig, encoded_texts, tokens
from tests.tasks.conftest import RunTask
from tests.tasks.language import speech_toys as toys
from tests.tasks.language.writing_models import byte_tokenizer


def add(folder: Path, row: dict[str, Any], samples: np.ndarray | None = None) -> None:
    """One more recording of a corpus."""
    if samples is not None:
        soundfile.write(folder / row["file_name"], samples, toys.RATE)
    with (folder / "metadata.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def test_a_corpus_becomes_examples_with_audio(tmp_path: Path, run_task: RunTask) -> None:
    folder = toys.corpus_folder(tmp_path / "words", 48)
    cfg = SpeechCorpusConfig(paths=(str(folder),), max_seconds=toys.WINDOW)
    made = run_task(prepare_speech, cfg)
    told = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    texts = {f"words/{row['file_name']}": row["text"] for row in told}
    seen: dict[str, set[str]] = {}
    for split in SPLITS:
        rows = list(read_examples(made, split))
        assert len(rows) == count_examples(made, split) > 0
        table = made.table(split).to_pylist()
        seen[split] = {row["speaker"] for row in table}
        for row, full in zip(rows, table, strict=True):
            assert (row.prompt, row.answer) == ("", texts.pop(row.id))
            assert row.references == (() if split == "train" else (row.answer,))
            samples = from_pcm16(full["audio"])
            assert len(samples) / toys.RATE == full["seconds"]
            assert full["seconds"] == pytest.approx(0.15 * len(row.answer))
    assert not texts
    assert not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]
    assert sum(map(len, seen.values())) == 6
    again = run_task(prepare_speech, cfg)
    assert again.manifest["files"] == made.manifest["files"]
    facts = made.metrics["corpus"]
    assert facts["train"]["rows"] == count_examples(made, "train")
    assert sum(each["seconds"] for each in facts.values()) == pytest.approx(
        0.15 * sum(len(row["text"]) for row in told)
    )


def test_bad_rows_go_to_quarantine_with_reasons(tmp_path: Path, run_task: RunTask) -> None:
    folder = toys.corpus_folder(tmp_path / "words", 30)
    wave = toys.spoken("ab", np.random.default_rng(9))
    add(folder, {"file_name": "no-text.wav"}, wave)
    add(folder, {"file_name": "spaces.wav", "text": "  "}, wave)
    add(folder, {"file_name": "silent.wav", "text": "a"}, np.zeros(4000, np.float32))
    add(folder, {"file_name": "long.wav", "text": "a"}, np.tile(wave, 4))
    add(folder, {"file_name": "absent.wav", "text": "a"})
    add(folder, {"file_name": "broken.wav", "text": "a"})
    (folder / "broken.wav").write_bytes(b"RIFF")
    add(folder, {"file_name": "good.wav", "text": "A, b!", "speaker": "s0"}, wave)
    cfg = SpeechCorpusConfig(
        paths=(str(folder),), max_seconds=toys.WINDOW, replace_in_text=(("[^A-Za-z]", ""),)
    )
    made = run_task(prepare_speech, cfg)
    reasons = {
        Path(row["path"]).name: row["reason"] for row in made.table("quarantine").to_pylist()
    }
    assert made.metrics["quarantined"] == len(reasons) == 6
    assert reasons["no-text.wav"] == "it has no text"
    assert reasons["spaces.wav"] == "the text is empty"
    assert "silent" in reasons["silent.wav"]
    assert reasons["long.wav"] == "1.20 s is longer than 0.6 s"
    assert "absent" in reasons["absent.wav"] and "audio" in reasons["broken.wav"]
    answers = {row.id: row.answer for split in SPLITS for row in read_examples(made, split)}
    assert len(answers) == 31 and answers["words/good.wav"] == "Ab"
    strict = cfg.model_copy(update={"max_bad_share": 0.1})
    with pytest.raises(StepError, match="6 of 37 recordings can't be used, more than the allowed"):
        run_task(prepare_speech, strict)


def test_problems_are_a_share_of_all_recordings_however_few_are_drawn(
    tmp_path: Path, run_task: RunTask
) -> None:
    """All 12 without a text are known; of the others 9 are read, and stand for the rest."""
    folder = toys.corpus_folder(tmp_path / "words", 88)
    for number in range(12):
        wave = toys.spoken("ab", np.random.default_rng(number))
        add(folder, {"file_name": f"no-text-{number}.wav"}, wave)
    drawn = {"apart": "recordings", "max_train_rows": 5, "max_eval_rows": 2}
    cfg = SpeechCorpusConfig(paths=(str(folder),), **drawn)
    made = run_task(prepare_speech, cfg)
    assert [count_examples(made, split) for split in SPLITS] == [5, 2, 2]
    assert (made.metrics["quarantined"], made.metrics["rows_read"]) == (12, 21)
    strict = cfg.model_copy(update={"max_bad_share": 0.1})
    with pytest.raises(StepError, match=r"12 of 100 recordings can't be used \(judged by the 9"):
        run_task(prepare_speech, strict)
    for path in folder.glob("*.wav"):
        path.write_bytes(b"RIFF")
    with pytest.raises(StepError, match="100 of 100 recordings can't be used"):
        run_task(prepare_speech, cfg)


def test_corpora_for_evaluation_are_for_testing(tmp_path: Path, run_task: RunTask) -> None:
    train = toys.corpus_folder(tmp_path / "train", 20)
    test = toys.corpus_folder(tmp_path / "test", 9, seed=5)
    where = {"paths": (str(train),), "eval_paths": (str(test / "metadata.jsonl"),)}
    cfg = SpeechCorpusConfig(**where, apart="recordings", max_train_rows=10, max_eval_rows=7)
    assert cfg.beside == (str(test),)  # its audio belongs to the key
    made = run_task(prepare_speech, cfg)
    assert [count_examples(made, split) for split in ("train", "test")] == [10, 7]
    assert all(row.id.startswith("test/") for row in read_examples(made, "test"))
    assert count_examples(made, "validation") > 0


def test_what_is_no_corpus_for_a_speech_model_is_refused(tmp_path: Path, run_task: RunTask) -> None:
    with pytest.raises(InputError, match="none was given"):
        run_task(prepare_speech, SpeechCorpusConfig())
    bare = toys.corpus_folder(tmp_path / "words", 4)
    (bare / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"none of the 4 recordings in .* has a text"):
        run_task(prepare_speech, SpeechCorpusConfig(paths=(str(bare),)))
    text = run_task(prepare_text, TextConfig())
    words = run_task(tokenizer, TokenizerConfig(method="bytes"), text)
    with pytest.raises(InputError, match="texts without audio"):
        run_task(tokens, TokensConfig(family="speech"), text, words)


def test_sides_are_by_hash_and_none_is_empty() -> None:
    keys = [f"k{number}" for number in range(400)]
    made = sides(keys, {"test": 0.2, "validation": 0.1}, seed=3)
    counts = {split: list(made.values()).count(split) for split in SPLITS}
    assert counts["test"] == pytest.approx(80, abs=25)
    assert counts["validation"] == pytest.approx(40, abs=20)
    assert all(
        sides(keys[:200], {"test": 0.2, "validation": 0.1}, 3)[k] == made[k] for k in keys[:200]
    )
    few = sides(["x", "y", "z"], {"test": 0.01, "validation": 0.01}, seed=0)
    assert sorted(few.values()) == ["test", "train", "validation"]
    assert sides(["x"], {"test": 0.4}, seed=0) == {"x": "train"}


def test_rows_are_labels_and_the_librarys_features(tmp_path: Path, run_task: RunTask) -> None:
    folder = toys.corpus_folder(tmp_path / "words", 30)
    corpus, words, rows = toys.chain(run_task, folder, speech={"dtype": "float32"})
    encoder = load_tokenizer(tokenizer_folder(words))
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    reader = SpeechReader(rows.file("train.arrow"))
    table = corpus.table("train").to_pylist()
    assert len(reader) == len(table) and reader.mel_bins == 80
    for number in (0, 7):
        row, example = reader[number], table[int(reader.examples[number])]
        assert encoder.decode(row.answer) == example["answer"] + "</s>" and not len(row.prompt)
        samples = from_pcm16(example["audio"])
        expected = extractor(samples, sampling_rate=toys.RATE, return_tensors="np")
        made = window(torch.from_numpy(row.features), 100).numpy()
        assert made == pytest.approx(expected["input_features"][0], abs=5e-5)
        assert len(row.features) == reader.frames[number] < 60
    assert int(reader.characters.sum()) == sum(len(row["answer"]) for row in table)
    other = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(other[3].features, reader[3].features)
    batch = speech_batch([reader[0], cut(reader[1], 2, "speech")], 60, 0, 1)  # type: ignore[list-item]
    assert batch["input_features"].shape == (2, 80, 60)
    assert batch["labels"][1].tolist()[2:] == [-100] * (batch["labels"].shape[1] - 2)
    half = toys.chain(run_task, folder)[2]
    for split in SPLITS:
        sizes = [features_file(each.file(f"{split}.arrow")).stat().st_size for each in (rows, half)]
        assert sizes[1] < 0.7 * sizes[0]


def test_transcripts_that_are_too_long_are_left_out_or_cut(
    tmp_path: Path, run_task: RunTask
) -> None:
    folder = toys.corpus_folder(tmp_path / "words", 30)
    corpus, words, rows = toys.chain(run_task, folder, length=3)
    facts = rows.json("facts")["splits"]["train"]
    texts = [row.answer for row in read_examples(corpus, "train")]
    short = [text for text in texts if len(text) == 2]
    assert (facts["rows"], facts["dropped"]) == (len(short), len(texts) - len(short))
    reader = SpeechReader(rows.file("train.arrow"))
    assert [texts[number] for number in reader.examples] == short
    cfg = TokensConfig(family="speech", length=3, overlong="truncate")
    whole = run_task(tokens, cfg, corpus, words).json("facts")["splits"]["train"]
    assert (whole["rows"], whole["truncated"]) == (len(texts), len(texts) - len(short))


def test_features_belong_to_their_transcripts(tmp_path: Path, run_task: RunTask) -> None:
    rows = toys.chain(run_task, toys.corpus_folder(tmp_path / "words", 20))[2]
    path = rows.file("train.arrow")
    (tmp_path / "train.arrow").write_bytes(path.read_bytes())
    beside = features_file(tmp_path / "train.arrow")
    beside.write_bytes(features_file(rows.file("test.arrow")).read_bytes())
    with pytest.raises(ValueError, match=r"transcripts, .* utterances"):
        SpeechReader(tmp_path / "train.arrow")


def test_a_tokenizer_says_what_begins_a_transcript(tmp_path: Path, run_task: RunTask) -> None:
    corpus = run_task(prepare_text, TextConfig())
    names = ["<|startoftranscript|>", "<|hi|>", "<|notimestamps|>"]
    given = byte_tokenizer()
    given.add_special_tokens({"additional_special_tokens": names})
    given.save_pretrained(tmp_path / "given")
    plain = {"method": "load", "path": str(tmp_path / "given")}
    without = run_task(tokenizer, TokenizerConfig(**plain), corpus)
    assert transcript_prefix(load_tokenizer(tokenizer_folder(without))) == []
    for prefix in (names, names[1:]):  # the start of the transcript is the model's to write
        made = run_task(tokenizer, TokenizerConfig(**plain, prefix=prefix), corpus)
        loaded = load_tokenizer(tokenizer_folder(made))
        assert transcript_prefix(loaded) == loaded.convert_tokens_to_ids(names[1:])
    with pytest.raises(InputError, match=r"has no token '<\|xx\|>'"):
        run_task(tokenizer, TokenizerConfig(**plain, prefix=("<|xx|>",)), corpus)
    with pytest.raises(ValueError, match="only a tokenizer that is loaded"):
        TokenizerConfig(prefix=("<|hi|>",))


def test_whispers_own_tokenizer_says_it_too(tmp_path: Path, run_task: RunTask) -> None:
    """The class of the library, on bytes: its own prefix, and one that is asked for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    given = WhisperTokenizer(vocab={name: i for i, name in enumerate(letters)}, merges=[])
    names = ["<|startoftranscript|>", "<|hi|>", "<|transcribe|>", "<|notimestamps|>"]
    given.add_special_tokens({"additional_special_tokens": names})
    given.save_pretrained(tmp_path / "given")
    corpus = run_task(prepare_text, TextConfig())
    for prefix, expected in (((), names[3:]), (tuple(names[1:]), names[1:])):
        cfg = TokenizerConfig(method="load", path=str(tmp_path / "given"), prefix=prefix)
        loaded = load_tokenizer(tokenizer_folder(run_task(tokenizer, cfg, corpus)))
        ids = transcript_prefix(loaded)
        assert loaded.convert_ids_to_tokens(ids) == expected
        assert loaded.pad_token == loaded.eos_token == "<|endoftext|>"
        text = "नमस्ते"
        (encoded,) = encoded_texts(loaded, [text], ids, [loaded.eos_token_id or 0])
        assert len(encoded) == len(ids) + len(text.encode()) + 1
        assert loaded.decode(encoded.tokens, skip_special_tokens=True) == text


SPEECH = {
    "speech": {"max_seconds": toys.WINDOW},
    "tokens": {"family": "speech"},
    "pretrain_tokens": {"family": "speech"},
    "pretrain": {"model": toys.MODEL},
}

MOONSHINE = {"family": "speech", "architecture": "moonshine"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": {}}, "tokens.family is causal, but pretrain.model.family is speech"),
        ({"speech": {}}, "max_seconds is 30, but a model of 30 max_source_positions hears 0.6 s"),
        ({"tokens": {"family": "speech", "speech": {"mel_bins": 128}}}, "num_mel_bins is 80"),
        ({"corpus": {"prompt": "", "answer": "{text}"}}, "say under speech how they are read"),
        ({"pretrain_corpus": {}}, "pretrain_corpus and calibration_corpus must be null"),
        ({"calibration_corpus": {}, "calibration_tokens": {"family": "speech"}}, "must be null"),
        ({"speech": {"paths": ["x"], "max_seconds": 0.5}}, "are those of corpus.paths"),
        ({"pretrain": {}, "tokens": {}, "pretrain_tokens": {}}, "this one is causal"),
        ({"pretrain": {"model": MOONSHINE}}, "a fresh speech model is a whisper"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_together_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        language.Config(**{**SPEECH, **changes})


def test_the_chain_of_speech_reads_the_corpus_paths() -> None:
    cfg = language.Config(**SPEECH, corpus={"paths": ["here"], "eval_paths": ["there"]})
    assert len(language.build(cfg)) == 5
    again = language.Config.model_validate(cfg.model_dump())
    assert again == cfg


def test_text_rows_are_no_rows_of_speech(tmp_path: Path) -> None:
    from goldcrest.tasks.language.rows import open_rows

    with TokenWriter(tmp_path / "train.arrow") as writer:
        row = TokenRow(np.zeros(0, np.int32), np.arange(3, dtype=np.int32))
        writer.write(row, example=0, characters=1, size=1)
    assert isinstance(open_rows(tmp_path / "train.arrow", "causal"), TokenReader)
    with pytest.raises(InputError, match="have no features, and a speech model reads audio"):
        open_rows(tmp_path / "train.arrow", "speech")
