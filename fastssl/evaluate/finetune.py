"""Fine-tuning: a new classifier on a backbone, both trained with labels, judged after every epoch.

    photo -> random resized crop (0.08 to 1 of its area, bicubic), flip -> backbone in training mode
    -> [half of a DINO head] -> Linear -> cross-entropy
    photo to be judged on -> bicubic centre crop (224 of 256) -> the same in evaluation mode

Protocol of SSLight (Tan et al., arXiv 2210.02808) for 1 % and 10 % of the labels: ``SSLIGHT_OPTIM``, batch 1024, no
warm-up, BatchNorm in training mode over all processes. Crops, order and first weights are functions of the seed: a run
repeats bit for bit on a CPU, and several processes make the steps of one, but for an epoch's last batch, which is
filled up until all have equal parts (see ``last_batch``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastssl.distributed.collectives import all_reduce_sum, average_gradients, broadcast_module, rank, world_size
from fastssl.distributed.sync_batchnorm import synchronise_batchnorm
from fastssl.evaluate.classifier import Classifier
from fastssl.evaluate.feature_stream import PASS, share_of
from fastssl.evaluate.features import EVALUATION_CROP, ProbeError, accuracies, collect, require_size, shard
from fastssl.evaluate.photos import LabelledSplit, require_classes, require_labels
from fastssl.optim.optimizers import OptimConfig, create_optimizer, parameter_groups
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation, ViewSpec
from fastssl.utils.host_memory import keep_freed_memory
from fastssl.utils.settings import Count, Positive, Real, settings
from fastssl.utils.transfer import to_device

#: The published optimiser of the semi-supervised figures.
SSLIGHT_OPTIM = OptimConfig(
    name="sgd", lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.0, decay_1d=False, final_lr=1e-6, per_epoch=True
)


@settings(error=ProbeError)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        optim: optimiser, with the rate for 256 photos, which scales with the batch, and half a cosine to ``final_lr``
            that changes once an epoch; no warm-up, constant decay.
        batch_size: photos a step, of all processes together; of fewer photos than that all are one batch.
        head_lr_factor: the head's rate in units of the backbone's.
        size, normalisation: of both views. crop: share of the short side that the centre crop shows.
    """

    optim: OptimConfig = SSLIGHT_OPTIM
    epochs: Count = 30
    batch_size: Count = 1024
    head_lr_factor: Positive = 1.0
    size: Count = 224
    crop: Real = EVALUATION_CROP
    normalisation: Normalisation = IMAGENET

    def record(self) -> dict[str, Any]:
        """All numbers by name, for a result."""
        values = dataclasses.asdict(self)
        optim = values.pop("optim")
        momentum = optim["momentum"] if self.optim.name != "adamw" else None
        return {"optimizer": optim.pop("name"), **optim, "momentum": momentum, **values}

    def lr(self, epoch: int) -> float:
        """The backbone's rate in ``epoch`` (0 .. epochs; at ``epochs``, one past the last, it is the final one)."""
        return self.optim.rate(epoch, RunLength(self.epochs, 1), self.batch_size)

    @property
    def train_view(self) -> ViewSpec:
        """Random resized crop and flip, no colour: torchvision's defaults for classification, bicubic."""
        no_colour: dict[str, Any] = {"jitter": 0.0, "grey": 0.0, "blur": 0.0, **self.normalisation._asdict()}
        return ViewSpec(size=self.size, area=(0.08, 1.0), interpolation="bicubic", flip=0.5, **no_colour)

    @property
    def test_view(self) -> ViewSpec:
        """The centre crop, bicubic."""
        view = ViewSpec.evaluation(self.size, self.crop, self.normalisation)
        return dataclasses.replace(view, interpolation="bicubic")


@dataclass(frozen=True)
class FinetuneResult:
    """What came out; shares in percent.

    Attributes:
        accuracy, top5: of the last epoch; top5 is None with five classes or fewer, of which it would say nothing.
        confidence, top5_confidence: their 95 % intervals.
        best_accuracy, best_confidence, best_top5, best_epoch: of the epoch (from 1) that was best on the photos judged
            on, which is how papers report it: slightly optimistic, because it was chosen by them.
        accuracies: by epoch. losses, train_accuracies: mean cross-entropy and top-1 over the epoch's training views,
            while the network was changing. learning_rates: of the backbone, by epoch.
        unseen: photos judged on of a class that the labelled ones do not have; they count as wrong.
        batch_size: photos a step: as asked for, or all that there are. steps_per_epoch: the last with what is left.
    """

    accuracy: float
    confidence: tuple[float, float]
    top5: float | None
    top5_confidence: tuple[float, float] | None
    best_accuracy: float
    best_confidence: tuple[float, float]
    best_top5: float | None
    best_epoch: int
    accuracies: list[float]
    losses: list[float]
    train_accuracies: list[float]
    learning_rates: list[float]
    train_samples: int
    val_samples: int
    classes: int
    unseen: int
    batch_size: int
    steps_per_epoch: int


