"""Has the network collapsed? A self-supervised loss can fall while the features become useless: all alike, or along a
few directions only. These statistics of a batch of (N, D) floating-point features show it, without labels.

Each is () float32 on the features' device; only :func:`effective_rank` may wait for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def feature_std(features: Tensor) -> Tensor:
    """Mean standard deviation of each dimension of the L2-normalised features, times sqrt(D).

    1: spread evenly over the sphere; 0: collapsed to one point. As in Chen & He, "Exploring simple Siamese
    representation learning", CVPR 2021, section 4.1, scaled so that it does not depend on the width.
    """
    normalised = functional.normalize(features.detach().float(), dim=1)
    spread: Tensor = normalised.std(dim=0, unbiased=False).mean() * features.shape[1] ** 0.5
    return spread


def effective_rank(features: Tensor) -> Tensor:
    """Number of directions that the features use: exp of the entropy of the singular values' distribution.

    Garrido, Balestriero, Najman, LeCun, "RankMe", ICML 2023, after Roy & Vetterli 2007; here of the *centred*
    features, so that a large common offset (which a fresh network has) does not count as structure. On a GPU the
    singular value decomposition waits for the device: call it between steps, not in one.

    Returns:
        from 1 to min(N - 1, D); 0 when all rows are equal up to rounding; NaN when a feature is not finite.
    """
    features = features.detach().float()
    finite = torch.isfinite(features).all()
    # The decomposition raises on NaN; a monitor has to report a diverged run, not to end it.
    features = torch.nan_to_num(features, posinf=0.0, neginf=0.0)
    singular = torch.linalg.svdvals(features - features.mean(dim=0))
    # What subtracting the mean leaves of equal rows is rounding noise, which looks like a full rank: it does not count.
    noise = torch.finfo(torch.float32).eps * torch.linalg.vector_norm(features) * 4
    singular = torch.where(singular > noise, singular, 0.0)
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float32).tiny)
    rank = torch.where(singular.sum() > 0, torch.special.entr(share).sum().exp(), 0.0)
    return torch.where(finite, rank, torch.nan)


def uniformity(features: Tensor) -> Tensor:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of different rows (at least two), on the unit sphere: 0 if
    collapsed to one point, about -4 if spread evenly in many dimensions, a little lower at best for few rows.

    Wang & Isola, "Understanding contrastive representation learning through alignment and uniformity", ICML 2020. Takes
    N^2 floats of memory.
    """
    normalised = functional.normalize(features.detach().float(), dim=1)
    count = len(normalised)
    exponent = 4 * (normalised @ normalised.T - 1)
    exponent.fill_diagonal_(-torch.inf)
    return torch.logsumexp(exponent.flatten(), dim=0) - math.log(count * (count - 1))
