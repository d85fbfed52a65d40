"""Optimisers and what they are told each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule.

    Attributes:
        name: ``sgd`` (momentum, no Nesterov) or ``adamw``.
        lr: peak rate at ``lr_batch`` samples a step; scaled linearly with the batch.
        lr_batch: 256 by convention; 0: ``lr`` is taken as it is.
        momentum: of SGD.
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
    weight_decay: float = 1e-4
    decay_1d: bool = True
    warmup_epochs: float = 0.0
    final_lr: float = 0.0
    per_epoch: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise ValueError(f"optim.name={self.name!r} is not one of sgd, adamw")
        if self.lr <= 0 or self.lr_batch < 0 or self.weight_decay < 0 or self.warmup_epochs < 0 or self.final_lr < 0:
            raise ValueError("optim.lr must be positive; lr_batch, weight_decay, warmup_epochs and final_lr not negative")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum must lie in 0..1 (1 excluded), got {self.momentum}")

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


def create_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over ``model``'s trainable parameters, in its fused form (one kernel for all tensors)."""
    groups = parameter_groups(model, config)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
