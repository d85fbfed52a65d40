"""Smoothed InfoNCE as the paper's public code computes it, at its cost: the peer that the benchmarks run against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.losses.smoothed_target import rank_weights


def dense_step(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    smoothing: float,
    weighting: str,
    neighbors: int | None = None,
) -> Tensor:
    """The loss of ``SmoothedInfoNCE`` in the way of the public light-moco code: a copy of the queue, dense logits,
    top-k, a dense soft target. Ties fall as ``torch.topk`` lets them.
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
