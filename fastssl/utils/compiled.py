"""Functions that torch.compile makes kernels of, where it can."""

from __future__ import annotations

from collections.abc import Callable
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
    """A function of tensors, compiled at its first call for all sizes at once; where that cannot be had, as it is.

    Args:
        function: makes no constants, which a recorded step would copy at every replay.

    Attributes:
        reason: why nothing is compiled; empty while it is.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function, self._compiled = function, torch.compile(function, dynamic=True, options=RECOMPUTE)
        self.reason = "switched off by TORCH_COMPILE_DISABLE" if torch._dynamo.config.disable else ""

    def __call__(self, *arguments: Any) -> Any:
        if not self.reason:
            try:
                return self._compiled(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler may fail with
                # It quotes its command line, with all folders in it.
                self.reason = f"{type(error).__name__}: {without_folders(' '.join(str(error).split()))[:200]}"
        return self._function(*arguments)
