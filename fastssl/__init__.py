"""fastssl: pre-train phone-sized vision networks without labels, as fast as the hardware can decode photos."""

from __future__ import annotations

from typing import Any

from fastssl._version import __version__

__all__ = ["__version__", "load_backbone"]


def __getattr__(name: str) -> Any:
    # Lazy: `fastssl --help` should not load torch.
    if name == "load_backbone":
        from fastssl.models.backbones import load_backbone

        return load_backbone
    raise AttributeError(f"module 'fastssl' has no attribute {name!r}")
