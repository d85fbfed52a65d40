"""Weighted k-nearest-neighbour classification of frozen features: no training, quick enough to run online.

Formula: Wu, Xiong, Yu, Lin, "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018,
section 3.4: each of the k most similar bank samples votes for its class with exp(cosine / temperature). The usual
protocol has the training photos as the bank and judges the validation photos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastssl.distributed.collectives import gather_rows, gather_uneven, rank, world_size
from fastssl.evaluate.features import Features, ProbeError, accuracies, check_probe_input, check_shared_input

#: Similarities held at a time: 16 MiB of float32 stay in a CPU's last-level cache.
_TILE_ELEMENTS = 1 << 22
#: Queries that are compared with a tile at once; and features, of queries for one way through the bank or of a tile,
#: that are normalised at once (256 MiB).
_QUERY_TILE, _QUERY_ELEMENTS = 1024, 1 << 26
#: Neighbours looked for beyond the k wanted: float32 products tell two that are equal to six digits apart by chance,
#: the exact cosines behind them do not.
_SPARE = 8
#: Elements of the float64 blocks in which cosines are taken again, and votes counted.
_EXACT_ELEMENTS = 1 << 21
#: What finds rows of a bank by float32 products, see ``_candidates``.
Finder = Callable[[Tensor, Tensor, int, int | None], Tensor]


@dataclass(frozen=True)
class KnnResult:
    """How often the vote was right.

    Attributes:
        accuracy, confidence: top-1 in percent, and its 95 % interval.
        top5_accuracy, top5_confidence: the class is one of the five with the most votes (a class without votes is none
            of them); None where there are no more than five classes.
        train_samples, val_samples: sizes of the bank and of what was judged.
        classes: of the bank.
    """

    accuracy: float
    confidence: tuple[float, float]
    top5_accuracy: float | None
    top5_confidence: tuple[float, float] | None
    k: int
    temperature: float
    train_samples: int
    val_samples: int
    classes: int


def knn_accuracy(
    train: Features, val: Features, *, k: int = 20, temperature: float = 0.07, device: str | torch.device = "cpu"
) -> KnnResult:
    """Accuracy on ``val`` of the weighted kNN vote of ``train``: ``knn_accuracies`` for one ``k``."""
    return knn_accuracies(train, val, ks=[k], temperature=temperature, device=device)[0]


def knn_accuracies(
    train: Features,
    val: Features,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
    leave_one_out: bool = False,
    shared: bool = False,
) -> list[KnnResult]:
    """One search, a vote for each of ``ks``. Samples of a class that ``train`` does not have count as wrong.

    Args:
        train: the bank. It stays where it is; tiles of it go to ``device``.
        val: to be judged.
        ks: numbers of neighbours that vote, at most the whole bank; those that come to the same number are one.
        leave_one_out: ``val`` is the bank itself (with ``shared`` all of it), and no sample votes for itself. A
            monitor: its figures cannot be compared with published ones.
        shared: ``train`` is this process's part of the bank, as ``features.shard`` deals it out, and ``val`` is whole
            on every process. All processes must call this, and get what one would get that has all of the bank.

    Raises:
        ProbeError: no labels, an empty part, features that are not finite, k < 1 or temperature <= 0, or a single
            sample to leave out.
    """
    if min(ks) < 1 or not temperature > 0:
        raise ProbeError(f"kNN needs k >= 1 and a temperature above 0, got k={min(ks)} and temperature={temperature}")
    (check_shared_input if shared else check_probe_input)(train, val)
    labels = gather_uneven(train.labels) if shared else train.labels
    if leave_one_out and len(labels) < 2:
        raise ProbeError("leave-one-out needs at least two samples")
    most = min(max(ks), len(labels) - leave_one_out)
    first = int(gather_rows(torch.tensor([len(train)]))[: rank()].sum()) if shared else 0
    own = first if leave_one_out else None
    similarity, index = _search(train.features, val.features, most, torch.device(device), own)
    if shared:
        similarity, index = _merged(similarity, index + first, most, len(labels))
    neighbours, classes = labels.to(index.device)[index], len(labels.unique())
    sizes: dict[str, Any] = {"train_samples": len(labels), "val_samples": len(val), "classes": classes}
    results = []
    for k in dict.fromkeys(min(k, most) for k in ks):
        ranked = ranked_classes(similarity[:, :k], neighbours[:, :k], temperature, places=5).cpu()
        hits = ranked == val.labels[:, None]
        figures = accuracies(int(hits[:, 0].sum()), int(hits.sum()), len(val), classes)
        results.append(KnnResult(**figures, **sizes, k=k, temperature=temperature))
    return results


def nearest_neighbors(bank: Tensor, query: Tensor, *, k: int, by: Finder | None = None) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of each query by cosine, the nearest first; of equally similar ones the lower row
    (among those that a float32 search brings to within a few places of the k-th).

    The (Q, N) similarity matrix is never whole, and the bank never copied: tiles are normalised when they are read,
    from whatever device, and merged into a running top k.

    Args:
        bank: (N, F), query: (Q, F), any scale. The work is done on the query's device. k: neighbours, at most N.
        by: finds those whose cosines are taken; None: in tiles, here.

    Returns:
        (similarity (Q, k) float32 in [-1, 1] up to rounding, index (Q, k) int64 bank rows), on the query's device.
    """
    similarity, index = _search(bank, query, k, query.device, None, by)
    return similarity.float(), index


