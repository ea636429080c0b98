"""The figures that the README prints are those of docs/figures.csv, with how each was obtained."""

from __future__ import annotations

import csv
import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["name", "value", "unit", "date", "machine", "command"]


def rows() -> list[dict[str, str]]:
    with (ROOT / "docs" / "figures.csv").open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def test_every_figure_says_how_and_when_it_was_obtained() -> None:
    found = rows()
    assert len({row["name"] for row in found}) == len(found) > 10
    for row in found:
        assert all(row[column] for column in COLUMNS if column != "unit"), row
        datetime.date.fromisoformat(row["date"])


def test_the_readme_prints_exactly_these_figures() -> None:
    printed = {
        tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
        for line in (ROOT / "README.md").read_text("utf-8").splitlines()
        if line.startswith("|")
    }
    for row in rows():
        assert (row["name"], f"{row['value']} {row['unit']}".strip()) in printed, row["name"]
