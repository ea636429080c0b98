"""From files to examples: templates, roles, leaks, quarantine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from goldcrest.cluster.api import Artifact, InputError
from goldcrest.cluster.config_file import load_config
from goldcrest.pipelines import language
from goldcrest.tasks.language.examples import SPLITS, Example, Split, count_examples, read_examples
from goldcrest.tasks.language.prepare import TextConfig, prepare_text

RunTask = Callable[..., Artifact]
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "language"


def jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"q": f"what is {n}?", "a": f"it is {n}"} for n in range(first, first + count)]


def config(*paths: Path, **settings: Any) -> TextConfig:
    given = {"prompt": "{q}\n", "answer": "{a}", **settings}
    return TextConfig(paths=tuple(str(path) for path in paths), **given)


def examples(corpus: Artifact, split: Split) -> list[Example]:
    return list(read_examples(corpus, split))


def test_files_of_the_three_roles(tmp_path: Path, run_task: RunTask) -> None:
    root = tmp_path / "pack"
    jsonl(root / "train.jsonl", pairs(5))
    jsonl(
        root / "dev.jsonl", [{"q": "d", "a": "one"}, {"q": "e", "a": "x"}, {"q": "d", "a": "two"}]
    )
    jsonl(root / "test.jsonl", pairs(2, first=50))
    corpus = run_task(prepare_text, config(root))
    first = Example("pack/train.jsonl:1", "what is 0?\n", "it is 0")
    assert examples(corpus, "train")[0] == first
    assert [(e.prompt, e.answer, e.references) for e in examples(corpus, "validation")] == [
        ("d\n", "one", ("one", "two")),
        ("e\n", "x", ("x",)),
    ]
    assert [count_examples(corpus, split) for split in SPLITS] == [5, 2, 2]
    assert corpus.json("facts")["files"]["test"] == ["pack/test.jsonl"]


def test_without_roles_every_split_is_filled_and_nothing_leaks(
    tmp_path: Path, run_task: RunTask
) -> None:
    rows = [{"q": f"q{n % 15}", "a": f"a{n}"} for n in range(60)]
    path = jsonl(tmp_path / "all.jsonl", rows)
    corpus = run_task(prepare_text, config(path))
    prompts = {split: {e.prompt for e in examples(corpus, split)} for split in SPLITS}
    assert all(prompts.values())
    assert sum(len(each) for each in prompts.values()) == 15
    answers = [e.answer for e in examples(corpus, "train")]
    for split in ("validation", "test"):
        answers += [a for e in examples(corpus, split) for a in e.references]
    assert sorted(answers) == sorted(row["a"] for row in rows)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, run_task: RunTask) -> None:
    path = jsonl(tmp_path / "all.jsonl", pairs(40))
    made = [run_task(prepare_text, config(path), seed=seed) for seed in (1, 1, 2)]
    files = [{n: f["sha256"] for n, f in each.manifest["files"].items()} for each in made]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_prompts_of_evaluation_files_are_not_trained_on(tmp_path: Path, run_task: RunTask) -> None:
    jsonl(tmp_path / "p" / "train.jsonl", pairs(10))
    jsonl(tmp_path / "p" / "dev.jsonl", [*pairs(2), *pairs(1, first=20)])
    jsonl(tmp_path / "p" / "test.jsonl", pairs(1))
    corpus = run_task(prepare_text, config(tmp_path / "p"))
    assert [count_examples(corpus, split) for split in SPLITS] == [8, 2, 1]
    assert corpus.metrics["also_in_evaluation"] == 1 + 2


def test_evaluation_corpora_replace_the_files_of_that_role(
    tmp_path: Path, run_task: RunTask
) -> None:
    jsonl(tmp_path / "p" / "train.jsonl", pairs(10))
    jsonl(tmp_path / "p" / "test.jsonl", pairs(3, first=90))
    other = jsonl(tmp_path / "other.jsonl", pairs(2, first=70))
    corpus = run_task(prepare_text, config(tmp_path / "p", eval_paths=(str(other),)))
    assert {e.id for e in examples(corpus, "test")} == {"other.jsonl:1", "other.jsonl:2"}
    assert corpus.json("facts")["files"]["left out"] == ["p/test.jsonl"]


def test_plain_text_is_split_by_documents(tmp_path: Path, run_task: RunTask) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {n} tells a story of its own." for n in range(80)))
    settings = {"prompt": "", "answer": "{text}", "documents": {"min_bytes": 20}}
    corpus = run_task(prepare_text, config(path, **settings))
    found = {split: {e.answer for e in examples(corpus, split)} for split in SPLITS}
    assert sum(len(each) for each in found.values()) == 80
    assert all(found.values())
    assert {e.prompt for e in examples(corpus, "train")} == {""}
    guessed = run_task(prepare_text, config(path, **{**settings, "prompt": None, "answer": None}))
    assert {e.answer for e in examples(guessed, "train")} == found["train"]


def test_lists_and_replacements(tmp_path: Path, run_task: RunTask) -> None:
    row = {"triples": [["A", "price", "£ 5"], ["A", "in", "B"]], "refs": ["It is £ 5 .", "B ."]}
    path = jsonl(tmp_path / "test.jsonl", [row])
    train = jsonl(tmp_path / "train.jsonl", [{**row, "triples": [["C", "is", "D"]]}])
    cfg = config(
        *(train, path),
        prompt="{triples}\n",
        answer="{refs}",
        replace_in_prompt=(("£ ", "£"),),
        replace_in_answer=((r" ([.,])", r"\1"), ("£ ", "£")),
        validation_share=0.0,
    )
    corpus = run_task(prepare_text, cfg)
    (test,) = examples(corpus, "test")
    assert (test.prompt, test.references) == ("A : price : £5 | A : in : B\n", ("It is £5.", "B."))
    assert [(e.id, e.answer) for e in examples(corpus, "train")] == [
        ("train.jsonl:1#0", "It is £5."),
        ("train.jsonl:1#1", "B."),
    ]
    assert examples(corpus, "validation") == []


BAD = {
    "no field": {"q": "x"},
    "prompt is empty": {"q": " \n", "a": "y"},
    "answer is empty": {"q": "x", "a": ""},
    "NUL": {"q": "x\0", "a": "y"},
    "surrogate": {"q": "x", "a": "\ud800"},
    "longer than": {"q": "x", "a": "y" * 3000},
    "list of answers is empty": {"q": "x", "a": []},
    "dict, text was expected": {"q": {}, "a": "y"},
}


def test_bad_rows_go_to_quarantine_with_reasons(tmp_path: Path, run_task: RunTask) -> None:
    path = jsonl(tmp_path / "all.jsonl", [*pairs(40), *BAD.values()])
    with path.open("ab") as stream:
        stream.write(b'{"q": "\xff"}\n' + b"x" * 50_000 + b"\n")
    corpus = run_task(prepare_text, config(path, max_row_bytes=2000))
    quarantine = corpus.table("quarantine").to_pylist()
    reasons = [row["reason"] for row in quarantine]
    expected = [*BAD, "not valid UTF-8", "longer than 2000 bytes"]
    assert len(reasons) == len(expected)
    for reason, words in zip(reasons, expected, strict=True):
        # The row of 3000 letters is one long line, the reason says so in the same words.
        assert words in reason
    assert [row["line"] for row in quarantine] == list(range(41, 51))
    assert corpus.metrics["quarantined"] == 10


def test_too_many_bad_rows_are_an_error_that_names_the_line(
    tmp_path: Path, run_task: RunTask
) -> None:
    path = jsonl(tmp_path / "all.jsonl", [*pairs(3), {"q": "x"}])
    with pytest.raises(InputError, match=re.escape("all.jsonl:4: there is no field 'a'")):
        run_task(prepare_text, config(path))
    run_task(prepare_text, config(path, max_bad_share=0.3))


def test_nothing_to_train_on(tmp_path: Path, run_task: RunTask) -> None:
    path = jsonl(tmp_path / "test.jsonl", pairs(3))
    with pytest.raises(InputError, match="no file is for training") as refused:
        run_task(prepare_text, config(path))
    assert refused.value.hint is not None and "corpus.roles.test=[]" in refused.value.hint
    run_task(prepare_text, config(path, roles={"test": [], "train": ["*"]}))  # as the hint says
    same = jsonl(tmp_path / "train.jsonl", pairs(3))
    with pytest.raises(InputError, match="no row is left for training"):
        run_task(prepare_text, config(same, path))
    with pytest.raises(InputError, match="--corpus"):
        run_task(prepare_text, TextConfig(eval_paths=(str(path),)))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty\.jsonl:1: the file is empty"):
        run_task(prepare_text, config(tmp_path / "empty.jsonl"))


def test_unknown_fields_without_templates(tmp_path: Path, run_task: RunTask) -> None:
    path = jsonl(tmp_path / "all.jsonl", [{"x": "1", "y": "2"}])
    with pytest.raises(InputError, match="x, y are none of the known") as caught:
        run_task(prepare_text, TextConfig(paths=(str(path),)))
    assert "corpus.prompt" in str(caught.value.hint)
    path = jsonl(tmp_path / "half.jsonl", [{"\ud800": "1", "y": "2"}])
    with pytest.raises(InputError, match=r"\\ud800, y are none of the known"):
        run_task(prepare_text, TextConfig(paths=(str(path),)))
    # The file is given up before its end, and before the row that would fit.
    path = jsonl(tmp_path / "many.jsonl", [*[{"x": "1"}] * 300, {"prompt": "1", "answer": "2"}])
    with pytest.raises(InputError, match=r"many\.jsonl:1: no templates were given") as caught:
        run_task(prepare_text, TextConfig(paths=(str(path),)))
    assert "corpus.prompt" in str(caught.value.hint)
    path = jsonl(tmp_path / "known.jsonl", [{"question": "1", "answer": "2"}] * 2)
    corpus = run_task(prepare_text, TextConfig(paths=(str(path),)))
    assert [(e.prompt, e.answer) for e in examples(corpus, "train")] == [("1\n", "2")] * 2


def test_limits_on_rows(tmp_path: Path, run_task: RunTask) -> None:
    jsonl(tmp_path / "p" / "train.jsonl", pairs(50))
    jsonl(tmp_path / "p" / "test.jsonl", pairs(9, first=60))
    cfg = config(tmp_path / "p", max_train_rows=20, max_eval_rows=3)
    corpus = run_task(prepare_text, cfg)
    assert count_examples(corpus, "train") == 20
    assert count_examples(corpus, "test") == 3
    assert count_examples(corpus, "validation") >= 1


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, run_task: RunTask) -> None:
    import tracemalloc

    rows = [{"q": f"what is {n}?", "a": "word " * 500} for n in range(2500)]
    path = jsonl(tmp_path / "all.jsonl", rows)
    del rows
    run_task(prepare_text, config(path, max_train_rows=10))  # imports
    tracemalloc.start()
    run_task(prepare_text, config(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 6_000_000
    assert peak < 4_500_000


def test_the_embedded_corpus(run_task: RunTask) -> None:
    corpus = run_task(prepare_text, TextConfig(embedded={"meanings": 60}))  # type: ignore[arg-type]
    train, test = examples(corpus, "train"), examples(corpus, "test")
    assert all(e.prompt.startswith("item[") and e.prompt.endswith("]\n") for e in train)
    assert all(len(e.references) == 3 for e in test)
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert all(len(e.answer) > 20 and "{" not in e.answer for e in train)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"prompt": "{q}", "answer": None}, "both prompt and answer"),
        ({"prompt": "{q", "answer": "{a}"}, "expected '}'"),
        ({"prompt": "{q}", "answer": "no field"}, "names no field"),
        ({"replace_in_answer": (("(", "x"),)}, "replacing"),
        ({"replace_in_answer": (("a", r"\1"),)}, "replacing"),
        ({"documents": {"heading": "["}}, "regular expression"),
        ({"names": ("a", "b")}, "2 names for 0 corpora"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_configs_that_cannot_work(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(why)):
        TextConfig(**settings)


def test_the_name_of_a_single_file_is_in_the_config(tmp_path: Path) -> None:
    """Its role is read off its name, and a file's fingerprint is without its name."""
    assert config(tmp_path / "train.jsonl").names == ("train.jsonl",)


