"""A toy pipeline of four quick steps: what the tests of the command line run."""

from __future__ import annotations

import os
import struct
import zlib
from typing import Annotated

from pydantic import Field

from goldcrest.cluster.api import Artifact, Config, InputError, InputFiles, Output, task


class CorpusConfig(Config):
    """Which files to read."""

    paths: Annotated[tuple[str, ...], InputFiles] = Field((), description="folders to train on")
    eval_paths: Annotated[tuple[str, ...], InputFiles] = Field((), description="only to evaluate")
    seeds: int = Field(3, ge=1, le=100, description="how many seeds to sow")


class GrowConfig(Config):
    """How the plants grow."""

    epochs: int = Field(3, ge=1, description="days")
    water: float = Field(0.5, gt=0, description="litres per day")
    fail: str = Field("", description="how to fail: '', 'input', 'crash'")
    hub_token: str = Field("", description="a secret that no step needs")


class WeighConfig(Config):
    """How the harvest is weighed."""

    unit: str = Field("g", description="unit of mass")


class Config(Config):  # type: ignore[no-redef]
    """The whole garden."""

    corpus: CorpusConfig = CorpusConfig()
    grow: GrowConfig = GrowConfig()
    weigh: WeighConfig = WeighConfig()
    seed: int = Field(0, ge=0, description="seed of everything random")


@task(cpus=1)
def sow(cfg: CorpusConfig, out: Output) -> None:
    """Make a list of seeds."""
    out.json("seeds", list(range(cfg.seeds)))
    out.metrics(quarantined=1)


@task(cpus=1)
def grow(cfg: GrowConfig, seeds: Artifact, out: Output) -> None:
    """Grow for some epochs; the result is a bundle."""
    if cfg.fail == "input":
        raise InputError("the soil is too <b>dry</b>", hint="water it")
    if cfg.fail == "crash":
        os._exit(7)
    height = 0.0
    for epoch in range(cfg.epochs):
        height += cfg.water * len(seeds.json("seeds"))
        out.log(epoch=epoch, height=height, loss=1.0 / (1.0 + height))
        out.progress((epoch + 1) / cfg.epochs, f"day {epoch + 1}")
    out.json("bundle", {"name": "dense", "height": height})
    out.metrics(models={"dense": {"bytes": 10, "parameters": 3}})
    out.measure(models={"dense": {"rtf": 0.25}})


@task(cpus=1)
def prune(cfg: WeighConfig, plants: Artifact, out: Output) -> None:
    """A second branch."""
    out.json("weight", {"unit": cfg.unit, "height": plants.json("bundle")["height"]})


@task(cpus=1)
def weigh(cfg: WeighConfig, plants: Artifact, pruned: Artifact, out: Output) -> None:
    """Measure the harvest; draws a figure."""
    height = plants.json("bundle")["height"]
    out.file("figures/harvest.png").write_bytes(tiny_png())
    out.metrics(
        verification={
            "dense": {"eer": 0.1, "min_dcf_0.01": 0.5, "trials": 1234, "eer_ci": [0.05, 0.15]},
            "ivector": {"eer": 0.2, "min_dcf_0.01": 0.75, "trials": 1234, "eer_ci": [0.1, 0.3]},
        },
        harvest=height,
    )


def tiny_png() -> bytes:
    """A valid PNG of 2 x 2 grey pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\x40\x80\0\x80\x40")
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def build(cfg: Config):
    """sow -> grow -> prune, weigh."""
    seeds = sow.bind(cfg.corpus, seed=cfg.seed)
    plants = grow.bind(cfg.grow, seeds, seed=cfg.seed)
    pruned = prune.bind(cfg.weigh, plants, seed=cfg.seed)
    return weigh.bind(cfg.weigh, plants, pruned, seed=cfg.seed)
