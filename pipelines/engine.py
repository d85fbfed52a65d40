"""What every engine promises: encoded pictures and a view plan in, uint8 views out.

An engine is a pure function of (bytes, plan). It never draws a random number, so any two engines render the same
request to the same pixels within rounding, and a run can change its engine without changing its experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass
class Request:
    """One batch to be rendered.

    Attributes:
        index: (B,) int64 sample ids.
        plans: one ``(count, B)`` array of ``VIEW_DTYPE`` for each view group.
    """

    index: np.ndarray
    plans: list[np.ndarray]


@dataclass
class Rendered:
    """A request with its pictures. The views are valid until the next one is taken from the engine.

    Attributes:
        request: as rendered: where a damaged sample was skipped, its place names the sample that took it.
        views: one (count * B, 3, S, S) uint8 channels-last tensor for each group, view-major, on the loader's device.
    """

    request: Request
    views: list[Tensor]


@dataclass
class EngineStats:
    """What the host spent, summed since the engine was opened (or since ``reset``).

    Attributes:
        samples: pictures decoded.
        host_cpu_s: CPU seconds of the worker threads (decode, host crops, plan).
        wait_s: seconds for which the consumer stood waiting for a batch to be ready.
        skipped: ids of damaged samples that were passed over, in the order met.
    """

    samples: int = 0
    host_cpu_s: float = 0.0
    wait_s: float = 0.0
    skipped: list[int] = field(default_factory=list)

    def reset(self) -> None:
        """Start counting from zero (``skipped`` is a record of the data, not of time: it stays)."""
        self.samples, self.host_cpu_s, self.wait_s = 0, 0.0, 0.0


class Engine(Protocol):
    """Renders requests in order, some way ahead of the consumer."""

    stats: EngineStats

    def run(self, requests: Iterator[Callable[[], Request]]) -> Iterator[Rendered]:
        """Render one after the other. Requests come as callables, so that drawing the plan is the workers' job too.

        Closing the iterator early stops the work that was begun ahead.
        """
        ...

    def close(self) -> None:
        """Join all threads and free all buffers."""
        ...
