"""Which process is that, and is it still there?

A process id alone is not an identity: it is reused after an exit and means nothing on another
machine or in another container. Here a process is (machine, pid, start time), where `machine` is
one boot of one host in one pid namespace. Only inside the same `machine` can a process be called
dead for certain; everywhere else silence has to do (see `lease.py`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["alive", "dead", "unknown"]
_PROC = Path("/proc")
_MARK = re.compile(r"([0-9a-f]{16})-(\d+)-(\d+(?:\.\d+)?)")


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """One process of one boot of one host."""

    host: str  # the host's name, for people
    machine: str  # 16 hex digits: host name, boot and pid namespace
    pid: int  # process id inside that namespace
    started: str  # start time in the system's own unit; "" where it is not known

    @classmethod
    def current(cls) -> ProcessId:
        """The process that calls."""
        pid = os.getpid()
        return cls(
            host=platform.node() or "localhost",
            machine=_machine(),
            pid=pid,
            started=_start_time(pid) or "",
        )

    @classmethod
    def from_json(cls, value: Any) -> ProcessId:
        """Read back what `to_json` gave; ValueError if it is anything else."""
        if not isinstance(value, dict):
            raise ValueError("a process is recorded as a mapping")
        host, machine, started = (value.get(key) for key in ("host", "machine", "started"))
        pid = value.get("pid")
        texts = all(isinstance(text, str) for text in (host, machine, started))
        if not texts or not isinstance(pid, int) or pid <= 0:
            raise ValueError(f"not a recorded process: {value}")
        return cls(host=str(host), machine=str(machine), pid=pid, started=str(started))

    def to_json(self) -> dict[str, Any]:
        """The four facts as a JSON mapping."""
        return asdict(self)

    @property
    def mark(self) -> str:
        """What the name of a file has in it that is this process's alone."""
        return f"{self.machine}-{self.pid}-{self.started or 0}"

    @classmethod
    def marked(cls, name: str) -> ProcessId | None:
        """The process whose `mark` a name has in it, None if it has none."""
        found = _MARK.search(name)
        if found is None:
            return None
        machine, pid, started = found.groups()
        started = "" if started == "0" else started
        return cls(host="", machine=machine, pid=int(pid), started=started)

    def state(self) -> State:
        """Whether the process runs: "unknown" where this machine can't tell."""
        if self.machine != _machine():
            return "unknown"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "dead"
        except (PermissionError, OverflowError):
            pass  # it runs under another user, or the number is no pid: the start time decides
        started = _start_time(self.pid)
        if started is None:
            return "dead"  # a zombie: it will never do anything again
        reused = bool(started and self.started and started != self.started)
        return "dead" if reused else "alive"


def aside(path: Path) -> Path:
    """Where this process writes what will replace `path`: hidden, and gc can tell whose it is."""
    return path.with_name(f".{path.name}.{ProcessId.current().mark}.tmp")


@functools.cache
def _machine() -> str:
    """16 hex digits that are the same for all processes whose pids can be compared."""
    facts = [platform.node()]
    for read in (_boot_id, _pid_namespace):
        try:
            facts.append(read())
        except OSError:
            facts.append("")
    return hashlib.sha256("|".join(facts).encode()).hexdigest()[:16]


def _boot_id() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> str:
    return str((_PROC / "self/ns/pid").readlink())


def _start_time(pid: int) -> str | None:
    """Start time of a process as text, "" if the system won't say, None for a zombie."""
    if not (_PROC / "self/stat").exists():
        return _start_time_elsewhere(pid)
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return ""
    # The second field is the command in parentheses and may hold anything, so count from its end:
    # state is field 3, the start time in clock ticks since boot is field 22.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def _start_time_elsewhere(pid: int) -> str | None:
    """The same on systems without /proc."""
    import psutil

    try:
        process = psutil.Process(pid)
        zombie = process.status() == psutil.STATUS_ZOMBIE
        return None if zombie else f"{process.create_time():.2f}"
    except psutil.Error:
        return ""
