"""All that a training step changes: to be looked at, and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastssl.methods.base import Method
from fastssl.training.networks import Bf16Weights


class StepState:
    """Networks, queue or centre, and optimiser, where they are; ``bf16_weights`` follow them."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, bf16_weights: Sequence[Bf16Weights]):
        self._method, self._optimizer, self._bf16_weights = method, optimizer, bf16_weights

    def tensors(self) -> dict[str, Tensor]:
        """Networks, queue or centre by the names of their ``state_dict``; the optimiser's, which are none before its
        first step, by ``optimizer.NUMBER.NAME``.
        """
        moments = {
            f"optimizer.{number}.{name}": tensor
            for number, state in enumerate(self._optimizer.state.values())
            for name, tensor in state.items()
            if isinstance(tensor, Tensor)
        }
        return {**self._method.state_dict(), **moments}

    def copy(self) -> dict[str, Tensor]:
        """``tensors`` as they are now."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def refresh(self) -> None:
        """Let the bfloat16 weights be those of the networks."""
        for half in self._bf16_weights:
            half.refresh()

    def is_finite(self) -> bool:
        """Whether all numbers are. Waits for the device."""
        device = next(self._method.parameters()).device.type
        floats = [
            tensor
            for tensor in self.tensors().values()
            if tensor.is_floating_point() and tensor.numel() and tensor.device.type == device
        ]
        # The largest magnitude is finite if all are: one launch for all tensors, and one number to wait for.
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(floats, math.inf)).sum()))

    def snapshot(self) -> Callable[[], None]:
        """What puts all of it back, in place, as it is now. Takes as much memory as it does, and does not wait for the
        device.
        """
        kept = self.copy()

        @torch.no_grad()
        def undo() -> None:
            for name, tensor in self.tensors().items():
                # A buffer that was made meanwhile is one that the first step would have begun at zero.
                tensor.copy_(kept[name]) if name in kept else tensor.zero_()
            self.refresh()

        return undo
