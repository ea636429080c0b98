"""The embedded text corpus: short descriptions of things, written from templates on the spot.

A row is a meaning, `item[kettle], colour[green], ...`, and a sentence that says it, as in the E2E
challenge (Novikova et al., SIGDIAL 2017), small enough for a model of a hundred thousand weights.
A meaning has several right sentences, so the corpus also shows what references are for. The same
seed gives the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

ITEMS = (
    *("kettle", "lantern", "bicycle", "teapot", "ladder", "blanket", "compass", "guitar"),
    *("umbrella", "suitcase", "mirror", "basket", "clock", "candle", "wheelbarrow", "telescope"),
)
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "brown", "silver")
PLACES = (
    *("the old harbour", "the market square", "the railway station", "the village school"),
    *("the lighthouse", "the stone bridge", "the museum garden", "the north gate"),
)
PRICES = ("cheap", "fairly priced", "expensive")
OWNERS = ("the baker", "a young teacher", "the night nurse", "an old captain", "the gardener")
_WORDINGS = (
    "The {colour} {item} near {place} is {price} and belongs to {owner}.",
    "Near {place} there is a {colour} {item}; it belongs to {owner} and is {price}.",
    "{Owner} sells a {price} {colour} {item} near {place}.",
)
_WORDINGS_NO_OWNER = (
    "The {colour} {item} near {place} is {price}.",
    "Near {place} you can find a {price} {colour} {item}.",
    "It is {price}, it is {colour}: the {item} near {place}.",
)
_CHOICES: tuple[tuple[str | None, ...], ...] = (ITEMS, COLOURS, PLACES, PRICES, (None, *OWNERS))
MEANINGS = math.prod(len(each) for each in _CHOICES)
"""How many distinct meanings there are."""


def descriptions(meanings: int, seed: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """`meanings` distinct meanings with three sentences each, in a seeded order.

    Raises ValueError for more than `MEANINGS`.
    """
    if meanings > MEANINGS:
        raise ValueError(f"{meanings} meanings were asked for, there are {MEANINGS}")
    chosen = np.random.default_rng([seed, 4]).permutation(MEANINGS)[:meanings]
    for places in zip(*np.unravel_index(chosen, [len(each) for each in _CHOICES]), strict=True):
        picked = (each[int(place)] for each, place in zip(_CHOICES, places, strict=True))
        named = zip(("item", "colour", "place", "price", "owner"), picked, strict=True)
        values = {name: value for name, value in named if value is not None}
        owner = values.get("owner", "")
        wordings = _WORDINGS if owner else _WORDINGS_NO_OWNER
        values["Owner"] = owner[:1].upper() + owner[1:]
        meaning = ", ".join(f"{name}[{value}]" for name, value in values.items() if name != "Owner")
        yield meaning, tuple(wording.format(**values) for wording in wordings)
