"""Makes docs/figures.csv and the README's table of results from the `--json` files of runs.

    python docs/figures.py FOLDER

FOLDER holds seed0.json, seed1.json, ... (pseudo-labels) and true0.json, ... (with
`pretrain.labels=true`) of `configs/speaker/real.yaml`, and bench.csv with the rows that benchmarks
printed. Of several seeds the table shows the mean and each one.
"""

from __future__ import annotations

import csv
import datetime
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["name", "value", "unit", "date", "machine", "command"]
MACHINE = "2 cores, no GPU (AVX2)"
PACKS = "librispeech arabic_commands ravdess nemo fsdd"
RUN = f"goldcrest run speaker --config configs/speaker/real.yaml --corpus each of {PACKS} -o seed=N"
SYSTEMS = {
    "meanstd": "MFCC mean + std, cosine",
    "ivector": "i-vector, cosine",
    "dense": "ECAPA on pseudo-labels",
    "fusion": "fusion of i-vector and ECAPA",
    "sparse": "ECAPA, 75 % sparse",
    "int8": "ECAPA, 75 % sparse + INT8",
}
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"

Run = dict[str, Any]
Row = dict[str, str]


def row(name: str, value: str, unit: str, command: str) -> Row:
    """One figure with how and when it was obtained."""
    today = datetime.date.today().isoformat()
    return dict(zip(COLUMNS, (name, value, unit, today, MACHINE, command), strict=True))


def over_seeds(runs: list[Run], get: Callable[[Run], float], digits: int = 1) -> str:
    """`mean (first, second, ...)` of a number over runs; the number alone where there is one."""
    values = [get(run["metrics"]) for run in runs]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})"


def verification(pseudo: list[Run], true: list[Run]) -> Iterator[Row]:
    """Error rates of unseen and of training speakers."""
    for system, words in SYSTEMS.items():
        eer = over_seeds(pseudo, lambda m, s=system: m["verification"][s]["eer"])
        yield row(f"EER, unseen speakers: {words}", eer, "%", RUN)
    supervised = f"{RUN} -o pretrain.labels=true"
    for system in ("dense", "sparse", "int8"):
        words = SYSTEMS[system].replace("pseudo-labels", "true labels")
        words += "" if "true labels" in words else ", true labels"
        eer = over_seeds(true, lambda m, s=system: m["verification"][s]["eer"])
        yield row(f"EER, unseen speakers: {words}", eer, "%", supervised)
    for kind, runs, command in (("pseudo", pseudo, RUN), ("true", true, supervised)):
        eer = over_seeds(runs, lambda m: m["verification"]["dense"]["eer_cosine"])
        yield row(f"EER, unseen speakers: ECAPA on {kind} labels, plain cosine", eer, "%", command)
    for system in ("ivector", "dense"):
        eer = over_seeds(pseudo, lambda m, s=system: m["verification_seen"][s]["eer"])
        yield row(f"EER, training speakers, cosine: {SYSTEMS[system]}", eer, "%", RUN)


def clustering(runs: list[Run]) -> Iterator[Row]:
    """Agreement with the speakers."""
    for method in ("kmeans", "ahc", "cimc"):
        for metric in ("nmi", "ami"):
            value = over_seeds(runs, lambda m, k=(method, metric): m["clustering"][k[0]][k[1]], 3)
            yield row(f"{metric.upper()} of {method}", value, "", RUN)


def models(runs: list[Run]) -> Iterator[Row]:
    """Size of the bundles; their latency is a row of bench.csv, measured on a quiet machine."""
    for name in ("dense", "sparse", "int8"):
        size = runs[0]["metrics"]["models"][name]["bytes"]
        yield row(f"bundle, {name}", f"{size:,}", "bytes", f"{RUN}, N = 0")


def collect(folder: Path) -> list[Row]:
    """All rows: those of the runs and those that benchmarks printed."""

    def read(prefix: str) -> list[Run]:
        return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{prefix}?.json"))]

    pseudo, true = read("seed"), read("true")
    with (folder / "bench.csv").open(newline="", encoding="utf-8") as stream:
        measured = list(csv.DictReader(stream))
    return [*verification(pseudo, true), *clustering(pseudo), *models(pseudo), *measured]


def main() -> None:
    """Write the CSV, and the table between the two marks of the README."""
    rows = collect(Path(sys.argv[1]))
    with (ROOT / "docs" / "figures.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"| {r['name']} | {r['value']} {r['unit']}".rstrip() + " |" for r in rows]
    table = "\n".join([BEGIN, "| figure | value |", "|---|---|", *lines, END])
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.S), "utf-8")


if __name__ == "__main__":
    main()
