"""A MoCo step as public code writes it: the peer of our own.

What is plain about it: NCHW memory, a forward pass for each view, the keys dealt again by a random permutation and
brought back, a copy of the whole queue for each loss, dense logits and a dense soft target, an optimiser and a moving
average that go from tensor to tensor, and the loss read back every step for the progress line. The arithmetic is that
of MoCo-v2 with a symmetric loss and, where the recipe smooths, light-moco's target; BatchNorm sees one view at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.config.recipe import Recipe
from fastssl.losses.reference import dense_step
from fastssl.methods.base import new_encoder
from fastssl.optim.optimizers import OptimConfig, create_optimizer, parameter_groups
from fastssl.training.networks import initial_backbone

if TYPE_CHECKING:
    from fastssl.benchmarks.suites.step import Step


class PlainLARS(torch.optim.Optimizer):
    """LARS as its paper writes it, one tensor after the other; the formula is `fastssl.optim.optimizers.LARS`'s."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        for group in self.param_groups:
            for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
                direction = parameter.grad + group["weight_decay"] * parameter
                weight, length = parameter.norm(), direction.norm()
                if parameter.ndim > 1 and weight > 0 and length > 0:
                    direction = direction * (group["trust"] * weight / length)
                buffer = self.state[parameter].get("momentum_buffer")
                buffer = direction if buffer is None else group["momentum"] * buffer + direction
                self.state[parameter]["momentum_buffer"] = buffer
                parameter -= group["lr"] * buffer


def plain_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """The recipe's optimiser in the form that goes from tensor to tensor."""
    groups = parameter_groups(model, config)
    if config.name == "lars":
        return PlainLARS(groups, {"lr": lr, "momentum": config.momentum, "trust": config.trust})
    if config.name == "sgd":
        nesterov = config.nesterov
        return torch.optim.SGD(groups, lr, config.momentum, nesterov=nesterov, foreach=False, fused=False)
    return torch.optim.AdamW(groups, lr, foreach=False, fused=False)


def has_peer(recipe: Recipe) -> bool:
    """Whether a recipe's step is one that ``PlainStep`` makes."""
    weights = recipe.pair_weights
    return recipe.method == "moco" and recipe.moco.symmetric and not weights.local_views and not recipe.drop_path


class PlainStep:
    """Networks, queue, optimiser and one step of ``batch_size`` samples, always at ``lr``. ``recipe``, ``device`` and
    ``amp`` are as for `TrainStep`, and so is ``seed``, of the queue and of the first weights, which are the same.
    """

    def __init__(self, recipe: Recipe, device: torch.device, batch_size: int, *, amp: bool, lr: float, seed: int = 0):
        self.moco, self.device, self.amp, self.batch_size = recipe.moco, device, amp, batch_size
        network = new_encoder(initial_backbone(recipe, seed), recipe.moco.projector).to(device)
        self.query = network.to(memory_format=torch.contiguous_format).train()
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        queue = torch.randn(recipe.moco.projector.out, recipe.moco.queue, generator=torch.Generator().manual_seed(seed))
        self.queue = functional.normalize(queue, dim=0).to(device)  # (D, K), as MoCo keeps it
        self.pointer = 0
        self.optimizer = plain_optimizer(self.query, recipe.optim, lr)

    def __call__(self, first: Tensor, second: Tensor) -> float:
        """Two views of the batch, (B, 3, S, S) each, NCHW. Returns the loss."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            queries = [self.query(view) for view in (first, second)]
            with torch.no_grad():
                self.move_keys()
                keys = [self._shuffled_keys(view) for view in (first, second)]
        loss = self._loss(queries[0], keys[1]) + self._loss(queries[1], keys[0])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for batch in keys:
            self.queue[:, self.pointer : self.pointer + len(batch)] = batch.t().to(self.queue.dtype)
            self.pointer = (self.pointer + len(batch)) % self.queue.shape[1]
        return loss.item()

    @torch.no_grad()
    def move_keys(self) -> None:
        """The moving average, one tensor after the other."""
        momentum = self.moco.momentum
        for query, key in zip(self.query.parameters(), self.key.parameters()):
            key.data = key.data * momentum + query.data * (1.0 - momentum)

    def _shuffled_keys(self, view: Tensor) -> Tensor:
        order = torch.randperm(len(view), device=view.device)
        keys: Tensor = self.key(view[order])[torch.argsort(order)]
        return keys

    def _loss(self, query: Tensor, key: Tensor) -> Tensor:
        moco = self.moco
        # `dense_step` copies the queue, as public code does.
        return dense_step(
            query.float(), key.float(), self.queue.t(), moco.temperature, moco.smoothing, moco.weighting, moco.neighbors
        )


def _plain(step: Step, amp: bool) -> PlainStep:
    return PlainStep(step.recipe, step.device, step.batch_size, amp=amp, lr=step.small_lr, seed=step.seed)


def plain_steps(step: Step, views: Tensor) -> dict[str, Callable[[], object]]:
    """The peers of ``step`` by name, ready to run on the same images in NCHW memory."""
    first, second = (view.float().contiguous() for view in views.chunk(2))
    return {
        f"plain MoCo step, NCHW, {'bf16 autocast' if amp else 'float32'}": partial(_plain(step, amp), first, second)
        for amp in dict.fromkeys((step.amp, False))
    }


def update_peers(step: Step) -> dict[str, Callable[[], None]]:
    """The same work in loops over tensors, and on a single tensor."""
    plain = _plain(step, step.amp)
    flat = torch.cat([p.detach().flatten() for p in step.method.student.parameters()])
    one = nn.ParameterDict({"flat": flat[None]})  # two dimensions: LARS takes norms of such
    average, weight = one["flat"].detach().clone(), 1 - step.recipe.moco.momentum
    of_one = create_optimizer(one, replace(step.recipe.optim, decay_1d=True, lr=step.small_lr))
    for network in (plain.query, one):
        fill_gradients(network)

    def loops() -> None:
        plain.optimizer.step()
        plain.move_keys()

    def of_all() -> None:
        of_one.step()
        average.lerp_(one["flat"].detach(), weight)

    return {"loops": loops, "flat": of_all}


def fill_gradients(network: nn.Module) -> None:
    """Gradients for an optimiser that runs alone."""
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
