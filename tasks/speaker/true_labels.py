"""True labels: the corpus's own speakers as labels, for the supervised upper bound."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from goldcrest.cluster.api import Artifact, Config, Output, StepError, task


class TrueLabelsConfig(Config):
    """Nothing to choose."""


@task(cpus=1, seeded=False)
def true_labels(cfg: TrueLabelsConfig, corpus: Artifact, out: Output) -> None:
    """Label every training utterance of a known speaker with that speaker."""
    facts = corpus.table("facts", ["id", "speaker", "split"]).to_pylist()
    known = [row for row in facts if row["split"] == "train" and row["speaker"] is not None]
    if len({row["speaker"] for row in known}) < 2:
        raise StepError(
            "training on true labels needs two labelled speakers or more",
            hint="leave pretrain.labels at false to train on pseudo-labels",
        )
    labels = np.unique([row["speaker"] for row in known], return_inverse=True)[1]
    out.table("labels", {"id": [row["id"] for row in known], "label": pa.array(labels, pa.int32())})
    out.metrics(supervised={"speakers": int(labels.max()) + 1, "utterances": len(known)})
