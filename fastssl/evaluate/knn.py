"""Weighted k-nearest-neighbour classification of frozen features: no training, one number, quick enough to run online.

Formula: Wu, Xiong, Yu, Lin, "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018,
section 3.4: each of the k most similar bank samples votes for its class with exp(cosine / temperature).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastssl.evaluate.features import Features, ProbeError, check_probe_input, wilson_interval

#: Similarities held at a time: 16 MiB of float32 stay in a CPU's last-level cache.
_TILE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class KnnResult:
    """Attributes: accuracy in percent; confidence: its 95 % interval; k, temperature as used; sizes of both parts."""

    accuracy: float
    confidence: tuple[float, float]
    k: int
    temperature: float
    train_samples: int
    val_samples: int
    classes: int


def knn_accuracy(
    train: Features, val: Features, *, k: int = 20, temperature: float = 0.07, device: str | torch.device = "cpu"
) -> KnnResult:
    """Top-1 accuracy on ``val`` of the weighted kNN vote of ``train``.

    Samples of a class that ``train`` does not have count as wrong.

    Raises:
        ProbeError: no labels, an empty part, features that are not finite, k < 1 or temperature <= 0.
    """
    check_probe_input(train, val)
    predicted = knn_predict(train.features.to(device), train.labels.to(device), val.features.to(device), k=k, temperature=temperature)
    return _result(predicted.cpu(), val.labels, train, k=min(k, len(train)), temperature=temperature)


def knn_leave_one_out(data: Features, *, k: int = 20, temperature: float = 0.07, device: str | torch.device = "cpu") -> KnnResult:
    """Top-1 accuracy when every sample is classified by all the others: no sample is lost to a split.

    Not to be compared with :func:`knn_accuracy` on another set: the bank is larger by everything that is classified.
    """
    check_probe_input(data, data)
    if len(data) < 2:
        raise ProbeError("leave-one-out needs at least two samples")
    features, labels = data.features.to(device), data.labels.to(device)
    predicted = knn_predict(features, labels, features, k=k, temperature=temperature, exclude_self=True)
    return _result(predicted.cpu(), data.labels, data, k=min(k, len(data) - 1), temperature=temperature)


def knn_predict(
    bank: Tensor, bank_labels: Tensor, query: Tensor, *, k: int = 20, temperature: float = 0.07, exclude_self: bool = False
) -> Tensor:
    """Classify ``query`` by the votes of its k most similar bank samples.

    Args:
        bank: (N, F) floating point; normalised here.
        bank_labels: (N,) int64, not negative.
        query: (Q, F) on the bank's device.
        k: neighbours that vote; at most the whole bank does.
        temperature: of the weights exp(cosine / temperature).
        exclude_self: query row q is bank row q and gets no vote for itself.

    Returns:
        (Q,) int64 labels. Ties: equal votes go to the lower label. Where several bank samples are exactly as similar
        as the k-th neighbour, which of them vote is not specified.
    """
    if k < 1 or temperature <= 0:
        raise ProbeError(f"kNN needs k >= 1 and a temperature above 0, got k={k} and temperature={temperature}")
    similarity, neighbor = nearest_neighbors(bank, query, k=k, exclude_self=exclude_self)
    # Relative to the nearest neighbour: the same ratios of votes, and exp() cannot overflow at low temperatures.
    weight = torch.exp((similarity - similarity[:, :1]) / temperature)
    votes = torch.zeros(len(query), int(bank_labels.max()) + 1, dtype=weight.dtype, device=weight.device)
    votes.scatter_add_(1, bank_labels[neighbor], weight)
    return votes.argmax(dim=1)


def nearest_neighbors(bank: Tensor, query: Tensor, *, k: int, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of each query by cosine, the nearest first.

    The (Q, N) similarity matrix is never whole: tiles of it are computed and merged into a running top k.

    Args:
        bank: (N, F), query: (Q, F), same device, any scale. k: neighbours, at most N (N - 1 with ``exclude_self``).
        exclude_self: leave out bank row q for query row q.

    Returns:
        (similarity (Q, k) float32 in [-1, 1] up to rounding, index (Q, k) int64 bank rows).
    """
    bank, query = functional.normalize(bank.float(), dim=1), functional.normalize(query.float(), dim=1)
    k = min(k, len(bank) - exclude_self)
    query_tile = min(len(query), 1024)
    bank_tile = max(k, _TILE_ELEMENTS // max(query_tile, 1))
    similarities, indices = [], []
    for rows in torch.arange(len(query), device=query.device).split(query_tile):
        best = query.new_empty(len(rows), 0)
        where = rows.new_empty(len(rows), 0)
        for first in range(0, len(bank), bank_tile):
            tile = query[rows] @ bank[first : first + bank_tile].T
            columns = torch.arange(first, first + tile.shape[1], device=tile.device)
            if exclude_self:
                tile.masked_fill_(rows[:, None] == columns, -torch.inf)
            found, position = tile.topk(min(k, tile.shape[1]), dim=1)
            best, chosen = torch.cat([best, found], dim=1).topk(min(k, best.shape[1] + found.shape[1]), dim=1)
            where = torch.cat([where, position + first], dim=1).gather(1, chosen)
        similarities.append(best)
        indices.append(where)
    return torch.cat(similarities), torch.cat(indices)


def _result(predicted: Tensor, labels: Tensor, train: Features, *, k: int, temperature: float) -> KnnResult:
    correct, total = int((predicted == labels).sum()), len(labels)
    return KnnResult(
        accuracy=100 * correct / total,
        confidence=wilson_interval(correct, total),
        k=k,
        temperature=temperature,
        train_samples=len(train),
        val_samples=total,
        classes=len(train.labels.unique()),
    )
