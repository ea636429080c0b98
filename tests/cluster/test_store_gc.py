"""Garbage collection: takes what nobody needs, never what a live writer has."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from goldcrest.cluster.lease import Record
from goldcrest.cluster.process_id import ProcessId, aside
from goldcrest.cluster.shared_store import _Wall
from goldcrest.cluster.store import Store
from goldcrest.cluster.store_bucket import Bucket
from goldcrest.cluster.store_remote import RemoteStore
from tests.chaos.traces import left_over

KEY, OTHER = (hashlib.sha256(name).hexdigest() for name in (b"gc", b"other"))
ABANDON = """
import os, sys
from goldcrest.cluster.store import Store
store = Store.open(sys.argv[1])
with store.lease(sys.argv[2], owner="dead") as lease:
    (store.begin(sys.argv[2], lease) / "half.bin").write_bytes(b"x" * 1000)
    (store.scratch(sys.argv[2]) / "checkpoint").write_text("1")
    os._exit(9)
"""
BREAK_OFF = """
import os, sys
from pathlib import Path
from goldcrest.cluster import report, run_record, shared_store, sweep, worker
from goldcrest.cluster.store import Store
store = Store.open(sys.argv[1])
folder = store.run_folder("dead")
log = folder / "logs" / "step.log"
log.parent.mkdir()
log.write_text("hub_token=abc")
Path.replace = Path.unlink = lambda *_, **__: None  # as though killed before every one of them
run_record.RunRecord(folder, {}).write("running")
report.write_text(folder / "report.html", "half")
worker.mask_log(log)
tune = sweep._scratch(folder)
(tune.__enter__() / "state").write_text("half")
shared_store._living_nodes = lambda: {"a": "here", "b": "there"}
shared_store._ask_all = lambda *_: os._exit(9)
shared_store.prove_shared(store, folder)
"""


def put(store, key):
    """Commit an artifact."""
    with store.lease(key, owner="test") as lease:
        folder = store.begin(key, lease)
        (folder / "value").write_text(key)
        return store.commit(key, folder, {"step": "x"}, lease)


def abandon(store, key):
    """A writer that dies in the middle of its work."""
    done = subprocess.run([sys.executable, "-c", ABANDON, store.uri, key])
    assert done.returncode == 9


def whats(rows):
    """The kinds of garbage in a report."""
    return sorted({row["what"] for row in rows})


def age(folder: Path, seconds: float) -> None:
    """Make a tree or a file look old."""
    then = time.time() - seconds
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))


@pytest.fixture
def store(tmp_path):
    """A folder store."""
    return Store.open(tmp_path / "store")


def test_nothing_to_do(store):
    put(store, KEY)
    assert store.gc() == []
    assert store.find(KEY) is not None


def test_unfinished_work_of_the_dead_goes_and_scratch_stays(store):
    abandon(store, KEY)
    assert whats(store.gc(dry_run=True)) == ["unfinished work"]
    assert len(list((store.root / "tmp").iterdir())) == 1  # dry
    rows = store.gc()
    assert rows[0]["bytes"] == 1000 and rows[0]["reason"] == "its writer is dead"
    assert list((store.root / "tmp").iterdir()) == []
    assert (store.scratch(KEY) / "checkpoint").exists()  # the next attempt resumes from it
    put(store, KEY)
    assert whats(store.gc()) == ["scratch"]
    assert not list(store.scratch(KEY).iterdir())


def test_checkpoints_of_what_was_given_up_go_with_old_artifacts(store):
    abandon(store, KEY)
    assert "scratch" not in whats(store.gc(set()))  # too young: whoever repeats it needs them
    age(store.scratch(KEY), 2 * 86400)
    assert store.gc() == []  # not asked for
    assert store.gc({KEY}) == []  # a kept run has it
    assert store.gc(set(), older_than=3 * 86400) == []
    with store.lease(KEY, owner="live"):
        assert store.gc(set()) == []
    assert (store.scratch(KEY) / "checkpoint").exists()
    (row,) = store.gc(set(), older_than=3600.0)
    assert row["what"] == "scratch" and "given up" in row["reason"]
    assert not list((store.root / "scratch").iterdir())


def test_live_writers_keep_everything(store):
    put(store, OTHER)
    with store.lease(KEY, owner="live") as lease, store.lease(OTHER, owner="live"):
        folder = store.begin(KEY, lease)
        (folder / "value").write_text("x")
        age(store.root, 10 * 86400)
        (store.scratch(OTHER) / "checkpoint").write_text("1")
        rows = store.gc(set(), grace=0.0)
        assert "unfinished work" not in whats(rows) and "artifact" not in whats(rows)
        assert (store.scratch(OTHER) / "checkpoint").exists()
        assert (folder / "value").exists()


def test_another_hosts_work_stays_for_the_grace_time(store):
    far = ProcessId(host="far", machine="e" * 16, pid=1, started="7")
    folder = store.root / "tmp" / f"{KEY}.000000000001-{'a' * 16}.{far.machine}-1-7"
    folder.mkdir()
    (folder / "half").write_text("x")
    assert store.gc(grace=3600.0) == []
    age(folder, 7200.0)
    lease = store.root / "leases" / KEY / "000000000001.json"
    lease.parent.mkdir(parents=True)
    lease.write_bytes(Record(owner="far", nonce="a" * 16, ttl=60.0, process=far).json())
    assert store.gc(grace=3600.0) == []  # its lease stands
    lease.unlink()
    assert whats(store.gc(grace=3600.0)) == ["unfinished work"]


def test_unknown_folders_are_left_for_the_grace_time(store):
    (store.root / "tmp" / "mine").mkdir()
    assert store.gc() == []
    age(store.root / "tmp" / "mine", 2 * 86400)
    assert whats(store.gc()) == ["unfinished work"]


def test_what_dead_writers_left_beside_run_records_goes(store: Store) -> None:
    done = subprocess.run([sys.executable, "-c", BREAK_OFF, store.uri])
    assert done.returncode == 9
    folder = store.run_folder("dead")
    (folder / ".agreed").write_text("1.0")
    for name in ("report.html", "run.json"):
        (folder / name).write_text("whole")
    kinds = (".run.json.*.tmp", ".report.html.*.tmp", "logs/.step.log.*.tmp", "tune-*")
    left = [path for kind in (*kinds, ".seen-*-nonce", ".seen-*-run") for path in folder.glob(kind)]
    assert len(left) == 6
    assert sorted(left_over(store.root)) == sorted(str(p.relative_to(store.root)) for p in left)
    rows = store.gc()
    assert whats(rows) == ["half-written"]
    assert {row["path"] for row in rows} == set(map(str, left))
    assert left_over(store.root) == []
    kept = sorted(path.name for path in folder.rglob("*"))
    assert kept == [".agreed", "logs", "report.html", "run.json", "step.log"]


def test_what_live_writers_have_beside_run_records_stays(store: Store) -> None:
    mine = aside(store.run_folder("live") / "run.json")
    mine.write_text("half")
    me, far = ProcessId.current(), ProcessId(host="far", machine="e" * 16, pid=1, started="7")
    other = mine.with_name(mine.name.replace(me.mark, far.mark))
    other.write_text("half")
    age(mine, 10 * 86400)
    age(other, 1800.0)
    assert store.gc(grace=3600.0) == []  # of the other host nothing is known
    age(other, 7200.0)
    assert [row["path"] for row in store.gc(grace=3600.0)] == [str(other)]
    assert mine.exists()


def test_old_leases_go_and_fresh_ones_stay(store):
    put(store, KEY)
    with store.lease(OTHER, owner="live"):
        assert store.gc() == []
        age(store.root / "leases" / KEY, 7200.0)
        rows = store.gc()
        assert [Path(row["path"]).name for row in rows] == [KEY]
        assert (store.root / "leases" / OTHER).exists()


def test_old_verification_notes_go(store):
    put(store, KEY)
    for key, days in ((KEY, 1), (OTHER, 1), (KEY, 8)):
        note = store.stamps.folder / f"{key}.json"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("{}")
        age(note, days * 86400)
        rows = [row for row in store.gc() if row["what"] == "verification note"]
        assert len(rows) == (0 if (key, days) == (KEY, 1) else 1)


def test_artifacts_only_on_request_and_by_age(store):
    put(store, KEY)
    put(store, OTHER)
    assert store.gc() == []
    assert store.gc({KEY}, older_than=3600.0) == []
    rows = store.gc({KEY})
    assert [(row["what"], Path(row["path"]).name) for row in rows] == [("artifact", OTHER)]
    assert store.find(OTHER) is None and store.find(KEY) is not None
    assert list((store.root / "tmp").iterdir()) == []


def test_quarantine_is_emptied_with_the_artifacts(store):
    (put(store, KEY).path / "value").write_text("damaged")
    assert store.find(KEY) is None
    assert store.gc() == [] and len(store.quarantined()) == 1
    assert whats(store.gc(set())) == ["quarantined"]
    assert store.quarantined() == []


def test_interrupted_removal_is_finished_by_the_next(store):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    me = ProcessId.current()
    trash = store.root / "tmp" / f"trash.{me.machine}-{dead.pid}-1.{'0' * 8}"
    trash.mkdir()
    assert whats(store.gc()) == ["unfinished work"]
    assert not trash.exists()


def test_bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    store = Store.open(f"local://{tmp_path}/bucket")
    put(store, KEY)
    assert store.gc(grace=0.0) == []
    # an upload cut short: members without a manifest, its writer's claim gone
    store.bucket.put(f"artifacts/{OTHER[:2]}/{OTHER}/000000000001-{'b' * 16}/value", b"half")
    assert store.gc() == []  # young
    assert whats(store.gc(grace=0.0, dry_run=True)) == ["unfinished work"]
    with store.lease(OTHER, owner="live") as lease:
        path = f"artifacts/{OTHER[:2]}/{OTHER}/{lease.attempt}/value"
        store.bucket.put(path, b"being uploaded")
        rows = store.gc(grace=0.0)
        assert [row["bytes"] for row in rows] == [4]
        assert store.bucket.get(path) == b"being uploaded"
    abandon(store, OTHER)
    rows = store.gc(set(), grace=0.0)
    assert whats(rows) == ["artifact", "cached artifact", "lease", "scratch", "unfinished work"]
    assert store.find(KEY) is None
    assert store.bucket.names("", recursive=True) == []
    put(store, KEY)


def test_a_bucket_s_notes_of_a_driver_that_died_go(tmp_path: Path) -> None:
    """Those that `prove_shared` leaves for the nodes."""
    store = RemoteStore(f"local://{tmp_path}/b", Bucket.at(f"local://{tmp_path}/b"), tmp_path / "c")
    _Wall(tmp_path, store.bucket, "seen-1").write("nonce", "x")
    assert store.gc() == []  # young
    (row,) = store.gc(grace=0.0)
    assert (row["what"], row["path"]) == ("half-written", "seen/seen-1/nonce")
    assert store.bucket.names("", recursive=True) == []


def test_the_cache_of_a_bucket_ages_out_and_heeds_the_leases_of_the_bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    store = Store.open(f"local://{tmp_path}/bucket")
    for key in (KEY, OTHER):
        put(store, key)
        (store.scratch(key) / "checkpoint").write_text("1")
        age(store.cache.place(key), 2 * 86400)
        age(store.scratch(key), 2 * 86400)
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "another host"))
    other = Store.open(store.uri)
    rows = other.gc(set())  # the artifacts go; of the first host's copies this one knows nothing
    assert whats(rows) == ["artifact"]
    with other.lease(OTHER, owner="live"):
        rows = store.gc({KEY}, older_than=3600.0)
        assert rows == []  # KEY is kept, on OTHER somebody works
    rows = store.gc(set(), older_than=3600.0)
    assert whats(rows) == ["cached artifact", "scratch"]
    assert store.cache.all_keys() == [] and not list((store.root / "scratch").iterdir())
    # a checkpoint of a step that another host has committed
    (store.scratch(KEY) / "checkpoint").write_text("1")
    put(other, KEY)
    assert whats(store.gc()) == ["scratch"]


def test_bucket_quarantine(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    store = Store.open(f"local://{tmp_path}/bucket")
    attempt = put(store, KEY).manifest["attempt"]
    store.bucket.put(f"artifacts/{KEY[:2]}/{KEY}/{attempt}/value", b"damaged")
    assert len(store.verify()) == 1
    assert store.gc(grace=0.0) == []
    assert whats(store.gc(set(), grace=0.0)) == ["cached artifact", "quarantined"]
    assert store.bucket.names("", recursive=True) == []
