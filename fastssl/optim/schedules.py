"""Values that change during a run: momentum of the key network, temperature and smoothing of the target.

Pure functions of the optimiser step. Steps count from 0; ``total_steps`` is one past the last, which is where a cosine
arrives: the last step itself is still a hair away from the final value. The learning rate: ``OptimConfig.rate``.
Sources: He et al. (MoCo, arXiv 1911.05722), Lin et al. (light-moco, arXiv 2212.07158), Grill et al. (BYOL, arXiv
2006.07733) and their public code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

MomentumSchedule = Literal["constant", "cosine"]
SmoothingSchedule = Literal["constant", "warm", "cosine"]


@dataclass(frozen=True)
class RunLength:
    """Length of a run and of an epoch, in optimiser steps."""

    total_steps: int
    steps_per_epoch: int

    def epoch(self, step: int) -> int:
        """The epoch that ``step`` belongs to."""
        return step // self.steps_per_epoch


def half_cosine(progress: float, first: float, last: float) -> float:
    """From ``first`` at progress 0 to ``last`` at 1 along half a cosine period; constant beyond either end."""
    fallen = (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
    return first + (last - first) * fallen


def ema_momentum(step: int, run: RunLength, base: float, schedule: MomentumSchedule) -> float:
    """Momentum m of the key network's moving average, ``key <- m key + (1 - m) query``.

    Args:
        schedule: ``constant`` (MoCo: 0.999 throughout) or ``cosine``: 1 - (1 - base) (1 + cos(pi step / total_steps)) /
            2, from ``base`` at the start to 1 at the end (BYOL; an option of light-moco, there once an epoch).
    """
    return base if schedule == "constant" else half_cosine(step / run.total_steps, base, 1.0)


def teacher_temperature(step: int, run: RunLength, first: float, last: float, warm_epochs: int) -> float:
    """A line from ``first`` in epoch 0 to ``last`` in epoch ``warm_epochs - 1``, constant within an epoch and ever
    after (DINO, arXiv 2104.14294).
    """
    epoch = run.epoch(step)
    if epoch >= max(1, warm_epochs - 1) or not warm_epochs:
        return last
    if warm_epochs == 1:
        return first
    return first + (last - first) * epoch / (warm_epochs - 1)


def smoothing(step: int, run: RunLength, base: float, schedule: SmoothingSchedule, warm_epochs: int = 0) -> float:
    """Mass a that the target of smoothed InfoNCE gives to the nearest negatives.

    Args:
        schedule: ``constant``; ``warm``: 0 during the first ``warm_epochs`` epochs, then ``base``; ``cosine``: base (1
            - cos(pi e / E)) / 2, from 0 at the start to ``base`` at the end, where e is the epoch. ``warm`` and
            ``cosine`` change once an epoch, as in light-moco's code, so the first epoch has no smoothing at all
            (exactly 0.0, which lets the loss skip the search for the nearest).
    """
    epoch = run.epoch(step)
    if schedule == "constant" or (schedule == "warm" and epoch >= warm_epochs):
        return base
    return 0.0 if schedule == "warm" else half_cosine(epoch * run.steps_per_epoch / run.total_steps, 0.0, base)
