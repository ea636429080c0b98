"""Perplexity against the models' own losses and against sums made token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from goldcrest.kernels.language.losses import decoder_inputs
from goldcrest.kernels.metrics import additive
from goldcrest.kernels.metrics import perplexity as ppl
from tests.kernels.language import tiny_models


def labelled(architecture: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = tiny_models.MODELS[architecture]().eval()
    batch = tiny_models.batch(architecture, rows=3)
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :4] = ppl.IGNORED
    if architecture == "t5":
        batch["decoder_input_ids"] = decoder_inputs(batch["labels"], start=0, pad=0)
    return model, batch


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mpt", "t5"])
def test_sums_are_the_models_own_loss(architecture: str) -> None:
    model, batch = labelled(architecture)
    sums = (ppl.seq2seq_sums if architecture == "t5" else ppl.causal_sums)(model, batch)
    with torch.no_grad():
        loss = float(model(**batch).loss)
    total = ppl.perplexity(sums.nll.numpy(), sums.tokens.numpy())
    assert math.log(total.value) == pytest.approx(loss, rel=1e-5)
    assert (sums.entropy < sums.tokens * math.log(tiny_models.VOCABULARY)).all()


def test_rows_token_by_token() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]], [[1.0, 1.0, 1.0], [0.0, 9.0, 0.0]]])
    labels = torch.tensor([[2, ppl.IGNORED], [0, 1]])
    sums = ppl.row_sums(logits, labels)
    p = torch.softmax(logits.double(), -1)
    nll = [-p[0, 0, 2].log(), -p[1, 0, 0].log() - p[1, 1, 1].log()]
    assert torch.allclose(sums.nll, torch.stack(nll), atol=1e-6)
    entropy = -(p * p.log()).sum(-1)
    assert sums.entropy[0] == pytest.approx(float(entropy[0, 0]), abs=1e-6)
    assert sums.tokens.tolist() == [1, 2]


def test_padding_changes_nothing() -> None:
    model, batch = labelled("llama")
    sums = ppl.causal_sums(model, batch)
    shorter = {key: value[-1:, :6] for key, value in batch.items()}  # the last row has 6 tokens
    alone = ppl.causal_sums(model, shorter)
    assert float(sums.nll[-1]) == pytest.approx(float(alone.nll[0]), rel=1e-5)
    assert int(sums.tokens[-1]) == int(alone.tokens[0]) == 5


def test_a_masked_model_never_sees_the_token_it_predicts() -> None:
    """Other than by hand: one row, one token masked at a time, the model asked once each."""
    model, batch = labelled("bert")
    sums = ppl.masked_sums(model, batch, mask_id=3, copies=4)
    row = 1
    expected = 0.0
    for place in range(batch["input_ids"].shape[1]):
        ids = batch["input_ids"][row : row + 1].clone()
        ids[0, place] = 3
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, place].log_softmax(-1)
        expected -= float(scores[batch["input_ids"][row, place]])
    assert float(sums.nll[row]) == pytest.approx(expected, rel=1e-5)
    changed = {**batch, "labels": batch["labels"]}
    assert int(sums.tokens.sum()) == int((changed["labels"] != ppl.IGNORED).sum())


def test_certainty_and_impossibility_are_finite() -> None:
    sums = ppl.row_sums(torch.tensor([[[0.0, -torch.inf]]]), torch.tensor([[0]]))
    assert float(sums.nll) == 0
    assert float(sums.entropy) == 0
    assert ppl.perplexity(np.array([0.0]), np.array([4])).value == 1
    assert math.isfinite(ppl.perplexity(np.array([1e9]), np.array([1])).value)


def test_bits_per_character() -> None:
    """A model that gives each of 8 letters 1/8 needs 3 bits for each."""
    nll, letters = np.full(5, 20 * math.log(8)), np.full(5, 20)
    assert ppl.bits_per(nll, letters).value == pytest.approx(3)
    low, high = additive.bootstrap_interval(ppl.bits_per(nll, letters), replicates=20)
    assert low == pytest.approx(3)
    assert high == pytest.approx(3)
