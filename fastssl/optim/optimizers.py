"""Optimisers and what they are told each step."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastssl.optim.schedules import RunLength, half_cosine
from fastssl.utils.settings import BelowOne, Natural, NotNegative, Positive, Switch, settings


@settings("optim")
class OptimConfig:
    """Optimiser and learning-rate schedule.

    Attributes:
        name: ``sgd``, ``adamw`` or ``lars``.
        lr: peak rate at ``lr_batch`` samples a step; scaled linearly with the batch.
        lr_batch: 256 by convention; 0: ``lr`` is taken as it is.
        momentum: of SGD and LARS.
        nesterov: of SGD and LARS: look ahead along the momentum (Sutskever et al. 2013), in torch's form.
        trust: of LARS: the step of a tensor as a share of its norm, before the rate.
        trust_clip: of LARS: the share is the step itself, and the rate of SGD its bound.
        weight_decay: on every tensor but those that the next two leave out.
        decay_1d: also on 1-D tensors (biases, norms): MoCo's code decays everything; most recipes for small networks do
            not.
        decay_depthwise: also on depth-wise filters (4-D, one input channel), which SSLight spares.
        final_weight_decay: half a cosine leads from ``weight_decay`` to it (DINO on vision transformers: 0.04 to 0.4);
            None: constant.
        clip_grad: largest norm of each tensor's gradient, as DINO's code clips (3.0 in its recipe): tensor by tensor,
            before weight decay; None: no bound.
        warmup_epochs: linear warm-up, in epochs.
        warmup_lr: rate of the very first step at the recipe's own batch, the last of the warm-up having the peak;
            None: a share of the peak. With another batch it follows as the peak does, see ``scaled``.
        final_lr: rate of the last step at the recipe's own batch; with another one it follows, too.
        hold: share of the run that ends when the rate begins to fall; 0: it falls from the end of the warm-up on.
        per_epoch: change the rate once an epoch, as MoCo and light-moco do, instead of every step.
        backbone_lr: the backbone's rate as a share of the head's, for weights that are to change less than the head,
            which begins at random.
    """

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: Positive = 0.03
    lr_batch: Natural = 256
    momentum: BelowOne = 0.9
    nesterov: Switch = False
    trust: Positive = 0.001
    trust_clip: Switch = False
    weight_decay: NotNegative = 1e-4
    decay_1d: Switch = True
    decay_depthwise: Switch = True
    final_weight_decay: NotNegative | None = None
    clip_grad: Positive | None = None
    warmup_epochs: NotNegative = 0.0
    warmup_lr: NotNegative | None = None
    final_lr: NotNegative = 0.0
    hold: BelowOne = 0.0
    per_epoch: Switch = False
    backbone_lr: Positive = 1.0

    def __post_init__(self) -> None:
        if self.warmup_lr is not None and (self.per_epoch or not self.warmup_epochs):
            raise ValueError("warmup_lr needs warmup_epochs, and a rate that changes every step (per_epoch: false)")
        if self.nesterov and (self.name == "adamw" or not self.momentum):
            raise ValueError("nesterov needs optim.name: sgd or lars, with momentum")
        if self.trust_clip and self.name != "lars":
            raise ValueError("trust_clip needs optim.name: lars")

    def peak_lr(self, batch_size: int) -> float:
        """The rate after warm-up for ``batch_size`` samples a step (of all ranks together)."""
        return self.lr * (batch_size / self.lr_batch if self.lr_batch else 1.0)

    def rate(self, step: int, run: RunLength, batch_size: int) -> float:
        """The learning rate at ``step`` (0 .. the run's steps) for ``batch_size`` samples a step: linear warm-up, the
        peak until ``hold``, then half a cosine from it to ``final_lr``.

        With W units of warm-up out of U, unit u < W has ``peak * (u + 1) / (W + 1)``: no step is spent at rate zero,
        and unit W is the first at the peak. With ``warmup_lr`` the warm-up is a line with both end points instead,
        ``warmup_lr`` at unit 0 and the peak at the last unit below W (DINO, SwAV, SSLight; where W is 1, the unit has
        ``warmup_lr``). The cosine begins at unit W, or at ``hold`` U if that is later, and reaches ``final_lr`` at
        u = U. A run no longer than its warm-up only climbs. A unit is a step, or with ``per_epoch`` an epoch; an
        epoch's warm-up without ``warmup_lr`` is also multiplied by the cosine continued to the left, as in light-moco's
        code (0.1 % and less).
        """
        peak, warmup = self.peak_lr(batch_size), self.warmup_epochs
        if self.per_epoch:
            unit, units = float(run.epoch(step)), run.total_steps / run.steps_per_epoch
        else:
            unit, units, warmup = step, run.total_steps, warmup * run.steps_per_epoch
        if unit >= warmup:
            # The last unit of a run that ends with its warm-up is the peak itself, whence the guard.
            held = max(warmup, self.hold * units)
            return half_cosine((unit - held) / (units - held) if units > held else 0.0, peak, self.final_lr)
        if self.warmup_lr is None:
            climb = peak * (unit + 1) / (warmup + 1)
            left = (warmup - unit) / (units - warmup) if self.per_epoch and units > warmup else 0.0
            return climb * half_cosine(left, 1.0, 0.0)
        last = math.ceil(warmup) - 1
        return self.warmup_lr + (peak - self.warmup_lr) * unit / max(last, 1)

    def scaled(self, factor: float, keep: Collection[str] = ()) -> OptimConfig:
        """For a batch ``factor`` times that for which the numbers were written: the schedule's two ends follow it.

        The peak does so by itself, see ``peak_lr``.

        Args:
            keep: of ``warmup_lr`` and ``final_lr`` those that stay as they are.
        """
        if not self.lr_batch:  # the peak does not follow, so nothing does
            return self
        ends = {name: getattr(self, name) for name in ("warmup_lr", "final_lr") if name not in keep}
        return replace(self, **{name: rate * factor for name, rate in ends.items() if rate})


def parameter_groups(model: nn.Module, config: OptimConfig, slower: Collection[nn.Parameter] = ()) -> list[dict]:
    """Trainable parameters, in one group or in two (with and without weight decay); those of ``slower``, where
    ``backbone_lr`` is not 1, in such groups of their own. A group's share of the rate is its ``lr_scale``.

    A group's ``weight_decay`` is 0 where the decay follows a schedule: ``apply_decay`` then takes it on, and ``decays``
    says of which groups.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    spared = [
        p
        for p in trainable
        if (p.ndim <= 1 and not config.decay_1d)
        or (p.ndim == 4 and p.shape[1] == 1 and not config.decay_depthwise)  # a depth-wise filter (C, 1, k, k)
    ]
    chosen, behind = {id(p) for p in spared}, {id(p) for p in slower if config.backbone_lr != 1}
    decay = config.weight_decay if config.final_weight_decay is None else 0.0
    groups: list[dict] = []
    for late in (False, True):
        mine = [p for p in trainable if (id(p) in behind) == late]
        for decays in (True, False):
            if parameters := [p for p in mine if (id(p) not in chosen) == decays]:
                rates = {"weight_decay": decay if decays else 0.0, "lr_scale": config.backbone_lr if late else 1.0}
                groups.append({"params": parameters, "decays": decays, **rates})
    return groups


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to a share of the tensor's own norm.

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888. With d = grad +
    weight_decay * p:

        d      <- trust * |p| / |d| * d        for tensors of two or more dimensions; as it is where either norm is zero
        buffer <- momentum * buffer + d
        p      <- p - lr * buffer              with nesterov lr * (d + momentum * buffer)

    With ``clip`` (LARC, as solo-learn's code has it) d is scaled by ``trust * |p| / (|grad| + weight_decay * |p|) /
    lr`` or by 1, whichever is less. Biases and norms (one dimension) take the plain step. No norm is read by the host.
    ``lr`` may be a tensor with one element on the parameters' device.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        clip: bool = False,
        nesterov: bool = False,
    ):
        self.clip, self.nesterov = clip, nesterov
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes no closure
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
                if self.clip:
                    lengths = torch.stack(torch._foreach_norm([parameters[n].grad for n in scaled]))
                    share = group["trust"] * weights / (lengths + group["weight_decay"] * weights)
                    share = (share / group["lr"]).clamp(max=1)
                else:
                    lengths = torch.stack(torch._foreach_norm([directions[n] for n in scaled]))
                    share = group["trust"] * weights / lengths
                ratio = torch.where((weights > 0) & (lengths > 0), share, torch.ones_like(weights))
                turned, partners = [directions[n] for n in scaled], ratio.unbind()
                if (
                    ratio.is_cuda
                ):  # partners of one number are a launch for each tensor, those of its layout one for all
                    flat = torch.cat([one.expand(d.numel()) for one, d in zip(partners, turned)])
                    parts = zip(flat.split([d.numel() for d in turned]), turned)
                    partners = tuple(part.as_strided(d.shape, d.stride()) for part, d in parts)
                torch._foreach_mul_(turned, partners)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, directions)
            steps: list[Tensor] | tuple[Tensor, ...] = buffers
            if self.nesterov:
                steps = torch._foreach_add(directions, buffers, alpha=group["momentum"])
            if isinstance(group["lr"], Tensor):
                torch._foreach_sub_(parameters, torch._foreach_mul(steps, group["lr"]))
            else:
                torch._foreach_add_(parameters, steps, alpha=-group["lr"])


