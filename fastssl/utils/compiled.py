"""Functions that torch.compile makes kernels of, and what runs where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastssl.errors import without_folders


class Compiled:
    """A function of tensors, compiled at its first call, for all sizes at once; where that cannot be had, another one.

    Args:
        function: what is compiled; makes no constants, which a recorded step would copy at every replay.
        otherwise: computes the same without a compiler.

    Attributes:
        reason: why ``otherwise`` runs; empty while it does not.
    """

    def __init__(self, function: Callable[..., Any], otherwise: Callable[..., Any]):
        self._compiled, self._otherwise, self.reason = torch.compile(function, dynamic=True), otherwise, ""

    def __call__(self, *arguments: Any) -> Any:
        if torch._dynamo.config.disable:
            self.reason = "switched off by TORCH_COMPILE_DISABLE"
        if not self.reason:
            try:
                return self._compiled(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler may fail with
                # It quotes its command line, with all folders in it.
                self.reason = f"{type(error).__name__}: {without_folders(' '.join(str(error).split()))[:200]}"
        return self._otherwise(*arguments)
