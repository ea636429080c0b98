"""docs/reliability.md says what its results file says, and its scenarios are those of tests."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import reliability

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "reliability.json"


def test_the_page_is_written_from_the_results() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = reliability.PAGE.read_text(encoding="utf-8")
    assert reliability.with_table(page, rows) == page
    for scenario, row in rows.items():
        source = (ROOT / row["test"]).read_text(encoding="utf-8")
        assert f'"{scenario}"' in source, f"{row['test']} has no scenario '{scenario}'"


def test_results_replace_their_own_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{reliability.BEGIN}\nold\n{reliability.END}\nrest\n")
    monkeypatch.setattr(reliability, "PAGE", page)
    file = tmp_path / "results.json"
    reliability.write(file, {"b": {"tried": 3, "failed": 0, "test": "tests/b.py"}})
    reliability.write(file, {"a": {"tried": 2, "failed": 1, "test": "tests/a.py"}})
    reliability.write(file, {"b": {"tried": 5, "failed": 0, "test": "tests/b.py"}})
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert [re.split(r" ?\| ?", line)[1:4] for line in lines[1:]] == [
        ["a", "2", "**1 tests failed**"],
        ["b", "5", "held every time"],
    ]
    assert page.read_text().startswith("# Title\n")
    assert page.read_text().endswith(f"{reliability.END}\nrest\n")


TESTS = """
import pytest

@pytest.mark.scenario("held")
@pytest.mark.parametrize("n", [1, 2])
def test_held(n, record_property):
    record_property("tried", 10)

@pytest.mark.scenario("broken")
def test_broken():
    assert False

@pytest.mark.scenario("never")
@pytest.mark.skip
def test_skipped():
    pass

def test_plain():
    pass
"""


LATER = """
import json
from pathlib import Path
import pytest

@pytest.mark.scenario("later")
def test_what_is_over_is_written():
    assert sorted(json.loads(Path("RESULTS").read_text())) == ["broken", "held"]
"""


def test_the_plugin_counts_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of pytest inside this one, on tests of every kind; written where a file ends."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = scenario(name): a row\n")
    results = tmp_path / "results.json"
    (tmp_path / "test_later.py").write_text(LATER.replace("RESULTS", str(results)))
    page = tmp_path / "docs" / "page.md"
    page.write_text(f"{reliability.BEGIN}\n{reliability.END}\n")
    monkeypatch.setattr(reliability, "PAGE", page)
    monkeypatch.setenv(reliability.VARIABLE, str(results))
    tally = reliability.Tally()
    options = ["-q", "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini")]
    files = [str(tmp_path / name) for name in ("test_it.py", "test_later.py")]
    pytest.main([*options, *files], plugins=[tally])
    assert tally.rows == {
        "held": {"tried": 20, "failed": 0, "test": "test_it.py"},
        "broken": {"tried": 1, "failed": 1, "test": "test_it.py"},
        "later": {"tried": 1, "failed": 0, "test": "test_later.py"},
    }
    assert "| held | 20 | held every time |" in page.read_text()
