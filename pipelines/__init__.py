"""The input side: from a ``.beton`` file to batches of augmented views. Knows nothing of the trainer.

Names are imported when they are first used: reading or checking a ``.beton`` file does not load torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastssl.errors import BetonError, FastSSLError, JpegError

_LAZY = {
    "Batch": "loader",
    "BetonReader": "beton.reader",
    "BetonSet": "beton.dataset",
    "BetonWriter": "beton.writer",
    "MultiCrop": "plan.multicrop",
    "ViewLoader": "loader",
    "ViewSpec": "plan.draw",
    "open_beton": "beton.dataset",
}

__all__ = ["BetonError", "FastSSLError", "JpegError", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
