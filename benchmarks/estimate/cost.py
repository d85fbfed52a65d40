"""The arithmetic of an estimate, from a few measured figures to a run: only numbers in and numbers out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastssl.methods.base import MethodConfig

#: Share of the memory that a run may fill, by device: a computer has other things to do, and its heap goes on growing
#: after the few steps measured here (a process of MobileNet-V3-Large at 224 px held a sixth more after some steps).
USABLE = {"cpu": 0.75, "cuda": 0.9}


class Line(NamedTuple):
    """``fixed + slope * x``."""

    fixed: float
    slope: float

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """The line nearest to ``(x, y)`` points (least squares), for what cannot shrink when a batch grows: time, memory.

    Where noise would have it fall, or begin below zero, and where there is one point only, it is the line through the
    origin and the point of the largest x: larger batches are then rather over- than underestimated. Raises ValueError
    without points, and where an x is not positive.
    """
    if not points or min(x for x, _ in points) <= 0:
        raise ValueError(f"a line needs points with positive x, got {list(points)}")
    last_x, last_y = max(points)
    if len({x for x, _ in points}) > 1:
        slope, fixed = statistics.linear_regression(*zip(*points))
        if slope >= 0 and fixed >= 0:
            return Line(fixed, slope)
    return Line(0.0, last_y / last_x)


def step_with_data_s(
    step_s: float, batch: int, loader: float, *, shared: bool, together: tuple[int, float, float] | None
) -> float:
    """Seconds of one step of the training loop, waiting for data included.

    Args:
        step_s: of the step alone, at ``batch``.
        loader: its rate alone, pairs a second.
        shared: both run on the same cores, so that their times add up; otherwise they run side by side and the slower
            one decides.
        together: if both were measured at once: the batch of that, seconds a step of both, and of the step alone. At
            ``batch`` itself this is the answer; at another size, what data added to a pair there is added here, and on
            cores of its own the loader stays the least.
    """
    loader_s = batch / loader
    if together is None:
        return loader_s + step_s if shared else max(loader_s, step_s)
    size, both_s, alone_s = together
    if size == batch:
        return both_s
    longer = step_s + max(0.0, both_s - alone_s) * batch / size
    return longer if shared else max(longer, loader_s)


def probe_count(epochs: int, every: int) -> int:
    """Online probes of a run: after every ``every`` epochs (0: never) but the last, which has the final one."""
    return (epochs - 1) // every if every else 0


def run_seconds(
    samples: int, batch: int, epochs: int, step_s: float, *, probes: int = 0, probe_s: float = 0.0
) -> tuple[float, float]:
    """(seconds of an epoch's steps, seconds of all epochs with their probes); the last, partial batch of an epoch is
    left out, as in training. Raises ValueError for fewer samples than one batch.
    """
    if samples < batch:
        raise ValueError(f"{samples} samples are fewer than one batch of {batch}")
    epoch_s = samples // batch * step_s
    return epoch_s, epochs * epoch_s + probes * probe_s


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that a training process holds at the peak of a step.

    Attributes:
        static, step: networks, optimiser, queue; what a step adds: a line over the pairs of one pass with gradient.
        images: of one pair's views as the network reads them; the keys' pass holds a second, shuffled copy of the whole
            batch.
        data: of one pair, whole batch: views and the loader's buffers, where they share this memory.
    """

    static: float
    step: Line
    images: float
    data: float

    def at(self, batch: int, parts: int = 1) -> float:
        """Bytes with steps of ``batch`` pairs, whose pass with gradient is cut into ``parts``."""
        part = batch / parts
        return self.static + self.step.at(part) + self.images * (batch - part) + self.data * batch


def allowed_batches(settings: MethodConfig, most: int) -> list[int]:
    """Batch sizes up to ``most``, largest first, that go with a method's numbers."""
    bound = settings.largest_batch
    return [batch for batch in range(most if bound is None else min(bound, most), 1, -1) if settings.allows(batch)]


def largest_batch(
    memory: MemoryModel, limit: float, *, settings: MethodConfig, most: int, parts: int = 1
) -> tuple[int | None, str]:
    """The largest batch that the numbers of a recipe's method allow and ``limit`` bytes hold, None where there is none,
    and what stops it: ``memory``, ``photos`` (``most`` are in the file) or the recipe's key. ``parts``, into which the
    pass with gradient is cut, divide the batch into two pairs each or more.
    """
    allowed = [batch for batch in allowed_batches(settings, most) if batch % parts == 0 and batch >= 2 * parts]
    fitting = [batch for batch in allowed if memory.at(batch, parts) <= limit]
    if not fitting:
        return None, "memory" if allowed else settings.BATCH_KEY
    if fitting[0] != allowed[0]:
        return fitting[0], "memory"
    bound = settings.largest_batch
    return fitting[0], "photos" if bound is None or allowed_batches(settings, bound)[0] > most else settings.BATCH_KEY


def parts_that_fit(memory: MemoryModel, limit: float, batch: int, groups: int = 1) -> int | None:
    """Fewest equal parts (``train.accumulate``) of two pairs or more, with which steps fit ``limit`` bytes, or None.
    ``groups``: BatchNorm groups of the student's pass; if there are several, no part cuts one.
    """
    whole = groups if groups > 1 else 0
    possible = (parts for parts in range(1, batch // 2 + 1) if batch % parts == 0 and whole % parts == 0)
    return next((parts for parts in possible if memory.at(batch, parts) <= limit), None)
