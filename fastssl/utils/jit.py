"""How the project's inner loops are compiled: by numba, without the interpreter lock, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numba
from numba.core.caching import FunctionCache

from fastssl.errors import FastSSLError


class _Cache(FunctionCache):
    """Numba's files of compiled code, which may be damaged, cut short or impossible to write, and then fail in any way:
    the function is compiled for this process only.
    """

    def load_overload(self, *arguments: Any) -> Any:
        with suppress(Exception):
            return super().load_overload(*arguments)
        return None

    def save_overload(self, *arguments: Any) -> None:
        with suppress(Exception):
            super().save_overload(*arguments)


def _compile(function: Callable, **options: Any) -> Callable:
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # set while numba is imported
        raise FastSSLError("NUMBA_DISABLE_JIT is set; the loops of fastssl run compiled only: unset it")
    compiled = numba.njit(nogil=True, error_model="numpy", **options)(function)
    with suppress(RuntimeError):  # neither the package's folder nor the user's cache can be written
        compiled._cache = _Cache(function)  # as njit(cache=True) does
    return compiled


#: Compile; sums may be taken in any order, so that they become vector instructions.
fast = partial(_compile, fastmath=True)
#: Compile with each operation rounded on its own, as IEEE 754 and NumPy have it: the same bits on any machine.
exact = partial(_compile, fastmath=False)
