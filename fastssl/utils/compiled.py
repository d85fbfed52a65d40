"""Functions that torch.compile makes kernels of, where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastssl.errors import without_folders


class Compiled:
    """A function of tensors, compiled at its first call for all sizes at once; where that cannot be had, as it is.

    Args:
        function: makes no constants, which a recorded step would copy at every replay.

    Attributes:
        reason: why nothing is compiled; empty while it is.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function, self._compiled = function, torch.compile(function, dynamic=True)
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