def create_optimizer(model: nn.Module, config: OptimConfig, groups: list[dict] | None = None) -> torch.optim.Optimizer:
    """The optimiser over ``model``'s trainable parameters, in the form that takes all tensors together.

    Args:
        groups: of these parameters; None: ``parameter_groups(model, config)``.
    """
    groups = parameter_groups(model, config) if groups is None else groups
    if config.name == "sgd":
        optimizer = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if config.momentum):
            # torch makes the buffers at the first step, for all parameters or none: a layer that is frozen then could
            # never begin to move. From zero the first step is the same.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if config.name == "lars":
        how: dict[str, Any] = {"trust": config.trust, "clip": config.trust_clip, "nesterov": config.nesterov}
        return LARS(groups, lr=config.lr, momentum=config.momentum, **how)
    # A step that is recorded as a CUDA graph counts on the device; torch asks for the promise beforehand.
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    return torch.optim.AdamW(groups, lr=config.lr, fused=True, capturable=on_gpu)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], most: float | None) -> None:
    """Scale down, in place, each gradient whose norm is above ``most``: by ``most / (norm + 1e-6)``. None: nothing.

    Each tensor for itself, as in DINO's public code (arXiv 2104.14294); no norm is read by the host.
    """
    if most is None or not (gradients := [p.grad for p in parameters if p.grad is not None]):
        return
    scales = most / (torch.stack(torch._foreach_norm(gradients)) + 1e-6)
    torch._foreach_mul_(gradients, list(scales.clamp(max=1).unbind()))


@torch.no_grad()
def apply_decay(optimizer: torch.optim.Optimizer, lr: float | Tensor, decay: float | Tensor) -> None:
    """Weight decay that changes every step, also of a recorded one: torch's fused kernels take a number and would keep
    that. AdamW shrinks the weights (p <- p - lr * decay * p), SGD and LARS add decay * p to the gradient.

    To be called between the backward pass and the optimiser's step. Parameters without a gradient are passed over.

    Args:
        optimizer: as ``create_optimizer`` makes it for a recipe with ``final_weight_decay``: with no decay of its own.
    """
    for group in (group for group in optimizer.param_groups if group["decays"]):
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            continue
        if isinstance(optimizer, torch.optim.AdamW):
            torch._foreach_mul_(parameters, 1 - lr * group.get("lr_scale", 1.0) * decay)
        elif isinstance(decay, Tensor):
            torch._foreach_add_([p.grad for p in parameters], torch._foreach_mul(parameters, decay))
        else:
            torch._foreach_add_([p.grad for p in parameters], parameters, alpha=decay)


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Give each group its share of the rate ``lr``; a tensor (one element, on the device) is read at every step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * scale if (scale := group.get("lr_scale", 1.0)) != 1 else lr
