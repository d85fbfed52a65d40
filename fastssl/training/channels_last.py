"""Is the memory layout that a network was given still there at its end? One silent ``.contiguous()`` on the way undoes
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn


def require_channels_last(images: Tensor) -> None:
    """Refuse a batch in another layout.

    Raises:
        ValueError: ``images`` is not (N, C, H, W) in channels-last memory.
    """
    if images.dim() != 4 or not images.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"the step takes images (N, 3, S, S) in channels-last memory, got {tuple(images.shape)} with "
            f"strides {images.stride()}: "
            "images.contiguous(memory_format=torch.channels_last)"
        )


@torch.no_grad()
def channels_last_breaks(network: nn.Module, images: Tensor) -> list[str]:
    """Names of the layers that got channels-last maps and gave others; empty: the layout holds throughout.

    The network is run once in evaluation mode and left as it was.

    Args:
        network: any; layers whose input or output is no map (N, C, H, W) do not count, nor do maps of one pixel, which
            have no layout.
        images: (N, 3, S, S) channels-last, on the network's device.
    """
    broken: list[str] = []

    def is_map(tensor: object) -> TypeGuard[Tensor]:
        return (
            isinstance(tensor, Tensor)
            and tensor.dim() == 4
            and tensor.shape[1] > 1
            and tensor.shape[2] * tensor.shape[3] > 1
        )

    def watch(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def look(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if inputs and is_map(inputs[0]) and is_map(output):
                before, after = (t.is_contiguous(memory_format=torch.channels_last) for t in (inputs[0], output))
                if before and not after:
                    broken.append(name)

        return look

    leaves = [(name, layer) for name, layer in network.named_modules() if next(layer.children(), None) is None]
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in leaves]
    modes = [(layer, layer.training) for layer in network.modules()]
    try:
        network.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, training in modes:
            layer.training = training
    return broken
