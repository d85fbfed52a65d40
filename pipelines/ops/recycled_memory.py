"""Host memory that is used again, because new memory is not free.

A batch of float views is too large for the allocator to keep: each comes from the system as pages of zeros, one fault a
page, and goes back when the batch is dropped. On one core that took longer than to compute what is written into it.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor


class RecycledMemory:
    """Gives float32 tensors on memory of earlier ones that nobody refers to any more.

    Args:
        most: blocks kept. Whoever keeps more batches than that gets new memory each time, never memory that is in use.
    """

    def __init__(self, most: int = 4):
        self.most = most
        # Each block with the array that the last tensor on it was made from: torch holds on to that as long as any view
        # of the tensor lives.
        self._blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def take(self, *shape: int) -> Tensor:
        """A contiguous float32 tensor whose content is undefined."""
        numel = math.prod(shape)
        free = [place for place, (block, user) in enumerate(self._blocks) if user() is None and block.size >= numel]
        if free:
            block, _ = self._blocks.pop(free[0])
        else:
            block = np.empty(numel, np.float32)
            in_use = [pair for pair in self._blocks if pair[1]() is not None]  # what is free was too small
            self._blocks = in_use[max(0, len(in_use) + 1 - self.most) :]
        array = block[:numel].reshape(shape)
        self._blocks.append((block, weakref.ref(array)))
        return torch.from_numpy(array)
