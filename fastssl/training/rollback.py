"""Losses and gradients that are not finite: the run ends and keeps the batch, or goes back and passes over the step.

With ``train.skip_nonfinite`` above 0 the state at the beginning of every block of steps is kept. A block with a loss or
gradient that is not finite is undone, and its steps are made again one by one, each taken back where it is the guilty
one. The run then is the same to the bit as one that never made that step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from torch import Tensor

from fastssl.distributed.collectives import any_rank
from fastssl.errors import FastSSLError, counted
from fastssl.pipelines.loader import Batch
from fastssl.runs.nonfinite import BAD_STEPS, save_bad_step
from fastssl.training.step import numbers

if TYPE_CHECKING:
    from fastssl.training.setup import Setup


class NonFiniteGuard:
    """Watches the steps of ``run``; does nothing while ``train.skip_nonfinite`` is 0."""

    def __init__(self, run: Setup):
        self._run, self._most = run, run.recipe.train.skip_nonfinite
        self._careful_until = 0

    @property
    def careful(self) -> bool:
        """Whether the next step is one of those that are made again one by one."""
        return self._run.position.step < self._careful_until

    def passes_over(self) -> bool:
        """Whether the next step is one that was found out and is not made."""
        return self._run.position.step + 1 in self._run.position.passed_over

    def begin_block(self) -> None:
        """Keep the state as it is now, to come back to."""
        if self._most and not self.careful:
            self._undo = self._run.step.snapshot()
            self._position = dataclasses.replace(self._run.position)

    def accept_block(self) -> bool:
        """Whether all steps since ``begin_block`` were finite; if not, the run is back where it was then."""
        run = self._run
        if not (self._most and any_rank(not (run.ring.is_finite() and run.step.is_finite()))):
            return True
        self._careful_until = run.position.step
        self._undo()
        run.ring.clear()
        run.position = dataclasses.replace(self._position)
        run.progress.message(f"a loss or gradient is not finite: back to step {run.position.step:,}, to find out which")
        return False

    def step(self, make_step: Callable[[Setup, Batch], Tensor], batch: Batch) -> None:
        """One step, taken back if its loss, or what it made of the networks, is not finite. Waits for the device."""
        run = self._run
        number, found = run.position.step + 1, run.position.passed_over
        if self.passes_over():
            return
        undo = run.step.snapshot()
        loss = float(make_step(run, batch)[0])
        if not any_rank(not (math.isfinite(loss) and run.step.is_finite())):
            return
        undo()
        run.ring.pop()
        reason = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        where = keep_batch(run, batch, number, reason)
        if len(found) >= self._most:
            were = f"{counted(self._most, 'such step')} {'was' if self._most == 1 else 'were'} passed over before"
            why = f"step {number:,}: {reason}, and {were} (train.skip_nonfinite){advice(run, where)}"
            run.end_together(FastSSLError(why))
        found.append(number)
        kept = f", its batch is in {where}" if where else ""
        run.progress.message(f"step {number:,}: {reason}; passed over{kept}")


def diverged(run: Setup, number: int, reason: str) -> FastSSLError:
    """The error for step ``number``, whose batch is drawn once more to be kept."""
    epoch, step_in_epoch = divmod(number - 1, run.length.steps_per_epoch)
    # A loader has one consumer, and an epoch of the run's own is in hand.
    views = run.recipe.views_at(epoch)
    with run.make_loader(views=views) as other, closing(other.epoch(epoch, start_step=step_in_epoch)) as batches:
        where = keep_batch(run, next(batches), number, reason)
    return FastSSLError(f"{reason} at step {number:,}: the run has diverged{advice(run, where)}")


def advice(run: Setup, where: str | None = None) -> str:
    """What to do about it, for the end of a message."""
    batch = f"; the step's batch is in {where}" if where else ""
    newest = f"; {run.saver.newest()}" if run.saver else ""
    change = "a higher train.skip_nonfinite" if run.recipe.train.skip_nonfinite else "train.skip_nonfinite=1 (or more)"
    return (
        f". Lower optim.lr (now {run.recipe.optim.lr:g}) or lengthen optim.warmup_epochs; or go on with {change}, "
        f"which passes over single steps{batch}{newest}"
    )


def keep_batch(run: Setup, batch: Batch, number: int, reason: str) -> str | None:
    """Save what this process was given at step ``number``; where. None: the disk did not take it."""
    epoch, step_in_epoch = divmod(number - 1, run.length.steps_per_epoch)
    about = {
        "step": number,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "seed": run.options.seed,
        "reason": reason,
        **numbers(run.step.rates(number - 1, run.length)),
    }
    folder = run.options.out / BAD_STEPS / f"step-{number:08}"
    try:
        save_bad_step(folder, batch, run.recipe.views_at(epoch), rank=run.world.rank, about=about)
    except OSError as error:
        run.progress.message(f"{folder}: the batch could not be saved ({error.strerror or error})")
        return None
    return str(folder)
