"""Feature vectors -> numbers. Pure functions in float64."""

import torch
from torch import Tensor


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Of features (N, D), N >= 2: mean (D,) and unbiased covariance (D, D), float64."""
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64. The trace of the root is taken of the
    symmetric C1^(1/2) C2 C1^(1/2), which has the same eigenvalues: those are real and at least 0,
    so that singular covariances (fewer images than features) need no special care.
    """
    values, vectors = torch.linalg.eigh(cov1)
    root1 = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root1 @ cov2 @ root1)
    trace_root = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_root
    return distance.item()


def fid(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of two sets of feature vectors, (N, D) and (M, D); N, M >= 2."""
    return frechet_distance(*mean_and_covariance(features), *mean_and_covariance(reference))
