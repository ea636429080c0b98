"""What every store promises: a folder, memory as a bucket, a disk as a bucket, an S3 server."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from goldcrest.cluster.artifact import MANIFEST, Artifact
from goldcrest.cluster.errors import InputError, StoreError
from goldcrest.cluster.store import Store, storage_error
from goldcrest.cluster.store_local import LocalStore
from goldcrest.cluster.store_remote import RemoteStore


def key_of(text):
    """A key for a test."""
    return hashlib.sha256(text.encode()).hexdigest()


KEY = key_of("features")
MEMBERS = {"facts.json": b'{"a": 1}\n', "table/part-00000.parquet": bytes(range(256)) * 40}


def put(store, key, members=None, **manifest):
    """Compute and commit an artifact with these members."""
    with store.lease(key, owner="test") as lease:
        folder = store.begin(key, lease)
        fill(folder, MEMBERS if members is None else members)
        return store.commit(key, folder, {"step": "features", **manifest}, lease)


def fill(folder, members):
    """Write the members of an artifact."""
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def content(artifact):
    """All members of an artifact, read through its verification."""
    return {name: artifact.file(name).read_bytes() for name in artifact.manifest["files"]}


@pytest.fixture(params=["folder", "memory", "disk as bucket", "s3"])
def store(request, tmp_path, monkeypatch):
    """An empty store of each kind."""
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    if request.param == "s3":
        return Store.open(request.getfixturevalue("s3_uri"))
    uris = {
        "folder": str(tmp_path / "store"),
        "memory": f"memory://{key_of(str(tmp_path))[:12]}/store",
        "disk as bucket": f"local://{tmp_path}/bucket",
    }
    return Store.open(uris[request.param])


def test_absent_then_there(store):
    assert store.find(KEY) is None
    assert store.manifest(KEY) is None
    made = put(store, KEY, config={"dims": 13}, metrics={"eer": 0.1 + 0.2})
    found = store.find(KEY)
    assert isinstance(found, Artifact)
    assert found.manifest == made.manifest == store.manifest(KEY)
    assert content(found) == MEMBERS
    assert found.manifest["config"] == {"dims": 13}
    assert found.metrics["eer"] == 0.1 + 0.2  # floats come back to the last bit
    assert found.manifest["key"] == KEY
    assert found.manifest["fence"] == 1
    assert store.find(KEY, verify=False).manifest == found.manifest
    assert Artifact.at(found.path).key == KEY


def test_manifest_lists_sizes_and_checksums(store):
    made = put(store, KEY)
    assert made.manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in MEMBERS.items()
    }


def test_artifact_without_members(store):
    put(store, KEY, members={})
    assert store.find(KEY).manifest["files"] == {}


def test_existing_artifact_wins(store):
    first = put(store, KEY)
    second = put(store, KEY, members={"other.txt": b"late"})
    assert second.manifest == first.manifest
    assert content(store.find(KEY)) == MEMBERS
    assert not list((store.root / "tmp").iterdir())


def test_lost_lease_is_refused(store):
    with store.lease(KEY, owner="early") as lease:
        folder = store.begin(KEY, lease)
        fill(folder, MEMBERS)
    with pytest.raises(StoreError, match="lost"):
        store.commit(KEY, folder, {}, lease)
    assert store.find(KEY) is None
    assert not folder.exists()


def test_lease_of_another_key_is_refused(store):
    with store.lease(key_of("other"), owner="test") as lease:
        folder = store.begin(key_of("other"), lease)
        with pytest.raises(StoreError, match="is none on"):
            store.commit(KEY, folder, {}, lease)


@pytest.mark.parametrize(
    "key", ["", "abc", "../" * 21 + "x", "A" * 64, "0" * 63, "0" * 65, "0" * 63 + "\n", "０" * 64]
)
def test_keys_are_64_hex_digits(store, key):
    for use in (store.find, store.manifest, store.scratch, store.drop_scratch, store.lineage):
        with pytest.raises(StoreError, match="64 hex digits"):
            use(key)
    with pytest.raises(StoreError, match="64 hex digits"):
        store.lease(key, owner="test")


@pytest.mark.parametrize("run", ["", "..", "a/b", "/etc", ".hidden", "x" * 200, "a\n"])
def test_run_names_stay_inside(store, run):
    with pytest.raises(StoreError, match="name of a run"):
        store.run_folder(run)


def test_only_plain_files_are_committed(store):
    with store.lease(KEY, owner="test") as lease:
        folder = store.begin(KEY, lease)
        (folder / "link").symlink_to("/etc/hostname")
        with pytest.raises(StoreError, match="link"):
            store.commit(KEY, folder, {}, lease)
        folder = store.begin(KEY, lease)
        os.mkfifo(folder / "pipe")
        with pytest.raises(StoreError, match="special file"):
            store.commit(KEY, folder, {}, lease)
        folder = store.begin(KEY, lease)
        (folder / MANIFEST).write_text("{}")
        with pytest.raises(StoreError, match="belongs to the store"):
            store.commit(KEY, folder, {}, lease)
    assert store.find(KEY) is None


@pytest.mark.parametrize("facts", [{"metrics": {"eer": float("nan")}}, {"host": object()}])
def test_manifest_must_be_json(store, facts):
    with pytest.raises(StoreError, match="not JSON"):
        put(store, KEY, **facts)
    assert store.find(KEY) is None
    assert not list((store.root / "tmp").iterdir())


def test_manifest_of_another_key_is_refused(store):
    with store.lease(KEY, owner="test") as lease:
        folder = store.begin(KEY, lease)
        with pytest.raises(StoreError, match="given for the key"):
            store.commit(KEY, folder, {"key": key_of("other")}, lease)


def test_discard_removes_unfinished_work_only(store, tmp_path):
    with store.lease(KEY, owner="test") as lease:
        folder = store.begin(KEY, lease)
        fill(folder, MEMBERS)
        store.discard(folder)
        store.discard(folder)
    assert not folder.exists()
    with pytest.raises(StoreError, match="no unfinished work"):
        store.discard(tmp_path)
    assert tmp_path.exists()


def test_scratch_survives_until_dropped(store):
    (store.scratch(KEY) / "checkpoint").write_text("3")
    assert (Store.open(store.uri).scratch(KEY) / "checkpoint").read_text() == "3"
    store.drop_scratch(KEY)
    store.drop_scratch(KEY)
    assert not list(store.scratch(KEY).iterdir())


def test_run_records(store, tmp_path, monkeypatch):
    (store.run_folder("run-1") / "run.json").write_text("{}")
    store.publish_run("run-1")
    assert [path.name for path in store.runs_folder.iterdir()] == ["run-1"]
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "another host"))
    assert (Store.open(store.uri).run_folder("run-1") / "run.json").read_text() == "{}"


def record(store, run, **facts):
    """Write the record of a run and let other hosts see it."""
    (store.run_folder(run) / "run.json").write_text(json.dumps(facts))
    store.publish_run(run)


def test_runs_of_every_host_are_listed(store, tmp_path, monkeypatch):
    assert store.runs() == [] and store.run_records("run-1") == []
    record(store, "run-1", host="one")
    store.run_folder("not-begun")
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "another host"))
    other = Store.open(store.uri)
    record(other, "run-2", host="two")
    for host in (store, other):
        # A bucket in memory knows no times to order them by.
        names = sorted(host.runs()) if store.uri.startswith("memory:") else host.runs()
        assert names == ["run-1", "run-2"]
        assert {row["host"] for row in host.run_records("run-1")} == {"one"}
        assert {row["host"] for row in host.run_records("run-2")} == {"two"}
    with pytest.raises(StoreError, match="name of a run"):
        store.run_records("../run-1")
    (store.run_folder("run-1") / "run.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):  # gc must not take it for an empty one
        store.run_records("run-1")


def test_a_run_that_another_host_went_on_with_is_fetched_again(tmp_path, monkeypatch):
    uri = f"local://{tmp_path}/bucket"
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "one"))
    one = Store.open(uri)
    record(one, "run-1", status="failed")
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "two"))
    two = Store.open(uri)
    path = two.run_folder("run-1") / "run.json"
    path.write_text('{"status": "running"}')  # two goes on with it ...
    assert json.loads((two.run_folder("run-1") / "run.json").read_text()) == {"status": "running"}
    assert json.loads((one.run_folder("run-1") / "run.json").read_text()) == {"status": "failed"}
    assert [row["status"] for row in two.run_records("run-1")] == ["running", "failed"]
    two.publish_run("run-1")  # ... and only then one sees it
    assert json.loads((one.run_folder("run-1") / "run.json").read_text()) == {"status": "running"}


def test_entries_and_lineage(store):
    corpus, mfcc = key_of("corpus"), key_of("mfcc")
    put(store, corpus, step="prepare")
    put(store, mfcc, step="mfcc", inputs={"corpus": corpus, "labels": None})
    put(store, KEY, step="train", inputs={"corpus": corpus, "mfcc": mfcc, "old": key_of("gone")})
    assert [entry["key"] for entry in store.entries()] == sorted([corpus, mfcc, KEY])
    tree = store.lineage(KEY)
    assert tree["step"] == "train"
    assert tree["inputs"]["mfcc"]["inputs"]["corpus"]["step"] == "prepare"
    assert tree["inputs"]["mfcc"]["inputs"]["labels"] is None
    assert tree["inputs"]["old"] == {"key": key_of("gone"), "missing": True}
    json.dumps(tree)


def test_two_handles_and_pickling(store):
    put(store, KEY)
    other = pickle.loads(pickle.dumps(store))
    assert other.uri == store.uri and type(other) is type(store)
    assert content(other.find(KEY)) == MEMBERS


def test_two_stores_are_apart(tmp_path):
    one, two = Store.open(tmp_path / "one"), Store.open(tmp_path / "two")
    put(one, KEY)
    with one.lease(KEY, owner="a"), two.lease(KEY, owner="b"):
        assert two.find(KEY) is None


def test_verify_names_what_is_absent(store):
    assert store.verify() == []
    assert store.verify(KEY) == [{"key": KEY, "step": "", "reason": "there is no such artifact"}]


def test_uris(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    assert isinstance(Store.open(f"file://{tmp_path}/a%20b"), LocalStore)
    assert (tmp_path / "a b" / "artifacts").is_dir()
    assert isinstance(Store.open("memory://uris"), RemoteStore)
    monkeypatch.chdir(tmp_path)
    assert Store.open("relative").uri == str(tmp_path / "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store.open("~/home").root == tmp_path / "home"
    for uri in ("", "nosuchscheme://x", "file://elsewhere/x", "s3://["):
        with pytest.raises(InputError):
            Store.open(uri)


def test_credentials_in_a_uri_are_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    assert "hunter2" not in repr(Store.open("memory://me:hunter2@bucket/store"))
    for uri in ("nosuchscheme://me:hunter2@x", "file://me:hunter2@x/y", "s3://me:hunter2@["):
        with pytest.raises(InputError) as caught:
            Store.open(uri)
        assert "hunter2" not in str(caught.value)
    told = storage_error(OSError(errno.ENOSPC, "full"), "s3://me:hunter2@bucket")
    assert "hunter2" not in str(told)


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file") as caught:
        Store.open(tmp_path / "file" / "store")
    assert "remove it" in str(caught.value)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "gc"), (errno.EACCES, "owns"), (errno.EROFS, "read-only"), (errno.EIO, None)],
)
def test_errors_of_the_disk_come_with_a_remedy(number, remedy):
    told = storage_error(OSError(number, os.strerror(number), "/store/x"), "/store")
    if remedy is None:
        assert told is None  # trying again may help: stays an OSError
    else:
        assert remedy in str(told) and "/store/x" in str(told)


def test_full_disk_leaves_nothing(store, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left") as caught:
            put(store, KEY)
    assert "gc" in str(caught.value)
    assert store.find(KEY) is None
    assert not list((store.root / "tmp").iterdir())
    assert content(put(store, KEY)) == MEMBERS


def test_forbidden_folder_is_told(tmp_path, monkeypatch):
    """Patched in, since root may write anywhere."""

    def forbidden(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(StoreError, match="Permission denied") as caught:
        Store.open(tmp_path / "store")
    assert "who owns" in str(caught.value) and str(tmp_path) in str(caught.value)


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    """A power cut keeps what was fsynced: at the commit point that must be all there is."""
    store = Store.open(tmp_path / "store")
    synced, at_rename = set(), {}
    fsync, rename = os.fsync, Path.rename

    def note_fsync(handle):
        fsync(handle)
        synced.add(os.fstat(handle).st_ino)

    def note_rename(path, target):
        if path.parent.name == "tmp":
            at_rename["all"] = {member.stat().st_ino for member in [path, *path.rglob("*")]}
            at_rename["synced"] = set(synced)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    artifact = put(store, KEY)
    assert at_rename["all"] <= at_rename["synced"]
    assert {artifact.path.parent.stat().st_ino, store.root.joinpath("artifacts").stat().st_ino} <= (
        synced
    )


def test_late_manifest_in_a_bucket_changes_nothing(tmp_path, monkeypatch):
    """A fenced writer passes all checks, sleeps, and puts its manifest after its heir's."""
    monkeypatch.setenv("GOLDCREST_CACHE", str(tmp_path / "cache"))
    store = Store.open(f"local://{tmp_path}/bucket")
    late = {}
    put_object = store.bucket.put

    def hold_back(name, data):
        if name.startswith("artifacts/") and not late:
            late[name] = data
        else:
            put_object(name, data)

    monkeypatch.setattr(store.bucket, "put", hold_back)
    with pytest.raises(StoreError, match="removed while"):
        put(store, KEY, members={"value": b"late"})
    winner = put(store, KEY, members={"value": b"heir"})
    for name, data in late.items():
        put_object(name, data)
    found = store.find(KEY)
    assert found.manifest == winner.manifest and content(found) == {"value": b"heir"}


def test_store_loads_neither_torch_nor_ray():
    """And neither pyarrow nor mlflow for a store in a folder: a cached run must start fast."""
    code = (
        "import sys, goldcrest.cluster.store_local, goldcrest.cluster.store\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'pyarrow', 'fsspec') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
