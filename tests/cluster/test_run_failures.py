"""Failures that no test can cause at will, in words: what Ray raises is made up here."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import exceptions as failures

from goldcrest.cluster.api import StepError
from goldcrest.cluster.failures import describe_failure, in_words


@pytest.mark.parametrize(
    ("error", "words", "hint"),
    [
        (failures.OutOfMemoryError("oom"), "ran out of memory", "smaller batches"),
        (failures.WorkerCrashedError(), "killed from outside (signal 9)", "no memory left"),
        (failures.NodeDiedError("gone"), "node that ran the step was lost", "look at that node"),
        (failures.RuntimeEnvSetupError("no pip"), "Ray could not run the step", ""),
        (StepError("too few", hint="add some"), "too few", "add some"),
        (KeyError("speaker"), "KeyError: 'speaker'", ""),
    ],
)
def test_what_ray_raises_is_told_in_words(
    tmp_path: Path, error: Exception, words: str, hint: str
) -> None:
    found = describe_failure(
        "step", error, log=tmp_path / "absent.log", exit_status=None, timed_out=None
    )
    assert words in found.message
    assert hint in (found.hint or "")
    assert found.log == ()


def test_a_crash_shows_the_lines_around_the_fatal_one(tmp_path: Path) -> None:
    log = tmp_path / "step.log"
    stack = [f"  File {i}" for i in range(100)]
    lines = [*[f"epoch {i}" for i in range(50)], "Fatal Python error: Aborted", *stack]
    log.write_text("\n".join(lines), encoding="utf-8")
    found = describe_failure(
        "step", failures.WorkerCrashedError(), log=log, exit_status=None, timed_out=None
    )
    assert found.message == "the step's process crashed in native code: Aborted"
    assert len(found.log) == 20
    assert "epoch 49" in found.log
    assert "Fatal Python error: Aborted" in found.log


def test_a_stopped_step_names_its_timeout(tmp_path: Path) -> None:
    found = describe_failure(
        "step",
        failures.TaskCancelledError(),
        log=tmp_path / "absent.log",
        exit_status=None,
        timed_out=7200.0,
    )
    assert found.message == "the step ran longer than its timeout of 2 h and was stopped"


@pytest.mark.parametrize(
    ("seconds", "words"), [(7200, "2 h"), (90, "90 s"), (600, "10 min"), (1.5, "1.5 s")]
)
def test_durations(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
