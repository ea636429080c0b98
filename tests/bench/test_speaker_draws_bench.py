"""i-vectors over many draws of the unseen speakers: how far one draw's error rate may be trusted.

    GOLDCREST_PACKS=DIR1:DIR2:... python -m pytest tests/bench/test_speaker_draws_bench.py -s

A seed of configs/speaker/real.yaml also draws which speakers are unseen. With some 65 of them in
five unlike corpora the draw alone moves the pooled EER by several points, for every system alike.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goldcrest.cluster.config_file import load_config
from goldcrest.kernels.metrics.verification import equal_error_rate
from goldcrest.kernels.speaker.scoring import cosine_scores
from goldcrest.pipelines.speaker import Config
from goldcrest.tasks.speaker.features import features
from goldcrest.tasks.speaker.ivector import ivector
from goldcrest.tasks.speaker.prepare import prepare
from goldcrest.tasks.speaker.trials import drawn_trials
from tests.tasks.conftest import run_task  # noqa: F401

PACKS = [path for path in os.environ.get("GOLDCREST_PACKS", "").split(":") if path]
DRAWS = int(os.environ.get("GOLDCREST_DRAWS", "10"))
CONFIG = Path(__file__).parents[2] / "configs" / "speaker" / "real.yaml"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not PACKS, reason="GOLDCREST_PACKS names no corpora"),
]


class _Notes:
    """The part of an Output that drawing trials needs."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def metrics(self, **_: Any) -> None:
        """Nothing to report: every corpus here has labels."""


def test_ivectors_beat_the_plain_mean_and_deviation_in_every_draw(run_task) -> None:  # noqa: F811
    config = load_config(
        Config, file=CONFIG, fields={"corpus.paths": PACKS}, overrides=["features.speeds=[]"]
    )
    found: dict[str, list[float]] = {"meanstd": [], "ivector": []}
    for seed in range(DRAWS):
        corpus = run_task(prepare, config.corpus, seed=seed)
        frames = run_task(features, config.features, corpus, seed=seed)
        vectors = run_task(ivector, config.ivector, frames, seed=seed)
        limits = {
            "max_targets": config.evaluate.max_targets,
            "max_nontargets": config.evaluate.max_nontargets,
        }
        trials = drawn_trials(corpus, "eval", **limits, out=_Notes(seed))  # type: ignore[arg-type]
        assert trials is not None
        for system, table, column in (
            ("meanstd", "baseline", "meanstd"),
            ("ivector", "vectors", "vector"),
        ):
            place = {name: row for row, name in enumerate(vectors.table(table)["id"].to_pylist())}
            matrix = vectors.matrix(table, column)
            pooled = trials.pool(np.stack([matrix[place[name]] for name in trials.utterances]))
            scores = cosine_scores(pooled, trials.first, trials.second)
            found[system].append(100 * equal_error_rate(scores, trials.target))
        shown = ", ".join(f"{system} {rates[-1]:.1f} %" for system, rates in found.items())
        print(f"draw {seed}: EER {shown}", flush=True)
    for system, rates in found.items():
        listed = ", ".join(f"{rate:.1f}" for rate in rates)
        print(f"{system}: mean {statistics.mean(rates):.1f} %, {listed}")
    assert all(i < m for i, m in zip(found["ivector"], found["meanstd"], strict=True))
