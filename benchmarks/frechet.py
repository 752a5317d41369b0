"""The Fréchet distance between two sets of features, and how far chance moves it.

Both sets are taken for Gaussian (Dowson & Landau 1982; with Inception's features it is the FID of Heusel et al. 2017):

    d² = |m1 - m2|² + tr(C1) + tr(C2) - 2 tr (C1^(1/2) C2 C1^(1/2))^(1/2)

Everything is float64. The root under the trace is that of a symmetric matrix, so it is found from eigenvalues; a
singular covariance (a pixel that never has ink) needs no special care.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of a set of features, float64; the covariance is the unbiased one."""

    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features (n, d), n >= 2.

        Raises:
            ValueError: for another shape, or a value that is not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features must be (n, d) with n >= 2; got {tuple(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError("features must be finite; some are NaN or infinite")
        x = features.double()
        return cls(x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]))

    @cached_property
    def root(self) -> Tensor:
        """The symmetric root of the covariance."""
        values, vectors = torch.linalg.eigh(self.cov)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T


def frechet(known: Moments, other: Moments) -> float:
    """d² between two sets; symmetric. ``known`` keeps its root, so it should be the one that is used again."""
    inner = known.root @ other.cov @ known.root
    crossed = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    apart = (known.mean - other.mean).square().sum()
    return float(apart + known.cov.trace() + other.cov.trace() - 2 * crossed)


def with_error(known: Moments, features: Tensor, blocks: int = 20) -> tuple[float, float]:
    """d² of features (n, d) from ``known``, and its standard error by the jackknife.

    The features are left out block by block (n / ``blocks`` at a time): sqrt((b - 1)/b Σ (d_i - mean d)²), which is
    what another draw of the n features would move d² by. ``known`` is held fixed, as a set of real pictures is.
    """
    whole = Moments.of(features)
    centred = features.double() - whole.mean
    parts = centred.tensor_split(blocks)
    sums = [(len(part), part.sum(0), part.T @ part) for part in parts]
    count, first, second = len(centred), sum(s[1] for s in sums), sum(s[2] for s in sums)
    left = []
    for n, ones, squares in sums:
        rest = count - n
        mean = (first - ones) / rest
        cov = (second - squares - rest * torch.outer(mean, mean)) / (rest - 1)
        left.append(frechet(known, Moments(whole.mean + mean, cov)))
    spread = torch.tensor(left, dtype=torch.float64).var(correction=0)
    return frechet(known, whole), float((spread * (len(parts) - 1)).sqrt())
