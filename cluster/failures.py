"""What happened to a step that failed, in words: crash, exit, timeout, memory, exception."""

from __future__ import annotations

import re
from pathlib import Path

from goldcrest.cluster.errors import GoldcrestError
from goldcrest.cluster.events import Failure
from goldcrest.cluster.run_record import last_lines
from goldcrest.cluster.runtime import first_line

_FATAL = re.compile(r"Fatal Python error: (.+)|\*\*\* (SIG\w+) received")
_LOG_LINES = 20
_LOG_SEARCHED = 400


def in_words(seconds: float) -> str:
    """A timeout as people say it."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def describe_failure(
    step: str,
    error: BaseException,
    *,
    log: Path,
    exit_status: int | None,
    timed_out: float | None,
) -> Failure:
    """The failure behind what `ray.get` raised for a step.

    `exit_status` is what the step passed to `os._exit`, if it did; `timed_out` its timeout in
    seconds, if it was stopped for that.
    """
    from ray.exceptions import RayTaskError

    lines = last_lines(log, _LOG_SEARCHED)
    fatal = next((i for i in reversed(range(len(lines))) if _FATAL.search(lines[i])), None)
    shown = lines[-_LOG_LINES:]
    if fatal is not None:  # the stack behind such a line is long and ends in nothing of interest
        first = max(0, fatal - _LOG_LINES // 2)
        shown = lines[first : first + _LOG_LINES]
    # A step may fail by itself in the moment in which it is stopped: then that is the reason.
    if timed_out is not None and not isinstance(error, RayTaskError):
        message = f"the step ran longer than its timeout of {in_words(timed_out)} and was stopped"
        longer = f'raise it: -o "steps={{{step}: {{timeout: 48h}}}}", or in the cluster profile'
        return Failure(step=step, message=message, hint=longer, log=shown)
    message, hint = _message(error, "" if fatal is None else lines[fatal], exit_status)
    return Failure(step=step, message=message, hint=hint, log=shown)


def _message(error: BaseException, fatal: str, exit_status: int | None) -> tuple[str, str | None]:
    import ray.exceptions as failures

    cause = error
    while isinstance(cause, failures.RayTaskError) and getattr(cause, "cause", None) is not None:
        cause = cause.cause
    if isinstance(cause, GoldcrestError):
        return cause.message, cause.hint
    if isinstance(cause, failures.OutOfMemoryError):
        return (
            "the step ran out of memory: its process was stopped because its node had hardly any "
            "memory left",
            "use smaller batches or fewer workers, or a node with more memory",
        )
    if isinstance(cause, failures.WorkerCrashedError | failures.LocalRayletDiedError):
        return _crash(fatal, exit_status)
    if isinstance(cause, failures.TaskCancelledError):
        return "the step was cancelled", None
    if isinstance(cause, failures.NodeDiedError | failures.ObjectLostError):
        return "the node that ran the step was lost again and again", "look at that node"
    if isinstance(cause, failures.RayError):
        return f"Ray could not run the step: {first_line(cause)}", None
    text = first_line(cause)
    kind = type(cause).__name__.removeprefix("RayTaskError(").removesuffix(")")
    return (f"{kind}: {text}" if text != kind else kind), None


def _crash(fatal: str, exit_status: int | None) -> tuple[str, str | None]:
    """A process that ended without an exception; `fatal` is the line of its log that says how."""
    if exit_status is not None:
        return f"the step ended its process with os._exit({exit_status})", "raise an error instead"
    found = _FATAL.search(fatal)
    if found is not None:
        return (
            f"the step's process crashed in native code: {(found[1] or found[2]).strip()}",
            "the stack in its log shows where",
        )
    return (
        "the step's process was killed from outside (signal 9), each time that it was tried",
        "most often the system had no memory left: use smaller batches, or a larger node",
    )
