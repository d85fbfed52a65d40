"""Probing a run: which photos, which features, and what is computed from them.

Labels are used here alone. Without them (a flat folder) the collapse monitors are all that can be said.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastssl.evaluate import collapse as monitor
from fastssl.evaluate.features import Features, ProbeError, extract_features, split_indices
from fastssl.evaluate.knn import knn_accuracy
from fastssl.evaluate.linear import linear_probe
from fastssl.pipelines.beton.reader import BetonReader


@dataclass
class ProbeSplit:
    """The photos of a probe: a bank to learn from, queries to be judged on.

    Attributes:
        bank, queries: the open files (one and the same when nothing else was given).
        bank_index, query_index: sample ids in them.
        labelled: both have labels, of at least two classes.
    """

    bank: BetonReader
    bank_index: np.ndarray
    queries: BetonReader
    query_index: np.ndarray
    labelled: bool
    held_out: bool

    @property
    def classes(self) -> int:
        """Number of classes in the bank."""
        return len(np.unique(self.bank.labels[self.bank_index])) if self.labelled else 0

    @property
    def can_judge(self) -> bool:
        """Whether the queries are labelled photos that the bank does not hold."""
        return self.labelled and (self.held_out or not self.queries.path.samefile(self.bank.path))

    def features(self, backbone: nn.Module, size: int, **options: Any) -> tuple[Features, Features]:
        """Features of bank and queries; ``options`` as in ``extract_features``."""
        return (
            extract_features(backbone, self.bank, size=size, indices=self.bank_index, **options),
            extract_features(backbone, self.queries, size=size, indices=self.query_index, **options),
        )


def choose_split(bank: BetonReader, queries: BetonReader | None, limit: int, seed: int) -> ProbeSplit:
    """At most ``limit`` photos (0: all), spread evenly over the classes.

    Args:
        bank: what the run learned from.
        queries: photos of their own to judge on; None: a fifth of the bank's file is held out from the probe.
    """
    labelled = bank.labels is not None and len(np.unique(bank.labels)) > 1
    if queries is None:
        everything = _subset(bank.labels, len(bank), limit, seed)
        labels = None if bank.labels is None else bank.labels[everything]
        keep, held_out = split_indices(labels, len(everything), seed=seed)
        if not len(held_out):  # one photo in each class: the labels cannot judge anything
            labelled = False
            keep, held_out = split_indices(None, len(everything), seed=seed)
        return ProbeSplit(bank, everything[keep], bank, everything[held_out], labelled, held_out=True)
    labelled = labelled and queries.labels is not None
    total = len(bank) + len(queries)
    share = min(1.0, limit / total) if limit else 1.0
    return ProbeSplit(
        bank,
        _subset(bank.labels, len(bank), round(share * len(bank)), seed),
        queries,
        _subset(queries.labels, len(queries), round(share * len(queries)), seed),
        labelled,
        held_out=False,
    )


def _subset(labels: np.ndarray | None, count: int, limit: int, seed: int) -> np.ndarray:
    """About ``limit`` of ``count`` sample ids (0: all), the same share of every class, sorted."""
    if not limit or limit >= count:
        return np.arange(count)
    return split_indices(labels, count, fraction=limit / count, seed=seed)[1]


def require_same_classes(train: BetonReader, val: BetonReader) -> None:
    """Label k must mean the same class in both files. Folders are numbered by name, so one missing folder shifts all
    after it.

    Raises:
        ProbeError: both files are labelled, and differently.
    """
    if train.labels is None or val.labels is None:
        return
    if train.classes and val.classes:
        if train.classes == val.classes:
            return
        only = sorted(set(train.classes) ^ set(val.classes))
        what = (
            f"{len(train.classes)} and {len(val.classes)} classes, different: "
            f"{', '.join(only[:5])}{', ...' if len(only) > 5 else ''}"
        )
    else:
        counts = [len(np.unique(reader.labels)) for reader in (train, val)]
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
        row: dict[str, Any] = {"kind": "probe", "step": step, "epoch": epoch}
        everything = torch.cat([bank.features, queries.features])
        # In evaluation mode a network can overflow that trains on: the row says so, and the run goes on.
        finite = all(torch.isfinite(extreme) for extreme in torch.aminmax(everything))
        row["knn"] = knn_accuracy(bank, queries).accuracy if self.split.labelled and finite else None
        row["feature_std"] = float(monitor.feature_std(everything))
        row["effective_rank"] = float(monitor.effective_rank(everything))
        row["uniformity"] = float(monitor.uniformity(everything))
        row["seconds"] = time.monotonic() - started
        return row


def probe_features(name: str, bank: Features, queries: Features, labelled: bool) -> dict[str, Any]:
    """A row of the table at the end: percent right with kNN and with a linear classifier."""
    if not labelled:
        return {"name": name, "knn": None, "linear": None}
    return {"name": name, "knn": knn_accuracy(bank, queries).accuracy, "linear": linear_probe(bank, queries).accuracy}
