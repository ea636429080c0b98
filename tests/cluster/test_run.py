"""Runs on a small Ray: results, events, failures in words, two runs on one store.

Expected sentences and states are those of the design; the numbers are sums worked out by hand.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from goldcrest.cluster.api import InputError
from goldcrest.cluster.events import (
    Event,
    RunFinished,
    RunResult,
    RunStarted,
    StepChanged,
    StepLog,
    StepProgress,
)
from goldcrest.cluster.plan import make_plan
from goldcrest.cluster.profile import Profile
from goldcrest.cluster.run import run
from goldcrest.cluster.run_record import Notifier, ProgressReader, last_lines
from goldcrest.cluster.store import Store
from goldcrest.cluster.store_remote import RemoteStore
from goldcrest.cluster.worker import mask_log
from tests.cluster.engine_steps import (
    Chain,
    ChainConfig,
    NumberConfig,
    TroubleConfig,
    add,
    bundle,
    coordinate,
    count,
    dawdle,
    flaky,
    number,
    trouble,
)
from tests.cluster.rotten_disk import rot

ONE = NumberConfig(value=1)


class Recorder:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def states(self, step: str) -> list[str]:
        return [e.state for e in self.events if isinstance(e, StepChanged) and e.step == step]


def pipeline(*nodes: Any) -> Any:
    return SimpleNamespace(build=lambda _: list(nodes), __name__="example")


def states(result: RunResult) -> dict[str, str]:
    return {step.name: step.state for step in result.steps}


@pytest.fixture
def store(store_folder: Path) -> Store:
    return Store.open(store_folder)


def test_a_run_and_the_same_run_again(ray_cluster: None, store: Store) -> None:
    first = number.bind(ONE)
    left, right = add.bind(ONE, first, name="left"), add.bind(ONE, first, name="right", seed=1)
    chain = pipeline(bundle.bind(ONE, add.bind(ONE, left, right, name="end")))
    recorder = Recorder()
    result = run(chain, ChainConfig(), store=store, listeners=[recorder])

    assert result.error is None
    assert result.status == "succeeded"
    assert set(states(result).values()) == {"ran"}
    assert result.metrics["numbers"] == {"last": 1, "total": 5}  # 1, 1 + 1 twice, 1 + 2 + 2
    assert result.as_json()["metrics"]["speed"] == {"per_second": 3.0}
    assert result.quarantined == 3  # one for each of the three additions
    assert json.loads(Path(result.bundles["dense"], "bundle.json").read_text())["number"] == 5

    assert isinstance(recorder.events[0], RunStarted)
    assert isinstance(recorder.events[-1], RunFinished)
    assert recorder.states("end") == ["waiting", "running", "ran"]
    rows = [e for e in recorder.events if isinstance(e, StepLog) and e.step == "end"]
    assert [(e.index, e.row["loss"]) for e in rows] == [(0, 1.0), (1, 0.5)]
    shares = [e.share for e in recorder.events if isinstance(e, StepProgress) and e.step == "end"]
    assert shares == [0.5, 1.0]

    folder = store.run_folder(result.run)
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["pipeline"]) == ("succeeded", "example")
    assert record["config"] == ChainConfig().model_dump(mode="json")
    assert json.loads((folder / "result.json").read_text()) == result.as_json()
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == [type(e).__name__ for e in recorder.events]

    again = run(chain, None, store=store)
    assert set(states(again).values()) == {"cached"}
    assert again.as_json()["metrics"] == result.as_json()["metrics"]
    assert again.bundles == result.bundles


def test_a_run_whose_store_is_an_s3_bucket(
    ray_cluster: None, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "one-host"))
    made = run(Chain, ChainConfig(length=2), store=Store.open(s3_uri))
    assert set(states(made).values()) == {"ran"}
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "another-host"))
    there = Store.open(s3_uri)
    found = run(Chain, ChainConfig(length=2), store=there)
    assert set(states(found).values()) == {"cached"}
    last = there.find(found.steps[-1].key)
    assert last is not None
    assert last.json("number") == 3
    assert "not-a-secret" not in json.dumps(found.as_json())


def test_a_manifest_says_how_the_artifact_came_to_be(ray_cluster: None, store: Store) -> None:
    result = run(pipeline(add.bind(ONE, number.bind(ONE), seed=4)), None, store=store)
    manifest = store.manifest(result.steps[1].key)
    assert manifest is not None
    assert manifest["task"] == "tests.cluster.engine_steps.add"
    assert manifest["config"] == {"value": 1}
    assert manifest["inputs"] == {"left": result.steps[0].key, "right": None}
    assert (manifest["step"], manifest["seed"], manifest["run"]) == ("add", 4, result.run)
    assert set(manifest["packages"]) >= {"ray", "torch", "numpy"}
    assert set(manifest["files"]) == {"number.json", "log.jsonl"}


TROUBLES = {
    "raise": "ValueError: fewer utterances than clusters",
    "input": "the corpus is empty",
    "connection": "ConnectionError: the line is dead",
    "unpicklable": "_UnpicklableError: this error cannot travel",
    "exit": "the step ended its process with os._exit(3)",
    "sysexit": "the step ended its process with sys.exit(4)",
    "segfault": "crashed in native code: Segmentation fault",
    "kill": "killed from outside (signal 9)",
    "memory": "the step ran out of memory: no room for 1 TiB",
    "sleep": "longer than its timeout of 1.5 s",
    "full": "No space left on device",
}


def test_every_kind_of_failure_is_told_in_words_and_siblings_finish(
    ray_cluster: None, store: Store
) -> None:
    source = number.bind(ONE)
    tasks = {kind: dawdle if kind == "sleep" else trouble for kind in TROUBLES}
    failing = {k: t.bind(TroubleConfig(kind=k), source, name=k) for k, t in tasks.items()}
    below = add.bind(ONE, failing["exit"], name="below")
    far_below = add.bind(ONE, below, name="far_below")
    sibling = add.bind(ONE, source, name="sibling")
    recorder = Recorder()
    result = run(
        pipeline(*failing.values(), far_below, sibling), None, store=store, listeners=[recorder]
    )
    assert states(result) == {
        "number": "ran",
        **dict.fromkeys(TROUBLES, "failed"),
        "below": "skipped",
        "far_below": "skipped",
        "sibling": "ran",
    }
    failures = {
        e.step: e.failure
        for e in recorder.events
        if isinstance(e, StepChanged) and e.failure is not None
    }
    for kind, words in TROUBLES.items():
        assert words in failures[kind].message, kind
        assert any(f"about to: {kind}" in line for line in failures[kind].log), kind
    assert failures["input"].hint == "give another --corpus"
    logs = list(store.run_folder(result.run).glob("logs/*.log"))
    assert len(logs) == len(TROUBLES) + 2  # also of the steps that were killed or stopped
    assert not [log.stem for log in logs if "not-a-secret" in log.read_text()]
    reasons = {step.name: step.reason for step in result.steps}
    assert reasons["below"] == "upstream `exit` failed"
    assert reasons["far_below"] == "upstream `below` skipped"
    assert result.status == "failed"
    error = result.as_json()["error"]
    assert error["step"] == "raise"
    assert set(error) == {"step", "message", "hint"}


@pytest.mark.parametrize("kind", ["connection", "segfault", "kill"])
def test_a_lost_worker_and_a_named_exception_are_tried_again(
    ray_cluster: None, store: Store, tmp_path: Path, kind: str
) -> None:
    config = TroubleConfig(kind=kind, marker=str(tmp_path / "attempts"))
    result = run(pipeline(flaky.bind(config)), None, store=store)
    assert states(result) == {"flaky": "ran"}, result.error
    assert len(list((tmp_path / "attempts").iterdir())) == 2


def test_an_exception_that_is_not_named_is_final(
    ray_cluster: None, store: Store, tmp_path: Path
) -> None:
    config = TroubleConfig(kind="raise", marker=str(tmp_path / "attempts"))
    assert states(run(pipeline(flaky.bind(config)), None, store=store)) == {"flaky": "failed"}
    assert len(list((tmp_path / "attempts").iterdir())) == 1


def test_nested_map_stream_and_siblings_on_two_cores_do_not_deadlock(
    ray_cluster: None, store: Store
) -> None:
    """Three steps that only hand work out, at once, each wanting both cores."""
    nodes = [coordinate.bind(NumberConfig(value=n), name=f"c{n}") for n in range(3)]
    result = run(pipeline(*nodes), None, store=store)
    assert result.error is None
    found = [json.loads(_number(store, step.key)) for step in result.steps]
    assert found == [4 * n + sum(range(50)) * 2 for n in range(3)]


def _number(store: Store, key: str) -> str:
    artifact = store.find(key)
    assert artifact is not None
    return artifact.file("number.json").read_text()


def test_two_runs_at_once_on_one_store_do_the_work_once(ray_cluster: None, store: Store) -> None:
    config = ChainConfig(length=2, first=NumberConfig(value=3, seconds=1.0))
    results: list[RunResult] = []

    def one() -> None:
        results.append(run(Chain, config, store=Store.open(store.uri)))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [result.status for result in results] == ["succeeded", "succeeded"]
    ran = [step.name for result in results for step in result.steps if step.state == "ran"]
    assert sorted(ran) == ["add0", "add1", "number"]


def test_a_damaged_input_is_made_again_and_nothing_else(ray_cluster: None, store: Store) -> None:
    result = run(Chain, ChainConfig(length=2), store=store)
    artifact = store.find(result.steps[0].key)
    assert artifact is not None
    member = artifact.path / "number.json"
    good = member.read_bytes()
    member.chmod(0o644)
    member.write_bytes(b"7\n")
    again = run(Chain, ChainConfig(length=2), store=Store.open(store.uri))
    assert states(again) == {"number": "ran", "add0": "cached", "add1": "cached"}
    assert member.read_bytes() == good


def test_a_rotten_copy_in_a_bucket_s_cache_costs_one_failure(
    ray_cluster: None, s3_uri: str
) -> None:
    """Its time stamps are as they were: only the step that reads it notices, and it is mended."""
    store = Store.open(s3_uri)
    assert isinstance(store, RemoteStore)
    result = run(Chain, ChainConfig(length=0), store=store)
    rot(store.cache, result.steps[0].key, "number.json")
    failed = run(Chain, ChainConfig(length=1), store=store)
    assert states(failed) == {"number": "cached", "add0": "failed"}
    again = run(Chain, ChainConfig(length=1), store=store)
    assert states(again) == {"number": "cached", "add0": "ran"}  # fetched, not computed again


def test_a_profile_that_nothing_fits_starts_no_step(ray_cluster: None, store: Store) -> None:
    profile = Profile.model_validate({"steps": {"number": {"gpus": 1}}})
    recorder = Recorder()
    with pytest.raises(InputError, match="step 'number' asks for 1 GPUs"):
        run(Chain, ChainConfig(), store=store, profile=profile, listeners=[recorder])
    last = recorder.events[-1]
    assert isinstance(last, RunFinished)
    assert last.result.status == "failed"
    assert last.result.error is not None
    assert last.result.error.step is None
    assert {step.state for step in last.result.steps} == {"skipped"}


def test_a_step_that_is_known_to_fail_stops_the_run_before_any_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Ray is even started."""
    started: list[Profile] = []
    monkeypatch.setattr("goldcrest.cluster.run.attach", started.append)
    listener = Recorder()
    chain = pipeline(count.bind(NumberConfig(value=-1), number.bind(ONE)))
    with pytest.raises(InputError, match="-1 is less than nothing"):
        run(chain, None, store=store, listeners=[listener])
    assert started == []
    assert listener.states("number") == listener.states("count") == ["waiting"]
    last = listener.events[-1]
    assert isinstance(last, RunFinished)
    assert last.result.error is not None
    assert last.result.error.hint == "give a number from 0"


