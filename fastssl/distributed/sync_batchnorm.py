"""BatchNorm over the samples of all ranks: what one process with the whole batch would normalise by.

    forward     each rank's mean and deviation -> gathered (2C + 1 numbers a rank) -> combined (Chan et al. 1979)
    backward    the two sums per channel, of dy and of dy * (x - mean), over all ranks (2C numbers)

On a GPU by the kernels of ``torch.nn.SyncBatchNorm``, on a CPU, which has none of them, by autograd. That layer itself
refuses the CPU, and on a GPU makes the host wait (it filters ranks without samples by value) unless it is recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.distributed.collectives import all_reduce_sum, gather_rows, world_size
from fastssl.errors import FastSSLError


def synchronise_batchnorm(network: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm of ``network`` normalise over all ranks when it trains. In place; ``separate_batchnorm``
    undoes it.

    A layer only changes its class: parameters, buffers, hooks and names are what they were. In evaluation mode and in a
    single process it is the ordinary layer. Ranks may hold different numbers of samples, at least one each. All must
    make the same passes: a network that one rank alone runs in training mode waits for the others. ``torch.compile``
    cuts its graph at each of these layers.

    Args:
        network: of ``nn.BatchNorm1d``, ``nn.BatchNorm2d`` and timm's ``BatchNormAct2d``; may itself be one; returned.
        device: where it will train.

    Raises:
        FastSSLError: another kind of device, or a layer that is a BatchNorm of a kind of its own.
    """
    if device.type not in ("cpu", "cuda"):
        raise FastSSLError(f"BatchNorm over several processes works on cpu and cuda, not on {device.type}")
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)]
    for name, layer in layers:
        if type(layer) not in _SYNCHRONISED and not isinstance(layer, _OverRanks):
            kind = type(layer).__name__
            raise FastSSLError(f"layer {name or 'network'} is a {kind}, which cannot be normalised over processes")
    for _, layer in layers:
        layer.__class__ = _SYNCHRONISED.get(type(layer), type(layer))
    return network


def separate_batchnorm(network: nn.Module) -> nn.Module:
    """Undo it, in place, for a pass in training mode that one rank makes alone. Returns ``network``."""
    ordinary = {synchronised: kind for kind, synchronised in _SYNCHRONISED.items()}
    for layer in network.modules():
        if isinstance(layer, _OverRanks):
            layer.__class__ = ordinary[type(layer)]
    return network


class _OverRanks(_BatchNorm):
    """What a layer has before its ordinary class: the same forward, but for the ranks."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        tracked = self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            # The mean over all batches; as in the ordinary layer, the one case in which the host waits.
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        running = (self.running_mean, self.running_var) if tracked else (None, None)
        output: Tensor = _normalise(input, self.weight, self.bias, *running, momentum, self.eps)
        if isinstance(self, BatchNormAct2d):
            output = self.act(self.drop(output))
        return output


_SYNCHRONISED: dict[type, type] = {
    kind: type(f"Synchronised{kind.__name__}", (_OverRanks, kind), {})
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)
}


@torch.compiler.disable  # a compiler can trace neither the collectives nor the statistics that change on the way
def _normalise(input: Tensor, *rest: Any) -> Any:
    return (_ByKernels.apply if input.is_cuda else by_autograd)(input, *rest)


def by_autograd(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """``_ByKernels`` in plain operations. Statistics of bfloat16 maps are float32."""
    wide = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    var, mean = torch.var_mean(wide, [place for place in range(input.dim()) if place != 1], correction=0)
    own = torch.cat([mean, var, mean.new_full((1,), input.numel() // input.shape[1])])
    means, variances, counts = gather_rows(own[None], gradient=True).tensor_split((len(mean), 2 * len(mean)), dim=1)
    total = counts.sum()
    mean = (means * (counts / total)).sum(0)
    var = ((variances + (means - mean).square()) * (counts / total)).sum(0)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (total / (total - 1))).to(running_var.dtype), momentum)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    column = (-1, *[1] * (input.dim() - 2))  # (C,) against (N, C, ...)
    output = (wide - mean.view(column)) * scale.view(column)
    return (output if bias is None else output + bias.view(column)).to(input.dtype)


class _ByKernels(torch.autograd.Function):
    """(input (N, C, ...), weight, bias, running mean, running var, momentum, eps) -> (N, C, ...); weight, bias and both
    statistics may be None.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, *how: Any) -> Tensor:
        running_mean, running_var, momentum, eps = how
        input = input.contiguous(memory_format=_layout(input))
        mean, invstd = torch.batch_norm_stats(input, eps)
        own = torch.cat([mean, invstd, mean.new_full((1,), input.numel() // input.shape[1])])
        means, invstds, counts = gather_rows(own[None]).tensor_split((len(mean), 2 * len(mean)), dim=1)
        counts = counts.flatten()
        # Of its first argument the kernel takes the type, which must be that of the counts where there are no running
        # statistics.
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            means, means, invstds, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(input, weight, mean, invstd, counts.to(torch.int32))
        return torch.batch_norm_elemt(input, weight, bias, mean, invstd, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd, counts = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_layout(input))
        wanted = ctx.needs_input_grad[:3]
        sum_dy, sum_dy_xmu, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, input, mean, invstd, weight, *wanted
        )
        grad_input = None
        if wanted[0]:
            sum_dy, sum_dy_xmu = all_reduce_sum(torch.cat([sum_dy, sum_dy_xmu])).tensor_split(2)
            grad_input = torch.batch_norm_backward_elemt(grad, input, mean, invstd, weight, sum_dy, sum_dy_xmu, counts)
        # A parameter's gradient is that of this rank's samples, as in every other layer.
        return grad_input, grad_weight if wanted[1] else None, grad_bias if wanted[2] else None, None, None, None, None


def _layout(input: Tensor) -> torch.memory_format:
    channels_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
