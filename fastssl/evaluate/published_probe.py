"""The linear probe by a published protocol, from photos to figures.

The features of a batch cost a pass of the network, a classifier on them next to nothing; so all classifiers of a grid
of rates and decays read the same features, and each moves as it would alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.distributed.collectives import all_reduce_mean, all_reduce_sum, average_gradients
from fastssl.evaluate.feature_stream import PASS, ClassTokens, FeatureStream
from fastssl.evaluate.features import (
    Bar,
    ProbeError,
    accuracies,
    check_shared_input,
    share_features,
    silent,
    split_indices,
)
from fastssl.evaluate.photos import LabelledSplit, require_classes, require_labels
from fastssl.evaluate.protocols import LinearProtocol, Trial, differing
from fastssl.optim.optimizers import OptimConfig, create_optimizer
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation

#: Scores held at a time when classifiers are judged: 64 MiB of float32.
_SCORES = 1 << 24
#: Share of the training photos that is kept from the training where the choice is made on them.
HELD_OUT = 0.1


def published_probe(
    backbone: nn.Module,
    split: LabelledSplit,
    protocol: LinearProtocol,
    grid: list[Trial],
    *,
    device: torch.device,
    normalisation: Normalisation = IMAGENET,
    seed: int = 0,
    workers: int | None = None,
    bar: Bar = silent,
    **settings: Any,
) -> dict[str, Any]:
    """Train the grid's classifiers on the split's first part, judge them on the second after every epoch.

    Under several processes all must call this; each reads its share of the photos. On a GPU the network runs under
    autocast to bfloat16.

    Args:
        backbone: frozen, on ``device``. It is put into evaluation mode.
        grid: see ``protocols.trials``; its first is the headline.
        normalisation: of both views.
        seed: of the order, the views, the classifiers' weights and what is held out.
        settings: the protocol's that are to be others, by the names of its fields, as ``epochs`` and ``size``. For the
            record alone: ``reestimate_bn``.

    Returns:
        the record's values: all settings that were used (``changed`` names those that are not the protocol's), sizes,
        and ``summary``.

    Raises:
        FastSSLError: one class only, fewer photos than a batch, a network that the protocol cannot read, features that
            are not finite.
    """
    classes = len(split.classes)
    require_classes(split.classes, split.train, "training photos", "a linear probe")
    network = ClassTokens(backbone, protocol.class_tokens) if protocol.class_tokens else backbone
    used = replace(protocol, **asdict(grid[0]), **settings, **split.scaled(), bfloat16=device.type == "cuda")
    if used.cached_epochs >= used.epochs:  # none would be read again
        used = replace(used, cached_epochs=0)
    learned, labels = split.train_index, require_labels(split.train)
    sets = {"val": ("validation photos", split.val, split.val_index)}
    if used.choose_on == "held_out":
        kept, held_out = split_indices(labels[learned], len(learned), fraction=HELD_OUT, seed=seed)
        if not len(held_out):
            raise ProbeError(f"{split.train.path}: one photo in each class leaves nothing to hold out; --select val")
        learned, sets["held_out"] = learned[kept], ("held-out photos", split.train, learned[held_out])
    how: dict[str, Any] = {"device": device, "workers": workers, "amp": used.bfloat16}
    targets, photos, whole = torch.from_numpy(split.targets(labels)), len(learned), used.batch_size
    shape: dict[str, Any] = {"batch_size": whole, "seed": seed, "cached_epochs": used.cached_epochs}
    # Opened first: a batch that does not fit is said before any photo is read.
    with FeatureStream(network, split.train, learned, targets, used.view(normalisation), **shape, **how) as stream:
        how |= {
            "size": used.size,
            "crop": used.crop,
            "normalisation": normalisation,
            "interpolation": used.interpolation,
        }
        judged: dict[str, tuple[Tensor, Tensor, int]] = {}
        for name, (label, reader, index) in sets.items():
            found = share_features(network, reader, index, label, bar, batch_size=PASS, **how)
            check_shared_input(found, found)
            wanted = torch.from_numpy(split.targets(found.labels.numpy()))
            judged[name] = found.features.to(device), wanted.to(device), len(index)
        width = judged["val"][0].shape[1]
        classifiers = Classifiers(protocol, grid, width, classes, device=device, seed=seed)  # milestones: of its length
        with bar("training views", used.epochs * photos) as advance:

            def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
                for step, batch in enumerate(stream.epoch(epoch), 1):
                    advance(epoch * photos + min(step * whole, photos))
                    yield batch

            curves = classifiers.train(batches, judged, epochs=used.epochs, batch_size=whole)
    return {
        **used.record(),
        "changed": differing(used.record() | normalisation._asdict(), protocol.record() | IMAGENET._asdict()),
        "steps_per_epoch": stream.steps,
        "cache_dtype": "float32" if used.cached_epochs else None,
        "features": width,
        "train_samples": photos,
        "val_samples": len(split.val_index),
        "classes": classes,
        **summary(curves, grid, classes, choose_on=used.choose_on),
    }


@dataclass(frozen=True)
class Curves:
    """What became of R trials over E epochs, on the host.

    Attributes:
        loss, train_accuracy: (E, R) float64, means over the epoch's photos, each taken before its step; accuracy in
            percent, of the random crops.
        right: (E, 2, R) int64 by name of the set: how many were right behind the epoch, top-1 and top-5.
        totals: the sets' sizes.
    """

    loss: Tensor
    train_accuracy: Tensor
    right: dict[str, Tensor]
    totals: dict[str, int]


class Classifiers:
    """R linear classifiers with C classes on F features, one for each trial. They begin alike.

    Args:
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
        self._rate, self._grid, drawn = protocol.rate, grid, torch.Generator().manual_seed(seed)
        first = torch.empty(classes, width).normal_(0.0, protocol.init_std, generator=drawn)
        self.weights = [first.to(device, copy=True).requires_grad_() for _ in grid]
        self.biases = [torch.zeros(classes, device=device).requires_grad_() for _ in grid]
        decays = [trial.weight_decay for trial in grid]
        decays += [0.0 if protocol.optimizer == "lars" else decay for decay in decays]  # of the biases
        tensors = zip([*self.weights, *self.biases], decays)
        groups = [{"params": [tensor], "weight_decay": decay} for tensor, decay in tensors]
        optim = OptimConfig(name=protocol.optimizer, momentum=protocol.momentum, trust=protocol.trust)
        self._optimizer = create_optimizer(nn.Module(), optim, groups)  # rates come with each step

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

    def train(
        self,
        batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
        judged: Mapping[str, tuple[Tensor, Tensor, int]],
        *,
        epochs: int,
        batch_size: int,
    ) -> Curves:
        """Steps at the protocol's rates, judged behind each epoch. The device is waited for once an epoch.

        Args:
            batches: the (features, targets) of each step of an epoch (from 0), as ``FeatureStream.epoch`` gives them.
            judged: by name of the set this process's share, (n, F) float32 features and (n,) int64 targets (-1: a class
                that is not learned) on the device, and how many there are on all processes.
            batch_size: of all processes together; rates are scaled to it.
        """
        losses, shares = [], []
        right: dict[str, list[Tensor]] = {name: [] for name in judged}
        for epoch in range(epochs):
            rates = [self._rate(trial.lr, epoch, epochs, batch_size) for trial in self._grid]
            told = [(len(batch[1]), torch.stack(self.step(*batch, rates)).double()) for batch in batches(epoch)]
            photos = sum(count for count, _ in told)
            means = all_reduce_mean(torch.stack([count / photos * mean for count, mean in told]).sum(dim=0)).cpu()
            losses.append(means[0])
            shares.append(100 * means[1])
            for name, (features, targets, _) in judged.items():
                right[name].append(all_reduce_sum(self.right(features, targets)).cpu())
        counts = {name: torch.stack(found) for name, found in right.items()}
        totals = {name: total for name, (_, _, total) in judged.items()}
        return Curves(torch.stack(losses), torch.stack(shares), counts, totals)


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

    def figures(epoch: int, trial: int, prefix: str = "") -> dict[str, Any]:
        top1, top5 = curves.right["val"][epoch, :, trial].tolist()
        found = accuracies(top1, top5, curves.totals["val"], classes)
        return {prefix + name: value for name, value in found.items()}

    rows = []
    for number, (trial, epoch, loss) in enumerate(zip(grid, best.tolist(), curves.loss[-1].tolist())):
        row = {
            **asdict(trial),
            **figures(-1, number),
            "best_epoch": epoch + 1,
            **figures(epoch, number, "best_"),
            "train_loss": loss if math.isfinite(loss) else None,  # JSON has no NaN: the trial diverged
            "train_accuracy": float(curves.train_accuracy[-1, number]),
        }
        if choose_on != "val":
            row[f"{choose_on}_accuracy"] = float(deciding[-1, number])
        rows.append(row)
    chosen = int(deciding[-1].argmax())
    rates = sorted({trial.lr for trial in grid})
    return {
        **{name: value for name, value in rows[0].items() if name not in ("lr", "weight_decay")},
        **{f"chosen_{name}": value for name, value in asdict(grid[chosen]).items()},
        **figures(-1, chosen, "chosen_"),
        "chosen_at_edge": len(rates) > 1 and grid[chosen].lr in (rates[0], rates[-1]),
        "chosen_on": {"val": "validation photos", "held_out": "held-out training photos"}[choose_on],
        "accuracy_by_epoch": tables["val"][:, 0, 0].tolist(),
        "grid": rows,
    }
