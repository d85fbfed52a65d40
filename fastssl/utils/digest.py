"""One number for all that a checkpoint holds. Neither of our file formats notices a flipped bit: torch reads its zip
archives without comparing their CRCs, and safetensors has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


def digest(content: Any) -> str:
    """SHA-256, as 64 hexadecimal digits, of nested dicts, lists, tuples, tensors, numbers, strings and None; TypeError
    for anything else. Names, order, types, shapes and values all count; device and memory layout of a tensor do not.
    """
    total = hashlib.sha256()
    _add(total, content)
    return total.hexdigest()


def add_tensor(total: Any, value: torch.Tensor) -> None:
    """Put type, shape and values into a hash of hashlib."""
    total.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
    total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _add(total: Any, content: Any) -> None:
    if isinstance(content, torch.Tensor):
        total.update(b"tensor ")
        add_tensor(total, content)
    elif isinstance(content, Mapping):
        total.update(f"dict {len(content)}\n".encode())
        for item in content.items():
            for part in item:
                _add(total, part)
    elif isinstance(content, (list, tuple)):
        total.update(f"{type(content).__name__} {len(content)}\n".encode())
        for part in content:
            _add(total, part)
    elif content is None or isinstance(content, (bool, int, float, str)):
        text = repr(content)
        total.update(f"{type(content).__name__} {len(text)} {text}\n".encode("utf-8", "surrogatepass"))
    else:
        raise TypeError(f"a {type(content).__name__} has no place in a checkpoint")
