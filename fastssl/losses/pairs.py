"""From the losses of pairs of views to one loss: global-global and global-local pairs, each kind with its weight.

Source: SSLight, arXiv 2210.02808. With two global views and L local ones, and gg and gl the means over the pairs of
each kind,

    loss = weight_gg * gg + weight_gl * gl            weight_gg + weight_gl = 1

SSLight takes 0.4 and 0.6; 1 / (1 + L) and L / (1 + L) give the plain mean over all pairs, as DINO, SwAV and MoCo have
it. ``MultiCrop`` checks the weights and knows what they are by default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairWeights:
    """How much each kind of pair counts.

    Attributes:
        local_views: number L of local views of a sample; may be 0.
        gg: weight of the mean over pairs of two global views.
        gl: weight of the mean over pairs of a global and a local view; 0 if there are no local views.
    """

    local_views: int
    gg: float
    gl: float


def reduce_pairs(gg: Tensor, gl: Tensor | None, weights: PairWeights) -> Tensor:
    """Weighted sum of the two kinds' means, scalars; ``gg`` itself where the weight of the local pairs is 0.

    Args:
        gl: ``None`` if there are no local views.
    """
    if gl is None or weights.gl == 0:
        return gg
    return weights.gg * gg + weights.gl * gl


def split_pairs(pairs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Means over the two kinds of pairs in a matrix of pair losses. A view against itself does not count.

    Args:
        pairs: (2, V) floating point: a row for each global view as the target, a column for each view, of which 0 and 1
            are the global ones.

    Returns:
        Mean over the two global-global pairs and over the 2 * (V - 2) global-local pairs, scalars; V = 2: None for it.
    """
    gg = torch.stack([pairs[0, 1], pairs[1, 0]]).mean()
    return gg, pairs[:, 2:].mean() if pairs.shape[1] > 2 else None