def ranked_classes(similarity: Tensor, labels: Tensor, temperature: float, *, places: int) -> Tensor:
    """The ``places`` classes with the most votes.

    Args:
        similarity: (Q, k) cosines of the neighbours, the nearest first. labels: (Q, k) int64, not negative, their
            classes.

    Returns:
        (Q, places) int64: the most votes first, of equal ones the lower class; -1 where no further class has a vote.
    """
    known, labels = labels.unique(return_inverse=True)  # may be any numbers; votes are for those that are there
    classes = len(known)
    ranked = []
    for rows in torch.arange(len(labels), device=labels.device).split(max(1, _EXACT_ELEMENTS // classes)):
        # Relative to the nearest neighbour: the same ratios of votes, and exp() cannot overflow at low temperatures.
        weight = torch.exp((similarity[rows] - similarity[rows, :1]).double() / temperature)
        votes = weight.new_zeros(len(rows), classes).scatter_add_(1, labels[rows], weight)
        found = []
        for _ in range(places):
            most, place = votes.max(dim=1, keepdim=True)
            found.append(torch.where(most > 0, known[place], -1))
            votes.scatter_(1, place, -1.0)
        ranked.append(torch.cat(found, dim=1))
    return torch.cat(ranked)


def _search(
    bank: Tensor, query: Tensor, k: int, device: torch.device, own: int | None, by: Finder | None = None
) -> tuple[Tensor, Tensor]:
    """(similarity (Q, K) float64, index (Q, K) int64) on ``device``, K = min(k, len(bank)), the nearest first. ``own``:
    query row ``own + b`` is bank row b and is left out there: its similarity is -inf.
    """
    wanted = min(k, len(bank))
    similarities, indices = [], []
    for first in range(0, len(query), block := max(_QUERY_TILE, _QUERY_ELEMENTS // max(query.shape[1], 1))):
        rows = query[first : first + block].to(device)
        itself = None if own is None else first - own  # bank row of the block's first query
        unit = functional.normalize(rows.float(), dim=1)
        candidates = (by or _candidates)(bank, unit, min(k + _SPARE, len(bank)), itself)
        similarity = _cosines(bank, rows, candidates)
        if itself is not None:
            own_rows = torch.arange(itself, itself + len(rows), device=device)[:, None]
            similarity.masked_fill_(candidates == own_rows, -torch.inf)
        similarity, index = _nearest_first(similarity, candidates, wanted)
        similarities.append(similarity)
        indices.append(index)
    return torch.cat(similarities), torch.cat(indices)


def _candidates(bank: Tensor, query: Tensor, count: int, itself: int | None) -> Tensor:
    """(Q, count) int64: the bank rows with the largest products with the normalised ``query``, in any order."""
    best = query.new_full((len(query), count), -torch.inf)
    where = torch.zeros(len(query), count, dtype=torch.int64, device=query.device)
    step = max(count, min(_TILE_ELEMENTS // min(len(query), _QUERY_TILE), _QUERY_ELEMENTS // max(query.shape[1], 1)))
    for first in range(0, len(bank), step):
        tile = functional.normalize(bank[first : first + step].to(query.device).float(), dim=1)
        for start in range(0, len(query), _QUERY_TILE):
            rows = slice(start, start + _QUERY_TILE)
            product = query[rows] @ tile.T
            if itself is not None and -len(product) < (shift := itself + start - first) < len(tile):
                product.diagonal(shift).fill_(-torch.inf)  # of the whole matrix's diagonal what crosses this tile
            found, position = product.topk(min(count, len(tile)), dim=1)
            best[rows], chosen = torch.cat([best[rows], found], dim=1).topk(count, dim=1)
            where[rows] = torch.cat([where[rows], position + first], dim=1).gather(1, chosen)
    return where


def _cosines(bank: Tensor, query: Tensor, index: Tensor) -> Tensor:
    """(Q, K) float64 cosines of each query with its bank rows ``index``: the same numbers in any tile or process."""
    found = torch.empty(index.shape, dtype=torch.float64, device=query.device)
    most = max(1, _EXACT_ELEMENTS // max(index.shape[1] * query.shape[1], 1))
    for rows in torch.arange(len(query), device=query.device).split(most):
        one, others = query[rows].double(), bank[index[rows].to(bank.device)].to(query.device).double()
        length = one.norm(dim=1, keepdim=True).clamp_min(1e-12) * others.norm(dim=2).clamp_min(1e-12)
        found[rows] = (one[:, None] * others).sum(dim=2) / length
    return found


def _nearest_first(similarity: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in falling order; equal ones by their index."""
    index, order = index.sort(dim=1)
    similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity[:, :k], index.gather(1, order[:, :k])


def _merged(similarity: Tensor, index: Tensor, k: int, total: int) -> tuple[Tensor, Tensor]:
    """The nearest k of what all processes found, each in its part of a bank of ``total`` rows; on every process."""
    if world_size() == 1:
        return similarity, index
    width = min(k, -(-total // world_size()))  # of the largest part
    missing = (0, width - similarity.shape[1])
    similarity = functional.pad(similarity, missing, value=-torch.inf)
    index = functional.pad(index, missing, value=total)
    found = []
    for parts in zip(similarity.split(_QUERY_TILE), index.split(_QUERY_TILE)):
        values, places = (
            gather_rows(part).unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(1) for part in parts
        )
        found.append(_nearest_first(values, places, k))
    return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])
