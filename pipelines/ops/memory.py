"""Host memory that is used again: new memory comes from the system page by page, each with a fault that all threads
queue for. On one core that took longer than to compute what is written into it.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class ThreadMemory(threading.local):
    """Scratch memory of each thread."""

    _kept = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """(size,) uint8 of undefined content, overwritten by the thread's next use."""
        if self._kept.size < size:
            self._kept = np.empty(size + size // 4, np.uint8)
        return self._kept[:size]


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
        import torch  # here, because those who only read a .beton file do without it

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
