"""The losses written out in full, pair by pair and sample by sample: slow twins, obviously right, for the tests."""

from __future__ import annotations

import torch
from torch import Tensor

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


def dense_similarity(
    query: Tensor, key: Tensor, queue: Tensor, student: float, teacher: float
) -> tuple[Tensor, Tensor]:
    """SEED's mean loss, differentiable in ``query``, and the mean entropy of its target: (B, D), (B, D), (K, D) ->
    scalars of the inputs' dtype. ``student``, ``teacher``: their temperatures.
    """
    losses, entropies = [], []
    for s, t in zip(query, key):
        keys = torch.cat([t[None], queue])  # (1 + K, D)
        target = (keys @ t / teacher).softmax(0)
        losses.append(-(target * (keys @ s / student).log_softmax(0)).sum())
        entropies.append(torch.special.entr(target).sum())
    return torch.stack(losses).mean(), torch.stack(entropies).mean()


def pair_mean(pairs: Tensor) -> Tensor:
    """Plain mean over all pairs of a target and another view: (2, V) -> scalar."""
    counted = [pairs[target, view] for target in range(2) for view in range(pairs.shape[1]) if view != target]
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


def dense_koleo(vectors: Tensor) -> Tensor:
    """(N, D) -> scalar: minus the mean logarithm of the distance to the nearest other."""
    losses = []
    for place, one in enumerate(vectors):
        distances = [torch.linalg.vector_norm(one - other) for other in (*vectors[:place], *vectors[place + 1 :])]
        losses.append(-(torch.stack(distances).min() + 1e-8).log())
    return torch.stack(losses).mean()
