"""Batches: a document's logits are the same alone and packed; labels, masks and budgets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from goldcrest.kernels.language.padding import token_mask
from goldcrest.tasks.data.tokens import TokenRow
from goldcrest.tasks.language.batches import (
    NO_LOSS,
    causal_batch,
    masked_batch,
    seq2seq_batch,
)
from tests.kernels.language import tiny_models

PAD = 0


def ids(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(4, tiny_models.VOCABULARY, size).astype(np.int32)


def packed_row(*documents: np.ndarray) -> TokenRow:
    starts = np.cumsum([0, *(len(each) for each in documents)])[:-1]
    return TokenRow(np.zeros(0, np.int32), np.concatenate(documents), starts.astype(np.int32))


@pytest.fixture
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [ids(rng, size) for size in (7, 3, 9, 11, 2)]


@pytest.fixture
def packed(documents: list[np.ndarray]) -> list[TokenRow]:
    return [packed_row(*documents[:3]), packed_row(*documents[3:])]


@pytest.mark.parametrize(
    ("name", "attention"),
    [(n, a) for n in ("llama", "gpt2") for a in ("eager", "sdpa")] + [("mpt", "eager")],
)
def test_a_packed_document_has_the_logits_of_the_document_alone(
    name: str, attention: str, documents: list[np.ndarray], packed: list[TokenRow]
) -> None:
    torch.manual_seed(0)
    model: Any = tiny_models.MODELS[name](attn_implementation=attention).eval()
    batch = causal_batch(packed, PAD)
    assert batch["attention_mask"].shape == (2, 1, 19, 19)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        place = [(0, 0), (0, 7), (0, 10), (1, 0), (1, 11)]
        for document, (row, start) in zip(documents, place, strict=True):
            alone = model(input_ids=torch.from_numpy(document[None].astype(np.int64))).logits[0]
            together = logits[row, start : start + len(document)]
            torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt"])
def test_the_loss_of_a_packed_batch_is_the_mean_over_documents_tokens(
    name: str, documents: list[np.ndarray], packed: list[TokenRow]
) -> None:
    torch.manual_seed(0)
    model: Any = tiny_models.MODELS[name]().eval()
    total = 0.0
    with torch.no_grad():
        loss = model(**causal_batch(packed, PAD)).loss
        for document in documents:
            alone = causal_batch([packed_row(document)], PAD)
            assert alone["attention_mask"].ndim == 2
            total += float(model(**alone).loss) * (len(document) - 1)
    assert float(loss) == pytest.approx(total / sum(len(d) - 1 for d in documents), rel=1e-5)


@pytest.mark.parametrize("made_in", [torch.bfloat16, torch.float32])
def test_a_packed_batch_in_bfloat16(made_in: torch.dtype, packed: list[TokenRow]) -> None:
    """A float32 mask that is cast holds -inf: still no query is left without anything to see."""
    model: Any = tiny_models.llama(attn_implementation="sdpa").to(torch.bfloat16)
    batch = causal_batch(packed, PAD, dtype=made_in)
    batch["attention_mask"] = batch["attention_mask"].to(torch.bfloat16)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bert_sees_its_own_document_in_both_directions(
    documents: list[np.ndarray], packed: list[TokenRow]
) -> None:
    torch.manual_seed(0)
    model: Any = tiny_models.bert().eval()
    batch = masked_batch(packed, PAD, 3, np.random.default_rng(0), share=0.0)
    hidden = batch["input_ids"]
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        alone = model(input_ids=hidden[:1, 7:10]).logits[0]
    torch.testing.assert_close(logits[0, 7:10], alone, atol=2e-6, rtol=1e-5)


def test_the_loss_is_on_the_answer_alone() -> None:
    rows = [
        TokenRow(np.array([1, 5, 6], np.int32), np.array([7, 8, 2], np.int32)),
        TokenRow(np.array([1], np.int32), np.array([9, 2], np.int32)),
    ]
    batch = causal_batch(rows, PAD)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 8, 2], [1, 9, 2, 0, 0, 0]]
    no = NO_LOSS
    assert batch["labels"].tolist() == [[no, no, no, 7, 8, 2], [no, 9, 2, no, no, no]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert torch.equal(token_mask(batch), batch["attention_mask"].bool())
    assert all(each.dtype == torch.int64 for each in batch.values())


def test_packed_rows_and_prompts_can_share_a_batch(packed: list[TokenRow]) -> None:
    question = TokenRow(np.array([1, 5], np.int32), np.array([7, 2], np.int32))
    batch = causal_batch([*packed, question], PAD)
    assert batch["position_ids"][0].tolist() == [*range(7), *range(3), *range(9)]
    assert batch["labels"][0].eq(NO_LOSS).nonzero().flatten().tolist() == [0, 7, 10]
    assert batch["labels"][2, :4].tolist() == [NO_LOSS, NO_LOSS, 7, 2]
    assert token_mask(batch).sum(1).tolist() == [19, 13, 4]
    seen = batch["attention_mask"][2, 0] == 0
    assert seen[:4, :4].equal(torch.ones(4, 4, dtype=torch.bool).tril())
    assert (batch["attention_mask"] == 0).any(-1).all(), "a query that sees nothing gives NaN"


def test_rows_of_an_encoder_decoder() -> None:
    rows = [
        TokenRow(np.array([5, 6, 2], np.int32), np.array([7, 2], np.int32)),
        TokenRow(np.array([5, 2], np.int32), np.array([7, 8, 9, 2], np.int32)),
    ]
    batch = seq2seq_batch(rows, PAD, 1)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [5, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 2, NO_LOSS, NO_LOSS], [7, 8, 9, 2]]
    assert batch["decoder_input_ids"].tolist() == [[1, 7, 2, 0], [1, 7, 8, 9]]
    torch.manual_seed(0)
    assert torch.isfinite(tiny_models.t5()(**batch).loss)


def test_masking_hides_the_share_that_it_should() -> None:
    rng = np.random.default_rng(0)
    rows = [packed_row(np.concatenate([[1], ids(rng, 398), [2]])) for _ in range(50)]
    plain = causal_batch(rows, PAD)["input_ids"]
    batch = masked_batch(rows, PAD, 3, np.random.default_rng(1), special=(0, 1, 2, 3))
    chosen = batch["labels"] != NO_LOSS
    count = int(chosen.sum())
    assert count / (50 * 398) == pytest.approx(0.15, abs=0.01)
    assert torch.equal(batch["labels"][chosen], plain[chosen])
    assert torch.equal(batch["input_ids"][~chosen], plain[~chosen])
    assert not chosen[:, 0].any()
    hidden = (batch["input_ids"] == 3)[chosen].float().mean()
    kept = (batch["input_ids"] == plain)[chosen].float().mean()
    assert float(hidden) == pytest.approx(0.8, abs=0.03)
    assert float(kept) == pytest.approx(0.1, abs=0.03)
    again = masked_batch(rows, PAD, 3, np.random.default_rng(1), special=(0, 1, 2, 3))
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_a_short_row_has_something_to_predict() -> None:
    for seed in range(20):
        batch = masked_batch([packed_row(np.array([5, 6]))], PAD, 3, np.random.default_rng(seed))
        assert (batch["labels"] != NO_LOSS).any()