PACKS = [
    (
        "e2e",
        {"mr": "name[The Vaults], priceRange[£ 30]", "ref": "It costs £ 30 ."},
        "name[The Vaults], priceRange[£30]\n",
        ["It costs £30."],
    ),
    ("multi30k", {"en": "A man.", "de": "Ein Mann."}, "A man.", ["Ein Mann."]),
    (
        "dart",
        {"tripleset": [["A", "IN", "B"], ["A", "AT", "C"]], "refs": ["x", "y"], "sources": ["s"]},
        "A : IN : B | A : AT : C\n",
        ["x", "y"],
    ),
    ("sst2", {"text": "a fine film", "label": 1}, "a fine film\n", ["1"]),
    (
        "paper-mpt-gsm8k",
        {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
        "1 + 1?\n",
        ["It is <<1+1=2>>2.\n#### 2"],
    ),
    (
        "paper-t5-wmt14",
        {"en": "A man.", "de": "Ein Mann."},
        "translate English to German: A man.",
        ["Ein Mann."],
    ),
]


@pytest.mark.parametrize(("name", "row", "prompt", "answers"), PACKS, ids=[p[0] for p in PACKS])
def test_packs_are_read_by_their_configs_alone(
    name: str,
    row: dict[str, object],
    prompt: str,
    answers: list[str],
    tmp_path: Path,
    run_task: RunTask,
) -> None:
    """A row as the pack has it, in files that are called as the pack's (DART has no train)."""
    cfg = load_config(language.Config, file=CONFIGS / f"{name}.yaml").corpus
    jsonl(tmp_path / "pack" / ("dev.jsonl" if name == "dart" else "train.jsonl"), [row])
    here = {"paths": (str(tmp_path / "pack"),), "validation_share": 0.0, "test_share": 0.0}
    corpus = run_task(prepare_text, TextConfig(**{**cfg.model_dump(), **here}))
    found = examples(corpus, "train")
    assert [(each.prompt, each.answer) for each in found] == [(prompt, a) for a in answers]


def test_articles_are_documents(tmp_path: Path, run_task: RunTask) -> None:
    """WikiText, as the head of configs/language/plain.yaml says."""
    (tmp_path / "train.txt").write_text(" \n = One = \n \n Text . \n = Two = \n More . \n")
    cfg = load_config(
        language.Config,
        file=CONFIGS / "plain.yaml",
        overrides=["corpus.documents.split=headings", f"corpus.paths=[{tmp_path}/train.txt]"],
    ).corpus
    corpus = run_task(
        prepare_text, cfg.model_copy(update={"validation_share": 0.0, "test_share": 0.0})
    )
    found = [each.answer.split() for each in examples(corpus, "train")]
    assert found == [["=", "One", "=", "Text", "."], ["=", "Two", "=", "More", "."]]


def test_an_odd_first_row_costs_that_row_alone(tmp_path: Path, run_task: RunTask) -> None:
    rows: list[dict[str, Any]] = [{"id": 1}]
    rows += [{"prompt": f"{number}?", "answer": f"{number}!"} for number in range(40)]
    path = jsonl(tmp_path / "all.jsonl", rows)
    corpus = run_task(prepare_text, TextConfig(paths=(str(path),)))
    (reason,) = corpus.table("quarantine").to_pylist()
    assert (reason["line"], "fields id are none of the known" in reason["reason"]) == (1, True)


def test_an_instruction_does_not_put_all_rows_on_one_side(
    tmp_path: Path, run_task: RunTask
) -> None:
    """The prompt is the same for every row: texts are held out, not prompts."""
    rows = [{"text": f"Story {number}."} for number in range(200)]
    cfg = config(
        jsonl(tmp_path / "all.jsonl", rows + rows[:50]), prompt="Write a story:\n", answer="{text}"
    )
    corpus = run_task(prepare_text, cfg)
    found = {split: {each.answer for each in examples(corpus, split)} for split in SPLITS}
    assert all(0 < len(answers) < 200 for answers in found.values())
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 200
    test = examples(corpus, "test")
    assert all(set(each.references) == {each.answer} for each in test)
