"""A queue of the keys of past steps, the same on all ranks: what MoCo and distillation compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Queued(nn.Module):
    """Of a method that has one: ``queue``, (K, D) unit vectors; the oldest stand at ``queue_pointer``."""

    queue: Tensor
    queue_pointer: Tensor

    def begin_queue(self, count: int, width: int, generator: torch.Generator | None) -> None:
        """Fill it with random unit vectors, as MoCo does, drawn on the CPU."""
        queue = torch.randn(count, width, generator=generator)
        # Buffers, and persistent: a run that resumed with a fresh queue would be another run.
        self.register_buffer("queue", functional.normalize(queue, dim=1))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write the keys of all ranks over the oldest ones. The pointer lives on the device: no host sync."""
        count = len(keys)
        places = (self.queue_pointer + torch.arange(count, device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys.to(self.queue.dtype))
        self.queue_pointer.add_(count).remainder_(len(self.queue))
