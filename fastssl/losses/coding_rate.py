"""The coding rate of unit vectors: how many directions they fill, in nats.

Sources: Yu et al. (MCR2), arXiv 2006.08558; Tong et al. (EMP-SSL), arXiv 2304.03977. Of N vectors of width D, the rows
of Z,

    R = 1/2 logdet( 1 + D / (N epsilon) Z^T Z )

The determinant of the smaller of Z^T Z and Z Z^T is taken, which is the same one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def coding_rate(vectors: Tensor, epsilon: float) -> Tensor:
    """(..., N, D) -> (...), with gradient, in float32 (float64 for float64), whatever autocast says; no host sync."""
    with torch.autocast(vectors.device.type, enabled=False):
        rows = vectors if vectors.dtype == torch.float64 else vectors.float()
        count, width = rows.shape[-2:]
        products = rows @ rows.mT if count < width else rows.mT @ rows
        one = torch.eye(products.shape[-1], dtype=rows.dtype, device=rows.device)
        factor, _ = torch.linalg.cholesky_ex(one + width / (count * epsilon) * products)
        rate: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return rate


def largest_coding_rate(count: int, width: int, epsilon: float) -> float:
    """That of unit vectors which fill all directions evenly."""
    filled = min(count, width)
    return filled / 2 * math.log1p(width / (filled * epsilon))
