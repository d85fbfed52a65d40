"""The least time that a step's layers can take on this machine: for each its arithmetic or its memory traffic,
whichever takes longer.

Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 2009. Counted are convolutions
and linear layers, each reading its input and its weights and writing its output once: BatchNorm, activations and
squeeze-and-excite are taken as fused into them. Eager code moves two to three times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Layer(NamedTuple):
    """Of a forward pass: floating-point operations (two for a multiplication with its addition) and bytes moved."""

    flop: float
    bytes: float


@dataclass(frozen=True)
class Cost:
    """A network's forward pass over one batch: convolutions and linear layers, and ``flop`` of all matrix products and
    convolutions, those outside of layers (attention) included.
    """

    layers: tuple[Layer, ...]
    flop: int

    @property
    def bytes(self) -> float:
        return sum(layer.bytes for layer in self.layers)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.layers + other.layers, self.flop + other.flop)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.layers * times, self.flop * times)

    def seconds(self, flop_per_s: float, bytes_per_s: float) -> float:
        """The least time of the pass at these rates."""
        of_layers = sum(max(layer.flop / flop_per_s, layer.bytes / bytes_per_s) for layer in self.layers)
        return of_layers + max(0.0, self.flop - sum(layer.flop for layer in self.layers)) / flop_per_s


@torch.no_grad()
def forward_cost(network: nn.Module, images: Tensor | Sequence[Tensor], itemsize: int) -> Cost:
    """Count one forward pass of ``network``, in the mode that it is in, over ``images`` (N, 3, S, S), or what else it
    takes. ``itemsize``: bytes of an activation, 2 under autocast, else 4.
    """
    layers: list[Layer] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = layer.weight  # of a convolution (out, in / groups, kh, kw), of a linear layer (out, in)
        assert isinstance(weight, Tensor)
        moved = inputs[0].numel() + output.numel() + weight.numel()
        layers.append(Layer(2.0 * weight[0].numel() * output.numel(), float(itemsize * moved)))

    watched = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in watched]
    try:
        with FlopCounterMode(display=False) as counter:
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(tuple(layers), counter.get_total_flops())
