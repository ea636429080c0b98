"""CE: the plain softmax classifier, without normalisation, scale or margin.

The baseline of the margin losses: logit_j = x . W_j + b_j, loss = softmax cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from goldcrest.kernels.margin._cosine import class_weights


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of plain cross-entropy."""

    label_smoothing: float = 0.0  # share of the target's probability spread over all classes

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}")


class Head(nn.Module):
    """A linear classifier with bias."""

    def __init__(self, embedding_dim: int, classes: int, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.weight = class_weights(classes, embedding_dim)
        self.bias = nn.Parameter(self.weight.new_zeros(classes))

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Embeddings (B, E) and labels (B,) int64 -> mean loss; no labels -> `logits`."""
        if labels is None:
            return self.logits(embeddings)
        smoothing = self.settings.label_smoothing
        return F.cross_entropy(self.logits(embeddings), labels, label_smoothing=smoothing)

    def logits(self, embeddings: Tensor) -> Tensor:
        """x . W_j + b_j: (B, E) -> (B, N) float32."""
        return F.linear(embeddings.float(), self.weight.float(), self.bias.float())
