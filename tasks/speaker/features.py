"""Features: utterances -> MFCC for i-vectors and log-mel filterbanks for the network.

Waveforms stream through a pool of workers; what comes out is written as it comes. The AugmentConfig
asks for corrupted copies of the training utterances beside the clean ones; their speech frames are
those of the clean copy, as in Kaldi's recipes.

Artifact:
    mfcc.arrow    speech frames of MFCC with deltas, float32 (see tasks/data/frames.py)
    fbank.arrow   all frames of the log-mel filterbank, normalised, float16
    index         id, copy, split
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from goldcrest.cluster.api import Artifact, DoesNotChangeResult, Output, task
from goldcrest.tasks.data import audio
from goldcrest.tasks.data.frames import FrameWriter
from goldcrest.tasks.speaker.augment import AugmentConfig, NoiseBank, load_noise_bank
from goldcrest.tasks.speaker.frontend import FrontEnd, FrontEndConfig

_BABBLE_POOL = 40  # utterances of other speakers that babble is mixed from


class FeatureConfig(FrontEndConfig):
    """Both front ends, and the augmented copies."""

    augment: AugmentConfig = Field(AugmentConfig(), description="augmented copies for training")
    workers: Annotated[int, DoesNotChangeResult] = Field(
        2, ge=1, description="processes that extract features"
    )
    batch_rows: int = Field(
        32, ge=1, description="utterances that a worker takes at a time; batches of the files too"
    )


class Extract:
    """Transform of a table of utterances into a table of features; one per worker."""

    def __init__(self, cfg: FeatureConfig, bank: NoiseBank, seed: int) -> None:
        import torch

        torch.set_num_threads(1)  # the pool is the parallelism
        self._cfg, self._bank, self._seed = cfg, bank, seed
        self._front = FrontEnd(cfg)

    def __call__(self, utterances: pa.Table) -> pa.Table:
        """Rows id, split, copy, mfcc (bytes), fbank (bytes): clean copies first, by utterance."""
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
                        self._bank.without(utterance["speaker"] or utterance["id"]),
                        self._seed,
                    )
                rows.append(self._row(utterance, copy, samples, speech))
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
            "mfcc": mfcc.astype("<f4").tobytes(),
            "fbank": fbank.astype("<f2").tobytes(),
        }


_ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("copy", pa.int32()),
        ("mfcc", pa.large_binary()),
        ("fbank", pa.large_binary()),
    ]
)


@task(cpus=0, timeout="12h")
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
    with (
        FrameWriter(out.file("mfcc.arrow"), cfg.mfcc_dimensions, "float32") as mfcc,
        FrameWriter(out.file("fbank.arrow"), cfg.network_dimensions, "float16") as fbank,
    ):
        for batch in out.runtime.stream(
            corpus.shards("utterances"),
            Extract,
            arguments,
            workers=cfg.workers,
            batch_rows=cfg.batch_rows,
        ):
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
    """Seeded training utterances with their speakers, an equal share of every shard."""
    pool: list[tuple[str, np.ndarray]] = []
    shards = corpus.shards("utterances")
    share = -(-_BABBLE_POOL // len(shards))
    for number, shard in enumerate(shards):
        table = pq.read_table(shard, columns=["id", "speaker", "split", "audio"])
        train = np.flatnonzero(np.array(table.column("split").to_pylist()) == "train")
        for row in np.random.default_rng([seed, 5, number]).permutation(train)[:share]:
            facts = table.slice(int(row), 1).to_pylist()[0]
            who = facts["speaker"] or facts["id"]
            pool.append((who, audio.from_pcm16(facts["audio"])))
    return pool[:_BABBLE_POOL]
