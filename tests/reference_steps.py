"""The papers' training steps written out slowly, from their descriptions: plain autograd, dense targets, the optimiser
tensor by tensor. Nothing of the product computes here but the backbone's layers.

Sources: MoCo-v2 (arXiv 2003.04297) and light-moco (arXiv 2212.07158); SSLight's DINO, SwAV and MoCo (arXiv 2210.02808),
after DINO (arXiv 2104.14294) and SwAV (arXiv 2006.09882).

Every step takes the views of the whole batch, each (B, 3, S, S), the global ones first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def cosine(first: float, last: float, part: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * part)) / 2


# ---------------------------------------------------------------------- optimisers, one tensor after the other


class Optimizer:
    """SGD, LARS or AdamW. ``spared``: names of parameters without weight decay."""

    def __init__(self, network: nn.Module, kind: str, decay: float, spared: Callable[[str, Tensor], bool]):
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.kind, self.decay = kind, decay
        self.spared = {name for name, p in self.parameters.items() if spared(name, p)}
        self.memory: dict[str, list[Tensor]] = {}
        self.count: dict[str, int] = {}

    @torch.no_grad()
    def step(self, lr: float, decay: float | None = None) -> None:
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            wd = 0.0 if name in self.spared else self.decay if decay is None else decay
            if self.kind == "adamw":
                first, second = self.memory.setdefault(name, [torch.zeros_like(p), torch.zeros_like(p)])
                t = self.count[name] = self.count.get(name, 0) + 1
                p -= lr * wd * p
                first.copy_(0.9 * first + 0.1 * p.grad)
                second.copy_(0.999 * second + 0.001 * p.grad**2)
                p -= lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            else:
                d = p.grad + wd * p
                if self.kind == "lars" and p.ndim > 1 and p.norm() > 0 and d.norm() > 0:
                    d = d * 0.001 * p.norm() / d.norm()
                (buffer,) = self.memory.setdefault(name, [torch.zeros_like(p)])
                buffer.copy_(0.9 * buffer + d)
                p -= lr * buffer
            p.grad = None


def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """The moving average, of the parameters alone."""
    with torch.no_grad():
        for old, new in zip(teacher.parameters(), student.parameters()):
            old.copy_(momentum * old + (1 - momentum) * new)


def clip_each(network: nn.Module, most: float) -> None:
    """DINO's clipping: every tensor's gradient for itself."""
    for p in network.parameters():
        if p.grad is not None and (scale := most / (p.grad.norm().item() + 1e-6)) < 1:
            p.grad *= scale


# ---------------------------------------------------------------------- networks


class DINOHead(nn.Module):
    """As SSLight's, with the names of ours: MLP, unit vectors, weight-normalised layer."""

    def __init__(self, mlp: nn.Module, rows: Tensor, gain: Tensor, *, learned: bool):
        super().__init__()
        self.mlp, self.last = mlp, nn.Module()
        self.last.direction = nn.Parameter(rows.clone())
        self.last.gain = nn.Parameter(gain.clone(), requires_grad=learned)

    def forward(self, features: Tensor) -> Tensor:
        unit = functional.normalize(self.mlp(features), dim=1)
        rows = self.last.gain * self.last.direction / self.last.direction.norm(dim=1, keepdim=True)
        return unit @ rows.t()


class SwAVHead(nn.Module):
    def __init__(self, mlp: nn.Module, prototypes: Tensor):
        super().__init__()
        self.mlp, self.prototypes = mlp, nn.Module()
        self.prototypes.weight = nn.Parameter(prototypes.clone())

    def forward(self, features: Tensor) -> Tensor:
        return functional.normalize(self.mlp(features), dim=1)


class Network(nn.Module):
    """Backbone and head; ``forward``: views grouped by size, one backbone pass for each size and one head pass."""

    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, *views: Tensor) -> list[Tensor]:
        features, start = [], 0
        for end in range(1, len(views) + 1):
            if end == len(views) or views[end].shape != views[start].shape:
                features.append(self.backbone(torch.cat(views[start:end])))
                start = end
        return list(self.projector(torch.cat(features)).split(len(views[0])))


def plain_mlp(projector: nn.Sequential) -> nn.Sequential:
    """The head's layers without what our class adds to them."""
    return nn.Sequential(*copy.deepcopy(list(projector)))


# ---------------------------------------------------------------------- MoCo


