"""Damage to a committed artifact is found, quarantined with its reason, and recomputed."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goldcrest.cluster.artifact import MANIFEST
from goldcrest.cluster.errors import StoreError
from goldcrest.cluster.store import Store
from goldcrest.cluster.store_stamps import SETTLED_NS, Stamps
from tests.cluster.rotten_disk import rot

FLIPS = 60
KEY = hashlib.sha256(b"damage").hexdigest()
MEMBERS = {"a.txt": b"first member", "deep/b.bin": bytes(range(200))}


def put(store):
    """Compute the artifact of KEY."""
    with store.lease(KEY, owner="test") as lease:
        folder = store.begin(KEY, lease)
        for name, content in MEMBERS.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return store.commit(KEY, folder, {"step": "x", "metrics": {"eer": 0.125}}, lease)


def check_recovery(store, *, reason):
    """The damage is found, kept aside with its reason, and a new computation is good again."""
    assert store.find(KEY) is None
    row = store.quarantined()[-1]
    assert row["key"] == KEY and reason in row["reason"]
    assert store.find(KEY) is None and len(store.quarantined()) == 1
    artifact = put(store)
    for name, content in MEMBERS.items():
        assert artifact.file(name).read_bytes() == content
    assert store.find(KEY) is not None and store.verify() == []


@pytest.fixture
def store(tmp_path):
    """A folder store with one artifact."""
    store = Store.open(tmp_path / "store")
    put(store)
    return store


@pytest.mark.scenario("an artifact is cut short, changed, or loses a file")
def test_every_kind_of_damage(tmp_path):
    def flip(place):
        data = bytearray((place / "deep/b.bin").read_bytes())
        data[77] ^= 4
        (place / "deep/b.bin").write_bytes(data)

    kinds = {
        "checksum": flip,
        "bytes instead of": lambda place: os.truncate(place / "a.txt", 3),
        "a.txt: No such file": lambda place: (place / "a.txt").unlink(),
        "no manifest": lambda place: (place / MANIFEST).unlink(),
        "not JSON": lambda place: os.truncate(place / MANIFEST, 40),
        "not JSON:": lambda place: (place / MANIFEST).write_bytes(b""),
        "not a mapping": lambda place: (place / MANIFEST).write_text("[]"),
        "seal": lambda place: (place / MANIFEST).write_text(
            (place / MANIFEST).read_text().replace("0.125", "0.124")
        ),
        "not a regular file": lambda place: (
            (place / "a.txt").rename(place / "b"),
            (place / "a.txt").symlink_to("b"),
        ),
        "no manifest ": lambda place: (shutil.rmtree(place), place.write_text("a file")),
    }
    for number, (reason, damage) in enumerate(kinds.items()):
        store = Store.open(tmp_path / str(number))
        damage(put(store).path)
        check_recovery(store, reason=reason.strip())


def test_manifest_of_another_key_is_found(store):
    other = hashlib.sha256(b"other").hexdigest()
    target = store.place(other)
    target.parent.mkdir(exist_ok=True)
    shutil.copytree(store.place(KEY), target)
    assert store.find(other) is None
    assert "belongs to the key" in store.quarantined()[0]["reason"]
    assert store.find(KEY) is not None


def test_empty_folder_in_the_way_is_nothing(tmp_path):
    store = Store.open(tmp_path)
    store.place(KEY).mkdir(parents=True)
    assert store.find(KEY) is None and store.quarantined() == []
    assert put(store).path == store.place(KEY)


def test_verify_hashes_everything_again(store):
    assert store.verify() == []
    (store.place(KEY) / "a.txt").write_bytes(b"FIRST member")
    problems = store.verify()
    assert problems == [{"key": KEY, "step": "x", "reason": "a.txt: its checksum differs"}]
    assert store.verify() == []


@pytest.mark.scenario("any one bit of an artifact flips")
@settings(
    max_examples=FLIPS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from([*MEMBERS, MANIFEST]), place=st.integers(0, 1 << 20))
def test_any_flipped_bit_is_found(tmp_path, record_property, name, place):
    """Every bit counts, save white space in the manifest that changes no value."""
    record_property("tried", FLIPS)
    store = Store.open(tmp_path / "flips")
    artifact = store.find(KEY) or put(store)
    before = dict(artifact.manifest)
    path = artifact.path / name
    good = path.read_bytes()
    place %= len(good) * 8
    bad = bytearray(good)
    bad[place // 8] ^= 1 << place % 8
    path.write_bytes(bad)
    found = store.find(KEY)
    assert found is None or (name == MANIFEST and found.manifest == before)
    if found is not None:
        path.write_bytes(good)


@pytest.mark.parametrize("uri", ["memory://damage-{}", "local://{}/bucket"])
def test_damage_in_a_bucket(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    store = Store.open(uri.format(tmp_path))
    base = f"artifacts/{KEY[:2]}/{KEY}"
    for reason, name, content in [
        ("checksum", "/a.txt", b"FIRST member"),
        ("size", "/a.txt", b"first"),
        ("missing", "/a.txt", None),
        ("not JSON", ".json", b"{"),
        ("seal", ".json", b"{}"),
    ]:
        attempt = put(store).manifest["attempt"]
        path = f"{base}/{attempt}{name}"
        store.bucket.delete(path) if content is None else store.bucket.put(path, content)
        if name != ".json":  # this host has a good copy of its own, another has not
            assert store.find(KEY) is not None
            monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / f"cache {reason}"))
            store = Store.open(store.uri)
        assert store.find(KEY) is None
        assert reason in store.quarantined()[-1]["reason"]
    put(store)
    assert store.verify() == []


def test_damaged_copy_in_the_cache_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    store = Store.open(f"local://{tmp_path}/bucket")
    (put(store).path / "a.txt").write_bytes(b"FIRST member")
    assert store.find(KEY).file("a.txt").read_bytes() == MEMBERS["a.txt"]
    assert store.quarantined() == []


@pytest.mark.parametrize("key", [KEY, None])
def test_rot_in_the_cache_of_a_bucket_is_mended_by_verify(tmp_path, monkeypatch, key):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    store = Store.open(f"local://{tmp_path}/bucket")
    put(store)
    rot(store.cache, KEY, "a.txt")
    with pytest.raises(StoreError, match=r"a\.txt"):
        store.find(KEY).file("a.txt")  # found by its unchanged stamps, refused when it is read
    (problem,) = store.verify(key)
    assert problem["key"] == KEY and problem["step"] == "x"
    assert problem["reason"] == "this host's copy: a.txt: its checksum differs"
    assert store.find(KEY).file("a.txt").read_bytes() == MEMBERS["a.txt"]
    assert store.verify(key) == [] and store.quarantined() == []


def test_half_downloaded_object_is_read_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    uri = f"local://{tmp_path}/bucket"
    put(Store.open(uri))
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "other"))
    store = Store.open(uri)
    blocks, calls = store.bucket.blocks, []

    def cut_once(name):
        calls.append(name)
        for block in blocks(name):
            yield block[:5] if len(calls) == 1 else block

    monkeypatch.setattr(store.bucket, "blocks", cut_once)
    assert store.find(KEY).file("a.txt").read_bytes() == MEMBERS["a.txt"]
    assert len(calls) == len(MEMBERS) + 1


def test_quarantine_gives_back_what_another_repaired(store, monkeypatch):
    """Between our verdict and the rename another process quarantined and recomputed it."""
    store._refuse(KEY, -1, "judged another folder")
    assert store.find(KEY) is not None and store.quarantined() == []


def settled(folder: Path) -> None:
    """Wait until the change times in `folder` are old enough to be stamped."""
    newest = max(path.stat().st_ctime_ns for path in folder.rglob("*"))
    time.sleep(max(0.0, (newest + SETTLED_NS - time.time_ns()) / 1e9) + 0.05)


def test_stamps_skip_the_hash_only_where_nothing_was_written(store, monkeypatch):
    """Rewritten with the same size and its old modification time: the change time tells."""
    hashed = []
    from goldcrest.cluster import store_stamps

    real = store_stamps.sha256_file
    monkeypatch.setattr(
        store_stamps, "sha256_file", lambda path: hashed.append(path.name) or real(path)
    )
    place = store.place(KEY)
    store.find(KEY)
    store.find(KEY)
    assert sorted(hashed) == ["a.txt", "a.txt", "b.bin", "b.bin"]  # too young to be stamped
    settled(place)
    hashed.clear()
    store.find(KEY)
    assert len(hashed) == 2
    store.find(KEY)
    assert len(hashed) == 2  # untouched since
    assert Store.open(store.uri).verify() == [] and len(hashed) == 4  # verify always hashes
    before = (place / "a.txt").stat()
    (place / "a.txt").write_bytes(b"FIRST member")
    os.utime(place / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.find(KEY) is None
    assert "a.txt" in store.quarantined()[0]["reason"]


@pytest.mark.parametrize("note", ["", "{", "[]", '{"at": "x", "files": {}}', '{"at": 1e99}'])
def test_damaged_stamps_cost_only_time(tmp_path, note):
    (tmp_path / "member").write_bytes(b"x")
    stamps = Stamps(tmp_path / "notes")
    stamps.folder.mkdir()
    (stamps.folder / f"{KEY}.json").write_text(note)
    files = {"member": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    assert stamps.check(tmp_path, KEY, files) is None
    files["member"]["sha256"] = "0" * 64
    assert "checksum" in stamps.check(tmp_path, KEY, files)


def test_old_stamps_are_not_believed(tmp_path):
    path = tmp_path / "member"
    path.write_bytes(b"x")
    stamps = Stamps(tmp_path / "notes")
    seen = path.stat()
    stamp = [seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns]
    stamps.folder.mkdir()
    wrong = {"member": {"bytes": 1, "sha256": "0" * 64}}
    for age, fault in [(3600, None), (8 * 86400, "member: its checksum differs")]:
        note = {"at": time.time() - age, "files": {"member": stamp}}
        (stamps.folder / f"{KEY}.json").write_text(json.dumps(note))
        assert stamps.check(tmp_path, KEY, wrong) == fault
