"""From the host to a device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(table: NDArray, device: torch.device) -> Tensor:
    """A small host table as a tensor on the device; through pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(table)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pinned_bytes(size: float) -> int:
    """What torch takes for ``size`` bytes of pinned memory: the next power of two."""
    return 1 << (math.ceil(size) - 1).bit_length()


def take_over(tensors: Sequence[Tensor], made: torch.cuda.Event, device: torch.device) -> None:
    """Let the current stream read ``tensors``, which another one has written by the time of ``made``. The host does not
    wait.
    """
    current = torch.cuda.current_stream(device)
    current.wait_event(made)
    for tensor in tensors:  # the allocator could else hand their memory on while it is being read
        tensor.record_stream(current)