def test_ctrl_c_leaves_a_record_and_a_run_that_goes_on(ray_cluster: None, store: Store) -> None:
    class Impatient(Recorder):
        def on_event(self, event: Event) -> None:
            super().on_event(event)
            running = isinstance(event, StepChanged) and event.state == "running"
            if running and event.step == "add0":  # type: ignore[attr-defined]
                raise KeyboardInterrupt

    config = ChainConfig(length=2, rest=NumberConfig(value=1, seconds=3.0))
    listener = Impatient()
    with pytest.raises(KeyboardInterrupt):
        run(Chain, config, store=store, listeners=[listener], run_id="stopped")
    record = json.loads((store.run_folder("stopped") / "run.json").read_text())
    assert record["status"] == "interrupted"
    last = listener.events[-1]
    assert isinstance(last, RunFinished)
    assert last.as_json()["result"]["status"] == "interrupted"  # what report and tracking show
    stable = json.loads((store.run_folder("stopped") / "result.json").read_text())
    assert stable == last.result.as_json()
    assert stable["status"] == "failed"  # machines know two ends
    assert stable["error"]["step"] is None
    for words in ("interrupted", "the same command continues"):
        assert words in stable["error"]["message"]
    quick = ChainConfig(length=2, rest=NumberConfig(value=1, seconds=0.0))
    again = run(Chain, quick, store=store)
    assert states(again) == {"number": "cached", "add0": "ran", "add1": "ran"}


