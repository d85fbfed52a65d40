"""Linear classifiers trained by a published protocol on frozen features: a whole grid of rates and decays at once.

The features of a batch cost a pass of the network, a classifier on them next to nothing; so all classifiers of a grid
read the same features, as one tensor of weights, and each moves as it would alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastssl.distributed.collectives import all_reduce_mean, all_reduce_sum, average_gradients
from fastssl.evaluate.features import accuracies
from fastssl.evaluate.protocols import LinearProtocol, Trial
from fastssl.optim.optimizers import LARS

#: Scores held at a time when classifiers are judged: 64 MiB of float32.
_SCORES = 1 << 24


class Classifiers:
    """R linear classifiers with C classes on F features, one for each trial. They begin alike.

    Args:
        protocol: optimiser and initialisation.
        grid: the R trials. Their rates come with each step.
        width, classes: F and C.
        seed: of the weights, drawn on the host: alike on all processes and devices.

    Attributes:
        weights: R of (C, F) float32. biases: R of (C,).
    """

    def __init__(
        self,
        protocol: LinearProtocol,
        grid: list[Trial],
        width: int,
        classes: int,
        *,
        device: torch.device,
        seed: int = 0,
    ):
        drawn = torch.Generator().manual_seed(seed)
        first = torch.empty(classes, width).normal_(0.0, protocol.init_std, generator=drawn)
        self.weights = [first.to(device, copy=True).requires_grad_() for _ in grid]
        self.biases = [torch.zeros(classes, device=device).requires_grad_() for _ in grid]
        lars, decays = protocol.optimizer == "lars", [trial.weight_decay for trial in grid]
        decays += [0.0 if lars else decay for decay in decays]  # of the biases
        tensors = zip([*self.weights, *self.biases], decays)
        groups = [{"params": [tensor], "weight_decay": decay} for tensor, decay in tensors]
        self._optimizer: torch.optim.Optimizer = (
            LARS(groups, 0.0, momentum=protocol.momentum, trust=protocol.trust)
            if lars
            else torch.optim.SGD(groups, 0.0, momentum=protocol.momentum, fused=True)
        )

    def scores(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, R, C): one matrix product for all classifiers."""
        found = torch.addmm(torch.cat(self.biases), features, torch.cat(self.weights).T)
        return found.view(-1, len(self.biases), len(self.biases[0]))

    def step(self, features: Tensor, targets: Tensor, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
        """One step of each on the mean cross-entropy of a batch; under several processes, of all their parts, which are
        equally large.

        Args:
            features: (B, F) float32. targets: (B,) int64 in 0 .. C - 1.
            rates: R of them.

        Returns:
            (loss (R,), share of the batch that was classified rightly (R,)), before the step, of this process's part;
            on the device.
        """
        for group, rate in zip(self._optimizer.param_groups, [*rates, *rates]):
            group["lr"] = min(rate, 1e38)  # LARS refuses a number that float32 does not have
        scores = self.scores(features)
        wanted = targets[:, None].expand(-1, len(self.biases))
        losses = functional.cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="none")
        loss = losses.view(wanted.shape).mean(dim=0)
        self._optimizer.zero_grad()
        loss.sum().backward()
        average_gradients([*self.weights, *self.biases])
        self._optimizer.step()
        with torch.no_grad():
            true = scores.gather(2, wanted[:, :, None])
            return loss.detach(), ((scores >= true).sum(dim=2) == 1).float().mean(dim=0)

    @torch.no_grad()
    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        """(2, R) int64: how many of the (B, F) features have their class first, and among the first five.

        A class scored as high as the true one counts as better, and scores that are not numbers as wrong: what a
        diverged classifier says is no hit. So is a target of -1, a class that was not learned.
        """
        found = torch.zeros(2, len(self.biases), dtype=torch.int64, device=self.biases[0].device)
        rows = max(1, _SCORES // sum(map(len, self.biases)))
        for part, classes in zip(features.split(rows), targets.split(rows)):
            scores = self.scores(part)
            true = scores.gather(2, classes.clamp_min(0)[:, None, None].expand(-1, len(self.biases), 1))
            place = (scores >= true).sum(dim=2)  # 1: first; 0: not a number
            known = (classes >= 0)[:, None]
            found += torch.stack([((place == 1) & known).sum(dim=0), ((place >= 1) & (place <= 5) & known).sum(dim=0)])
        return found


@dataclass(frozen=True)
class Judged:
    """Photos that the classifiers are judged on after every epoch: this process's share of them.

    Attributes:
        features: (n, F) float32 and targets: (n,) int64 (-1: a class that is not learned), on the device.
        total: how many there are on all processes.
    """

    features: Tensor
    targets: Tensor
    total: int


@dataclass(frozen=True)
class Curves:
    """What became of R trials over E epochs, on the host.

    Attributes:
        loss, train_accuracy: (E, R) float64, means over the epoch's steps, each taken before its step; accuracy in
            percent, of the random crops.
        right: (E, 2, R) int64 for each set that was judged, by name: how many were right behind the epoch, top-1 and
            top-5.
        totals: the sets' sizes.
    """

    loss: Tensor
    train_accuracy: Tensor
    right: dict[str, Tensor]
    totals: dict[str, int]


def train_classifiers(
    classifiers: Classifiers,
    protocol: LinearProtocol,
    grid: list[Trial],
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    judged: Mapping[str, Judged],
    *,
    epochs: int,
    batch_size: int,
) -> Curves:
    """Train ``classifiers`` for ``epochs``, judged behind each. The device is waited for once an epoch.

    Args:
        batches: the (features, targets) of each step of an epoch (from 0), as ``FeatureStream.epoch`` gives them.
        judged: sets by name.
        batch_size: of all processes together; rates are scaled to it.
    """
    device = classifiers.biases[0].device
    losses, shares = [], []
    right: dict[str, list[Tensor]] = {name: [] for name in judged}
    for epoch in range(epochs):
        rates = [protocol.rate(trial.lr, epoch, epochs, batch_size) for trial in grid]
        means = torch.zeros(2, len(grid), dtype=torch.float64, device=device)
        steps = 0
        for features, targets in batches(epoch):
            means += torch.stack(classifiers.step(features, targets, rates))
            steps += 1
        means = all_reduce_mean(means / steps).cpu()
        losses.append(means[0])
        shares.append(100 * means[1])
        for name, part in judged.items():
            right[name].append(all_reduce_sum(classifiers.right(part.features, part.targets)).cpu())
    return Curves(
        torch.stack(losses),
        torch.stack(shares),
        {name: torch.stack(counts) for name, counts in right.items()},
        {name: part.total for name, part in judged.items()},
    )


def summary(curves: Curves, grid: list[Trial], classes: int, *, choose_on: str = "val") -> dict[str, Any]:
    """The figures of a probe, as they stand in its record.

    The headline is the last epoch of the grid's first trial: nothing was chosen for it. Beside it, chosen on the set
    ``choose_on``: ``best_epoch`` of that trial (what papers often report), and, where the grid has several, the trial
    with the best last epoch as ``chosen_...``; ``chosen_at_edge`` says that its rate is the grid's smallest or largest,
    so that better ones may lie beyond. All figures are of the set ``val``; percent, with their 95 % interval; top-5 is
    None where there are no more than five classes.
    """
    # (E, 2, R) percent
    tables = {name: 100 * counts.double() / curves.totals[name] for name, counts in curves.right.items()}
    deciding = tables[choose_on][:, 0]
    best = deciding.argmax(dim=0)  # (R,) of equal epochs the first

    def figures(epoch: int, trial: int) -> dict[str, Any]:
        top1, top5 = (int(count) for count in curves.right["val"][epoch, :, trial])
        return accuracies(top1, top5, curves.totals["val"], classes)

    def with_prefix(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
        return {f"{prefix}_{name}": value for name, value in values.items()}

    rows = []
    for number, trial in enumerate(grid):
        row = {
            **asdict(trial),
            **figures(-1, number),
            "best_epoch": int(best[number]) + 1,
            **with_prefix("best", figures(int(best[number]), number)),
            "train_loss": _finite(curves.loss[-1, number]),
            "train_accuracy": float(curves.train_accuracy[-1, number]),
        }
        if choose_on != "val":
            row[f"{choose_on}_accuracy"] = float(deciding[-1, number])
        rows.append(row)
    chosen = int(deciding[-1].argmax())
    rates = sorted({trial.lr for trial in grid})
    return {
        **{name: value for name, value in rows[0].items() if name not in ("lr", "weight_decay")},
        **with_prefix("chosen", {**asdict(grid[chosen]), **figures(-1, chosen)}),
        "chosen_at_edge": len(rates) > 1 and grid[chosen].lr in (rates[0], rates[-1]),
        "chosen_on": {"val": "validation photos", "held_out": "held-out training photos"}[choose_on],
        "accuracy_by_epoch": tables["val"][:, 0, 0].tolist(),
        "grid": rows,
    }


def _finite(value: Tensor) -> float | None:
    """JSON has no NaN; a loss that is none says that the trial diverged."""
    return float(value) if torch.isfinite(value) else None