def finetune(
    network: Classifier,
    split: LabelledSplit,
    config: FinetuneConfig,
    *,
    device: torch.device,
    amp: bool = False,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> FinetuneResult:
    """Train ``network``, all of it, on the first part of ``split``; judge it on the second after every epoch. All
    processes get the result.

    Args:
        network: with an output for each of ``split.classes``; changed in place, moved to ``device``, in evaluation mode
            afterwards.
        amp: bfloat16 autocast, all but the last layer.
        seed: of the order of photos and of their crops.
        progress: called with the number of photos (of all processes) trained on so far.

    Raises:
        FastSSLError: a batch that cannot be dealt out, one class alone, a size that the network cannot take, or a loss
            that is no longer finite.
    """
    classes, photos = len(split.classes), len(split.train_index)
    if config.batch_size < 2:
        raise ProbeError("a batch of 1: BatchNorm needs at least 2 photos; --batch-size changes it")
    own = min(share_of(config.batch_size), -(-photos // world_size()))
    config = dataclasses.replace(config, batch_size=min(config.batch_size, photos))
    require_classes(split.classes, split.train, "labelled photos", "a classifier")
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True  # all steps of an epoch but its last have the same shapes
    network.to(device).to(memory_format=torch.channels_last)
    require_size(network, config.size, device, network.linear.weight.dtype)
    broadcast_module(network)
    if world_size() > 1:
        synchronise_batchnorm(network, device)
    groups = [
        {**group, "lr_factor": 1.0 if part is network.backbone else config.head_lr_factor}
        for part in (network.backbone, network.hidden, network.linear)
        for group in parameter_groups(part, config.optim)
        if group["params"]
    ]
    optimizer = create_optimizer(network, config.optim, groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    targets = split.targets(require_labels(split.train))
    # Views in the type that the first layer reads, so that no pass casts them again.
    how: dict[str, Any] = {"workers": workers, "dtype": torch.bfloat16 if amp else network.linear.weight.dtype}
    how |= {"seed": seed, "rank": rank(), "world": world_size(), "indices": split.train_index, "drop_last": False}
    losses, train_accuracies, counts, rates = [], [], [], []
    with ViewLoader(split.train, [config.train_view], own, device, **how) as loader:
        for epoch in range(config.epochs):
            rates.append(config.lr(epoch))
            for group in optimizer.param_groups:
                group["lr"] = rates[-1] * group["lr_factor"]
            network.train()
            seen = 0  # by this process, as many as by any other
            sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, right; waited for behind the epoch
            for step, batch in enumerate(loader.epoch(epoch), 1):
                wanted = to_device(targets[batch.index.numpy()], device)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    logits = network(batch.views[0])
                loss = functional.cross_entropy(logits, wanted)
                loss.backward()
                average_gradients(parameters)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                with torch.no_grad():
                    sums += torch.stack([loss.double() * len(wanted), (logits.argmax(1) == wanted).sum().double()])
                seen += len(wanted)
                progress(epoch * photos + min(step * config.batch_size, photos))
            mean, right = (all_reduce_sum(sums) / (seen * world_size())).tolist()
            if not math.isfinite(mean):
                raise ProbeError(
                    f"fine-tuning has diverged: the loss is {mean} in epoch {epoch + 1} of {config.epochs}; lower --lr"
                )
            losses.append(mean)
            train_accuracies.append(100 * right)
            counts.append(count_correct(network, split, config, device=device, amp=amp, workers=workers))
    total = len(split.val_index)
    best = max(range(config.epochs), key=lambda epoch: counts[epoch][0])  # the first of equals
    last, at_best = (accuracies(*counts[epoch], total, classes).values() for epoch in (-1, best))
    names = ("accuracy", "confidence", "top5", "top5_confidence", "best_accuracy", "best_confidence", "best_top5")
    return FinetuneResult(
        **dict(zip(names, [*last, *at_best])),
        best_epoch=best + 1,
        accuracies=[100 * first / total for first, _ in counts],
        losses=losses,
        train_accuracies=train_accuracies,
        learning_rates=rates,
        train_samples=photos,
        val_samples=total,
        classes=classes,
        unseen=int((split.targets(require_labels(split.val)[split.val_index]) < 0).sum()),
        batch_size=config.batch_size,
        steps_per_epoch=len(loader),
    )


def count_correct(
    network: Classifier,
    split: LabelledSplit,
    config: FinetuneConfig,
    *,
    device: torch.device,
    amp: bool = False,
    workers: int | None = None,
) -> tuple[int, int]:
    """How many of all photos to be judged on have their class first, and among the first five. The network is in
    evaluation mode afterwards.
    """
    best, mine = min(5, network.linear.out_features), shard(split.val_index, may_be_empty=True)
    dtype = torch.bfloat16 if amp else network.linear.weight.dtype
    network.eval()
    right = torch.zeros(2, dtype=torch.int64)
    if len(mine):

        def guesses(images: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits: Tensor = network(images.to(dtype))
            return logits.topk(best, dim=1).indices  # float32 holds them exactly

        how: dict[str, Any] = {"indices": mine, "batch_size": min(config.batch_size, PASS), "device": device}
        found = collect(guesses, split.val, config.test_view, workers=workers, **how)
        hits = found.features.long() == torch.from_numpy(split.targets(found.labels.numpy()))[:, None]
        right[0], right[1] = hits[:, 0].sum(), hits.sum()
    first, five = all_reduce_sum(right).tolist()
    return first, five
