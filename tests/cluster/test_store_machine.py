"""A random walk over the store beside a dictionary that says what it must hold."""

import hashlib
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from goldcrest.cluster.store import Store

KEYS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(3)]
keys = st.sampled_from(KEYS)
contents = st.binary(min_size=1, max_size=50)


class StoreMachine(RuleBasedStateMachine):
    """Commits, damage, removals and reopenings in any order."""

    scheme = ""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.uri = f"{self.scheme}{self.folder}/store"
        self.good = {}  # key -> content of its member
        self.damaged = {}  # key -> whether the quarantine must have grown when it was seen
        self.open()

    def open(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GOLDCREST_CACHE", str(self.folder / "cache"))
            self.store = Store.open(self.uri)

    def teardown(self):
        shutil.rmtree(self.folder)

    @rule(key=keys, content=contents)
    def compute(self, key, content):
        """A run of the step: what is there and good wins."""
        with self.store.lease(key, owner="machine") as lease:
            folder = self.store.begin(key, lease)
            (folder / "sub").mkdir()
            (folder / "sub/value").write_bytes(content)
            artifact = self.store.commit(key, folder, {"step": "x"}, lease)
        expected = self.good.setdefault(key, content)
        assert artifact.file("sub/value").read_bytes() == expected

    @rule(key=keys, content=contents)
    def give_up(self, key, content):
        """A step that fails in the middle."""
        with self.store.lease(key, owner="machine") as lease:
            folder = self.store.begin(key, lease)
            (folder / "half").write_bytes(content)
            self.store.discard(folder)

    @rule(key=keys)
    def find(self, key):
        """Found exactly if committed and undamaged."""
        artifact = self.store.find(key)
        assert (artifact is not None) == (key in self.good)
        if artifact is not None:
            assert artifact.file("sub/value").read_bytes() == self.good[key]

    @precondition(lambda self: self.good)
    @rule(data=st.data(), kind=st.sampled_from(["flip", "cut", "remove"]))
    def damage(self, data, kind):
        """Harm a member of a committed artifact, in the store itself."""
        key = data.draw(st.sampled_from(sorted(self.good)))
        path = self.member(key)
        content = path.read_bytes()
        if kind == "flip":
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        elif kind == "cut":
            path.write_bytes(content[:-1])
        else:
            path.unlink()
        before = len(self.store.quarantined())
        assert [row["key"] for row in self.store.verify()] == [key]
        assert len(self.store.quarantined()) == before + 1
        del self.good[key]

    def member(self, key):
        """Where the member of an artifact really lies."""
        return self.store.place(key) / "sub/value"

    @rule()
    def reopen(self):
        """Another process."""
        self.open()

    @rule()
    def collect(self):
        """Garbage collection without `keep` changes nothing that can be read."""
        self.store.gc(grace=0.0)

    @rule(kept=st.sets(keys))
    def collect_artifacts(self, kept):
        """Garbage collection with `keep`."""
        self.store.gc(kept, grace=0.0)
        self.good = {key: content for key, content in self.good.items() if key in kept}

    @invariant()
    def lists_what_it_has(self):
        """`entries` and `manifest` agree with the model; no unfinished work is left."""
        assert [entry["key"] for entry in self.store.entries()] == sorted(self.good)
        for key in KEYS:
            assert (self.store.manifest(key) is not None) == (key in self.good)
        assert list((self.store.root / "tmp").iterdir()) == []


class BucketMachine(StoreMachine):
    """The same in a bucket."""

    scheme = "local://"

    def member(self, key):
        """In the newest committed attempt."""
        attempt = self.store.manifest(key)["attempt"]
        return self.folder / "store/artifacts" / key[:2] / key / attempt / "sub/value"


@pytest.mark.parametrize("machine", [StoreMachine, BucketMachine])
def test_random_walks(machine):
    run_state_machine_as_test(
        machine, settings=settings(max_examples=25, stateful_step_count=20, deadline=None)
    )
