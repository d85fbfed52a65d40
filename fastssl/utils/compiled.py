"""Functions that torch.compile makes kernels of, where it can."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from fastssl.errors import without_folders

#: For torch.compile: a value that several kernels read is computed again in each of them, from more inputs and in more
#: operations than Inductor does by itself. Small networks wait for memory, not for arithmetic: of a MoCo step of
#: MobileNet-V3 a fifth of the bytes is the values that would be written for others to read (counted).
RECOMPUTE: dict[str, Any] = {
    "realize_reads_threshold": 12,
    "realize_acc_reads_threshold": 24,
    "realize_opcount_threshold": 60,
}


class Compiled:
    """A function of tensors, compiled at its first call; where that cannot be had, as it is.

    Args:
        function: makes no constants, which a recorded step would copy at every replay.
        backend: of torch.compile; None: nothing is compiled.
        options: its other ones.

    Attributes:
        reason: why nothing is compiled, though it should be; else empty.
    """

    def __init__(
        self, function: Callable[..., Any], backend: str | Callable[..., Any] | None = "inductor", **options: Any
    ):
        self._function = self._compiled = function
        self.reason = ""
        if backend is not None and torch._dynamo.config.disable:
            self.reason = "switched off by TORCH_COMPILE_DISABLE"
        elif backend is not None:
            # With code of its own: torch counts recompilations by code, and a process may have many of one function.
            code, rest = function.__code__.replace(), (None, function.__defaults__, function.__closure__)
            own = FunctionType(code, function.__globals__, *rest)
            how: dict[str, Any] = {"options": RECOMPUTE if backend == "inductor" else None, **options}
            self._compiled = torch.compile(own, backend=backend, **how)

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is not self._function:
            try:
                return self._compiled(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler may fail with
                # It quotes its command line, with all folders in it.
                self.reason = f"{type(error).__name__}: {without_folders(' '.join(str(error).split()))[:200]}"
                self._compiled = self._function
        return self._function(*arguments)
