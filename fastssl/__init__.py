"""fastssl: pre-train phone-sized vision networks without labels, as fast as the hardware can decode photos."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastssl._version import __version__
from fastssl.errors import FastSSLError, Interrupted, require_posix

if TYPE_CHECKING:
    from fastssl.api import RunResult, embed, evaluate, export, pretrain
    from fastssl.weights.source import load_backbone
    from fastssl.weights.transform import transform

#: Where each name lives.
_HOMES = dict.fromkeys(("RunResult", "embed", "export"), "api")
_HOMES |= {"load_backbone": "weights.source", "transform": "weights.transform"}
__all__ = ["FastSSLError", "Interrupted", "__version__", "evaluate", "pretrain"]
__all__ += ["RunResult", "embed", "export", "load_backbone", "transform"]

# Read when torch is loaded: what it cannot do on an Apple GPU, it does on the CPU, and says so.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def __getattr__(name: str) -> Any:
    # Lazy: `fastssl --help` should not load torch.
    if name in ("evaluate", "pretrain"):  # see `CallableModule`
        require_posix()
        return import_module(f"fastssl.{name}")
    if name in _HOMES:
        return getattr(import_module(f"fastssl.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastssl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
