"""Probing a run: which photos, which features, and what is computed from them. Without labels, which are used here
alone, the collapse monitors are all that can be said.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fastssl.errors import counted
from fastssl.evaluate import collapse as monitor
from fastssl.evaluate.features import Features, ProbeError, extract_features, is_finite, split_indices
from fastssl.evaluate.knn import knn_accuracy
from fastssl.evaluate.linear import linear_probe
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.plan.order import epoch_order


@dataclass
class ProbeSplit:
    """The photos of a probe: a bank to learn from, queries to be judged on.

    Attributes:
        bank, queries: the open files (one and the same when nothing else was given).
        bank_index, query_index: sample ids in them.
        held_out: the queries are a part of the bank's file that the bank does not hold.
        seen: pre-training learned from the queries, too (without their labels).
        obstacle: see ``_obstacle``.
    """

    bank: BetonReader
    bank_index: np.ndarray
    queries: BetonReader
    query_index: np.ndarray
    held_out: bool
    seen: bool = True
    obstacle: str = ""

    @property
    def labelled(self) -> bool:
        """Whether bank and queries have labels of at least two classes each."""
        return not self.obstacle

    @property
    def classes(self) -> int:
        """Number of classes in the bank."""
        return len(np.unique(self.bank.labels_of(self.bank_index))) if self.labelled else 0

    @property
    def can_judge(self) -> bool:
        """Whether the queries are labelled photos that the bank does not hold."""
        return self.labelled and (self.held_out or not _same_photos(self.queries, self.bank))

    def features(self, backbone: nn.Module, size: int, **options: Any) -> tuple[Features, Features]:
        """Features of bank and queries; ``options`` as in ``extract_features``."""
        bank = extract_features(backbone, self.bank, size=size, indices=self.bank_index, **options)
        return bank, extract_features(backbone, self.queries, size=size, indices=self.query_index, **options)


#: Photos of a class that a probe of some photos should have at least: four to learn from, one to be judged.
_LEAST_OF_A_CLASS = 5
#: Photos that tell two files apart.
_LOOKED_AT, _MOST_OF_A_SIZE = 16, 64


def choose_split(data: BetonReader, val: BetonReader | None, limit: int, seed: int) -> ProbeSplit:
    """At most ``limit`` photos (0: all), spread evenly over the classes; where these are too many, over some of them.

    Args:
        data: what the run learned from.
        val: photos of their own to judge on. None, or without labels where ``data`` has some: a fifth of ``data`` is
            held out from the probe. Where ``val`` alone has labels, a fifth of ``val``.
    """
    if val is not None and val.labelled == data.labelled:
        total = len(data) + len(val)
        kept = _some_classes((data, val), limit, seed)
        shares = [round(min(1.0, limit / total) * len(reader)) if limit else 0 for reader in (data, val)]
        bank, queries = (_subset(reader, share, kept, seed) for reader, share in zip((data, val), shares))
        split = ProbeSplit(data, bank, val, queries, held_out=False, seen=False)
    else:
        reader = val if val is not None and val.labelled else data
        some = _subset(reader, limit, _some_classes((reader,), limit, seed), seed)
        labels = reader.labels_of(some) if reader.labelled else None
        keep, held_out = split_indices(labels, len(some), seed=seed)
        if not len(held_out):  # one photo in each class: the labels cannot judge anything
            keep, held_out = split_indices(None, len(some), seed=seed)
        seen = reader is data or _same_photos(reader, data)
        split = ProbeSplit(reader, some[keep], reader, some[held_out], held_out=True, seen=seen)
    return replace(split, obstacle=_obstacle(split))


def _obstacle(split: ProbeSplit) -> str:
    """Why labels cannot judge anything, in words; empty: they can."""
    found = []
    for reader, index in ((split.bank, split.bank_index), (split.queries, split.query_index)):
        if not reader.labelled:
            return "the photos have no labels"
        labels = reader.labels_of(index)
        if len(labels) and labels.min() < 0:
            return f"some photos in {reader.path.name} have no label"
        found.append(np.unique(labels))
    known, asked = found
    if len(known) < 2:
        return "the photos are all of one class"
    if not np.isin(asked, known).any():
        return "no class has two photos, one to learn from and one to be judged"
    if len(asked) < 2:
        rest = "there are too few of the others" if split.held_out else "which tells nothing"
        return f"the photos to be judged are all of one class: {rest}"
    return ""


def _same_photos(one: BetonReader, other: BetonReader) -> bool:
    """Whether two files hold the same photos, in whatever order, as far as sizes and the bytes of some photos tell."""
    if one.is_same(other):
        return True
    if one.lazy or other.lazy:  # their tables are too large to be compared
        return _alike(one, other)
    tables = [np.stack([reader.widths, reader.heights, reader.sizes]).astype(np.int64) for reader in (one, other)]
    mine, theirs = (table[:, np.lexsort(table)] for table in tables)
    if not np.array_equal(mine, theirs):
        return False
    # Photos of one size have no order among themselves: all of them are compared; of many, those in the same places.
    for size in np.unique(mine[2, np.linspace(0, len(one) - 1, _LOOKED_AT).astype(np.int64)]):
        groups = [(reader, np.flatnonzero(reader.sizes == size)) for reader in (one, other)]
        if len(groups[0][1]) > _MOST_OF_A_SIZE:
            return _alike(one, other)
        first, second = (sorted(bytes(reader.encoded(int(i))) for i in found) for reader, found in groups)
        if first != second:
            return False
    return True


def _alike(one: BetonReader, other: BetonReader) -> bool:
    return one.table_checksums() == other.table_checksums() and one.photo_checksum() == other.photo_checksum()


def _some_classes(files: Sequence[BetonReader], limit: int, seed: int) -> np.ndarray | None:
    """The classes that a probe of ``limit`` photos is of, where that is too few for all of them; else None. Those of
    one photo, of which nothing can be held out, come last.
    """
    if not limit or not all(reader.labelled for reader in files):
        return None
    everything = np.concatenate([reader.labels_of(reader.some()) for reader in files])
    known, counts = np.unique(everything, return_counts=True)
    most = max(2, limit // _LEAST_OF_A_CLASS)
    if len(everything) <= limit or len(known) <= most:
        return None
    order = epoch_order(len(known), seed, 0)
    return np.take(known, np.concatenate([order[counts[order] > 1], order[counts[order] == 1]])[:most])


def _subset(reader: BetonReader, limit: int, kept: np.ndarray | None, seed: int) -> np.ndarray:
    """About ``limit`` sample ids (0: all), sorted; an equal share of each class in ``kept`` (None: all)"""
    chosen = reader.some() if limit else np.arange(len(reader))
    labels = reader.labels_of(chosen) if limit and reader.labelled else None
    if kept is not None and labels is not None:
        inside = np.isin(labels, kept)
        chosen, labels = chosen[inside], labels[inside]
    if limit and limit < len(chosen):
        chosen = chosen[split_indices(labels, len(chosen), fraction=limit / len(chosen), seed=seed)[1]]
    return chosen


def match_classes(train: BetonReader, val: BetonReader) -> None:
    """Have label k mean the same class in both files: those of ``val`` are matched by name, if ``train`` has them all.
    Folders are numbered by name, so one missing folder shifts all after it.

    Raises:
        ProbeError: ``val`` has a class that ``train`` lacks; or both have labels, without names, of other numbers.
    """
    if not train.labelled or not val.labelled:
        return
    if train.classes and val.classes:
        if train.classes == val.classes:
            return
        lacking = sorted(set(val.classes) - set(train.classes))
        if not lacking:
            val.use_classes(train.classes)
            return
        shown = ", ".join([*lacking[:5], *(["..."] if len(lacking) > 5 else [])])
        what = f"{counted(len(lacking), 'class')} of the second, of {len(val.classes)}, not in the first: {shown}"
    else:
        counts = [len(np.unique(one.labels_of(one.some()))) for one in (train, val)]
        if counts[0] == counts[1]:
            return
        what = f"{counts[0]} and {counts[1]} classes"
    raise ProbeError(
        f"{train.path} and {val.path} do not have the same classes ({what}); convert both from the same class folders"
    )


class OnlineProbe:
    """The check between epochs: kNN and the collapse monitors on a small, fixed part of the photos."""

    def __init__(self, split: ProbeSplit, size: int, **options: Any):
        self.split, self.size, self.options = split, size, options

    def run(self, backbone: nn.Module, *, step: int, epoch: int) -> dict[str, Any]:
        """One line for metrics.jsonl. Where a feature is NaN or infinite there is no kNN, and the monitors are NaN."""
        started = time.monotonic()
        bank, queries = self.split.features(backbone, self.size, **self.options)
        everything = torch.cat([bank.features, queries.features])
        # In evaluation mode a network can overflow that trains on: the row says so, and the run goes on.
        judged = self.split.labelled and is_finite(bank, queries)
        row: dict[str, Any] = {"kind": "probe", "step": step, "epoch": epoch}
        row["knn"] = knn_accuracy(bank, queries).accuracy if judged else None
        for figure in (monitor.feature_std, monitor.effective_rank, monitor.uniformity):
            row[figure.__name__] = float(figure(everything))
        return row | {"seconds": time.monotonic() - started}


def probe_features(name: str, bank: Features, queries: Features, labelled: bool) -> dict[str, Any]:
    """A row of the table at the end: percent right with kNN and linearly; None where features are not finite."""
    if not (labelled and is_finite(bank, queries)):
        return {"name": name, "knn": None, "linear": None}
    return {"name": name, "knn": knn_accuracy(bank, queries).accuracy, "linear": linear_probe(bank, queries).accuracy}
