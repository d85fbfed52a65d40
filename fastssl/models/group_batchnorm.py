"""BatchNorm by groups: one pass in which every layer normalises each group of the rows by the group's own mean and
variance, as if the groups had gone through the network one after the other.

    rows      group after group: all rows of a group lie together
    output    as of a pass for each group; so are the gradients
    running   r <- a^G r + m * sum over g of a^(G - 1 - g) x_g       a = 1 - m: what G passes do to a statistic r

The statistics of all layers move at the end of the pass, in a handful of launches for the whole network, and so do
their counters, without groups too. On a GPU the activation behind a layer is part of it: backward works it out again
from the layer's input, and neither keeps nor reads what the two gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.models.heads import at_least_float32
from fastssl.utils.compiled import Compiled


class BatchNorms:
    """What the BatchNorms of a network share: the groups of the pass that runs, and the statistics that it took.

    Attributes:
        complete: whether all layers with statistics of a batch take them by group; otherwise groups need passes of
            their own.
        groups: of the rows that go through the layers now; 0: they are taken whole. None: no pass runs, and the layers
            are the ordinary ones.
    """

    def __init__(self, network: nn.Module):
        """Let all ``nn.BatchNorm1d``, ``nn.BatchNorm2d`` and timm's ``BatchNormAct2d`` of ``network`` do so, in place:
        a layer only changes its class.
        """
        self.complete = True
        for number, layer in enumerate(network.modules()):
            if type(layer) in _BY_GROUP and layer.momentum is not None:
                layer.__class__ = _BY_GROUP[type(layer)]
            if isinstance(layer, GroupBatchNorm):
                layer.norms, layer.number = self, number
            elif isinstance(layer, _BatchNorm) or "running_var" in layer._buffers:
                self.complete = False
        self.groups: int | None = None
        self._taken: dict[int, list[tuple[GroupBatchNorm, int, Sequence[Tensor]]]] = {}

    def __deepcopy__(self, memo: dict) -> BatchNorms:
        return self  # a copy of the network that computes in its place makes the same passes

    def forget(self) -> None:
        """No pass runs, and none is remembered."""
        self.groups = None
        self._taken.clear()  # no cycle outlives a pass, nor what a compiler notes of the dictionary while it traces
        self._taken = {}  # blocks that are computed again, later, have the old one

    def took(self, layer: GroupBatchNorm, statistics: Sequence[Tensor]) -> None:
        """Note means and variances, (groups, C) both, of a layer; none: its running ones have seen its one group."""
        self._taken.setdefault(layer.number, []).append((layer, self.groups or 1, statistics))

    @torch.no_grad()
    def count(self, views: int) -> None:
        """Behind a pass, move the statistics and counters of all its layers.

        Args:
            views: the groups are those of that many views, view after view; the running statistics see the first group
                of every view, then the second ones.
        """
        counters: list[tuple[Tensor, int]] = []
        moves: dict[tuple[float, int], tuple[list[Tensor], list[list[Tensor]]]] = {}
        for taken in self._taken.values():
            layer, total = taken[0][0], sum(groups for _, groups, _ in taken)
            if layer.num_batches_tracked is not None:
                counters.append((layer.num_batches_tracked, total))
            mean, variance = layer.running_mean, layer.running_var
            if taken[0][2] and mean is not None and variance is not None:
                running, found = moves.setdefault((layer.momentum or 0.0, total), ([], []))
                running += [mean, variance]
                found += [[statistics[n] for *_, statistics in taken] for n in range(2)]
        if counters:
            torch._foreach_add_(*map(list, zip(*counters)))
        for (momentum, _), (running, found) in moves.items():
            _move(running, found, momentum, views)


def _move(running: list[Tensor], found: list[list[Tensor]], momentum: float, views: int) -> None:
    """Move ``running`` statistics (C) by ``found``, (groups, C) of each size of pictures; see ``BatchNorms.count``."""
    values = torch.cat([sizes[0] if len(sizes) == 1 else torch.cat(sizes) for sizes in found], 1)  # all of a channel
    total = len(values)
    behind = torch.arange(total - 1, -1, -1, device=values.device, dtype=values.dtype)  # groups that follow each
    behind = behind.view(-1, views).t().reshape(-1, 1)
    added = (values * (momentum * (1 - momentum) ** behind)).sum(0)
    torch._foreach_mul_(running, (1 - momentum) ** total)
    torch._foreach_add_(running, list(added.split([len(one) for one in running])))


class GroupBatchNorm(_BatchNorm):
    """What a layer has before its ordinary class."""

    norms: BatchNorms
    number: int

    def forward(self, input: Tensor) -> Tensor:
        norms = self.norms
        if not self.training or norms.groups is None:
            return super().forward(input)
        self._check_input_dim(input)
        tracked, joined = self.running_mean is not None, ""
        output: Tensor
        statistics: Sequence[Tensor] = ()
        if not norms.groups:
            running = (self.running_mean, self.running_var) if tracked else (None, None)
            momentum = self.momentum or 0.0
            output = functional.batch_norm(input, *running, self.weight, self.bias, True, momentum, self.eps)
        elif input.device.type == "cpu" and not torch.compiler.is_compiling():
            output, *statistics = in_turn(input, self.weight, self.bias, norms.groups, self.eps)
        else:
            joined = self._joined()
            output, *statistics = Together.apply(input, self.weight, self.bias, norms.groups, self.eps, joined)
        if tracked:
            norms.took(self, statistics)
        if not joined and isinstance(self, BatchNormAct2d):
            output = self.act(self.drop(output))
        return output

    def _joined(self) -> str:
        """The class of the activation that becomes part of the layer; empty: none, or one that is not known here."""
        name = type(self.act).__name__ if isinstance(self, BatchNormAct2d) and type(self.drop) is nn.Identity else ""
        return name if name in ACTIVATIONS else ""


_BY_GROUP: dict[type, type] = {
    kind: type(f"Group{kind.__name__}", (GroupBatchNorm, kind), {})
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)
}
globals().update({kind.__name__: kind for kind in _BY_GROUP.values()})  # where pickle looks for them


def ordinary_batchnorm(network: nn.Module) -> nn.Module:
    """Undo it, in place, for layers that are to become something else. Returns ``network``."""
    kinds = {by_group: kind for kind, by_group in _BY_GROUP.items()}
    for layer in network.modules():
        if isinstance(layer, GroupBatchNorm):
            layer.norms.complete = False
            layer.__class__ = kinds[type(layer)]
    return network


# ---------------------------------------------------------------------- one layer


#: Class -> the activation, (maps); its gradient, (gradient, maps).
_aten = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "ReLU": (functional.relu, lambda grad, maps: _aten.threshold_backward(grad, maps, 0)),
    "ReLU6": (functional.relu6, relu6_backward := lambda grad, maps: _aten.hardtanh_backward(grad, maps, 0.0, 6.0)),
    "LeanReLU6": (functional.relu6, relu6_backward),
    "Hardswish": (functional.hardswish, _aten.hardswish_backward),
    "SiLU": (functional.silu, _aten.silu_backward),
}


def in_turn(input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> list[Tensor]:
    """One group after the other, by torch's own kernels."""
    running = at_least_float32(input.detach()[:0]).new_zeros(2, groups, input.shape[1])
    parts = [  # with a momentum of 1 running statistics become those of the group
        functional.batch_norm(part, mean, variance, weight, bias, True, 1.0, eps)
        for part, mean, variance in zip(input.chunk(groups), *running)
    ]
    return [torch.cat(parts), *running]


