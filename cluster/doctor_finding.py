"""What the doctor's checks are made of: a finding, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

CHILD_SECONDS = 120.0
"""Longest time that a check in a child process may take."""

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding: `name`, `status`, what was seen in `detail`, what to do in `hint`."""

    name: str
    status: Status
    detail: str
    hint: str = ""
    seconds: float = 0.0


def start_child(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Python on `code`, with pipes, `environment` on top of this one's."""
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
        "DS_SKIP_CUDA_CHECK": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **quiet, **environment},
    )


def finish(child: subprocess.Popen[str], what: str) -> tuple[str, str]:
    """`(last line of output, "")`, or `("", reason)` when the child failed or took too long."""
    try:
        output, errors = child.communicate(timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return "", f"{what} did not answer within {CHILD_SECONDS:.0f} s"
    lines = [line for line in output.splitlines() if line.strip()]
    if child.returncode == 0 and lines:
        return lines[-1], ""
    if child.returncode < 0:
        return "", f"{what} was killed by signal {-child.returncode}"
    said = [line.strip() for line in errors.splitlines() if line.strip()]
    return "", f"{what} failed: {said[-1] if said else f'exit code {child.returncode}'}"
