"""Hints for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (nearest: a, b)`` for a mistyped ``name``, or the empty string when nothing is near."""
    hits = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(hits)})" if hits else ""


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """``; did you mean optim.lr?`` for a dotted ``key`` that does not exist, or the empty string when nothing is near.

    The last name decides, by its spelling, its beginning or its initials (``lr``, ``learning_rate``); among equals
    those before it do.
    """
    section, _, name = key.rpartition(".")
    scores = {}
    for other in known:
        place, _, last = other.rpartition(".")
        if (alike := _alike(name, last)) >= 0.6:
            scores[other] = alike + 0.3 * difflib.SequenceMatcher(None, section, place).ratio()
    best = max(scores.values(), default=0)
    hits = sorted((other for other in scores if scores[other] > best - 0.1), key=scores.__getitem__, reverse=True)[:3]
    return f"; did you mean {' or '.join(hits)}?" if hits else ""


def _alike(one: str, other: str) -> float:
    """1: the same; 0.8 and more: initials, words, beginning, or that of a word; else the share of equal characters."""
    if one == other:
        return 1.0
    initials, others = ("".join(word[:1] for word in name.split("_")) for name in (one, other))
    words, theirs = ({word[:4] for word in name.split("_")} for name in (one, other))  # gradient_clipping, clip_grad
    if initials == other or one == others or words == theirs:
        return 0.95
    if min(len(one), len(other)) >= 3 and (one.startswith(other) or other.startswith(one)):
        return 0.9
    if len(one) >= 3 and any(word.startswith(one) for word in other.split("_")):
        return 0.8
    return difflib.SequenceMatcher(None, one, other).ratio()


def some_names(names: Iterable[str], word: str, most: int = 3) -> str:
    """``5 missing (a, b, c, ...)``, or the empty string if there are none."""
    names = sorted(names)
    return f"{len(names)} {word} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})" if names else ""
