"""Leases: one holder, take-over of the dead at once and of the silent in time, fences that grow.

The expected behaviour is the rules in the docstrings of cluster/lease.py and lease_remote.py.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from goldcrest.cluster import lease as lease_module
from goldcrest.cluster.errors import StoreError
from goldcrest.cluster.lease import FileLeases, Lease, Record, Silence, hold
from goldcrest.cluster.lease_remote import BucketLeases
from goldcrest.cluster.process_id import ProcessId
from goldcrest.cluster.store import Store
from goldcrest.cluster.store_bucket import Bucket

KEY = hashlib.sha256(b"lease").hexdigest()
WORKERS = Path(__file__).with_name("store_workers.py")


@pytest.fixture(params=["folder", "bucket"])
def book(request, tmp_path):
    """A lease book of each kind on a disk."""
    if request.param == "folder":
        return FileLeases(tmp_path / "leases")
    return BucketLeases(Bucket.at(f"local://{tmp_path}/bucket"), lambda key: 0)


def foreign(record: Record) -> Record:
    """The same record from another machine, where no pid can be looked up."""
    return replace(record, process=replace(record.process, machine="f" * 16, host="far"))


def start_holder(uri, *, ttl=60.0):
    """A process of its own that holds the lease on KEY."""
    process = subprocess.Popen(
        [sys.executable, str(WORKERS), "hold", str(uri), KEY, str(ttl)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_fences_grow_and_release_frees(book):
    fences = []
    for _ in range(3):
        with hold(book, KEY, owner="me", ttl=30.0) as lease:
            assert book.holds(lease) and book.held(KEY)
            fences.append(lease.fence)
        assert not book.holds(lease) and not book.held(KEY)
    if isinstance(book, FileLeases):  # in a bucket the attempts carry the fences on
        assert fences == [1, 2, 3]


def test_threads_exclude_each_other(book):
    inside, most, rounds = 0, 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most, rounds
        for _ in range(3):
            with hold(book, KEY, owner="thread", ttl=30.0):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.002)
                with guard:
                    inside -= 1
                    rounds += 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, rounds) == (1, 18)


def test_other_keys_do_not_wait(book):
    other = hashlib.sha256(b"other").hexdigest()
    with hold(book, KEY, owner="a", ttl=30.0), hold(book, other, owner="b", ttl=30.0) as lease:
        assert book.holds(lease)


def test_waiting_is_told_with_name_and_place(book):
    notes = []
    with hold(book, KEY, owner="features of run 7", ttl=30.0):

        def wait(note):
            notes.append(note)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            book.acquire(KEY, owner="late", ttl=30.0, wait=wait)
    assert "features of run 7" in notes[0] and str(os.getpid()) in notes[0]
    with hold(book, KEY, owner="next", ttl=30.0):  # the one that gave up left nothing in the way
        pass


def test_silent_foreign_holder_is_fenced_off(book, monkeypatch):
    """Another host's holder falls silent for its ttl: taken over, and it finds out by itself."""
    new = Record.new
    monkeypatch.setattr(Record, "new", classmethod(lambda cls, *a: foreign(new(*a))))
    silent = book.acquire(KEY, owner="silent", ttl=0.3, wait=None)
    monkeypatch.undo()
    begun = time.monotonic()
    with hold(book, KEY, owner="heir", ttl=30.0) as lease:
        assert time.monotonic() - begun >= 0.3
        assert lease.fence > silent.fence
        assert not book.holds(silent)
        assert not book.renew(silent)
        book.release(silent)  # a late release must not free the heir's lease
        assert book.holds(lease)


def test_heartbeat_keeps_a_foreign_holder_alive(book, monkeypatch):
    new = Record.new
    monkeypatch.setattr(Record, "new", classmethod(lambda cls, *a: foreign(new(*a))))
    held, taken = threading.Event(), threading.Event()
    with hold(book, KEY, owner="busy", ttl=0.4) as busy:

        def want():
            held.set()
            with hold(book, KEY, owner="other", ttl=0.4):
                taken.set()

        thread = threading.Thread(target=want)
        thread.start()
        assert held.wait(5)
        assert not taken.wait(1.5)  # almost four times its ttl
        assert book.holds(busy) and not busy.lost
    thread.join()
    assert taken.is_set()


def test_damaged_record_ends_by_silence_only(tmp_path):
    book = FileLeases(tmp_path)
    (tmp_path / KEY).mkdir(parents=True)
    record = tmp_path / KEY / "000000000004.json"
    record.write_text("{half a rec")
    clock = tmp_path / KEY / "clock"
    clock.touch()
    assert not book.is_free(record, Silence(), clock=clock)
    assert book.held(KEY).owner == "unknown"


def test_age_alone_frees_nothing(tmp_path):
    """A laptop that slept for a day: the holder's stamp is old, but it only just woke up, too."""
    book = FileLeases(tmp_path)
    lease = book.acquire(KEY, owner="sleeper", ttl=60.0)
    top = book.newest(KEY)
    far = foreign(Record.parse(top.read_bytes()))
    top.write_bytes(far.json())
    os.utime(top, (time.time() - 86400, time.time() - 86400))
    clock = tmp_path / KEY / "clock"
    clock.touch()
    silence = Silence()
    assert not book.is_free(top, silence, clock=clock)
    book.renew(lease)
    assert not book.is_free(top, silence, clock=clock)


