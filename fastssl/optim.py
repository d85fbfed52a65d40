"""Optimisers and what they are told each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule.

    Attributes:
        name: ``sgd`` (momentum, no Nesterov), ``adamw`` or ``lars``.
        lr: peak rate at ``lr_batch`` samples a step; scaled linearly with the batch.
        lr_batch: 256 by convention; 0: ``lr`` is taken as it is.
        momentum: of SGD and LARS.
        trust: of LARS: the step of a tensor as a share of its norm, before the rate.
        weight_decay: on every tensor, or without the 1-D ones (biases, norms) when ``decay_1d`` is false.
        decay_1d: MoCo's code decays everything; most recipes for small networks do not.
        warmup_epochs: linear warm-up, in epochs.
        final_lr: rate of the last step (not scaled).
        per_epoch: change the rate once an epoch, as MoCo does, instead of every step.
    """

    name: str = "sgd"
    lr: float = 0.03
    lr_batch: int = 256
    momentum: float = 0.9
    trust: float = 0.001
    weight_decay: float = 1e-4
    decay_1d: bool = True
    warmup_epochs: float = 0.0
    final_lr: float = 0.0
    per_epoch: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw", "lars"):
            raise ValueError(f"optim.name={self.name!r} is not one of sgd, adamw, lars")
        if self.lr <= 0 or self.lr_batch < 0 or self.weight_decay < 0 or self.warmup_epochs < 0 or self.final_lr < 0:
            raise ValueError("optim.lr must be positive; lr_batch, weight_decay, warmup_epochs and final_lr not negative")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum must lie in 0..1 (1 excluded), got {self.momentum}")
        if self.trust <= 0:
            raise ValueError(f"optim.trust must be positive, got {self.trust}")

    def peak_lr(self, batch_size: int) -> float:
        """The rate after warm-up for ``batch_size`` samples a step (of all ranks together)."""
        return self.lr * (batch_size / self.lr_batch if self.lr_batch else 1.0)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Trainable parameters, in one group or in two (with and without weight decay)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config.decay_1d:
        return [{"params": trainable, "weight_decay": config.weight_decay}]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to a share of the tensor's own norm.

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888. With d = grad + weight_decay * p:

        d      <- trust * |p| / |d| * d        for tensors of two or more dimensions; as it is where either norm is zero
        buffer <- momentum * buffer + d
        p      <- p - lr * buffer

    Biases and norms (one dimension) take the plain step. All tensors go through together (``torch._foreach_*``), and no norm is read by the host.

    Args:
        params: parameters or groups.
        lr: rate; a tensor with one element on the parameters' device serves a captured graph.
        momentum, weight_decay, trust: as above.
    """

    def __init__(self, params: Any, lr: float | Tensor, *, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            directions = torch._foreach_add([p.grad for p in parameters], parameters, alpha=group["weight_decay"])
            scaled = [number for number, p in enumerate(parameters) if p.ndim > 1]
            if scaled:
                weights = torch.stack(torch._foreach_norm([parameters[n] for n in scaled]))
                lengths = torch.stack(torch._foreach_norm([directions[n] for n in scaled]))
                ratio = torch.where((weights > 0) & (lengths > 0), group["trust"] * weights / lengths, torch.ones_like(weights))
                torch._foreach_mul_([directions[n] for n in scaled], list(ratio.unbind()))
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, directions)
            if isinstance(group["lr"], Tensor):
                torch._foreach_sub_(parameters, torch._foreach_mul(buffers, group["lr"]))
            else:
                torch._foreach_add_(parameters, buffers, alpha=-group["lr"])


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over ``model``'s trainable parameters, in the form that takes all tensors together."""
    groups = parameter_groups(model, config)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.name == "lars":
        return LARS(groups, lr=config.lr, momentum=config.momentum, trust=config.trust)
    # A step that is recorded as a CUDA graph counts on the device; torch asks for the promise beforehand.
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    return torch.optim.AdamW(groups, lr=config.lr, fused=True, capturable=on_gpu)


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Give every group the rate ``lr``; a tensor (one element, on the device) is read by the kernels at every step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def after_restore(optimizer: torch.optim.Optimizer) -> None:
    """Set again what belongs to this machine and not to the checkpoint, which may come from a run on another device."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = any(parameter.is_cuda for parameter in group["params"])
