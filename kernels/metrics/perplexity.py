"""Perplexity and bits per character: how probable a model finds a text.

    perplexity      = exp( sum_i NLL_i / sum_i tokens_i )          NLL in nats, loss tokens only
    bits per char   = sum_i NLL_i / (ln 2 * sum_i characters_i)    likewise per UTF-8 byte

Perplexities of models with different tokenizers can't be compared; bits per character can, as the
text is the same for all. NLL counts every token with a label, the end-of-text token too; characters
are those of the text.

For a masked model there is no probability of a text; the pseudo-log-likelihood takes its place:
every token is predicted from all the others (J. Salazar et al., "Masked Language Model Scoring",
ACL 2020, equation 1), one forward pass per token.

B rows   T tokens   V vocabulary   N examples
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goldcrest.kernels.metrics.additive import Additive, FloatArray, ratio

IGNORED = -100
"""Label of a token that carries no loss, as the transformers library has it."""


class RowSums(NamedTuple):
    """What the tokens of B rows add up to."""

    nll: Tensor  # (B,) float64, negative log-likelihoods in nats
    entropy: Tensor  # (B,) float64, entropies of the predictions in nats
    tokens: Tensor  # (B,) int64, tokens with a loss


def row_sums(logits: Tensor, labels: Tensor) -> RowSums:
    """Losses and entropies by row.

    The entropy of what a model predicts tells how sure of itself it is; fine-tuning a sparse model
    on labels alone drives it towards 0 (E. Kurtic et al., arXiv 2310.06927, figure 6.3).

    Args:
        logits: (B, T, V), position t's prediction of labels[:, t].
        labels: (B, T) int64, `IGNORED` where there is no loss.
    """
    nll, entropy = [], []
    for row, label in zip(logits, labels, strict=True):
        keep = label != IGNORED  # a row at a time: log probabilities of a batch may be large
        losses, entropies = _token_terms(row[keep], label[keep])
        nll.append(losses.sum())
        entropy.append(entropies.sum())
    return RowSums(torch.stack(nll), torch.stack(entropy), (labels != IGNORED).sum(dim=1))


def _token_terms(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods and entropies (n,) float64 of logits (n, V) and labels (n,)."""
    scores = F.log_softmax(logits.float(), dim=-1)
    losses = -scores.gather(1, labels[:, None])[:, 0]
    # A token of probability 0 has log probability -inf and adds nothing to the entropy.
    entropies = -(scores.exp() * scores.clamp_min(-1e4)).sum(dim=-1)
    return losses.double(), entropies.double()


@torch.no_grad()
def causal_sums(model: nn.Module, batch: Mapping[str, Tensor]) -> RowSums:
    """`row_sums` of a causal model: labels stand at their own tokens, predicted one before."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return row_sums(logits[:, :-1], batch["labels"][:, 1:])


@torch.no_grad()
def seq2seq_sums(model: nn.Module, batch: Mapping[str, Tensor]) -> RowSums:
    """`row_sums` of an encoder-decoder model; the batch holds its `decoder_input_ids`."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return row_sums(model(**inputs, use_cache=False).logits, batch["labels"])


@torch.no_grad()
def masked_sums(
    model: nn.Module, batch: Mapping[str, Tensor], mask_id: int, *, copies: int = 32
) -> RowSums:
    """Pseudo-log-likelihoods (and entropies) by row of a masked model.

    Args:
        model: a masked language model in eval mode.
        batch: input_ids and labels (B, T), attention_mask and whatever else the model takes, by
            row; tokens with a label are scored.
        mask_id: the mask token's id.
        copies: rows per forward pass, each with another token masked.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    others = {key: value for key, value in batch.items() if key not in ("input_ids", "labels")}
    rows, places = torch.nonzero(labels != IGNORED, as_tuple=True)
    nll, entropy = torch.zeros(2, len(ids), dtype=torch.float64, device=ids.device)
    for row, place in zip(rows.split(copies), places.split(copies), strict=True):
        hidden = ids[row]
        here = torch.arange(len(row), device=ids.device)
        hidden[here, place] = mask_id
        given = {key: value[row] for key, value in others.items()}
        logits = model(input_ids=hidden, **given).logits
        losses, entropies = _token_terms(logits[here, place], labels[row, place])
        nll.index_add_(0, row, losses)
        entropy.index_add_(0, row, entropies)
    return RowSums(nll, entropy, (labels != IGNORED).sum(dim=1))


def perplexity(nll: FloatArray, tokens: FloatArray) -> Additive:
    """Perplexity from the NLL in nats and the tokens of N examples, (N,) each.

    It is at most exp(700): a model that finds a text impossible still has a finite perplexity.
    """

    def score(sums: FloatArray) -> float:
        return math.exp(min(sums[0] / sums[1], 700.0)) if sums[1] else 1.0

    return Additive(np.stack([nll, tokens], axis=1).astype(np.float64), score)


def bits_per(nll: FloatArray, units: FloatArray) -> Additive:
    """Bits per unit of text, from the NLL in nats and the units (characters or bytes), (N,)."""
    return ratio(nll, units, 1 / math.log(2))