class Together(torch.autograd.Function):
    """All groups at once. It keeps what a BatchNorm keeps: the input, and two numbers for each group and channel."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, act: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, mean, variance, invstd = _kernels(forward, act)(input, weight, bias, groups, eps, act)
        ctx.save_for_backward(input, weight, bias, mean, invstd)
        ctx.mark_non_differentiable(mean, variance)
        ctx.act = act
        return output, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        to_input, *of_affine = _kernels(backward, ctx.act)(grad, *ctx.saved_tensors, ctx.act)
        return to_input, *(of_affine if ctx.saved_tensors[1] is not None else (None, None)), None, None, None


@cache
def compiled(function: Callable[..., Any], act: str) -> Compiled:
    """One for each activation, for all sizes at once."""
    return Compiled(function, dynamic=True)


def _kernels(function: Callable[..., Any], act: str) -> Callable[..., Any]:
    """As it is within a compiled network, where the compiler joins it with its neighbours, and where bits have to stay:
    a compiler chooses by the clock.
    """
    plain = torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled()
    return function if plain else compiled(function, act)


def not_compiled() -> str:
    """Why the groups' kernels are not compiled on a GPU; empty: they are, or there were none yet."""
    reasons = (compiled(function, act).reason for function in (forward, backward) for act in ("", *ACTIVATIONS))
    return next(filter(None, reasons), "")


def forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, act: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``input`` (N, C, ...) normalised and activated; mean, unbiased variance and 1 / deviation, (groups, C) each."""
    wide, shape = at_least_float32(input), _of_channels(input)
    maps = wide.unflatten(0, (groups, -1))
    variance, mean = torch.var_mean(maps, [1, *range(3, maps.dim())], correction=0)
    invstd, rows = (variance + eps).rsqrt(), maps[0, :, 0].numel()
    # Of each sample. The result is no view, which an activation in place would have to copy.
    shift, scale = (
        one.unsqueeze(1).expand(*maps.shape[:3]).flatten(0, 1).unflatten(1, shape)
        for one in (mean, invstd if weight is None else invstd * weight)
    )
    output = (wide - shift) * scale
    output = output if bias is None else output + bias.view(shape)
    output = ACTIVATIONS[act][0](output) if act else output
    return output.to(input.dtype), mean, variance * (rows / (rows - 1)), invstd


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    act: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by the output, (N, C, ...) -> those by the input, weight and bias."""
    grads, maps = (at_least_float32(tensor).unflatten(0, (len(mean), -1)) for tensor in (grad, input))
    shape = _of_channels(input)
    mean, invstd = (tensor.view(len(mean), 1, *shape) for tensor in (mean, invstd))
    scale = invstd if weight is None else invstd * weight.view(shape)
    if act:
        activated = (maps - mean) * scale
        grads = ACTIVATIONS[act][1](grads, activated if bias is None else activated + bias.view(shape))
    dims, normal = [1, *range(3, maps.dim())], (maps - mean) * invstd
    to_bias, to_weight = grads.sum(dims, keepdim=True), (grads * normal).sum(dims, keepdim=True)
    to_input = (grads - (to_bias + normal * to_weight) / maps[0, :, 0].numel()) * scale
    of_affine = torch.stack([to_weight, to_bias]).flatten(2).sum(1)
    return to_input.flatten(0, 1).to(input.dtype), *of_affine.unbind()


def _of_channels(input: Tensor) -> tuple[int, ...]:
    """The shape by which (C) numbers go with (N, C, ...)."""
    return -1, *[1] * (input.dim() - 2)
