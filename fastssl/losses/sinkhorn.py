"""SwAV's assignment of samples to prototypes: a few steps of Sinkhorn-Knopp towards equal use of all prototypes.

Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882.
With scores S of N samples (of all ranks) and K prototypes, the textbook form is

    Q = exp(S / epsilon), divided by its total
    a few times:  each prototype's share of Q is divided by its sum over all samples, and by K;
                  each sample's share is divided by its sum over all prototypes, and by N
    Q * N: each sample's share sums to one

What is computed here is the same with fewer steps:

* Every constant cancels (each is common to all of Q until the next division by sums removes it). What is left are the
  two divisions by sums, and only the prototypes' sums go over all samples.
* The exponentials need a shift lest they overflow. A shift c_k of prototype k's scores, the same for all samples of all
  ranks, multiplies that prototype's share by exp(-c_k / epsilon), and the first division by its sum removes it. A shift
  of one sample's scores, or of one rank's samples, would not do: it weighs them in the first sums of the prototypes,
  and a finite number of rounds remembers it.
* So c_k is the mean over ranks of the rank's largest score of prototype k, which takes nothing but a sum over ranks.
  On one rank it is the maximum: no exponential exceeds 1, and that of the nearest sample is 1. On several, one rank's
  maximum is at least their mean, so no prototype's sum is below 1, and an exponential overflows only if the ranks'
  maxima of a prototype lie 88 epsilon apart: 4.4 where cosines have 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    epsilon: Tensor | float = 0.05,
    iterations: int = 3,
    all_reduce: Callable[[Tensor], Tensor] = lambda share: share,
    ranks: int = 1,
) -> Tensor:
    """Soft assignment of this rank's samples, as if computed over the samples of all ranks; without gradient and
    without a host sync.

    The scores of a sample may differ by about 80 epsilon (4 by default; cosines differ by 2). Of samples that are
    further than that from every prototype the exponentials vanish and the assignment is NaN.

    Args:
        scores: (B, K) floating point: this rank's samples against the prototypes, cosines as a rule.
        epsilon: entropy of the assignment, positive: the smaller, the harder.
        iterations: rounds, at least one.
        all_reduce: sums a (K,) tensor over the ranks and returns the sum (in place or not); called ``iterations + 1``
            times.
        ranks: number of ranks over which it sums.

    Returns:
        (B, K) float32 (float64 for float64 scores), whatever autocast says. Each row, a sample, sums to one; over the
        samples of all ranks each prototype gets nearly the same mass.
    """

    with torch.autocast(scores.device.type, enabled=False):
        own = scores if scores.dtype == torch.float64 else scores.float()
        shift = all_reduce(own.amax(0)) / ranks  # (K,)
        mass = (own - shift).div_(epsilon).exp_()  # (B, K)
        for _ in range(iterations):
            mass.div_(all_reduce(mass.sum(0)))  # prototypes
            mass.div_(mass.sum(1, keepdim=True))  # samples
    return mass
