"""fastssl: pre-train phone-sized vision networks without labels, as fast as the hardware can decode photos."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastssl._version import __version__
from fastssl.errors import FastSSLError, Interrupted

if TYPE_CHECKING:
    from fastssl.api import RunResult, StopRequest, embed, evaluate, export, load_backbone, pretrain, transform

__all__ = [
    "FastSSLError",
    "Interrupted",
    "RunResult",
    "StopRequest",
    "__version__",
    "embed",
    "evaluate",
    "export",
    "load_backbone",
    "pretrain",
    "transform",
]


def __getattr__(name: str) -> Any:
    # Lazy: `fastssl --help` should not load torch.
    if name in ("evaluate", "pretrain"):
        return import_module(f"fastssl.{name}")
    if name in __all__:
        return getattr(import_module("fastssl.api"), name)
    raise AttributeError(f"module 'fastssl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
