"""When a run is saved, and what becomes of it while the disk takes nothing. Only a run's first process has one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from fastssl.config.recipe import Recipe
from fastssl.methods.base import Method
from fastssl.runs.checkpoint import NotSaved, Position, save_checkpoint
from fastssl.runs.folder import RunFolder
from fastssl.utils.signals import StopRequest

#: Seconds between two tries to write a checkpoint that the disk did not take, and between two messages about it.
_RETRY_S, _SAY_EVERY_S = 60.0, 600.0
#: Seconds from the start to the first checkpoint, at most: a folder that takes none should be known at once.
_FIRST_S = 60.0
#: How long a run that has made all its steps waits for room. The other processes wait too, an hour at most.
_WAIT_MINUTES = 30.0


class Saver:
    """Writes checkpoints and metrics of a run; a disk that is full or read-only does not end it.

    Args:
        folder: of the run.
        recipe: how often, and how many are kept.
        config: stored with every checkpoint.
        say: is told one line at a time what the user should know.

    Attributes:
        saved_step: of the newest checkpoint; None: there is none.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, config: dict[str, Any], say: Callable[[str], None]):
        self.folder, self.recipe, self.config, self.say = folder, recipe, config, say
        self.saved_step: int | None = None
        self._failure: str | None = None  # words alone: an exception keeps all that its frames hold
        self._said_at: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """Count the time to the first checkpoint from now."""
        self._ask_in(min(60 * self.recipe.train.checkpoint_minutes, _FIRST_S))

    def is_due(self) -> bool:
        """Whether a checkpoint should be written now. True once: the answer of several processes comes a step later."""
        due = not self._asked and time.monotonic() >= self._due_at
        self._asked |= due
        return due

    def ask_again(self) -> None:
        """What was due was not tried: the run went back some steps."""
        self._asked = False

    def save(
        self,
        method: Method,
        optimizer: Optimizer,
        position: Position,
        *,
        milestone: int | None = None,
        stop: StopRequest | None = None,
    ) -> bool:
        """Write a checkpoint, see ``save_checkpoint``. False: the disk did not take it; ``is_due`` says when it may.

        Args:
            stop: all steps are made: wait for room, until this is set, because what would be lost is the whole run.

        Raises:
            NotSaved: with ``stop``: it was set, or there was no room for a long time.
        """
        deadline = time.monotonic() + 60 * _WAIT_MINUTES
        while not self._try(method, optimizer, position, milestone):
            if stop is None:
                return False
            waiting = f"waiting up to {_WAIT_MINUTES:g} min for room for the last checkpoint"
            self._say_now_and_then("end", f"all steps are made; {waiting}: {self.why()}")
            if time.monotonic() > deadline or stop.wait(_RETRY_S):
                raise NotSaved(f"all steps are made, but there was no room to save the last of them: {self.why()}")
        self.folder.metrics.flush()
        return True

    def _try(self, method: Method, optimizer: Optimizer, position: Position, milestone: int | None) -> bool:
        train = self.recipe.train
        self.folder.metrics.sync()
        state: dict[str, Any] = {"method": method, "optimizer": optimizer, "position": position, "config": self.config}
        try:
            save_checkpoint(
                self.folder.checkpoints, **state, arch=self.recipe.arch, keep=train.keep_last, milestone=milestone
            )
        except NotSaved as error:
            self._failure = str(error)
            text = f"{error}; {self.newest()}; the run goes on, and tries again every {_RETRY_S:g} s"
            self._say_now_and_then("checkpoint", text)
            self._ask_in(_RETRY_S)
            return False
        if self._failure is not None:
            self.say(f"saved at step {position.step:,}: there is room again")
        self._failure, self.saved_step = None, position.step
        self._said_at.pop("checkpoint", None)
        self._ask_in(60 * train.checkpoint_minutes)
        return True

    def write(self, row: dict[str, Any]) -> None:
        """Add a row to the metrics."""
        metrics = self.folder.metrics
        if not metrics.append(row):
            text = f"{metrics.path}: not written ({metrics.failure}); kept in memory until there is room"
            self._say_now_and_then("metrics", text)

    def newest(self) -> str:
        """What the next start will go on from, in words."""
        step = self.saved_step
        return "there is no checkpoint" if step is None else f"the newest checkpoint is of step {step:,}"

    def why(self) -> str:
        """What became of the last try, in words."""
        return f"{self.newest()}; {self._failure}" if self._failure else self.newest()

    def _ask_in(self, seconds: float) -> None:
        self._due_at, self._asked = time.monotonic() + seconds, False

    def _say_now_and_then(self, about: str, text: str) -> None:
        """What goes wrong every few seconds is told every ten minutes."""
        if time.monotonic() - self._said_at.get(about, -math.inf) >= _SAY_EVERY_S:
            self._said_at[about] = time.monotonic()
            self.say(text)
