"""What the device itself can do, as calls that take their turn among the contenders: a large copy and a large matrix
product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Bytes of the copy: several times any cache.
_COPY_CPU, _COPY_GPU = 2**26, 2**29
#: Side of the square matrices.
_SIDE_CPU, _SIDE_GPU = 1024, 8192


def _on_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def copy_bytes(device: torch.device | str) -> int:
    """Bytes that one ``copy_call`` moves, read and written counted."""
    return 2 * (_COPY_GPU if _on_gpu(device) else _COPY_CPU)


def copy_call(device: torch.device | str) -> Callable[[], object]:
    """Copies a block of memory to another; on a CPU with all of torch's threads."""
    source = torch.zeros(copy_bytes(device) // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product_flop(device: torch.device | str) -> int:
    """Floating-point operations of one ``product_call``, two for a multiplication with its addition."""
    return 2 * (_SIDE_GPU if _on_gpu(device) else _SIDE_CPU) ** 3


def product_call(device: torch.device | str, dtype: torch.dtype) -> Callable[[], object]:
    """Multiplies two square matrices of ``dtype``."""
    side = _SIDE_GPU if _on_gpu(device) else _SIDE_CPU
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right
