"""What a run leaves behind that it should not: files of a store, processes of a machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

MARK = "GOLDCREST_TEST_RUN"
"""A variable that a test gives to a process; all that the process starts inherit it."""
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own helpers of a node, which hold no cores. Where the driver dies while its Ray starts,
they notice a minute late that nobody needs them (66 s were seen)."""


def left_over(root: Path) -> list[str]:
    """Files of the store `root` that should not be there once a run has ended and gc has passed."""
    places = [path for name in ("tmp", "scratch") for path in (root / name).glob("*")]
    held = [path for path in (root / "leases").rglob("*") if path.is_file()]
    records = (root / "runs").rglob("*")
    aside = [p for p in records if p.name.startswith((".", "tune-")) and p.name != ".agreed"]
    return [str(path.relative_to(root)) for path in [*places, *held, *aside]]


def alive(mark: str) -> dict[int, str]:
    """Processes, by id, that were started with `MARK` = `mark` or by such a process; Ray's agents
    do not count."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # ended meanwhile, or somebody else's
            continue
        ours = wanted in environment and not command.startswith(tuple(map(str.encode, AGENTS)))
        if ours and state != "Z" and int(folder.name) != os.getpid():
            found[int(folder.name)] = command.decode(errors="replace")[:200]
    return found


def alive_after(mark: str, seconds: float) -> dict[int, str]:
    """`alive`, once there is none or `seconds` have passed."""
    limit = time.monotonic() + seconds
    while (found := alive(mark)) and time.monotonic() < limit:
        time.sleep(0.2)
    return found
