"""Prepare: what goes in, what is cut, what is held out, what is refused."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.cluster.api import InputError, StepError
from goldcrest.tasks.data import audio, recording_chunks
from goldcrest.tasks.data.audio import from_pcm16
from goldcrest.tasks.data.corpus import Recording, StoredAudio, read_corpora
from goldcrest.tasks.speaker import prepare as prepare_step
from goldcrest.tasks.speaker.prepare import PrepareConfig, hold_out_speakers, prepare


def test_a_folder_of_speech(run_task, speech_folder: Path) -> None:
    made = run_task(prepare, PrepareConfig(paths=(str(speech_folder),)))
    facts = made.table("facts").to_pylist()
    assert len(facts) == 12
    assert {row["split"] for row in facts} == {"train", "eval"}
    audio = made.table("utterances")["audio"].to_pylist()
    lengths = [len(from_pcm16(data)) / 16_000 for data in audio]
    assert lengths == pytest.approx([row["seconds"] for row in facts])
    assert made.metrics["corpus"]["train"]["speakers"] == 2
    assert made.metrics["quarantined"] == 0


def test_the_same_seed_gives_the_same_bytes(run_task, speech_folder: Path) -> None:
    cfg = PrepareConfig(paths=(str(speech_folder),))
    one, two, *others = (run_task(prepare, cfg, seed=s).manifest["files"] for s in (0, 0, 1, 2, 3))
    assert one == two
    # Another seed holds out other speakers; with 6 ways to choose 2 of 4, not at every seed.
    assert any(one["facts.parquet"] != other["facts.parquet"] for other in others)


def test_long_recordings_are_cut_evenly(run_task, tmp_path: Path) -> None:
    root = tmp_path / "long"
    root.mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000 * 9)
    soundfile.write(root / "a.wav", noise, 16_000)
    facts = run_task(prepare, PrepareConfig(paths=(str(root),))).table("facts").to_pylist()
    assert [row["seconds"] for row in facts] == pytest.approx([3.0, 3.0, 3.0])
    assert [row["id"] for row in facts] == [f"long/a.wav#{n:03d}" for n in range(3)]


def test_bad_files_go_to_quarantine_with_reasons(run_task, speech_folder: Path) -> None:
    rows = [
        {"file_name": str(p.relative_to(speech_folder)), "speaker": p.parent.name}
        for p in sorted(speech_folder.rglob("*.wav"))
    ]
    rows.append({"file_name": "gone.wav", "speaker": "speaker0"})
    (speech_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (speech_folder / "speaker1" / "take0.wav").write_bytes(b"")
    soundfile.write(speech_folder / "speaker2" / "take0.wav", np.zeros(16_000), 16_000)
    huge = np.full(16_000, 1e25, np.float32)
    soundfile.write(speech_folder / "speaker3" / "take0.wav", huge, 16_000, subtype="FLOAT")
    made = run_task(prepare, PrepareConfig(paths=(str(speech_folder),), max_bad_share=0.5))
    reasons = {row["id"]: row["reason"] for row in made.table("quarantine").to_pylist()}
    assert made.metrics["quarantined"] == len(reasons) == 4
    assert "0 bytes" in reasons["corpus/speaker1/take0.wav"]
    assert "silent" in reasons["corpus/speaker2/take0.wav"]
    assert "as large as 1e+25" in reasons["corpus/speaker3/take0.wav"]
    assert "absent" in reasons["corpus/gone.wav"]
    assert made.table("facts").num_rows == 9


def test_too_many_bad_files_stop_the_step(run_task, speech_folder: Path) -> None:
    for path in list(speech_folder.rglob("*.wav"))[:6]:
        path.write_text("not audio")
    with pytest.raises(StepError, match="6 of 12 recordings can't be used"):
        run_task(prepare, PrepareConfig(paths=(str(speech_folder),)))


def test_jobs_are_bounded_by_what_their_files_decode_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed silence with a click: few bytes, many seconds."""
    samples = np.zeros(16_000 * 30, np.int16)
    samples[0] = 20_000
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.flac", samples, 16_000)
    (tmp_path / "no.flac").write_bytes(b"fLaC")
    recordings = read_corpora((str(tmp_path),))
    assert sum((tmp_path / r.path).stat().st_size for r in recordings) < 100_000
    (job,) = prepare_step._chunks(recordings, ["train"] * 7)
    assert len(job.recordings) == 7
    monkeypatch.setattr(recording_chunks, "_CHUNK_SECONDS", 60.0)
    jobs = list(prepare_step._chunks(recordings, list("abcdefg")))  # type: ignore[arg-type]
    assert [len(job.recordings) for job in jobs] == [2, 2, 2, 1]
    assert [list(job.splits) for job in jobs] == [["a", "b"], ["c", "d"], ["e", "f"], ["g"]]


