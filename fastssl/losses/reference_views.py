"""The losses over several views written out pair by pair and sample by sample: slow twins, obviously right, that tests
compare with.

The twin of the loss against a queue is in ``fastssl.losses.reference``, whose target is used here, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.losses.reference import dense_target


def pair_mean(pairs: Tensor, targets: Sequence[int]) -> Tensor:
    """Plain mean over all pairs: (T, V) -> scalar. Row t belongs to global view ``targets[t]``; a view against itself
    does not count.
    """
    counted = []
    for t in range(pairs.shape[0]):
        for v in range(pairs.shape[1]):
            if v != targets[t]:
                counted.append(pairs[t, v])
    return sum(counted) / len(counted)


def dense_soft_cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """(T, B, K) and (V, B, K) -> (T, V) of the inputs' dtype, differentiable in both."""
    rows = []
    for target in targets:
        entries = []
        for view in logits:
            samples = [-(target[b] * (view[b] / temperature).log_softmax(0)).sum() for b in range(len(view))]
            entries.append(sum(samples) / len(samples))
        rows.append(torch.stack(entries))
    return torch.stack(rows)


def dense_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """SwAV's assignment of the samples of all ranks in the order of the paper's pseudo-code: (N, K) -> (N, K)."""
    q = (scores / epsilon).exp().t()  # (K, N): prototypes down, samples across
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] = q[k] / q[k].sum() / prototypes
        for n in range(samples):
            q[:, n] = q[:, n] / q[:, n].sum() / samples
    return (q * samples).t()


def dense_nt_xent(
    anchors: Tensor,
    candidates: Tensor,
    temperature: float,
    smoothing: float,
    weighting: str,
    neighbors: int | None = None,
    first: int = 0,
) -> Tensor:
    """(V, B, D) and (2, M, D) -> (2, V): mean loss of the anchors of view v, positive in global view g, negatives of
    all other samples.
    """
    views, batch, _ = anchors.shape
    rows = []
    for g in range(2):
        entries = []
        for v in range(views):
            losses = []
            for b in range(batch):
                own = first + b
                others = [candidates[view, m] for view in range(2) for m in range(candidates.shape[1]) if m != own]
                logits = (
                    torch.stack([(anchors[v, b] * other).sum() for other in [candidates[g, own], *others]])[None]
                    / temperature
                )
                target = dense_target(logits, smoothing, weighting, neighbors)
                losses.append(-(target * logits.log_softmax(1)).sum())
            entries.append(sum(losses) / batch)
        rows.append(torch.stack(entries))
    return torch.stack(rows)
