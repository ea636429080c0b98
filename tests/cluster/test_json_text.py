"""Whatever a message quotes can be written, and is JSON."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from goldcrest.cluster.json_text import json_text
from goldcrest.cluster.run_record import RunRecord
from goldcrest.pipelines.cli_common import write_json

BROKEN = {"message": "the fields \ud800, \udc80é are none of the known ones"}


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.text()))
def test_any_text_comes_back(value: dict[str, str]) -> None:
    assert json.loads(json_text(value).encode("utf-8")) == value


def test_half_a_surrogate_pair_is_an_escape() -> None:
    assert json.loads(json_text(BROKEN).encode("utf-8")) == BROKEN
    assert json_text({"a": "é中"}) == '{"a": "é中"}'


def test_records_and_results_hold_it(tmp_path: Path) -> None:
    RunRecord(tmp_path, {}).write("failed", error=BROKEN)
    assert json.loads((tmp_path / "run.json").read_text("utf-8"))["error"] == BROKEN
    write_json(tmp_path / "out.json", BROKEN)
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == BROKEN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "run.json"]
