"""The figures that the README prints are those of docs/figures.csv, with how each was obtained."""

from __future__ import annotations

import csv
import datetime
import json
import re
import runpy
from pathlib import Path
from statistics import mean
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["name", "value", "unit", "date", "machine", "command"]
PICTURED = {  # task -> its sparsities in percent
    "E2E": ["50", "70", "80", "90"],
    "SST-2": ["50", "70", "75", "80", "90"],
}


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


def test_a_mean_is_that_of_the_seeds_printed_beside_it() -> None:
    found = 0
    for row in rows():
        for printed, each in re.findall(r"([\d.]+) \(([\d.]+(?:, [\d.]+)+)\)", row["value"]):
            seeds = [float(value) for value in each.split(", ")]
            unit = 10.0 ** -len(printed.partition(".")[2])  # both are rounded to it
            assert abs(float(printed) - mean(seeds)) <= unit * 1.001, row["name"]
            found += 1
    assert found > 30


def test_the_picture_draws_these_figures() -> None:
    """`python docs/curves.py` draws it again."""
    panels, dense = runpy.run_path(str(ROOT / "docs" / "curves.py"))["read"](
        ROOT / "docs" / "figures.csv"
    )
    assert [title.partition(":")[0] for title in panels] == list(PICTURED)
    assert panels.keys() == dense.keys()
    for curves, levels in zip(panels.values(), PICTURED.values(), strict=True):
        assert len(curves) == 3
        for curve in curves.values():
            assert list(curve) == levels
            assert all(len(seeds) == 3 for seeds in curve.values())
    picture = ElementTree.parse(ROOT / "docs" / "sparsity.svg")
    described = picture.findtext(".//{http://purl.org/dc/elements/1.1/}description")
    assert described is not None
    assert json.loads(described) == {"curves": panels, "dense": dense}
    assert "(docs/sparsity.svg)" in (ROOT / "README.md").read_text("utf-8")
