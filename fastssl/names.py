"""Hints for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (nearest: a, b)`` for a mistyped ``name``, or the empty string when nothing is near."""
    hits = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(hits)})" if hits else ""
