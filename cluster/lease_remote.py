"""Leases in a bucket, which has no exclusive creation: Lamport's bakery.

Source: L. Lamport, "A new solution of Dijkstra's concurrent programming problem", CACM 17(8), 1974.

Every contender owns one object `leases/<key>/<nonce>.json`, which only it writes. It

1. announces that it is choosing (number 0),
2. takes the number 1 + the largest it sees, and writes that,
3. waits until no living other is choosing or has a smaller (number, nonce).

Two can't pass: of two contenders, the one that chose later either saw the other's number and took a
larger one, or was announced as choosing before the other looked, which then waited for its number.
The number is the fence. Beyond the paper, contenders may die: one whose process is dead, or whose
object has not changed for its time to live while we watched, gets a tombstone `<nonce>.fenced`.
The tombstone has a name of its own, so that a late heartbeat can't overwrite it, and it stays: a
fenced holder that wakes up finds it and knows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from goldcrest.cluster.lease import HEARTBEATS_PER_TTL, Lease, Record, Silence, Waiting, polls
from goldcrest.cluster.store_bucket import Bucket


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What one contender's object says."""

    nonce: str
    number: int  # 0 while it is choosing
    record: Record
    text: bytes  # as read: changes with every heartbeat


class BucketLeases:
    """The leases of one bucket."""

    def __init__(self, bucket: Bucket, largest_fence: Callable[[str], int]) -> None:
        """`largest_fence(key)` is the largest fence that any work on `key` in the store carries."""
        self._bucket = bucket
        self._largest_fence = largest_fence
        self._mine: dict[str, tuple[Record, int]] = {}  # nonce -> record, heartbeats so far

    def acquire(
        self, key: str, *, owner: str, ttl: float, wait: Callable[[str], None] | None = None
    ) -> Lease:
        """Block until the lease is ours. See `LeaseBook`."""
        while True:
            lease = self._contend(key, owner, ttl, wait)
            if lease is not None:
                return lease

    def _contend(
        self, key: str, owner: str, ttl: float, wait: Callable[[str], None] | None
    ) -> Lease | None:
        """One passage through the bakery; None if we were so slow that others fenced us off."""
        record = Record.new(owner, ttl)
        lease = Lease(key=key, owner=owner, fence=0, nonce=record.nonce, ttl=ttl)
        self._mine[record.nonce] = (record, 0)
        passed = False
        try:
            self._write(lease)  # step 1
            seen = [claim.number for claim in self._claims(key)]
            lease.fence = 1 + max([*seen, self._largest_fence(key)])
            self._write(lease)  # step 2
            passed = self._wait_for_turn(lease, wait)
        finally:
            if not passed:
                self._forget(lease)
        return lease if passed else None

    def _wait_for_turn(self, lease: Lease, wait: Callable[[str], None] | None) -> bool:
        """Step 3, with a heartbeat of our own so that nobody takes us for dead in the queue."""
        silence, waiting, pauses = Silence(), Waiting(wait), polls()
        known: dict[str, Claim] = {}
        beat_at = time.monotonic()
        while True:
            ahead = [claim for claim in self._claims(lease.key, known) if _before(claim, lease)]
            if not ahead:
                return self.holds(lease)
            first = known.pop(ahead[0].nonce)  # read afresh at the next look, the others are not
            if self._fence_off(lease.key, first, silence):
                continue
            waiting.tell(first.record.owner, first.record.process)
            if time.monotonic() - beat_at > lease.ttl / HEARTBEATS_PER_TTL:
                if not self.renew(lease):
                    return False
                beat_at = time.monotonic()
            time.sleep(next(pauses))

    def _fence_off(self, key: str, claim: Claim, silence: Silence) -> bool:
        """Put a tombstone on a claim whose owner is gone; whether that was so."""
        silent = silence.seconds(claim.nonce, claim.text)
        if not claim.record.dead and silent < claim.record.ttl:
            return False
        self._bucket.put(f"leases/{key}/{claim.nonce}.fenced", claim.text)
        return True

    def _claims(self, key: str, known: dict[str, Claim] | None = None) -> list[Claim]:
        """The claims on a key that have no tombstone, smallest number first.

        A number once chosen never changes, so claims in `known` that have one are not read again.
        """
        known = {} if known is None else known
        names = self._bucket.names(f"leases/{key}")
        fenced = {name.removesuffix(".fenced") for name in names if name.endswith(".fenced")}
        standing = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        claims = []
        for nonce in standing:
            if nonce in fenced:
                continue
            if nonce not in known or known[nonce].number == 0:
                text = self._bucket.get(f"leases/{key}/{nonce}.json")
                if text is None:
                    continue
                known[nonce] = Claim(
                    nonce=nonce, number=_number(text), record=Record.parse(text), text=text
                )
            claims.append(known[nonce])
        return sorted(claims, key=lambda claim: (claim.number, claim.nonce))

    def held(self, key: str) -> bool:
        """Whether a claim stands whose owner is not known to be dead."""
        return any(not claim.record.dead for claim in self._claims(key))

    def stands(self, key: str, nonce: str) -> bool:
        """Whether the claim `nonce` has no tombstone and its owner is not known to be dead."""
        return any(c.nonce == nonce and not c.record.dead for c in self._claims(key))

    def renew(self, lease: Lease) -> bool:
        """Rewrite our claim, unless it has a tombstone. See `LeaseBook`."""
        if not self.holds(lease):
            return False
        self._write(lease)
        return True

    def holds(self, lease: Lease) -> bool:
        """Whether our claim is there without a tombstone. See `LeaseBook`."""
        names = self._bucket.names(f"leases/{lease.key}")
        return f"{lease.nonce}.json" in names and f"{lease.nonce}.fenced" not in names

    def release(self, lease: Lease) -> None:
        """Remove our claim. See `LeaseBook`."""
        self._forget(lease)

    def _write(self, lease: Lease) -> None:
        record, beats = self._mine[lease.nonce]
        self._mine[lease.nonce] = (record, beats + 1)
        text = record.json(number=lease.fence, beats=beats)
        self._bucket.put(f"leases/{lease.key}/{lease.nonce}.json", text)

    def _forget(self, lease: Lease) -> None:
        self._mine.pop(lease.nonce, None)
        self._bucket.delete(f"leases/{lease.key}/{lease.nonce}.json")


def _before(claim: Claim, lease: Lease) -> bool:
    """Whether a claim goes first: it is choosing, or its (number, nonce) is smaller."""
    mine = (lease.fence, lease.nonce)
    return claim.nonce != lease.nonce and (claim.number == 0 or (claim.number, claim.nonce) < mine)


def _number(text: bytes) -> int:
    """The number in a claim; an unreadable one is still choosing."""
    try:
        return max(0, int(json.loads(text)["number"]))
    except (ValueError, KeyError, TypeError):
        return 0
