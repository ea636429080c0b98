"""Linear discriminant analysis of labelled i-vectors, the step before PLDA.

Source: Fisher (1936) as in Kaldi `ivectorbin/ivector-compute-lda.cc`: whiten the within-class
covariance, keep the directions of largest between-class covariance.

    S_w = within-class covariance   S_b = between-class covariance
    A = argmax tr((A^T S_w A)^{-1} A^T S_b A),   A^T S_w A = I

    N vectors   R dimensions   K kept dimensions
"""

from __future__ import annotations

import torch
from torch import Tensor

from goldcrest.kernels.ivector.length_norm import Whitening

__all__ = ["class_covariances", "fit_lda"]


def class_covariances(vectors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Within- and between-class covariances over N vectors, (R, R) each; they sum to the total.

    Raises:
        ValueError: shapes that do not match, or fewer than two classes.
    """
    if vectors.ndim != 2 or labels.shape != vectors.shape[:1]:
        raise ValueError(
            f"vectors {tuple(vectors.shape)} and labels {tuple(labels.shape)} do not match"
        )
    x = vectors.double()
    _, index = labels.unique(return_inverse=True)
    classes = int(index.max()) + 1 if index.numel() else 0
    if classes < 2:
        raise ValueError(f"at least two speakers are needed, got {classes}")
    counts = torch.bincount(index, minlength=classes).double()
    means = x.new_zeros((classes, x.shape[1])).index_add_(0, index, x) / counts[:, None]
    inner = x - means[index]
    outer = means - x.mean(0)
    within = inner.T @ inner / x.shape[0]
    between = (outer * counts[:, None]).T @ outer / x.shape[0]
    return within, between


def fit_lda(vectors: Tensor, labels: Tensor, dimensions: int, *, ridge: float = 1e-4) -> Whitening:
    """LDA as a centring and a projection, applied by `length_norm.whiten`.

    Args:
        vectors: (N, R) float.
        labels: (N,) int, the speakers.
        dimensions: K; 200 in the recipe. At most the number of speakers minus one is informative.
        ridge: added to the within-class covariance, as a share of its mean eigenvalue.

    Returns:
        A `Whitening` with transform (R, K): within-class covariance becomes the identity.

    Raises:
        ValueError: K outside 1..R, or bad labels.
    """
    if not 1 <= dimensions <= vectors.shape[1]:
        raise ValueError(f"dimensions must lie in 1..{vectors.shape[1]}, not {dimensions}")
    within, between = class_covariances(vectors, labels)
    size = within.shape[0]
    within = within + torch.eye(size).to(within) * (ridge * within.trace() / size)
    factor = torch.linalg.cholesky(within)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(size).to(within), upper=False)
    _, basis = torch.linalg.eigh(inverse @ between @ inverse.T)
    transform = inverse.T @ basis.flip(1)[:, :dimensions]
    return Whitening(mean=vectors.double().mean(0), transform=transform)
