"""Values that change during a run: learning rate, momentum of the key network, smoothing of the target.

Pure functions of the optimiser step, so that a resumed run, or a plot, needs nothing but the step number. Steps count
from 0; ``total_steps`` is one past the last, which is where a cosine arrives: the last step itself is still a hair away
from the final value. Sources: He et al. (MoCo, arXiv 1911.05722), Lin et al. (light-moco, arXiv 2212.07158), Grill et
al. (BYOL, arXiv 2006.07733) and their public code.
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


def learning_rate(
    step: int,
    *,
    total_steps: int,
    steps_per_epoch: int,
    peak: float,
    final: float = 0.0,
    warmup_epochs: float = 0.0,
    warmup_lr: float | None = None,
    per_epoch: bool = False,
) -> float:
    """Linear warm-up, then half a cosine from ``peak`` to ``final``.

    With W units of warm-up out of U, unit u < W has ``peak * (u + 1) / (W + 1)``: no step is spent at rate zero, and
    unit W is the first at ``peak``. With ``warmup_lr`` the warm-up is a line with both end points instead,
    ``warmup_lr`` at unit 0 and ``peak`` at the last unit below W (DINO, SwAV, SSLight). The cosine begins at unit W and
    reaches ``final`` at u = U. A run no longer than its warm-up only climbs.

    Args:
        warmup_lr: rate of the first step; None: a share of the peak.
        step: 0 .. total_steps.
        total_steps, steps_per_epoch: length of the run and of an epoch, in optimiser steps.
        warmup_epochs: may be a fraction when the rate changes every step.
        per_epoch: u counts epochs, a staircase as in MoCo's and light-moco's code, instead of steps. (light-moco's code
            also multiplies its warm-up by the cosine continued to the left, under 0.1 % in its recipes; that is left
            out.)

    Raises:
        ValueError: a length that is not positive, or a step outside the run.
    """
    _check_run(step, total_steps, steps_per_epoch)
    if per_epoch:
        unit: float = step // steps_per_epoch
        units, warmup = total_steps / steps_per_epoch, warmup_epochs
    else:
        unit, units, warmup = step, total_steps, warmup_epochs * steps_per_epoch
    if unit < warmup:
        if warmup_lr is not None:
            last = math.ceil(warmup) - 1
            return warmup_lr + (peak - warmup_lr) * unit / last if last else peak
        return peak * (unit + 1) / (warmup + 1)
    # The last unit of a run that ends with its warm-up is the peak itself, whence the guard.
    return half_cosine((unit - warmup) / (units - warmup) if units > warmup else 0.0, peak, final)


def ema_momentum(step: int, *, total_steps: int, base: float, schedule: str = "constant") -> float:
    """Momentum m of the key network's moving average, ``key <- m key + (1 - m) query``.

    Args:
        schedule: ``constant`` (MoCo: 0.999 throughout) or ``cosine``: 1 - (1 - base) (1 + cos(pi step / total_steps)) /
            2, from ``base`` at the start to 1 at the end (BYOL; an option of light-moco, there once an epoch).

    Raises:
        ValueError: unknown schedule, or a step outside the run.
    """
    _check_run(step, total_steps)
    if schedule == "constant":
        return base
    if schedule == "cosine":
        return half_cosine(step / total_steps, base, 1.0)
    raise ValueError(f"momentum schedule {schedule!r} is unknown; choose one of constant, cosine")


def weight_decay(step: int, *, total_steps: int, base: float, final: float | None = None) -> float:
    """From ``base`` along half a cosine to ``final`` at ``total_steps`` (DINO on vision transformers: 0.04 to 0.4);
    constant without ``final``.
    """
    _check_run(step, total_steps)
    return base if final is None else half_cosine(step / total_steps, base, final)


def teacher_temperature(step: int, *, steps_per_epoch: int, first: float, last: float, warm_epochs: int) -> float:
    """A line from ``first`` in epoch 0 to ``last`` in epoch ``warm_epochs - 1``, constant within an epoch and ever
    after (DINO, arXiv 2104.14294).
    """
    epoch = step // steps_per_epoch
    if epoch >= max(1, warm_epochs - 1) or not warm_epochs:
        return last
    if warm_epochs == 1:
        return first
    return first + (last - first) * epoch / (warm_epochs - 1)


def smoothing(
    step: int, *, total_steps: int, steps_per_epoch: int, base: float, schedule: str = "constant", warm_epochs: int = 0
) -> float:
    """Mass a that the target of smoothed InfoNCE gives to the nearest negatives.

    Args:
        schedule: ``constant``; ``warm``: 0 during the first ``warm_epochs`` epochs, then ``base``; ``cosine``: base (1
            - cos(pi e / E)) / 2, from 0 at the start to ``base`` at the end, where e is the epoch. ``warm`` and
            ``cosine`` change once an epoch, as in light-moco's code, so the first epoch has no smoothing at all
            (exactly 0.0, which lets the loss skip the search for the nearest).

    Raises:
        ValueError: unknown schedule, or a step outside the run.
    """
    _check_run(step, total_steps, steps_per_epoch)
    epoch = step // steps_per_epoch
    if schedule == "constant":
        return base
    if schedule == "warm":
        return 0.0 if epoch < warm_epochs else base
    if schedule == "cosine":
        return half_cosine(epoch * steps_per_epoch / total_steps, 0.0, base)
    raise ValueError(f"smoothing schedule {schedule!r} is unknown; choose one of constant, warm, cosine")


def _check_run(step: int, total_steps: int, steps_per_epoch: int = 1) -> None:
    if total_steps < 1 or steps_per_epoch < 1:
        raise ValueError(
            f"total_steps={total_steps}, steps_per_epoch={steps_per_epoch}: a run and its epochs have at least one step"
        )
    if not 0 <= step <= total_steps:
        raise ValueError(f"step {step} lies outside the run of {total_steps} steps")
