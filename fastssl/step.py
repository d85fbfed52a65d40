"""One training step: what the loop calls thousands of times, and what the benchmarks measure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.backbones import create_backbone
from fastssl.methods.moco import MoCo
from fastssl.optim import create_optimizer, set_lr
from fastssl.pipelines.errors import FastSSLError
from fastssl.pipelines.order import batch_permutation
from fastssl.recipe import Recipe


def use_amp(amp: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: ``auto`` does on a GPU and not on a CPU, where float32 is often the faster one."""
    return amp == "bf16" or (amp == "auto" and device.type == "cuda")


def initial_backbone(recipe: Recipe, seed: int) -> nn.Module:
    """The backbone as a run with this seed begins with it, on the CPU: the same weights at every call."""
    torch.manual_seed(seed)
    return create_backbone(recipe.arch, zero_init_residual=recipe.zero_init_residual)


class TrainStep:
    """The networks, the optimiser, and the step that moves them. Nothing in the step waits for the device.

    Args:
        recipe: arch, method, optimiser.
        device: where everything lives.
        amp: autocast to bfloat16.
        seed: of the first weights, of the queue's first content and of the BatchNorm groups.

    Raises:
        FastSSLError: no such network, or a batch that does not fit the queue or the BatchNorm groups.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, amp: bool, seed: int):
        self.recipe, self.device, self.amp, self.seed = recipe, device, amp, seed
        self.batch_size = recipe.train.batch_size
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every step has the same shapes
        backbone = initial_backbone(recipe, seed)
        try:
            method = MoCo(backbone, recipe.moco, batch_size=self.batch_size, generator=torch.Generator().manual_seed(seed))
        except ValueError as error:
            raise FastSSLError(f"batch of {self.batch_size}: {error}; --batch-size or --set changes that") from error
        except RuntimeError as error:  # torch's allocator: "you tried to allocate ... bytes"
            raise FastSSLError(
                f"no memory for the networks and a queue of {recipe.moco.queue:,} keys ({' '.join(str(error).split())[:120]}); "
                "lower moco.queue or projector.hidden with --set"
            ) from error
        self.method = method.to(device, memory_format=torch.channels_last).train()
        self.optimizer = create_optimizer(self.method, recipe.optim)

    def permutation(self, epoch: int, step: int) -> Tensor:
        """The order in which this step's keys are dealt into BatchNorm groups, (2B,) int64 on the device."""
        order = torch.from_numpy(batch_permutation(2 * self.batch_size, self.seed, epoch, step))
        return order.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else order

    def autocast(self) -> torch.autocast:
        """The precision of the networks."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp)

    def __call__(self, views: list[Tensor], permutation: Tensor, *, lr: float, momentum: float, smoothing: float) -> Tensor:
        """Forward, backward, optimiser, key network, queue.

        Args:
            views: as ``ViewLoader`` gives them.
            permutation: see ``permutation``.
            lr, momentum, smoothing: this step's values of the schedules.

        Returns:
            the method's metrics, (len(MoCo.METRICS),) float32 on the device.
        """
        set_lr(self.optimizer, lr)
        with self.autocast():
            loss, metrics = self.method(views, permutation, smoothing)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.update_teacher(momentum)
        return metrics
