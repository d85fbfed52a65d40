"""The input side: from a ``.beton`` file to batches of augmented views. Knows nothing of the trainer.

Names are imported when they are first used: reading or checking a ``.beton`` file does not load torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastssl.errors import BetonError, FastSSLError, JpegError

_LAZY = {
    "Batch": "fastssl.pipelines.loader",
    "BetonReader": "fastssl.pipelines.beton.reader",
    "BetonWriter": "fastssl.pipelines.beton.writer",
    "MultiCrop": "fastssl.pipelines.plan.multicrop",
    "ViewLoader": "fastssl.pipelines.loader",
    "ViewSpec": "fastssl.pipelines.plan.draw",
}

__all__ = [
    "Batch",
    "BetonError",
    "BetonReader",
    "BetonWriter",
    "FastSSLError",
    "JpegError",
    "MultiCrop",
    "ViewLoader",
    "ViewSpec",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
