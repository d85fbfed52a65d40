"""KoLeo: vectors are to keep away from their nearest neighbours, and so fill the sphere evenly.

Sources: Sablayrolles et al., "Spreading vectors for similarity search", arXiv 1806.03198; with DINO: Oquab et al.
(DINOv2), arXiv 2304.07193. Of N unit vectors,

    L = - mean_i log( min_{j != i} | x_i - x_j | + 1e-8 )
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-8


def koleo(own: Tensor, everyone: Tensor, first: int = 0) -> Tensor:
    """(..., n, D) among (..., N, D), unit vectors both -> (...), with gradient to both, in float32 (float64 for
    float64), whatever autocast says. Equal vectors push each other nowhere: their distance has no direction.

    Args:
        first: the place of ``own``'s first row in ``everyone``, where the others follow it.
    """
    with torch.autocast(own.device.type, enabled=False):
        wide = own.dtype if own.dtype == torch.float64 else torch.float32
        rows, others = own.to(wide), everyone.to(wide)
        with torch.no_grad():
            near = rows @ others.mT
            near.diagonal(first, -2, -1).fill_(-2)  # nobody is their own neighbour
            nearest = near.argmax(-1, keepdim=True).expand(*rows.shape)
        distance = torch.linalg.vector_norm(rows - others.gather(-2, nearest), dim=-1)
        loss: Tensor = -(distance + _EPSILON).log().mean(-1)
        return loss
