"""A line of metrics for every block of steps."""

from __future__ import annotations

import dataclasses
import time

from fastssl.pipelines.loader import ViewLoader
from fastssl.training.bottleneck import data_share
from fastssl.training.rollback import diverged
from fastssl.training.setup import Setup
from fastssl.training.step import numbers


class StepLog:
    """Times blocks of steps of ``run``, and reports each: rates, waiting, what the schedules said, the metrics' means.

    Args:
        run: whose metrics file and progress get the lines.
        loader: whose clocks say what the photos cost.
    """

    def __init__(self, run: Setup, loader: ViewLoader):
        self._run, self._loader = run, loader
        self._views = sum(spec.count for spec in run.recipe.views)
        self.begin_block()

    def begin_block(self) -> None:
        """Steps are timed from here."""
        self._started = time.monotonic()
        self._prepared_s = self._run.step.prepare_s
        self._stats, self._cpu = dataclasses.replace(self._loader.stats), time.thread_time()

    def is_block_end(self) -> bool:
        """By the position and not by the steps made: blocks end where those of an uninterrupted run do."""
        done = self._run.position.step_in_epoch
        return done % self._run.recipe.train.log_every == 0 or done == self._run.length.steps_per_epoch

    def end_block(self, *, wait: bool = False) -> None:
        """Report the steps since ``begin_block``.

        Args:
            wait: for the metrics of these very steps; otherwise on a GPU they may be written a block later.

        Raises:
            FastSSLError: a loss is not finite.
        """
        run = self._run
        if len(run.ring):
            self._flush(len(run.ring))
        for row in run.ring.collect(wait=wait or run.position.step == run.length.total_steps):
            bad = row.pop("nonfinite", None)
            if run.saver:
                run.saver.write(row)
            run.progress.row({**row, "knn": run.online_knn}, run.position.step, run.length.total_steps)
            if bad is not None:
                raise diverged(run, bad, f"the loss is {row['loss']}")

    def _flush(self, steps: int) -> None:
        run, spent, before = self._run, self._loader.stats, self._stats
        # Minutes of compiling before the first step are not the rate of a step.
        seconds = max(time.monotonic() - self._started - (run.step.prepare_s - self._prepared_s), 1e-9)
        waited = spent.wait_s - before.wait_s
        run.position.train_seconds += seconds
        pairs = steps * run.recipe.train.batch_size
        run.ring.flush(
            {
                "kind": "step",
                "step": run.position.step,
                "epoch": run.position.step / run.length.steps_per_epoch,
                **numbers(run.rates),
                "pair_per_s": pairs / seconds,
                "view_per_s": pairs * self._views / seconds,
                "data_wait": waited / seconds,
                "data_share": data_share(
                    seconds,
                    on_cpu=run.device.type == "cpu",
                    wait_s=waited,
                    colour_s=spent.colour_s - before.colour_s,
                    loader_cpu_s=spent.host_cpu_s - before.host_cpu_s,
                    step_cpu_s=time.thread_time() - self._cpu - (spent.consumer_cpu_s - before.consumer_cpu_s),
                ),
                "seconds": run.position.train_seconds,
            }
        )
