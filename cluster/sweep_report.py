"""placeholder"""

from pathlib import Path


def write_report(folder: Path, result, space):
    return folder / "report.html"
