"""Fine-tuning: batch -> losses -> gradients, averaged over the processes -> one step. Every layer is trained.

What is random is a function of (seed, iteration, process): the pictures, their scale and flip (``draw``), and the
proposals that torchvision's heads sample, for which torch's generator is reseeded at every iteration. So a run that
goes on from a checkpoint makes the steps that it would have made. Two processes do not group the pictures, or sample
the proposals, that one would: the steps are equally good ones, not the same.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.config.resolved import differences
from fastssl.distributed.collectives import (
    any_rank,
    average_gradients,
    broadcast_module,
    broadcast_object,
    rank,
    world_size,
)
from fastssl.distributed.sync_batchnorm import synchronise_batchnorm
from fastssl.errors import FastSSLError, counted
from fastssl.evaluate.detection.annotations import DetectionError, DetectionSet, Picture
from fastssl.evaluate.detection.batches import View, load_batches, scaled_size, to_device
from fastssl.evaluate.detection.model import Detector
from fastssl.optim.optimizers import set_lr
from fastssl.pipelines.plan.order import epoch_order
from fastssl.pipelines.plan.philox import Stream, keyed_words
from fastssl.runs.checkpoint import VERSION, load_checkpoint, load_optimizer, write_state

#: Iterations between two looks at the loss, for which the host waits.
LOOK_EVERY = 20


def iterations_of(schedule: str, pictures: int, batch_size: int) -> int:
    """Iterations of ``batch_size`` pictures (of all processes), at least one, that make as many passes as over COCO's
    117,266 pictures with boxes ``1x`` (Detectron2's 90,000 iterations of 16) or ``2x`` makes.
    """
    return max(1, round(int(schedule[0]) * 90_000 * 16 / 117_266 * pictures / batch_size))


@dataclass(frozen=True)
class TrainingConfig:
    """How a detector is fine-tuned; the defaults are Detectron2's.

    Attributes:
        iterations: steps, see ``iterations_of``.
        batch_size: pictures a step, of all processes together.
        optimizer: ``sgd`` or ``adamw``.
        lr: peak rate for 16 pictures; scaled linearly with the batch.
        weight_decay: on everything but norms.
        warmup: iterations on a line from a thousandth of the rate to all of it; None: 1000, or a tenth of all where
            that is less.
        drops: iterations from which on the rate is a tenth of what it was; None: two thirds and eight ninths of all.
        short_sides: in pixels; each picture gets one of them.
        long_side: at most, in pixels.
        seed: of everything that is drawn.
    """

    iterations: int
    batch_size: int = 16
    optimizer: str = "sgd"
    lr: float = 0.02
    weight_decay: float = 1e-4
    warmup: int | None = None
    drops: tuple[int, ...] | None = None
    short_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    long_side: int = 1333
    seed: int = 0

    def __post_init__(self) -> None:
        drops = list(self.drops or ())
        if drops != sorted(drops) or not all(0 < drop < self.iterations for drop in drops):
            wanted = f"must lie between 0 and the {counted(self.iterations, 'iteration')}, the first one first"
            raise DetectionError(f"--drops {','.join(map(str, drops))}: {wanted}; --iterations changes how many")
        if (self.warmup or 0) > self.iterations:
            raise DetectionError(f"--warmup {self.warmup} is longer than {counted(self.iterations, 'iteration')}")

    def warmup_and_drops(self) -> tuple[int, tuple[int, ...]]:
        """As asked for, or what stands for None."""
        warmup = min(1000, self.iterations // 10) if self.warmup is None else self.warmup
        return warmup, self.drops or (-(-2 * self.iterations // 3), -(-8 * self.iterations // 9))

    def rate(self, iteration: int) -> float:
        """The rate of ``iteration``, from 0."""
        warmup, drops = self.warmup_and_drops()
        rate = self.lr * self.batch_size / 16 * 0.1 ** sum(iteration >= drop for drop in drops)
        return rate * (0.001 + 0.999 * iteration / warmup if iteration < warmup else 1)


def draw(picture: Picture, config: TrainingConfig, epoch: int) -> View:
    """A view of it, one of two flipped: a function of (seed, epoch, image id)."""
    words, sides = keyed_words(config.seed, Stream.DETECTION, epoch, picture.id), config.short_sides
    # The high half of a product, as for all ranges here: no division, no bias worth the name.
    side = sides[int(words[0]) * len(sides) >> 32]
    return View(picture, *scaled_size(picture.height, picture.width, side, config.long_side), bool(words[1] >> 31))


def training_requests(
    pictures: Sequence[Picture], iterations: range, config: TrainingConfig, rank: int = 0, world: int = 1
) -> Iterator[list[View]]:
    """This process's part of the batch of every iteration, grouped as by Detectron2: of the epochs' orders, one behind
    another, a process takes every ``world``-th picture; they wait in two groups, wider than high or not, and whichever
    first has the process's share leaves. Earlier batches are formed again: three seconds for all of COCO.
    """
    waiting: tuple[list[tuple[int, Picture]], ...] = [], []
    left = 0
    for place in itertools.count(rank, world):
        epoch, position = divmod(place, len(pictures))
        picture = pictures[epoch_order(len(pictures), config.seed, epoch)[position]]
        group = waiting[picture.width > picture.height]
        group.append((epoch, picture))
        if len(group) == config.batch_size // world:
            if left == iterations.stop:
                return
            if left >= iterations.start:
                yield [draw(each, config, number) for number, each in group]
            left += 1
            group.clear()


def fine_tune(
    detector: Detector,
    data: DetectionSet,
    config: TrainingConfig,
    *,
    workers: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_minutes: float = 10.0,
    about: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Train ``detector``, in place, on the pictures of ``data`` that have boxes, together with the other processes.

    Args:
        detector: where it runs; alike on all processes behind the first step, whatever it was before.
        workers: decoding threads.
        checkpoint: file of the detector and of what is needed to go on, written at the first look at the loss behind
            every ``checkpoint_minutes`` and at the end; if it is there, the run goes on from it.
        about: what else must be equal for that (which backbone, which pictures); must be what JSON can hold.
        progress: called with the number of iterations done, every ``LOOK_EVERY`` iterations and at the end.

    Returns:
        the last losses that were looked at, by name, ``loss`` being their sum; of this process's pictures.

    Raises:
        DetectionError: fewer pictures than a batch, a batch that the processes cannot share, a damaged picture, a
            checkpoint that is damaged or of another run, or a loss or weights that are not finite (the last step's
            too).
        FastSSLError: the checkpoint cannot be written.
    """
    pictures = data.with_boxes()
    if config.batch_size % world_size():
        raise DetectionError(
            f"a batch of {config.batch_size} cannot be shared by {world_size()} processes: make --batch-size a multiple"
        )
    if len(pictures) < config.batch_size:
        few = f"{counted(len(pictures), 'picture')} with boxes, fewer than one batch of {config.batch_size}"
        raise DetectionError(f"{data.name}: {few}; lower --batch-size")
    device = detector.mean.device
    synchronise_batchnorm(detector.pyramid.body, device)
    optimizer = create_optimizer(detector, config)
    # Through JSON, as what is read back: tuples are lists there. Of "flip" older files could say something else; before
    # "form" 2 anchors, batches and losses were others, and no such detector goes on.
    settings = json.loads(json.dumps({**(about or {}), **asdict(config), "flip": True, "form": 2}))
    first, losses, saved = 0, dict[str, float](), time.monotonic()
    if checkpoint is not None and broadcast_object(checkpoint.is_file()):
        first, losses = _resume(checkpoint, settings, detector, optimizer)
    broadcast_module(detector)

    requests = training_requests(pictures, range(first, config.iterations), config, rank(), world_size())
    detector.train()
    how: dict[str, Any] = {"divisible": detector.pyramid.divisible, "masks": detector.config.masks}
    with closing(load_batches(requests, workers=workers, **how)) as batches:
        for iteration, batch in enumerate(batches, start=first):
            _seed_sampling(config.seed, iteration, rank())
            rate = config.rate(iteration)
            set_lr(optimizer, rate)
            images, targets = to_device(batch, device, detector.normalise)
            parts = detector(images, batch.sizes, targets)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(parts.values())).sum().backward()
            average_gradients(detector.parameters())
            optimizer.step()
            done = iteration + 1
            last = done == config.iterations
            if done % LOOK_EVERY and not last:
                continue
            losses = _look(parts, done, rate)
            progress(done)
            if last:  # of what a step made of the weights the next one's loss tells; behind the last, this one
                kept = [buffer.clone() for buffer in detector.buffers()]
                with torch.no_grad():
                    parts = detector(images, batch.sizes, targets)
                    for buffer, value in zip(detector.buffers(), kept):  # statistics of the BatchNorms
                        buffer.copy_(value)
                _look(parts, done, rate)
            if last or (checkpoint is not None and time.monotonic() - saved >= 60 * checkpoint_minutes):
                _require_finite(detector, done, rate)
                saved = time.monotonic()
                if checkpoint is not None and rank() == 0:
                    states = {"detector": detector.state_dict(), "optimizer": optimizer.state_dict()}
                    _save(checkpoint, config=settings, iteration=done, losses=losses, **states)
    return losses


