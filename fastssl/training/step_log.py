"""A line of metrics for every block of steps; no step waits for the device."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastssl.distributed.collectives import all_reduce_mean
from fastssl.pipelines.loader import ViewLoader
from fastssl.training.bottleneck import data_share
from fastssl.training.rollback import diverged
from fastssl.training.step import numbers

if TYPE_CHECKING:
    from fastssl.training.setup import Setup


@dataclass
class _Block:
    values: Tensor  # (steps, metrics), on the host once ``copied`` has passed
    steps: list[int]
    copied: torch.cuda.Event | None
    row: dict[str, Any]


class MetricRing:
    """Collects a vector of metrics a step on the device, and hands out their means a block later.

    ``push`` and ``flush`` only queue work. On a GPU ``collect`` returns the blocks whose copy has arrived by now;
    reading ``loss.item()`` instead would stop the host until the device has caught up, every step.

    Of several processes each hands out the mean over all; they flush together.

    Args:
        names: of the metrics, in the order of the pushed vectors; ``loss`` is one of them.
        capacity: steps in the largest block.
        device: where the vectors live.
    """

    def __init__(self, names: tuple[str, ...], capacity: int, device: torch.device):
        self.names = names
        self._loss = names.index("loss")
        self._ring = torch.zeros(capacity, len(names), device=device)
        self._steps: list[int] = []
        self._blocks: deque[_Block] = deque()

    def __len__(self) -> int:
        """Steps pushed since the last flush."""
        return len(self._steps)

    def push(self, metrics: Tensor, step: int) -> None:
        """Add the vector (len(names),), float32, on the device, of one step."""
        self._ring[len(self._steps)].copy_(metrics)
        self._steps.append(step)

    def pop(self) -> None:
        """Forget the step that was pushed last."""
        self._steps.pop()

    def clear(self) -> None:
        """Forget the steps since the last flush."""
        self._steps = []

    def is_finite(self) -> bool:
        """Whether all losses since the last flush are. Waits for the device."""
        return bool(torch.isfinite(self._ring[: len(self._steps), self._loss]).all())

    def flush(self, row: dict[str, Any]) -> None:
        """Close the block; ``row`` is what the host knows about it (step, lr, ...)."""
        values, copied = all_reduce_mean(self._ring[: len(self._steps)].clone()), None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._blocks.append(_Block(values, self._steps, copied, row))
        self._steps = []

    def collect(self, wait: bool = False) -> list[dict[str, Any]]:
        """Rows that are complete: the host's values and the means of the metrics. ``wait``: all of them, at the end.

        Where a loss is not finite, ``nonfinite`` names the first step at which.
        """
        rows = []
        while self._blocks:
            block = self._blocks[0]
            if block.copied is not None:
                if wait:
                    block.copied.synchronize()
                elif not block.copied.query():
                    break
            self._blocks.popleft()
            means = block.values.mean(dim=0).tolist()
            bad = (~torch.isfinite(block.values[:, self._loss])).nonzero()
            where = {"nonfinite": block.steps[int(bad[0])]} if len(bad) else {}
            rows.append({**block.row, **dict(zip(self.names, means)), **where})
        return rows


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
            run.progress.row({**row, "knn": run.online_knn}, row["step"], run.length.total_steps)
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
