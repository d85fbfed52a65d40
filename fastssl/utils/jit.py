"""How the project's inner loops are compiled: by numba, without the interpreter lock, kept on disk after the first
call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import FunctionCache

from fastssl.errors import FastSSLError


def fast(function: Callable) -> Callable:
    """Compile; sums may be taken in any order, so that they become vector instructions."""
    return _compile(function, fastmath=True)


def exact(function: Callable) -> Callable:
    """Compile with each operation rounded on its own, as IEEE 754 and NumPy have it: the same bits on any machine."""
    return _compile(function, fastmath=False)


class _Cache(FunctionCache):
    """Numba's files of compiled code, which may be damaged, cut short or impossible to write: then the function is
    compiled for this process only.
    """

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # unpickling a file that somebody else has cut short can fail in any way
            return None

    def save_overload(self, *arguments: Any) -> None:
        try:
            super().save_overload(*arguments)
        except Exception:  # no space, no right, or an index that cannot be read
            return


def _compile(function: Callable, **options: Any) -> Callable:
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # set while numba is imported
        raise FastSSLError("NUMBA_DISABLE_JIT is set; the loops of fastssl run compiled only: unset it")
    compiled = numba.njit(nogil=True, error_model="numpy", **options)(function)
    try:
        compiled._cache = _Cache(function)  # as njit(cache=True) does
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        pass
    return compiled
