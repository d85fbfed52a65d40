"""bfloat16 weights that are cast once a step.

Autocast casts a weight whenever a layer needs it: once a step in the student, whose casts it keeps, but once for every
pass in a network without gradient, and the teacher makes a pass for each BatchNorm group. In MobileNet-V3-Large 167 of
a step's 632 kernels are such casts. Here the networks that compute are copies whose convolutions and linear layers hold
bfloat16 weights; they are filled from the float32 ones in one go, and the student's gradients come back the same way.
The numbers are those of autocast to the last bit.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

#: Layers whose weights autocast casts to bfloat16; all others compute with their float32 parameters.
_CAST_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _only_multiplies(layer: nn.Module) -> bool:
    """Whether the layer's weights go into the product as they are. Some kinds standardise them first, in float32, and
    are left to autocast.
    """
    kinds = [kind for kind in _CAST_LAYERS if isinstance(layer, kind)]
    return any(type(layer).forward is kind.forward for kind in kinds) or type(layer).__name__ == "Conv2dSame"


class Bf16Weights:
    """A copy of a network that computes with bfloat16 weights where autocast would.

    Every other parameter and every buffer (BatchNorm's statistics, position embeddings) is the very tensor of the
    original, so that there is one truth.

    Args:
        original: in float32, on its device already, in training mode; it may not be replaced or moved afterwards.

    Attributes:
        network: the copy; to be called under autocast to bfloat16.
    """

    def __init__(self, original: nn.Module):
        layers = [layer for layer in original.modules() if _only_multiplies(layer)]
        cast = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}
        shared = {id(t): t for t in (*original.parameters(), *original.buffers()) if id(t) not in cast}
        self.network: nn.Module = copy.deepcopy(original, shared)
        names = [name for name, parameter in original.named_parameters() if id(parameter) in cast]
        self._full: list[Tensor] = [original.get_parameter(name) for name in names]
        self._half: list[Tensor] = [self._replace(name) for name in names]

    def _replace(self, name: str) -> nn.Parameter:
        path, _, last = name.rpartition(".")
        layer = self.network.get_submodule(path)
        full = getattr(layer, last)
        half = nn.Parameter(full.detach().to(torch.bfloat16), requires_grad=full.requires_grad)
        setattr(layer, last, half)
        return half

    @torch.no_grad()
    def refresh(self) -> None:
        """Fill the bfloat16 weights from the float32 ones."""
        torch._foreach_copy_(self._half, self._full)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add what a backward pass left at the bfloat16 weights to the float32 weights' gradients, and clear it."""
        fresh: tuple[list[Tensor], list[Tensor]] = [], []
        again: tuple[list[Tensor], list[Tensor]] = [], []
        for full, half in zip(self._full, self._half):
            if half.grad is None:
                continue
            totals, grads = fresh if full.grad is None else again
            if full.grad is None:
                full.grad = torch.empty_like(full)
            totals.append(full.grad)
            grads.append(half.grad)
            half.grad = None
        if fresh[0]:
            torch._foreach_copy_(*fresh)
        if again[0]:
            torch._foreach_add_(*again)