def create_optimizer(detector: Detector, config: TrainingConfig) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW; as in Detectron2, norms do not decay and biases do."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    norms = {
        id(each) for layer in detector.modules() if isinstance(layer, kinds) for each in layer.parameters(recurse=False)
    }
    groups = [
        {"params": [each for each in detector.parameters() if (id(each) in norms) == spared], "weight_decay": decay}
        for spared, decay in ((False, config.weight_decay), (True, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def _seed_sampling(seed: int, iteration: int, rank: int) -> None:
    """Set torch's generators, of which torchvision's samplers draw."""
    high, low, _, _ = (int(word) for word in keyed_words(seed, Stream.DETECTION, iteration, rank, view=1))
    torch.manual_seed((high >> 1) << 32 | low)


def _look(parts: dict[str, Tensor], done: int, lr: float) -> dict[str, float]:
    values = torch.stack([value.detach() for value in parts.values()]).tolist()
    losses = {"loss": sum(values), **dict(zip(parts, values))}
    if any_rank(not math.isfinite(losses["loss"])):
        raise DetectionError(f"the loss is not finite at iteration {done:,} (learning rate {lr:g}): lower --lr")
    return losses


def _require_finite(detector: Detector, done: int, lr: float) -> None:
    """All processes have the same weights, and come to the same end."""
    tensors = [value for value in detector.state_dict().values() if value.is_floating_point()]
    if not torch.stack([value.isfinite().all() for value in tensors]).all():
        raise DetectionError(f"the weights are not finite behind iteration {done:,} (learning rate {lr:g}): lower --lr")


def _resume(
    path: Path, settings: dict[str, Any], detector: Detector, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, float]]:
    """Put the file's state into both; (iterations it has done, the last losses)."""
    try:
        state = load_checkpoint(path)
        if found := differences(settings, state["config"]):
            raise FastSSLError(f"{path} belongs to a run with other settings ({'; '.join(found[:3])})")
        detector.load_state_dict(state["detector"], strict=True)
        load_optimizer(optimizer, state["optimizer"])
        return state["iteration"], state["losses"]
    except FastSSLError as error:
        why = str(error)
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        why = f"{path}: does not fit this detector ({why})"
    raise DetectionError(f"{why}; choose another --out, or remove it")


def _save(path: Path, **state: Any) -> None:
    """Write the file: whole, or the one before stays."""
    try:
        write_state(path, {"version": VERSION, "kind": "detector", **state})
    except (OSError, RuntimeError) as error:
        raise FastSSLError(f"{path}: not written ({error}); the one before it is untouched") from error
