"""Meters that never make a step wait for the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed.collectives import all_reduce_mean, world_size


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
        values, copied = self._ring[: len(self._steps)], None
        if world_size() > 1:
            values = all_reduce_mean(values.clone())
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            # Ordered behind the pushes on this stream, and before those of the next block: the ring may be reused at
            # once.
            values = host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        else:
            values = values.clone()
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
