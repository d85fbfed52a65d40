"""How the project's inner loops are compiled: by numba, without the interpreter lock, kept on disk after the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def fast(function: Callable) -> Callable:
    """Compile; sums may be taken in any order, so that they become vector instructions."""
    return _compile(function, fastmath=True)


def exact(function: Callable) -> Callable:
    """Compile with each operation rounded on its own, as IEEE 754 and NumPy have it: the same bits on any machine."""
    return _compile(function, fastmath=False)


def _compile(function: Callable, **options: Any) -> Callable:
    options.update(nogil=True, error_model="numpy")
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**options)(function)
