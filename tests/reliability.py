"""The table of docs/reliability.md, written from what tests did, never by hand.

A test that tries to break something names its scenario, and how often it tried:

    @pytest.mark.scenario("a node is killed at a random second of a run")
    def test_...(record_property): record_property("tried", 10)

With `GOLDCREST_RELIABILITY=docs/reliability.json` a test session adds up what it saw, replaces the
rows of the scenarios that it ran and writes the table into the page (`make reliability`), after
every file of tests: the whole takes more than an hour. Without it nothing is written.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
VARIABLE = "GOLDCREST_RELIABILITY"


class Tally:
    """A pytest plugin that counts what the tests of each scenario tried and held."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Count a test's end; a skipped one counts as not tried."""
        report = yield
        marker = item.get_closest_marker("scenario")
        if marker is not None and not report.skipped and (report.when == "call" or report.failed):
            self._count(str(marker.args[0]), item, failed=report.failed)
        return report

    def _count(self, scenario: str, item: pytest.Item, *, failed: bool) -> None:
        tried = int(dict(item.user_properties).get("tried", 1))
        file = item.path.relative_to(PAGE.parents[1]).as_posix()
        row = self.rows.setdefault(scenario, {"tried": 0, "failed": 0, "test": file})
        row["tried"] += tried
        row["failed"] += failed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Any:
        """Write what is known where a file ends: its rows are whole."""
        result = yield
        if nextitem is None or nextitem.path != item.path:
            self._write()
        return result

    def pytest_sessionfinish(self) -> None:
        """Write what a session saw that ended early."""
        self._write()

    def _write(self) -> None:
        target = os.environ.get(VARIABLE)
        if target and self.rows:
            write(Path(target), self.rows)


def write(file: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Put `rows` in the place of those of the same scenarios, and the table into the page."""
    import datetime

    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}",
    }
    known |= {scenario: {**row, **facts} for scenario, row in rows.items()}
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_table(page, known), encoding="utf-8")


def with_table(page: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """`page` with the table of `rows` between its two marks."""
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows in Markdown, by test file and scenario."""
    lines = ["| scenario | tried | result | test | date | machine |", "|---|---|---|---|---|---|"]
    ordered = sorted(rows.items(), key=lambda pair: (pair[1]["test"], pair[0]))
    for scenario, row in ordered:
        result = "held every time" if not row["failed"] else f"**{row['failed']} tests failed**"
        cells = [scenario, str(row["tried"]), result, f"`{row['test']}`", row["date"]]
        lines.append(f"| {' | '.join([*cells, row['machine']])} |")
    return "\n".join(lines)
