"""Readers of text: what was written comes back, and what is broken is named, line by line."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from goldcrest.cluster.api import InputError
from goldcrest.tasks.data.documents import DocumentConfig
from goldcrest.tasks.data.templates import FieldError, Template
from goldcrest.tasks.data.text import RoleConfig, Row, corpus_names, read_rows, text_files

LIMIT = 1 << 16
texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))
fields = st.dictionaries(st.sampled_from(["a", "b", "text"]), texts, min_size=1)
few = settings(max_examples=40, deadline=None)


def rows(path: Path, limit: int = LIMIT, **documents: Any) -> list[Row]:
    (file,) = text_files(str(path), "corpus")
    return list(read_rows(file, DocumentConfig(**documents), limit))


def good(path: Path, limit: int = LIMIT, **documents: Any) -> list[Any]:
    found = rows(path, limit, **documents)
    assert not [row for row in found if row.problem]
    return [row.fields for row in found]


@given(st.lists(fields, min_size=1), st.booleans())
@few
def test_what_is_written_as_jsonl_comes_back(written: list[dict[str, str]], zipped: bool) -> None:
    path = Path.cwd() / "rows.jsonl"
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written).encode()
    path = path.with_name("rows.jsonl.gz") if zipped else path
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert good(path) == written


@given(st.lists(st.tuples(texts, texts), min_size=1), st.sampled_from([".csv", ".tsv"]))
@few
def test_what_is_written_as_csv_comes_back(written: list[tuple[str, str]], suffix: str) -> None:
    path = Path.cwd() / f"rows{suffix}"
    with path.open("w", newline="", encoding="utf-8") as stream:
        delimiter = "," if suffix == ".csv" else "\t"
        writer = csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([("a", "b"), *written])
    (file,) = text_files(str(path), "corpus")
    found = list(read_rows(file, DocumentConfig(), LIMIT, quoted=("csv", "tsv")))
    assert [row.fields for row in found] == [{"a": a, "b": b} for a, b in written]
    assert not any(row.problem for row in found)


@given(st.lists(st.tuples(texts, texts), min_size=1))
@example([('"open', "one"), ('closed"', '"two"'), ('"', '""')])
@few
def test_a_quote_in_a_tsv_is_a_letter(written: list[tuple[str, str]]) -> None:
    """As in most corpora of the kind (GLUE, Tatoeba, Common Voice)."""
    path = Path.cwd() / "rows.tsv"
    cells = [[re.sub(r"[\t\r\n]", '"', text) for text in row] for row in written]
    text = "".join(f"{a}\t{b}\n" for a, b in [("a", "b"), *cells])
    path.write_text(text, encoding="utf-8", newline="")
    assert good(path) == [{"a": a, "b": b} for a, b in cells]


@given(st.lists(texts, min_size=1), st.integers(1, 5))
@few
def test_what_is_written_as_parquet_comes_back(written: list[str], group: int) -> None:
    path = Path.cwd() / "rows.parquet"
    pq.write_table(pa.table({"text": written}), path, row_group_size=group)
    assert good(path) == [{"text": text} for text in written]


@given(st.lists(st.binary(max_size=60), max_size=12))
@few
def test_any_bytes_are_rows_or_reasons(lines: list[bytes]) -> None:
    """No file of lines ends the reading, and every line that is not blank is accounted for."""
    path = Path.cwd() / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = rows(path, limit=30)
    pieces = [line for line in b"\n".join(lines).split(b"\n") if line.strip()]
    decodable = {row.line for row in found if not row.problem}
    assert len(decodable) <= len(pieces)
    assert all(row.problem or isinstance(row.fields, dict) for row in found)


@given(texts)
@few
def test_lines_as_documents_are_the_lines(text: str) -> None:
    path = Path.cwd() / "text.txt"
    path.write_bytes(text.encode())
    expected = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    found = [row.fields["text"] for row in rows(path, split="lines") if not row.problem]
    assert found == [line for line in expected if line.strip()]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_bad_lines_have_reasons_and_the_good_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        *(b'{"text": "one"}', b'{"text": "caf\xe9"}', b'{"text": ', b'["a list"]', b"NaN"),
        *(b"", b'{"text": "' + b"x" * 300 + b'"}', b"[" * 250, b'{"text": "two"}'),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    found = rows(path, limit=260)
    assert [(row.line, row.fields.get("text")) for row in found if not row.problem] == [
        (1, "one"),
        (9, "two"),
    ]
    reasons = {row.line: row.problem for row in found if row.problem}
    assert "UTF-8" in reasons[2]
    assert "not a line of JSON" in reasons[3]
    assert "object" in reasons[4]
    assert "NaN is not JSON" in reasons[5]
    assert "longer than 260 bytes" in reasons[7]
    assert "JSON" in reasons[8]


def test_a_line_of_ten_megabytes_costs_no_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"x" * (10 << 20) + b'"}\n{"text": "next"}\n'))
    tracemalloc.start()
    found = rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [bool(row.problem) for row in found] == [True, False]
    assert peak < 5 << 20


def test_csv_rows_that_do_not_fit_the_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,2\n1,2,3\n"line\nbreak",2\ncaf\xe9,2\n"x"y,2\n5,6\n')
    found = rows(path)
    assert [tuple(row.fields.values()) for row in found if not row.problem] == [
        ("1", "2"),
        ("line\nbreak", "2"),
        ("5", "6"),
    ]
    assert {row.line for row in found if row.problem} == {3, 6, 7}


def test_an_open_quote_does_not_swallow_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('a\n"open\n' + "word\n" * 40_000 + "last\n")
    found = rows(path)
    assert found[0].problem
    assert found[-1].fields == {"a": "last"}


@pytest.mark.parametrize("end", ["", 'closed" it\n', '",2,3\n'])
def test_lines_that_a_quote_swallows_are_bad_rows(tmp_path: Path, end: str) -> None:
    """All of them count: the run that loses more than it may ends."""
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,2\n"open,2\n' + "3,4\n" * 100 + end)
    found = rows(path)
    assert found[0].fields == {"a": "1", "b": "2"}
    assert [row.line for row in found if row.problem] == list(range(3, 104 + bool(end)))
    assert "quotes of line 3 reach to line 10" in found[-1].problem


@pytest.mark.parametrize("header", [b"a,a\n1,2\n", b"a,\n1,2\n", b"\xff\xfe,b\n"])
def test_a_header_must_name_its_columns(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(header)
    with pytest.raises(InputError, match=r"rows\.csv:1"):
        rows(tmp_path / "rows.csv")


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9", b"good"], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": text}), tmp_path / "rows.parquet")
    found = rows(tmp_path / "rows.parquet")
    assert [found[n].fields["text"] for n in (0, 2)] == ["fine", "good"]
    with pytest.raises(FieldError, match="field 'text' can't be read: not valid UTF-8"):
        Template("{text}").render(found[1].fields, ())


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (2**62, pa.timestamp("us")),
        (2**30, pa.date32()),
        (2**62, pa.duration("s")),
        (1, pa.timestamp("ns", tz="Foo/Bar")),
    ],
    ids=str,
)
@pytest.mark.parametrize("saved", [False, True])
def test_values_that_python_has_none_for_cost_only_who_reads_them(
    tmp_path: Path, value: int, kind: pa.DataType, saved: bool
) -> None:
    when = pa.StructArray.from_arrays([pa.array([None, value], kind)], ["at"])
    table = pa.table({"text": ["one", "two"], "when": when})
    if saved:
        datasets.Dataset(table).save_to_disk(tmp_path / "rows")
        found = rows(tmp_path / "rows")
    else:
        pq.write_table(table, tmp_path / "rows.parquet")
        found = rows(tmp_path / "rows.parquet")
    assert [Template("{text}").render(row.fields, ()) for row in found] == ["one", "two"]
    for template in ("{when.at}", "{when}"):
        with pytest.raises(FieldError, match="field 'when' can't be read: no struct"):
            Template(template).render(found[1].fields, ())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", b"this is not gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 500)[:-30]),
        ("a.parquet", b"PAR1 but nothing else"),
    ],
    ids=["not gzip", "cut gzip", "cut parquet"],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        rows(tmp_path / name)


def test_rows_are_given_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    lines = (json.dumps({"text": str(n)}) + "\n" for n in range(50_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode())[:-3000])
    (file,) = text_files(str(tmp_path / "a.jsonl.gz"), "a")
    found = read_rows(file, DocumentConfig(), LIMIT)
    assert [next(found).fields["text"] for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"a\.jsonl\.gz:\d+: the gzip file"):
        list(found)


def test_a_name_that_is_not_utf8_stays_readable(tmp_path: Path) -> None:
    import os

    folder = tmp_path / "pack"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl")).write_bytes(b"")
    assert [file.name for file in text_files(str(folder), "pack")] == ["pack/caf\\xe9.jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.gz"])
def test_an_empty_file_is_a_bad_row(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert [row.problem for row in rows(tmp_path / name)] == ["the file is empty"]


def test_only_the_wanted_columns_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["1"], "b": [2]}), tmp_path / "rows.parquet")
    (file,) = text_files(str(tmp_path / "rows.parquet"), "c")
    (row,) = read_rows(file, DocumentConfig(), LIMIT, ["a", "missing"])
    assert row.fields == {"a": "1"}


def test_a_folder_is_walked_in_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ("b/test.jsonl", "a.txt.gz", ".git/x.jsonl", "README.md", "c/.x.csv", "c/x.CSV"):
        (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pack" / name).write_bytes(b"")
    found = text_files(str(tmp_path / "pack"), "pack")
    assert [file.name for file in found] == ["pack/a.txt.gz", "pack/b/test.jsonl", "pack/c/x.CSV"]


@pytest.mark.parametrize("name", ["missing", "file.docx", "empty"])
def test_what_is_no_corpus_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.docx").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        text_files(str(tmp_path / name), "c")


def test_a_dataset_saved_on_disk(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"q": ["1", "2"], "n": [3, None]})
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "d")
    files = text_files(str(tmp_path / "d"), "d")
    assert [(file.name, RoleConfig().of(file.inside)) for file in files] == [
        ("d/test", "test"),
        ("d/train", "train"),
    ]
    found = list(read_rows(files[1], DocumentConfig(), LIMIT, ["q"]))
    assert [row.fields for row in found] == [{"q": "1"}, {"q": "2"}]
    assert len(list(read_rows(files[1], DocumentConfig(), LIMIT, ["missing"]))) == 2
    assert [f.name for f in text_files(f"datasets://{tmp_path / 'd'}:test", "d")] == ["d/test"]
    table.save_to_disk(tmp_path / "plain")
    for path, role in (("plain", "train"), ("plain:test", "test")):
        (file,) = text_files(f"datasets://{tmp_path / path}", "d")
        assert (file.name, file.inside) == ("d", role)
    with pytest.raises(InputError, match="can't be loaded"):
        text_files(f"datasets://{tmp_path / 'd'}:nothing", "d")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the hub: `datasets` looks for `owner/name` in the current one."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def put(hub: Path, dataset: str, **files: str) -> None:
    for name, text in files.items():
        (hub / dataset).mkdir(parents=True, exist_ok=True)
        (hub / dataset / name.replace("_", ".")).write_text(text)


def test_a_dataset_of_the_hub_is_streamed(hub: Path) -> None:
    """Every split, with the columns that are wanted; nothing goes into a cache on disk."""
    import datasets

    lines = "".join(json.dumps({"q": str(i), "n": i}) + "\n" for i in range(200))
    put(hub, "owner/name", train_jsonl=lines, test_jsonl='{"q": "?", "n": 1}\n')
    files = text_files("datasets://owner/name", "d")
    assert [(file.name, file.inside) for file in files] == [
        ("d/test", "test"),
        ("d/train", "train"),
    ]
    assert isinstance(files[1].dataset, datasets.IterableDataset)
    rows = list(read_rows(files[1], DocumentConfig(), LIMIT, ["q"]))
    assert [row.fields for row in rows] == [{"q": str(i)} for i in range(200)]
    assert [row.line for row in rows] == list(range(1, 201))
    assert len(list(read_rows(files[1], DocumentConfig(), LIMIT, ["missing"]))) == 200
    one = text_files("datasets://owner/name:test", "d")
    assert [(file.name, file.inside) for file in one] == [("d/test", "test")]
    with pytest.raises(InputError, match="no split 'more'") as error:
        text_files("datasets://owner/name:more", "d")
    assert error.value.hint == "its splits are test, train"


def test_a_dataset_with_configs(hub: Path) -> None:
    """Of CSV, whose columns are not known before it is read."""
    readme = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.csv\n"
        for name in ("de-en", "fr-en")
    )
    put(hub, "wmt/wmt0", README_md=f"{readme}---\n")
    for name in ("de-en", "fr-en"):
        put(hub, "wmt/wmt0", **{f"{name}_csv": f"a,b\n{name},1\n"})
    for name in ("de-en", "fr-en"):
        (file,) = text_files(f"datasets://wmt/wmt0/{name}", "d")
        (row,) = read_rows(file, DocumentConfig(), LIMIT, ["a"])
        assert row.fields["a"] == name
    with pytest.raises(InputError, match=r"(?s)dataset wmt/wmt0 can't be loaded.*de-en"):
        text_files("datasets://wmt/wmt0", "d")


@pytest.mark.parametrize(
    ("files", "row"),
    [
        ({"train_jsonl": '{"q": 1}\n{"q": broken\n'}, 0),
        ({"1_csv": "a,b\n" + "1,2\n" * 64, "2_csv": "a,b\n1,2,3\n1,2,3,4\n"}, 64),
        ({"1_jsonl": '{"q": 1}\n' * 64, "2_jsonl": '{"z": 1}\n'}, 64),
    ],
)
def test_a_streamed_file_that_is_broken(hub: Path, files: dict[str, str], row: int) -> None:
    put(hub, "owner/bad", **files)
    (file,) = text_files("datasets://owner/bad", "d")
    rows = read_rows(file, DocumentConfig(), LIMIT)
    with pytest.raises(InputError, match=f"dataset d/train can't be read beyond row {row}: "):
        for _ in rows:
            pass


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train.jsonl.gz", "train"),
        ("train_phrases.jsonl", "train"),
        ("dev_in_domain.jsonl.gz", "validation"),
        ("val.csv", "validation"),
        ("validation-00000-of-00001.parquet", "validation"),
        ("test_2016_flickr.jsonl.gz", "test"),
        ("test/part-0.parquet", "test"),
        ("testimonials.txt", "train"),
        ("all.jsonl", "train"),
        ("1.txt", "train"),
    ],
)
def test_roles_are_read_off_the_words_of_names(name: str, role: str) -> None:
    assert RoleConfig().of(name) == role


def test_roles_are_for_the_config_to_say() -> None:
    roles = RoleConfig(train=("dev*",), validation=(), test=("test",))
    assert [roles.of(n) for n in ("dev.jsonl", "test.jsonl", "x.jsonl")] == ["train", "test", None]


def test_corpora_of_one_name_are_numbered() -> None:
    assert corpus_names(("/a/x.txt", "/b/x.txt", "datasets://o/d")) == ("x.txt", "2-x.txt", "o/d")


def documents(text: str, **settings: Any) -> list[tuple[int, str]]:
    Path("text.txt").write_text(text)
    return [(row.line, row.fields["text"]) for row in rows(Path("text.txt"), **settings)]


def test_documents_end_at_blank_lines_when_they_are_long_enough() -> None:
    text = "one\n\ntwo\nlines\n\n\nthree\n"
    assert documents(text, min_bytes=1) == [(1, "one"), (3, "two\nlines"), (7, "three")]
    assert documents(text, min_bytes=6) == [(1, "one\n\ntwo\nlines"), (7, "three")]


def test_documents_begin_with_headings() -> None:
    text = " \n = Lobster = \n \n a = b\n = = Diet = = \n fish\n = Crab = \n small\n"
    assert documents(text, split="headings") == [
        (2, " = Lobster = \n \n a = b\n = = Diet = = \n fish"),
        (7, " = Crab = \n small"),
    ]
    assert [line for line, _ in documents("# A\nx\n## B\ny", split="headings")] == [1, 3]


def test_a_file_can_be_one_document() -> None:
    assert documents("a\r\n\r\nb\n\n", split="file") == [(1, "a\n\nb")]


def test_a_bad_line_spoils_its_own_document_only() -> None:
    Path("text.txt").write_bytes(b"one\n\ntw\xff\nlines\n\nthree\n\n" + b"long\n" * 20)
    found = rows(Path("text.txt"), limit=40, min_bytes=1)
    assert [(row.line, row.fields["text"], row.problem[:13]) for row in found] == [
        (1, "one", ""),
        (3, "", "not valid UTF"),
        (6, "three", ""),
        (8, "", "the document "),
    ]


def test_templates_join_lists_by_depth() -> None:
    row = {"triples": [["A", "is", 1], ["A", "in", True]], "t": {"en": "hi"}, "a.b": "column"}
    separators = (" | ", " : ")
    assert Template("{triples}").render(row, separators) == "A : is : 1 | A : in : true"
    assert Template("<{t.en}>{{}}\n").render(row, separators) == "<hi>{}\n"
    assert Template("{a.b}").render(row, separators) == "column"


def test_a_list_of_answers_gives_one_text_for_each() -> None:
    row = {"refs": [["a", "b"], "c"], "n": 1}
    assert Template("{n}: {refs}").render_each(row, (" | ", "+")) == ["1: a+b", "1: c"]
    assert Template("{n}").render_each(row, ()) == ["1"]
    with pytest.raises(FieldError, match="both lists"):
        Template("{refs}{more}").render_each({"refs": [], "more": []}, ())


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "no field 'a'"),
        ({"a": None}, "no field 'a'"),
        ({"a": "text"}, "no field 'a.b'"),
        ({"a": {"b": {}}}, "dict"),
        ({"a": {"b": [[["x"]]]}}, "nested deeper"),
        ({"a": {"b": [None]}}, "null"),
    ],
)
def test_fields_that_are_no_text_are_named(row: dict[str, Any], why: str) -> None:
    with pytest.raises(FieldError, match=why):
        Template("{a.b}").render(row, (" ", ","))


@pytest.mark.parametrize("text", ["{a!r}", "{a:08d}", "{", "{}", "{a.}", "}"])
def test_templates_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Template(text)


@given(texts)
@few
def test_any_text_is_a_template_or_refused(text: str) -> None:
    try:
        template = Template(text)
    except ValueError:
        return
    if not template.fields:
        assert template.render({}, ()) == text.replace("{{", "{").replace("}}", "}")