def test_audio_in_tables_is_read_job_by_job(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    paths = sorted(speech_folder.rglob("*.wav"))
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    datasets.Dataset.from_dict({"audio": rows}).save_to_disk(str(tmp_path / "saved"))
    recordings = read_corpora((str(tmp_path / "saved"),))
    read: list[int] = []
    plain = StoredAudio.read
    monkeypatch.setattr(StoredAudio, "read", lambda self: read.append(self.row) or plain(self))
    monkeypatch.setattr(recording_chunks, "_CHUNK_FILES", 5)
    jobs = prepare_step._chunks(recordings, ["train"] * 12)
    first = next(jobs)
    assert read == [0, 1, 2, 3, 4]
    assert [r.data for r in first.recordings] == [row["bytes"] for row in rows[:5]]
    assert [len(job.recordings) for job in jobs] == [5, 2]
    pickle.dumps(first)  # it travels to a worker


def test_a_file_that_needs_too_much_memory_is_quarantined(
    run_task, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = speech_folder / "speaker0" / "wide.flac"
    soundfile.write(wide, np.full((4_000, 8), 1_000, np.int16), 16_000)
    plain = audio.AudioLimits
    monkeypatch.setattr(audio, "AudioLimits", functools.partial(plain, max_samples=31_999))
    made = run_task(prepare, PrepareConfig(paths=(str(speech_folder),)))
    (row,) = made.table("quarantine").to_pylist()
    assert row["id"] == "corpus/speaker0/wide.flac"
    assert row["reason"].startswith("4000 samples in 8 channels; at most 31999")


def test_evaluation_corpora_never_train(run_task, speech_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    speech_folder.joinpath("speaker3").rename(other)
    cfg = PrepareConfig(paths=(str(speech_folder),), eval_paths=(str(other),))
    facts = run_task(prepare, cfg).table("facts").to_pylist()
    assert {row["corpus"]: row["split"] for row in facts} == {"corpus": "train", "other": "eval"}


def test_one_folder_for_both_is_refused(run_task, speech_folder: Path) -> None:
    path = str(speech_folder)
    with pytest.raises(InputError, match="in two corpora"):
        run_task(prepare, PrepareConfig(paths=(path,), eval_paths=(f"{path}/",)))


def test_a_recording_of_a_dataset_is_not_in_training_and_evaluation(
    run_task, speech_folder: Path, tmp_path: Path
) -> None:
    import datasets

    for name in ("one", "two"):
        paths = sorted(speech_folder.glob(f"speaker*/take[{'01' if name == 'one' else '12'}].wav"))
        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        datasets.Dataset.from_dict({"audio": rows}).save_to_disk(str(tmp_path / name))
    cfg = PrepareConfig(paths=(str(tmp_path / "one"),), eval_paths=(str(tmp_path / "two"),))
    with pytest.raises(InputError, match=r"one/\d+ would be trained on, but two/\d+ is the same"):
        run_task(prepare, cfg)


def test_the_names_of_corpora_are_part_of_the_config(tmp_path: Path) -> None:
    """They are part of every id, so they must be part of the key."""
    cfg = PrepareConfig(paths=("/data/one", "/other/one"), eval_paths=("/data/two",))
    assert cfg.names == ("one", "one-2", "two")
    (tmp_path / "metadata.jsonl").write_text("")
    manifest = PrepareConfig(paths=(str(tmp_path / "metadata.jsonl"),))
    assert manifest.beside == (str(tmp_path),)
    with pytest.raises(ValueError, match="1 names for 2 corpora"):
        PrepareConfig(paths=("a", "b"), names=("x",))


def test_the_embedded_corpus(run_task) -> None:
    made = run_task(prepare, PrepareConfig(embedded={"speakers": 5, "utterances": 2}))
    facts = made.table("facts").to_pylist()
    assert len({row["speaker"] for row in facts}) == 5
    assert {row["sex"] for row in facts} <= {"M", "F"}
    assert made.metrics["corpus"]["eval"]["speakers"] == 2


@settings(deadline=None, max_examples=40)
@given(speakers=st.integers(1, 12), share=st.floats(0, 0.99), seed=st.integers(0, 3))
def test_held_out_speakers_are_disjoint(speakers: int, share: float, seed: int) -> None:
    recordings = [
        Recording(id=f"{s}/{n}", corpus="c", path=Path("x"), speaker=f"s{s}")
        for s in range(speakers)
        for n in range(2)
    ]
    splits = hold_out_speakers(recordings, share, seed)
    sides = {
        side: {r.speaker for r, s in zip(recordings, splits, strict=True) if s == side}
        for side in ("train", "eval")
    }
    assert not sides["train"] & sides["eval"]
    assert len(sides["train"]) >= min(speakers, 2)
    assert len(sides["eval"]) != 1
    if speakers >= 4 and share > 0:
        assert len(sides["eval"]) >= 2


@pytest.mark.parametrize("seed", range(8))
def test_held_out_speakers_can_make_trials_within_a_sex(seed: int) -> None:
    recordings = [
        Recording(id=str(n), corpus="c", path=Path("x"), speaker=f"s{n}", sex="MF"[n % 2])
        for n in range(6)
    ]
    splits = hold_out_speakers(recordings, 0.3, seed)
    held = [r.sex for r, split in zip(recordings, splits, strict=True) if split == "eval"]
    assert len(held) == 2
    assert held[0] == held[1]


def _speakers(**corpora: str) -> list[Recording]:
    """`_speakers(a="xyz")`: corpus a with speakers x, y and z."""
    return [
        Recording(id=f"{corpus}/{name}", corpus=corpus, path=Path("x"), speaker=name)
        for corpus, names in corpora.items()
        for name in names
    ]


def _sides(recordings: list[Recording], seed: int, share: float = 0.3) -> dict[str, str]:
    splits = hold_out_speakers(recordings, share, seed)
    return {r.id: split for r, split in zip(recordings, splits, strict=True)}


@settings(deadline=None, max_examples=80)
@given(
    corpora=st.lists(st.sets(st.sampled_from("abcdefghijkl"), min_size=1), min_size=1, max_size=4),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 3),
)
def test_a_name_is_on_one_side_in_all_corpora(
    corpora: list[set[str]], share: float, seed: int
) -> None:
    names = {f"corpus{n}": "".join(sorted(each)) for n, each in enumerate(corpora)}
    sides = _sides(_speakers(**names), seed, share)
    of_name: dict[str, set[str]] = {}
    for place, side in sides.items():
        of_name.setdefault(place.partition("/")[2], set()).add(side)
    assert all(len(found) == 1 for found in of_name.values())
    first = next((corpus for corpus, each in names.items() if len(each) >= 4), None)
    if first is None:
        assert set(sides.values()) == {"train"}
    else:  # it is drawn as if it were alone
        assert _sides(_speakers(**{first: names[first]}), seed, share).items() <= sides.items()


@pytest.mark.parametrize("seed", range(4))
def test_names_of_one_corpus_are_drawn_as_ever(seed: int) -> None:
    """Expected: the draw of each corpus alone, which results in stores were made with."""
    together = _sides(_speakers(one="abcdef", two="ghijkl"), seed)
    alone = _sides(_speakers(one="abcdef"), seed) | _sides(_speakers(two="ghijkl"), seed)
    assert together == alone
    shared = _sides(_speakers(one="abcdef", two="abghijklmn"), seed)
    two = _sides(_speakers(two="abghijklmn"), seed)
    own = [name for name in two if name[-1] not in "ab"]
    # Ten names hold out three: with up to two decided by the other corpus there may be one more.
    assert sum(shared[name] != two[name] for name in own) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_a_later_corpus_keeps_two_speakers_on_either_side(seed: int) -> None:
    """As far as its own names allow."""
    sides = _sides(_speakers(one="abcdefgh", two="abcdxy", three="efgh", few="abc"), seed)
    two = [side for place, side in sides.items() if place.startswith("two/")]
    assert two.count("train") >= 2
    assert two.count("eval") >= 2
    assert {p: s for p, s in sides.items() if p.startswith("few/")} == {
        f"few/{name}": sides[f"one/{name}"] for name in "abc"
    }


def test_names_on_both_sides_are_noted(run_task, speech_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name in ("speaker1", "stranger"):
        (other / name).mkdir(parents=True)
        source = speech_folder / "speaker2" / "take0.wav"
        (other / name / "take9.wav").write_bytes(source.read_bytes())
    cfg = PrepareConfig(paths=(str(speech_folder),), eval_paths=(str(other),))
    note = run_task(prepare, cfg).metrics["notes"]["speakers_on_both_sides"]
    assert "have 1 speakers' names in common (speaker1)" in note
    assert "notes" not in run_task(prepare, PrepareConfig(paths=(str(speech_folder),))).metrics


def test_the_unlabelled_train() -> None:
    recordings = [Recording(id=str(n), corpus="c", path=Path("x")) for n in range(9)]
    assert set(hold_out_speakers(recordings, 0.3, 0)) == {"train"}
