"""Computes one key while a fault strikes at its n-th file operation; run as a script.

    commit_fault_process.py URI FAULT MORE    FAULT is kill, full, bucket-kill or checkpoint-kill

The artifact has two files and MORE further ones, each in a folder of its own. With
checkpoint-kill the third checkpoint of a training is written instead.
For n = 0, 1, 2, ... a forked child works on `URI/n` until one gets through undisturbed. Prints a
line of JSON per child: {"n", "operation", "status"}, where `status` is "killed", "done", or the
name and text of the error.
"""

import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from goldcrest.cluster.errors import StoreError
from goldcrest.cluster.store import Store
from goldcrest.cluster.store_bucket import Bucket

KEY = hashlib.sha256(b"chaos").hexdigest()
CHANGES = {"os.mkdir", "os.rename", "os.link", "os.utime", "os.remove", "os.rmdir", "open"}


def compute(store, more):
    """What a worker does with a key."""
    with store.lease(KEY, owner="victim", ttl=3600.0) as lease:
        if store.find(KEY) is None:
            (store.scratch(KEY) / "checkpoint").write_text("1")
            folder = store.begin(KEY, lease)
            (folder / "deep").mkdir()
            (folder / "a.txt").write_text("alpha")
            (folder / "deep" / "b.txt").write_text("beta")
            for number in range(more):
                (folder / f"{number}").mkdir()
                (folder / f"{number}" / "c.txt").write_text("gamma")
            store.commit(KEY, folder, {"step": "x"}, lease)
        store.drop_scratch(KEY)


def write_checkpoints(scratch, *epochs):
    """What a training of one worker leaves after these epochs; the one weight counts them."""
    import torch

    from goldcrest.cluster import checkpoints

    for epoch in epochs:
        folder = checkpoints.begin(scratch, epoch)
        shard = {"weight:0:w": torch.full((6,), float(epoch))}
        for name, tensors in {"shard-00000": shard, "whole": {}, "extra": {}}.items():
            checkpoints.write_tensors(folder, name, tensors)
        checkpoints.commit(
            scratch,
            checkpoints.Position(
                epoch=epoch, step=epoch, seed=0, examples=1, config={}, shapes={"w": [6]},
                aliases={}, history=[], totals={}, workers=1,
            ),
        )  # fmt: skip


class Strike:
    """Counts operations and strikes at number `n`."""

    def __init__(self, n, fault, pipe):
        self.n, self.fault, self.pipe, self.count = n, fault, pipe, 0

    def __call__(self, operation):
        hit = self.count == self.n or (self.fault == "full" and self.count > self.n)
        self.count += 1
        if not hit:
            return
        if self.count == self.n + 1:
            os.write(self.pipe, operation.encode() + b"\n")
        if self.fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL)


def watch_files(root, strike):
    """Call `strike` before every operation that Python reports for a path below `root`.

    A full disk refuses only what needs space: removing and reading go on.
    """

    def hook(event, arguments):
        if event not in CHANGES or not str(arguments[0]).startswith(root):
            return
        if strike.fault == "full":
            writes = event in ("os.mkdir", "os.link") or (
                event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if not writes:
                return
        strike(f"{event} {arguments[0]}")

    sys.addaudithook(hook)


def watch_bucket(strike):
    """Call `strike` before and after every operation on a bucket."""

    def wrap(name):
        real = getattr(Bucket, name)

        def struck(self, *arguments, **named):
            strike(f"before {name} {arguments[-1] if name == 'upload' else arguments[0]}")
            result = real(self, *arguments, **named)
            strike(f"after {name}")
            return result

        setattr(Bucket, name, struck)

    for name in ("put", "_write", "upload", "get", "times", "delete"):
        wrap(name)


def victim(uri, fault, more, n, pipe):
    """The child."""
    strike = Strike(n, fault, pipe)
    if fault == "checkpoint-kill":
        work = functools.partial(write_checkpoints, Path(uri), 3)
        watch_files(uri, strike)
    else:
        store = Store.open(uri)
        work = functools.partial(compute, store, more)
        watch_bucket(strike) if fault == "bucket-kill" else watch_files(str(store.root), strike)
    try:
        work()
        status = "done"
    except StoreError as error:
        status = f"StoreError: {error}"
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    os.write(pipe, b"=" + status.encode() + b"\n")


def main(uri, fault, more):
    """Strike everywhere."""
    # Imports and caches happen before the first count.
    if fault == "checkpoint-kill":
        write_checkpoints(Path(uri) / "warm", 1, 2)
    else:
        compute(Store.open(f"{uri}/warm"), int(more))
    for n in range(2000):
        if fault == "checkpoint-kill":
            shutil.copytree(f"{uri}/warm", f"{uri}/{n}")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                victim(f"{uri}/{n}", fault, int(more), n, writer)
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            lines = stream.read().splitlines()
        status = os.waitpid(child, 0)[1]
        said = [line[1:] for line in lines if line.startswith("=")]
        operation = next((line for line in lines if not line.startswith("=")), None)
        result = said[0] if said else "killed" if status == signal.SIGKILL else f"exit {status}"
        print(json.dumps({"n": n, "operation": operation, "status": result}), flush=True)
        if operation is None:
            return
    raise SystemExit("no end of operations")


if __name__ == "__main__":
    main(*sys.argv[1:])
