"""Processes for the tests of leases and stores; run as a script so that they fork cleanly.

store_workers.py race URI KEY COUNT LOG   COUNT processes want KEY; each computation adds a line
store_workers.py hold URI KEY TTL         take the lease on KEY, say so, keep it until killed
"""

import os
import sys
import time
from pathlib import Path

from goldcrest.cluster.store import Store


def compute(uri, key, log):
    """One worker: take the lease, use what is there, else compute and commit."""
    store = Store.open(uri)
    with store.lease(key, owner=f"worker {os.getpid()}", ttl=20.0) as lease:
        artifact = store.find(key)
        if artifact is None:
            with Path(log).open("a") as stream:
                stream.write(f"{os.getpid()} {lease.fence}\n")
            folder = store.begin(key, lease)
            (folder / "value.txt").write_text("forty-two")
            time.sleep(0.05)
            artifact = store.commit(key, folder, {"step": "race"}, lease)
    return artifact.file("value.txt").read_text() == "forty-two"


def race(uri, key, count, log):
    """Fork `count` workers; the number of those that failed."""
    Store.open(uri)  # imports happen once, before the fork
    children = []
    for _ in range(int(count)):
        child = os.fork()
        if child == 0:
            good = False
            try:
                good = compute(uri, key, log)
            finally:
                os._exit(0 if good else 1)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def hold(uri, key, ttl):
    """Hold a lease for a minute."""
    with Store.open(uri).lease(key, owner="holder", ttl=float(ttl)):
        print("held", flush=True)
        time.sleep(60.0)
    return 0


if __name__ == "__main__":
    sys.exit({"race": race, "hold": hold}[sys.argv[1]](*sys.argv[2:]))