def smoothed_cross_entropy(q: Tensor, k: Tensor, queue: Tensor, tau: float, shares: Sequence[float]) -> Tensor:
    """Dense logits and a dense target: 1 - sum(shares) on the key, ``shares`` on the nearest negatives."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.t()], 1) / tau
    target = torch.zeros_like(logits)
    target[:, 0] = 1 - sum(shares)
    for row, order in enumerate(logits[:, 1:].argsort(1, descending=True)):
        target[row, 1 + order[: len(shares)]] = torch.tensor(shares)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def stepped_shares(mass: float) -> list[float]:
    """Half of the mass on the 2 nearest, a quarter on ranks 3 to 8, a quarter on ranks 9 to 20."""
    return [mass / 4] * 2 + [mass / 4 / 6] * 6 + [mass / 4 / 12] * 12


class MoCo:
    """One step of light-moco (symmetric) or of SSLight's MoCo (``lambdas`` for the two kinds of pairs)."""

    def __init__(
        self,
        student: Network,
        teacher: Network,
        queue: Tensor,
        *,
        tau: float,
        optimizer: Optimizer,
        groups: int = 1,
        by_view: bool = False,
        lambdas: tuple[float, float] | None = None,
    ):
        self.student, self.teacher, self.queue, self.place = student, teacher, queue.clone(), 0
        self.tau, self.optimizer, self.groups, self.by_view, self.lambdas = tau, optimizer, groups, by_view, lambdas

    def embed(self, network: Network, views: list[Tensor], orders: list[Tensor]) -> list[Tensor]:
        """Each group of ``orders`` (rows of a view) through the network for itself, on one GPU after the other."""
        out = [torch.zeros(len(images), self.queue.shape[1]) for images in views]
        for number in range(self.groups):
            for view, images in enumerate(views):
                rows = orders[view].chunk(self.groups)[number]
                out[view] = out[view].index_copy(0, rows, functional.normalize(network(images[rows])[0], dim=1))
        return out

    def step(self, views: list[Tensor], permutation: Tensor, lr: float, momentum: float, shares: list[float]) -> float:
        size = len(views[0])
        if self.lambdas:  # key of global view 1; the others are queries
            with torch.no_grad():
                keys = [functional.normalize(self.teacher(views[0])[0], dim=1)]
            queries = [functional.normalize(q, dim=1) for q in self.student(*views[1:])]
            terms = [smoothed_cross_entropy(q, keys[0], self.queue, self.tau, shares) for q in queries]
            loss = self.lambdas[0] * terms[0] + self.lambdas[1] * sum(terms[1:]) / len(terms[1:])
        else:
            with torch.no_grad():
                if self.by_view:
                    orders = [rows - view * size for view, rows in enumerate(permutation.split(size))]
                    keys = self.embed(self.teacher, views, orders)
                else:
                    dealt = self.embed(self.teacher, [torch.cat(views)], [permutation])[0]
                    keys = list(dealt.split(size))
            if self.by_view:
                queries = self.embed(self.student, views, [torch.arange(size)] * 2)
            else:
                queries = [functional.normalize(q, dim=1) for q in self.student(*views)]
            pairs = zip(queries, reversed(keys))
            loss = sum(smoothed_cross_entropy(q, k, self.queue, self.tau, shares) for q, k in pairs)
        loss.backward()
        self.optimizer.step(lr)
        follow(self.teacher, self.student, momentum)
        for key in torch.cat(keys):
            self.queue[self.place] = key
            self.place = (self.place + 1) % len(self.queue)
        return loss.item()


# ---------------------------------------------------------------------- DINO


class DINO:
    def __init__(self, student: Network, teacher: Network, width: int, lambdas: tuple[float, float], optimizer: Any):
        self.student, self.teacher, self.optimizer, self.lambdas = student, teacher, optimizer, lambdas
        self.centre = torch.zeros(width)

    def step(
        self,
        views: list[Tensor],
        *,
        lr: float,
        momentum: float,
        tau: float,
        frozen: bool,
        decay: float | None,
        clip: float,
    ) -> float:
        with torch.no_grad():
            raw = self.teacher(*views[:2])
            targets = [((t - self.centre) / tau).softmax(1) for t in raw]
        guesses = [(s / 0.1).log_softmax(1) for s in self.student(*views)]
        near, far = [], []
        for g, target in enumerate(targets):
            for v, guess in enumerate(guesses):
                if g != v:
                    (near if v < 2 else far).append(-(target * guess).sum(1).mean())
        loss = self.lambdas[0] * sum(near) / len(near) + self.lambdas[1] * sum(far) / len(far)
        loss.backward()
        clip_each(self.student, clip)
        if frozen:
            for p in self.student.projector.last.parameters():
                p.grad = None
        self.optimizer.step(lr, decay)
        follow(self.teacher, self.student, momentum)
        self.centre = 0.9 * self.centre + 0.1 * torch.cat(raw).mean(0)
        return loss.item()


# ---------------------------------------------------------------------- SwAV


def assignments(scores: Tensor) -> Tensor:
    """Sinkhorn as published: (N, K) scores, epsilon 0.05, three rounds; each row sums to one."""
    q = (scores / 0.05).exp().t()
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).t()


class SwAV:
    """``queue``: features kept for each global view; none at first."""

    def __init__(self, network: Network, queue: int, lambdas: tuple[float, float], optimizer: Optimizer):
        self.network, self.length, self.lambdas, self.optimizer = network, queue, lambdas, optimizer
        self.queues: list[list[Tensor]] = [[], []]

    def step(self, views: list[Tensor], *, lr: float, frozen: bool, fill: bool) -> float:
        size, rows = len(views[0]), self.network.projector.prototypes.weight
        with torch.no_grad():
            rows.copy_(rows / rows.norm(dim=1, keepdim=True))
        embeddings = self.network(*views)
        scores = [z @ rows.t() for z in embeddings]
        targets = []
        for view in range(2):
            known = scores[view].detach()
            if len(self.queues[view]) == self.length:
                known = torch.cat([torch.stack(self.queues[view]) @ rows.detach().t(), known])
            targets.append(assignments(known)[-size:])
        near, far = [], []
        for g, target in enumerate(targets):
            for v, score in enumerate(scores):
                if g != v:
                    (near if v < 2 else far).append(-(target * (score / 0.1).log_softmax(1)).sum(1).mean())
        loss = self.lambdas[0] * sum(near) / len(near) + self.lambdas[1] * sum(far) / len(far)
        loss.backward()
        if frozen:
            rows.grad = None
        self.optimizer.step(lr)
        if fill:
            for view in range(2):
                self.queues[view] = [*self.queues[view], *embeddings[view].detach()][-self.length :]
        return loss.item()
