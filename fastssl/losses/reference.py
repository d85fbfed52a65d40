"""Smoothed InfoNCE written out in full: the logits, the target, the cross-entropy.

``dense_smoothed_infonce`` is the slow, obviously right twin of ``SmoothedInfoNCE``; tests compare the two in float64.
``dense_step`` does what the paper's public code does in a training step, at its cost, and is the peer that the
benchmark runs against.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.losses.smoothed_target import rank_weights


def dense_target(logits: Tensor, smoothing: Tensor | float, weighting: str, neighbors: int | None = None) -> Tensor:
    """Target distribution over ``[positive, negatives]``.

    Args:
        logits: (B, 1 + K), the positive in column 0.
        smoothing: mass a on the negatives, which the weighting shares by rank (largest logit first, ties by index).
        weighting, neighbors: see :func:`fastssl.losses.smoothed_target.rank_weights`.

    Returns:
        (B, 1 + K) of the logits' dtype; each row sums to one.
    """
    negatives = logits.detach()[:, 1:]  # (B, K)
    target = torch.zeros_like(logits, requires_grad=False)
    target[:, 0] = 1 - smoothing
    if weighting == "uniform_all":
        target[:, 1:] = smoothing / negatives.shape[1]
        return target
    weights = torch.tensor(rank_weights(weighting, neighbors), dtype=logits.dtype, device=logits.device)
    order = negatives.sort(dim=1, descending=True, stable=True).indices[:, : len(weights)]  # (B, n)
    return target.scatter(1, order + 1, (smoothing * weights).expand_as(order))


def dense_smoothed_infonce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    smoothing: Tensor | float,
    weighting: str,
    neighbors: int | None = None,
) -> Tensor:
    """Mean loss, differentiable in ``query`` and ``key``: (B, D), (B, D), (K, D) -> scalar of the inputs' dtype."""
    positive = (query * key).sum(1, keepdim=True)  # (B, 1)
    logits = torch.cat([positive, query @ queue.t()], 1) / temperature  # (B, 1 + K)
    target = dense_target(logits, smoothing, weighting, neighbors)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def dense_step(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    smoothing: float,
    weighting: str,
    neighbors: int | None = None,
) -> Tensor:
    """The same mean loss in the way of the public light-moco code: a copy of the queue, dense logits, top-k, a dense
    soft target.

    Ties fall as ``torch.topk`` lets them; everything else equals :func:`dense_smoothed_infonce`.
    """
    positive = torch.einsum("bd,bd->b", query, key).unsqueeze(1)  # (B, 1)
    negative = torch.einsum("bd,kd->bk", query, queue.clone().detach())  # (B, K)
    logits = torch.cat([positive, negative], 1) / temperature
    target = torch.zeros_like(logits)
    target[:, 0] = 1 - smoothing
    if weighting == "uniform_all":
        target[:, 1:] = smoothing / queue.shape[0]
    elif smoothing > 0:
        weights = logits.new_tensor([smoothing * w for w in rank_weights(weighting, neighbors)])
        nearest = logits.detach()[:, 1:].topk(len(weights), 1).indices  # (B, n)
        target.scatter_(1, nearest + 1, weights.expand_as(nearest))
    return -(target * F.log_softmax(logits, 1)).sum(1).mean()
