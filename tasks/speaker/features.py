"""Features: utterances -> MFCC for i-vectors and log-mel filterbanks for the network.

Waveforms stream through a pool of workers; what comes out is written as it comes. The AugmentConfig
asks for corrupted copies of the training utterances beside the clean ones; their speech frames are
those of the clean copy, as in Kaldi's recipes. `speeds` adds speakers to what the network trains
on: a speaker at another speed sounds like, and is taken for, another speaker.

Source of `speeds`: H. Yamamoto et al., "Speaker Augmentation and Bandwidth Extension for Deep
Speaker Embedding", Interspeech 2019, section 3.

Artifact:
    mfcc.arrow     speech frames of MFCC with deltas, float32 (see tasks/data/frames.py)
    fbank.arrow    all frames of the log-mel filterbank, normalised, float16
    speeds.arrow   the same of the training utterances at other speeds; its `copy` counts speeds
                   from 1 (only if there are any)
    index          id, copy, split of the rows of mfcc.arrow and fbank.arrow
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from goldcrest.cluster.api import Artifact, DoesNotChangeResult, Output, task
from goldcrest.tasks.data import audio
from goldcrest.tasks.data.corpus import recording_of
from goldcrest.tasks.data.frames import FrameWriter
from goldcrest.tasks.speaker.augment import AugmentConfig, NoiseBank, load_noise_bank
from goldcrest.tasks.speaker.frontend import FrontEnd, FrontEndConfig

_BABBLE_POOL = 40  # utterances of other speakers that babble is mixed from


class FeatureConfig(FrontEndConfig):
    """Both front ends, and the augmented copies."""

    augment: AugmentConfig = Field(AugmentConfig(), description="augmented copies for training")
    speeds: tuple[Annotated[float, Field(ge=0.5, le=2.0)], ...] = Field(
        (),
        description="speeds at which every training utterance is given to the network once more, "
        "as speech of another speaker; 0.9 and 1.1 are usual",
    )
    workers: Annotated[int, DoesNotChangeResult] = Field(
        2, ge=1, description="processes that extract features"
    )
    batch_rows: int = Field(
        32, ge=1, description="utterances that a worker takes at a time; batches of the files too"
    )

    @field_validator("speeds")
    @classmethod
    def _other_speeds(cls, speeds: tuple[float, ...]) -> tuple[float, ...]:
        """At (almost) one speed the same voice would be two classes."""
        voices = sorted((1.0, *speeds))
        if any(b - a < 0.02 for a, b in itertools.pairwise(voices)):
            raise ValueError(f"speeds must be 0.02 or more apart and away from 1, not {speeds}")
        return speeds


class Extract:
    """Transform of a table of utterances into a table of features; one per worker."""

    def __init__(self, cfg: FeatureConfig, bank: NoiseBank, seed: int) -> None:
        import torch

        torch.set_num_threads(1)  # the pool is the parallelism
        self._cfg, self._bank, self._seed = cfg, bank, seed
        self._front = FrontEnd(cfg)

    def __call__(self, utterances: pa.Table) -> pa.Table:
        """Rows as in `_ROWS`, utterance by utterance: clean copy, augmented ones, other speeds."""
        from goldcrest.tasks.speaker.augment import corrupt

        rows: list[dict[str, Any]] = []
        for utterance in utterances.to_pylist():
            clean = audio.from_pcm16(utterance["audio"])
            speech = self._front.speech(clean)
            copies = self._cfg.augment.copies if utterance["split"] == "train" else 0
            for copy in range(copies + 1):
                samples = clean
                if copy:
                    samples = corrupt(
                        clean,
                        utterance["id"],
                        copy,
                        self._cfg.augment,
                        self._bank.without(recording_of(utterance["id"])),
                        self._seed,
                    )
                rows.append(self._row(utterance, copy, samples, speech))
            if utterance["split"] == "train":
                rows += self._at_other_speeds(utterance, clean)
        return pa.Table.from_pylist(rows, schema=_ROWS)

    def _row(
        self, utterance: dict[str, Any], copy: int, samples: np.ndarray, speech: np.ndarray
    ) -> dict[str, Any]:
        mfcc = self._front.mfcc(samples, speech)
        fbank = self._front.fbank(samples)
        return {
            "id": utterance["id"],
            "split": utterance["split"],
            "copy": copy,
            "speed": 0,
            "mfcc": mfcc.astype("<f4").tobytes(),
            "fbank": fbank.astype("<f2").tobytes(),
        }

    def _at_other_speeds(
        self, utterance: dict[str, Any], samples: np.ndarray
    ) -> list[dict[str, Any]]:
        import torch

        from goldcrest.kernels.frontend.speed import change_speed

        rows = []
        for number, speed in enumerate(self._cfg.speeds, start=1):
            fbank = self._front.fbank(change_speed(torch.from_numpy(samples), speed).numpy())
            row = {"id": utterance["id"], "split": "train", "copy": 0, "speed": number}
            rows.append({**row, "mfcc": b"", "fbank": fbank.astype("<f2").tobytes()})
        return rows


_ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("copy", pa.int32()),
        ("speed", pa.int32()),  # 0: as it was spoken; n: at the config's n-th speed
        ("mfcc", pa.large_binary()),
        ("fbank", pa.large_binary()),
    ]
)


@task(cpus=0, timeout="12h", version=2)
def features(cfg: FeatureConfig, corpus: Artifact, out: Output) -> None:
    """Extract MFCC and filterbanks of every utterance and augmented copy."""
    facts = corpus.table("facts")
    total = facts.num_rows
    bank = NoiseBank([], [], [])
    if cfg.augment.copies:
        bank = load_noise_bank(cfg.augment, _babble_pool(corpus, out.seed))
    if bank.left_out:
        out.metrics(notes={"noises_left_out": f"{bank.left_out} noise files can't be read"})
    arguments = {"cfg": cfg, "bank": bank, "seed": out.seed}
    index: list[pa.Table] = []
    rows = 0
    with contextlib.ExitStack() as files:

        def writer(name: str, dimensions: int, dtype: str) -> FrameWriter:
            return files.enter_context(FrameWriter(out.file(name), dimensions, dtype))

        mfcc = writer("mfcc.arrow", cfg.mfcc_dimensions, "float32")
        fbank = writer("fbank.arrow", cfg.network_dimensions, "float16")
        speeds = writer("speeds.arrow", cfg.network_dimensions, "float16") if cfg.speeds else None
        for found in out.runtime.stream(
            corpus.shards("utterances"),
            Extract,
            arguments,
            workers=cfg.workers,
            batch_rows=cfg.batch_rows,
        ):
            if speeds is not None:
                other = found.filter(pc.field("speed") > 0)
                speeds.write(*(other.column(name).to_pylist() for name in ("id", "speed", "fbank")))
            batch = found.filter(pc.field("speed") == 0)
            ids, copies = batch.column("id").to_pylist(), batch.column("copy").to_pylist()
            mfcc.write(ids, copies, batch.column("mfcc").to_pylist())
            fbank.write(ids, copies, batch.column("fbank").to_pylist())
            index.append(batch.select(["id", "copy", "split"]))
            rows += copies.count(0)
            out.progress(rows / total, f"{rows} of {total} utterances")
        out.metrics(features={"speech_frames": mfcc.frames, "frames": fbank.frames})
    out.table("index", pa.concat_tables(index))
    out.json(
        "frontend",
        FrontEndConfig(**cfg.model_dump(include=set(FrontEndConfig.model_fields))).model_dump(),
    )


def _babble_pool(corpus: Artifact, seed: int) -> list[tuple[str, np.ndarray]]:
    """Seeded training utterances with their recordings, an equal share of every shard.

    Not with their speakers: features must be the same whether the speakers are known or not.
    """
    pool: list[tuple[str, np.ndarray]] = []
    shards = corpus.shards("utterances")
    share = -(-_BABBLE_POOL // len(shards))
    for number, shard in enumerate(shards):
        table = pq.read_table(shard, columns=["id", "split", "audio"])
        train = np.flatnonzero(np.array(table.column("split").to_pylist()) == "train")
        for row in np.random.default_rng([seed, 5, number]).permutation(train)[:share]:
            facts = table.slice(int(row), 1).to_pylist()[0]
            pool.append((recording_of(facts["id"]), audio.from_pcm16(facts["audio"])))
    return pool[:_BABBLE_POOL]
