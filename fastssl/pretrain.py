"""One run: processes, training, report. The module itself is `fastssl.api.pretrain`, for all who have photos and no
recipe at hand: ``fastssl.pretrain("photos/")``.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

from fastssl.config.recipe import Recipe
from fastssl.config.recipe_choice import follow_samples
from fastssl.distributed.devices import choose_device, only_deterministic
from fastssl.distributed.group import joined
from fastssl.distributed.world import first_of_host_speaks, world_from_environment
from fastssl.errors import FastSSLError, Interrupted, counted
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.report.finish import finish_run
from fastssl.runs.loggers import logging_to, require_loggers
from fastssl.runs.status import State
from fastssl.training.setup import Progress, RunOptions, Setup, prepare
from fastssl.training.trainer import train
from fastssl.utils.callable_module import CallableModule

__all__ = ["RunOptions", "pretrain"]

sys.modules[__name__].__class__ = CallableModule


class _Silence:
    """The progress of all processes but the first."""

    def row(self, *_: object, **__: object) -> None:
        pass

    message = note = row


def pretrain(recipe: Recipe, options: RunOptions, progress: Progress) -> dict[str, Any] | None:
    """Train, probe, and write the run's folder; returns the summary, as in ``summary.json``, or None in all processes
    but the first.

    Raises:
        Interrupted: by a signal, after a checkpoint was written.
        NotSaved: there was no room for the checkpoint when a signal came, or for a long time at the end.
        FastSSLError: bad data, a run of other settings in the folder, or a loss that is no longer finite.
    """
    started = time.monotonic()
    world = world_from_environment()
    with ExitStack() as files:
        if recipe.train.deterministic:
            files.enter_context(only_deterministic())
        with first_of_host_speaks():
            require_loggers(options.log)
            device = choose_device(options.device, world)
            reader = files.enter_context(open_beton(options.data))
            val = files.enter_context(open_beton(options.val)) if options.val else None
            for one in filter(None, (reader, val)):
                one.side_notes()  # an unreadable one fails here: the report asks it for the classes' names
        recipe = follow_samples(recipe, len(reader))
        log = progress if world.is_main else _Silence()
        if world.size > 1:
            log.note(f"{world.size} processes meet at {world.address}:{world.port}")
        joining = time.monotonic()
        run: Setup | None = None
        with ExitStack() as listening:
            try:
                with joined(world, device):
                    if world.size > 1:
                        log.note(f"all {world.size} are here after {time.monotonic() - joining:.0f} s")
                    run = prepare(recipe, options, reader, val, log, world, device)
                    files.callback(run.close)
                    run.tell_status("training")
                    names = options.log if world.is_main else ()
                    tell = files.enter_context(logging_to(names, options.out, run.config, log.message))
                    # Until this process has left the others: a launcher repeats itself, and ends all as soon as the
                    # first has gone.
                    listening.enter_context(run.stop.by_signals())
                    train(run)
            except BaseException as error:
                state: State = "stopped" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
                why = str(error) if isinstance(error, FastSSLError) else f"{type(error).__name__}: {error}"
                if isinstance(error, KeyboardInterrupt):
                    why = str(error) or "interrupted"
                if run is not None:
                    run.tell_status(state, why=why[:1000])
                raise
            run.tell_status("trained")
        # The processes have parted: what follows is the first one's alone.
        if not world.is_main:
            return None
        if run.stop:  # too late for the last step to be told
            made = run.length.total_steps
            saved = f"{made:,} of {counted(made, 'step')} made and saved in {options.out}"
            raise Interrupted(f"{saved}; the same command writes the report")
        before = "a random one, the weights as they came" if options.init else "the same network before training"
        log.note(f"probing: the trained network, {before}, raw pixels, colours")
        summary = finish_run(run, started)
        tell(summary)
        run.tell_status("finished")
        return summary
