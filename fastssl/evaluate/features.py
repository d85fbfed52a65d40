"""Features of a frozen backbone, computed once and kept: what kNN, the linear probe and the pictures read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.distributed.collectives import any_rank, gather_uneven, rank, world_size
from fastssl.errors import FastSSLError, counted
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation, ViewSpec
from fastssl.pipelines.plan.order import epoch_order

#: (what is counted, how many, [of what]) -> a block with a function to be told how many are done:
#: ``fastssl.cli.common.progress_bar`` is one.
Bar = Callable[..., AbstractContextManager[Callable[[int], None]]]

#: Side of the centre crop relative to the short side: the field's 224 of 256.
EVALUATION_CROP = 0.875
#: Pixels along each side of it, where nothing is known of the run.
EVALUATION_SIZE = 224


@contextmanager
def silent(label: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """A bar that shows nothing."""
    yield lambda done: None


class ProbeError(FastSSLError):
    """The features or labels given do not allow the evaluation that was asked for."""


@dataclass(frozen=True)
class Features:
    """One row for each sample.

    Attributes:
        features: (N, F) float32, on the CPU.
        labels: (N,) int64, -1 for all where the file has no labels.
        index: (N,) int64 sample ids in the file.
    """

    features: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labelled(self) -> bool:
        return bool((self.labels >= 0).all())

    def subset(self, rows: np.ndarray) -> Features:
        """The rows ``rows`` (int64 positions, not sample ids)."""
        chosen = torch.from_numpy(np.asarray(rows, np.int64))
        return Features(self.features[chosen], self.labels[chosen], self.index[chosen])


def extract_features(
    backbone: nn.Module,
    data: BetonReader | str | Path,
    *,
    size: int,
    device: str | torch.device = "cpu",
    amp: bool = False,
    crop: float = EVALUATION_CROP,
    normalisation: Normalisation = IMAGENET,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    **how: Any,
) -> Features:
    """Run ``backbone`` in evaluation mode over the centre crops of ``data``, without gradient.

    Args:
        backbone: images (B, 3, S, S), channels-last, normalised -> features (B, F). Its parameters must be on
            ``device``; each module's training flag is put back afterwards.
        data: a ``.beton`` file or an open reader (which stays open).
        size: S, in pixels. amp: bfloat16 autocast.
        crop: side of the centre square relative to the photo's short side. normalisation: as the network was trained.
        how: ``indices``, ``batch_size``, ``workers``, ``on_bad`` and ``progress``, see ``collect``.

    Raises:
        FastSSLError: a damaged photo with ``on_bad="fail"``, or indices outside the file.
    """
    device = torch.device(device)
    forward = torch.autocast(device.type, torch.bfloat16, enabled=amp)(backbone)
    spec = replace(ViewSpec.evaluation(size, crop, normalisation), interpolation=interpolation)
    with evaluating(backbone):
        return collect(forward, data, spec, device=device, **how)


def share_features(
    backbone: nn.Module, data: BetonReader, index: np.ndarray, label: str, bar: Bar = silent, **how: Any
) -> Features:
    """``extract_features`` of this process's share of the samples ``index``, with a bar."""
    mine = shard(index)
    with bar(label, len(mine)) as advance:
        return extract_features(backbone, data, indices=mine, progress=advance, **how)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each module's own flag is put back behind it."""
    flags = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@torch.no_grad()
