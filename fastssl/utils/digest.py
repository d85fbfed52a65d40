"""One number for all that a checkpoint holds.

Neither of our file formats notices a flipped bit: torch reads its zip archives without comparing their CRCs, and
safetensors has none. A run that went on from such weights would be another run, and nobody would know.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: Settings and optimiser states are a few levels deep; a dict that holds itself has no end. Parts in all, each counted
#: as often as it is held: dicts that each hold the next one twice are 4 billion parts at 32 levels.
_DEEPEST, _MOST = 32, 5_000_000


def digest(content: Any, *, most_bytes: float = math.inf) -> str:
    """SHA-256, as 64 hexadecimal digits, of nested dicts, lists, tuples, tensors, numbers, strings and None.

    Names, order, types, shapes and values all count; the device and the memory layout of a tensor do not.

    Args:
        most_bytes: of tensors and texts in all. A tensor can have terabytes of which the same four are stored.

    Raises:
        TypeError: there is something else in it. ValueError: it is nested too deeply, or has too many parts or bytes.
    """
    total = hashlib.sha256()
    _add(total, content, 0, _Room(_MOST, most_bytes))
    return total.hexdigest()


@dataclass
class _Room:
    """What may still come."""

    parts: int
    bytes: float

    def take(self, size: int) -> None:
        self.bytes -= size
        if self.bytes < 0:
            raise ValueError("more bytes than there are")


def add_tensor(total: Any, value: torch.Tensor) -> None:
    """Put type, shape and values into a hash of hashlib."""
    total.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
    total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _add(total: Any, content: Any, depth: int, left: _Room) -> None:
    left.parts -= 1
    if left.parts < 0:
        raise ValueError(f"more than {_MOST:,} parts")
    if depth > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} levels deep")
    if isinstance(content, torch.Tensor):
        left.take(content.numel() * content.element_size())
        total.update(b"tensor ")
        add_tensor(total, content)
    elif isinstance(content, Mapping):
        total.update(f"dict {len(content)}\n".encode())
        for key, value in content.items():
            _add(total, key, depth + 1, left)
            _add(total, value, depth + 1, left)
    elif isinstance(content, (list, tuple)):
        total.update(f"{type(content).__name__} {len(content)}\n".encode())
        for value in content:
            _add(total, value, depth + 1, left)
    elif content is None or isinstance(content, (bool, int, float, str)):
        left.take(len(content) if isinstance(content, str) else 1)
        text = repr(content)
        total.update(f"{type(content).__name__} {len(text)} {text}\n".encode("utf-8", "surrogatepass"))
    else:
        raise TypeError(f"a {type(content).__name__} has no place in a checkpoint")