@pytest.mark.parametrize(
    ("age", "watched", "free"), [(0, 31, False), (61, 31, True), (0, 61, True)]
)
def test_silence_is_judged_by_watching(tmp_path, monkeypatch, age, watched, free):
    """ttl 60: an old stamp needs half a ttl of watching, a stamp from the future a whole one."""
    book = FileLeases(tmp_path)
    book.acquire(KEY, owner="far", ttl=60.0)
    top = book.newest(KEY)
    top.write_bytes(foreign(Record.parse(top.read_bytes())).json())
    stamp = time.time() - age
    os.utime(top, (stamp, stamp))
    clock = tmp_path / KEY / "clock"
    clock.touch()
    now = [1000.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now[0])
    silence = Silence()
    assert not book.is_free(top, silence, clock=clock)
    now[0] += watched
    assert book.is_free(top, silence, clock=clock) is free


def test_contender_with_an_old_picture_withdraws(tmp_path):
    """Between its look and its claim, others took the lease, released it and were cleaned away."""
    book = FileLeases(tmp_path)
    with hold(book, KEY, owner="a", ttl=30.0), pytest.raises(KeyboardInterrupt):
        raise KeyboardInterrupt
    with hold(book, KEY, owner="b", ttl=30.0) as lease:
        assert lease.fence == 2 and not (tmp_path / KEY / "000000000001.released").exists()
        candidate = tmp_path / KEY / "x.candidate"
        candidate.write_bytes(Record.new("late", 30.0).json())
        assert not book._claim(KEY, candidate, 1)  # that number is free again, the lease is not
        assert book.holds(lease)
        assert not (tmp_path / KEY / "000000000001.json").exists()


def test_heartbeat_survives_io_errors_and_reports_loss(tmp_path, monkeypatch):
    book = FileLeases(tmp_path)
    calls = []

    def renew(lease):
        calls.append(lease)
        if len(calls) == 1:
            raise OSError(5, "I/O error")
        return False

    monkeypatch.setattr(book, "renew", renew)
    with hold(book, KEY, owner="me", ttl=0.05) as lease:
        deadline = time.monotonic() + 5
        while not lease.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lease.lost and len(calls) == 2


def test_ttl_must_be_positive(book):
    with pytest.raises(ValueError, match="time to live"), hold(book, KEY, owner="me", ttl=0.0):
        pass


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_killed_holder_is_taken_over_at_once(tmp_path, monkeypatch, scheme):
    """SIGKILL; its parent has not even reaped it: a zombie counts as dead. No ttl is waited for."""
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    uri = f"{scheme}{tmp_path}/store"
    holder = start_holder(uri, ttl=3600.0)
    try:
        holder.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        with Store.open(uri).lease(KEY, owner="heir", ttl=3600.0) as lease:
            assert time.monotonic() - begun < 30.0
            assert lease.fence == 2
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_stopped_holder_cannot_commit_late(tmp_path, monkeypatch, scheme):
    """SIGSTOP silences a living holder: after its ttl another takes over with a larger fence."""
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    uri = f"{scheme}{tmp_path}/store"
    holder = start_holder(uri, ttl=0.5)
    try:
        holder.send_signal(signal.SIGSTOP)
        with Store.open(uri).lease(KEY, owner="heir", ttl=30.0) as lease:
            assert lease.fence == 2
            holder.send_signal(signal.SIGCONT)
            time.sleep(0.3)  # several heartbeats of the late one
            assert Store.open(uri).leases.holds(lease)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@pytest.mark.scenario("32 processes race for one key, in a folder and in a bucket")
@pytest.mark.parametrize("scheme", ["", "local://"])
def test_many_processes_compute_once(tmp_path, monkeypatch, scheme):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    log = tmp_path / "log"
    uri = f"{scheme}{tmp_path}/store"
    done = subprocess.run(
        [sys.executable, str(WORKERS), "race", uri, KEY, "32", str(log)], timeout=120
    )
    assert done.returncode == 0
    assert len(log.read_text().splitlines()) == 1


def test_process_identity():
    me = ProcessId.current()
    assert ProcessId.from_json(json.loads(json.dumps(me.to_json()))) == me
    assert me.state() == "alive"
    assert replace(me, machine="0" * 16).state() == "unknown"
    assert replace(me, started="1").state() == "dead"  # the pid was given to another process
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert replace(me, pid=gone.pid, started="").state() == "dead"


@pytest.mark.parametrize("value", [None, [], {}, {"host": "a", "machine": "b", "pid": "7"}])
def test_process_identity_refuses_nonsense(value):
    with pytest.raises(ValueError):
        ProcessId.from_json(value)


def test_lost_lease_reads_well():
    lease = Lease(key=KEY, owner="features", fence=3, nonce="0" * 16, ttl=60.0)
    error = lease_module.lost_lease(lease)
    assert isinstance(error, StoreError)
    assert "features" in str(error) and "repeat the command" in str(error)