def require_size(network: nn.Module, size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Show the network one black picture: better now than behind the first photos. It is in evaluation mode afterwards.

    Raises:
        ProbeError: it cannot take pictures of ``size`` pixels, or what it says of one is NaN or infinite.
    """
    picture = torch.zeros(1, 3, size, size, device=device, dtype=dtype)
    try:
        found = network.eval()(picture)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ProbeError(
            f"the network cannot take pictures of {size} px ({' '.join(str(error).split())[:200]}): change --size"
        ) from error
    if not torch.isfinite(found).all():
        raise ProbeError("the network's outputs are NaN or infinite: the checkpoint's training has diverged")


@torch.no_grad()
def collect(
    function: Callable[[Tensor], Tensor],
    data: BetonReader | str | Path,
    spec: ViewSpec,
    *,
    indices: np.ndarray | None = None,
    batch_size: int = 256,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (cannot be changed)
    workers: int | None = None,
    on_bad: str = "fail",
    progress: Callable[[int], None] = lambda done: None,
) -> Features:
    """Apply ``function`` (B, 3, S, S) -> (B, F) to the one view ``spec`` of every sample.

    Args:
        indices: only these sample ids, in this order; default: all, in stored order.
        workers: decoding threads.
        on_bad: ``fail``, or ``skip``: damaged photos are left out of the result.
        progress: called with the number of photos done, after each batch.
    """
    # no_grad and not inference_mode: the tensors may later stand in a computation with gradient.
    how: dict[str, Any] = {"workers": workers, "on_bad": on_bad, "indices": indices}
    with ViewLoader(data, [spec], batch_size, device, shuffle=False, drop_last=False, **how) as loader:
        features: Tensor | None = None
        index, labels = torch.empty(2, loader.num_samples, dtype=torch.int64).unbind()
        first = kept = 0
        for batch in loader.epoch(0):
            rows = function(batch.views[0])
            if features is None:
                # One block filled in place: joining pieces at the end would need the memory twice.
                features = torch.empty(loader.num_samples, rows.shape[1], dtype=torch.float32)
            # Where a damaged photo was skipped, another sample stands in its place: counting that one twice
            # would bias the probe, so only rows whose sample is the one asked for are kept.
            asked = torch.from_numpy(loader.ids_at(np.arange(first, first + len(batch.index))))
            good = (batch.index == asked).nonzero().squeeze(1)
            first += len(batch.index)
            target = slice(kept, kept + len(good))
            features[target] = rows[good.to(rows.device)].to("cpu", torch.float32)
            index[target], labels[target] = batch.index[good], batch.label[good]
            kept += len(good)
            progress(first)
    assert features is not None  # a loader has samples
    return Features(features[:kept], labels[:kept], index[:kept])


def shard(index: np.ndarray, *, may_be_empty: bool = False) -> np.ndarray:
    """This process's part of ``index``: neighbours stay together, parts differ by one at most.

    Raises:
        ProbeError: there are fewer samples than processes, on all of them, unless the part ``may_be_empty``.
    """
    if len(index) < world_size() and not may_be_empty:
        photos = counted(len(index), "photo")
        raise ProbeError(f"{photos} cannot be shared out to {world_size()} processes; start fewer")
    return np.array_split(index, world_size())[rank()]


def gathered(features: Features) -> Features:
    """The features of all processes on each of them, in the order that ``shard`` dealt their samples out."""
    return Features(*(gather_uneven(part) for part in (features.features, features.labels, features.index)))


def split_indices(
    labels: np.ndarray | None, num_samples: int, *, fraction: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a part of one data set, the same share of every class; a pure function of its arguments, on any machine.

    Args:
        labels: (num_samples,) integers, or None for an unlabelled set (then the split is not stratified).
        fraction: share to hold out, 0 < fraction < 1; of each class at least one sample is held out if it has two,
            and at least one stays.

    Returns:
        (train, held_out): two sorted int64 arrays of sample ids, disjoint, together all of them.
    """
    if not 0 < fraction < 1:
        raise ProbeError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    groups = np.zeros(num_samples, np.int64) if labels is None else np.asarray(labels)
    if groups.shape != (num_samples,):
        raise ProbeError(f"{groups.shape} labels for {num_samples} samples")
    held_out = draw_of_each(groups, seed, lambda size: min(max(round(fraction * size), 1), size - 1))
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def draw_of_each(labels: np.ndarray, seed: int, count: Callable[[int], int]) -> np.ndarray:
    """(N,) bool, which of the samples are drawn: of a class with n samples the first ``count(n)`` in an order of
    ``seed``, which of a larger count has those of a smaller.
    """
    order = epoch_order(len(labels), seed, 0)
    # Class by class, each in the drawn order: one sort, where a thousand classes would be a thousand searches.
    by_class = order[np.argsort(labels[order], kind="stable")]
    drawn = np.zeros(len(labels), bool)
    for members in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        drawn[members[: count(len(members))]] = True
    return drawn


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of an accuracy, in percent.

    Wilson's score interval (J. Am. Stat. Assoc. 22, 1927): sound also near 0 and 100 %. It covers the choice of the
    ``total`` samples only, not the seed of the training.
    """
    if total == 0:
        return 0.0, 100.0
    share = correct / total
    centre = share + z * z / (2 * total)
    half = z * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    scale = 1 + z * z / total
    return 100 * max(0.0, (centre - half) / scale), 100 * min(1.0, (centre + half) / scale)


def accuracies(top1: int, top5: int, total: int, classes: int) -> dict[str, Any]:
    """``accuracy`` and ``top5_accuracy`` in percent, each with its interval; top-5 is None where there are no more than
    five classes, of which it would say nothing.
    """
    first, five = ((100 * right / total, wilson_interval(right, total)) for right in (top1, top5))
    names = ("accuracy", "confidence", "top5_accuracy", "top5_confidence")
    return dict(zip(names, [*first, *(five if classes > 5 else (None, None))]))


def is_finite(*parts: Features) -> bool:
    """Whether no feature is NaN or infinite."""
    # The extremes are if any number is, and a table of which ones are would be as large as a quarter of the features.
    return all(bool(torch.isfinite(extreme)) for part in parts if len(part) for extreme in torch.aminmax(part.features))


def check_probe_input(train: Features, val: Features) -> None:
    """Refuse what no probe can use: nothing there, no labels, widths that differ, numbers that are not finite."""
    for name, part in (("training", train), ("validation", val)):
        if len(part) == 0:
            raise ProbeError(f"the {name} part is empty")
        if not part.labelled:
            raise ProbeError(
                f"the {name} part has no labels; kNN and linear probes need them (convert a class/file folder tree)"
            )
        if not is_finite(part):
            raise ProbeError(f"features of the {name} part are NaN or infinite: the checkpoint's training has diverged")
    if train.features.shape[1] != val.features.shape[1]:
        widths = f"{train.features.shape[1]} in training, {val.features.shape[1]} in validation"
        raise ProbeError(f"features differ in width: {widths}")


def check_shared_input(train: Features, val: Features) -> None:
    """``check_probe_input`` of every process's share: where one cannot be used, all raise, and none waits for the
    others in vain.
    """
    try:
        check_probe_input(train, val)
    except ProbeError:
        any_rank(True)
        raise
    if any_rank(False):
        raise ProbeError("another process's share of the features cannot be used: it says why")
