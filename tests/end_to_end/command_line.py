"""The command line in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple


class SmallRun(NamedTuple):
    """A finished run: where it was started, what `--json` wrote, what it printed."""

    folder: Path
    json: dict[str, Any]
    stdout: str


def goldcrest(*arguments: str, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """`goldcrest ARGUMENTS` in the folder `cwd`; its exit code must be `expect`."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "goldcrest", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done