def test_what_a_killed_step_printed_is_masked_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same name of the run: driver and step were killed, then the step was made."""
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    store = Store.open(f"local://{tmp_path}/bucket")
    assert isinstance(store, RemoteStore)
    chain = pipeline(number.bind(ONE))
    step = make_plan(chain, None, store).steps[0].step
    with store.lease(step.key, owner="test") as lease:
        store.commit(step.key, store.begin(step.key, lease), {"step": step.name}, lease)
    log = store.run_folder("killed") / "logs" / "number.log"
    log.parent.mkdir()
    log.write_text("began\nAuthorization: Bearer not-a-secret\n")
    assert run(chain, None, store=store, run_id="killed").status == "succeeded"
    assert log.read_text() == "began\nAuthorization: ***\n"
    assert store.bucket.get("runs/killed/logs/number.log") == log.read_bytes()


def test_a_log_is_masked_whoever_else_has_it(tmp_path: Path) -> None:
    log = tmp_path / "step.log"
    mask_log(log)
    assert not log.exists()
    with log.open("w", buffering=1) as stream:
        stream.write("password: a\n")
        mask_log(log)
        stream.write("password: b\n")
    assert log.read_text() == "password: ***\n"
    assert list(tmp_path.iterdir()) == [log]


def test_a_listener_that_raises_is_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def on_event(self, event: Event) -> None:
            raise RuntimeError("tracking is down")

    recorder = Recorder()
    notify = Notifier([Broken(), recorder])
    for step in "ab":
        notify(StepProgress(run_id="r", step=step))
    assert len(recorder.events) == 2
    assert capsys.readouterr().err == (
        "goldcrest: Broken stopped (RuntimeError: tracking is down); the run goes on\n"
    )


def test_progress_is_read_in_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "progress" / "a.jsonl"
    file.parent.mkdir()
    file.write_text('{"kind": "old"}\n')
    reader = ProgressReader(tmp_path)
    reader.skip_old(["a", "b"])
    assert reader.new("a") == reader.new("b") == []
    with file.open("a") as stream:
        stream.write('{"kind": "x"}\nnot json\n{"kind": ')
        stream.flush()
        assert reader.new("a") == [{"kind": "x"}]
        stream.write('"y"}\n')
    assert reader.new("a") == [{"kind": "y"}]


def test_last_lines_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {i}" for i in range(10_000)))
    assert last_lines(log, 2, limit=100) == ("line 9998", "line 9999")
    assert last_lines(tmp_path / "absent") == ()
