"""Fine-tuning: batch -> losses -> gradients, averaged over the processes -> one step. Every layer is trained.

What is random is a function of (seed, iteration, process): the pictures, their scale and flip (``batches.draw``), and
the proposals that torchvision's heads sample, for which torch's generator is reseeded at every iteration. So a run that
goes on from a checkpoint makes the steps that it would have made. Two processes do not sample the proposals that one
would: the steps are equally good ones, not the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl.config.recipe import differences
from fastssl.distributed.collectives import any_rank, average_gradients, broadcast_module, broadcast_object
from fastssl.distributed.sync_batchnorm import synchronise_batchnorm
from fastssl.distributed.world import World
from fastssl.errors import FastSSLError, counted
from fastssl.evaluate.detection.annotations import DetectionError, DetectionSet
from fastssl.evaluate.detection.batches import load_batches, to_device, training_requests
from fastssl.evaluate.detection.model import Detector
from fastssl.optim.optimizers import set_lr
from fastssl.pipelines.plan.philox import Stream, keyed_words
from fastssl.runs.checkpoint import VERSION, load_checkpoint, write_state
from fastssl.runs.restore import load_optimizer

#: Iterations between two looks at the loss, for which the host waits.
LOOK_EVERY = 20

#: What tells a detector's file from the other checkpoints.
KIND = "detector"

#: Passes over the pictures with boxes. Detectron2's 1x schedule: 90,000 iterations of 16 of COCO's 117,266.
EPOCHS = {"1x": 90_000 * 16 / 117_266, "2x": 180_000 * 16 / 117_266}


def iterations_of(schedule: str, pictures: int, batch_size: int) -> int:
    """Iterations of ``batch_size`` pictures (of all processes) that make as many passes as ``1x`` or ``2x`` makes over
    COCO; at least one.
    """
    return max(1, round(EPOCHS[schedule] * pictures / batch_size))


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
        short_sides: in pixels; each picture gets one of them.
        long_side: at most, in pixels.
        flip: with probability one half.
        seed: of everything that is drawn.
    """

    iterations: int
    batch_size: int = 16
    optimizer: str = "sgd"
    lr: float = 0.02
    weight_decay: float = 1e-4
    warmup: int | None = None
    short_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    long_side: int = 1333
    flip: bool = True
    seed: int = 0

    def rate(self, iteration: int) -> float:
        """The rate of ``iteration``, from 0: a tenth of the peak from two thirds on, a hundredth from eight ninths."""
        warmup = min(1000, self.iterations // 10) if self.warmup is None else self.warmup
        rate = self.lr * self.batch_size / 16
        if iteration < warmup:
            rate *= 0.001 + 0.999 * iteration / warmup
        drops = (3 * iteration >= 2 * self.iterations) + (9 * iteration >= 8 * self.iterations)
        return rate * 0.1**drops


def fine_tune(
    detector: Detector,
    data: DetectionSet,
    config: TrainingConfig,
    *,
    device: torch.device,
    world: World = World(),  # noqa: B008 (frozen)
    workers: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_minutes: float = 10.0,
    about: dict[str, Any] | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train ``detector``, in place, on the pictures of ``data`` that have boxes.

    Args:
        detector: on ``device``; alike on all processes behind the first step, whatever it was before.
        world: this process among those that train together; the group is there.
        workers: decoding threads.
        checkpoint: file of the detector and of what is needed to go on, written every ``checkpoint_minutes`` (with the
            next look at the loss) and at the end; if it is there, the run goes on from it.
        about: what else must be equal for that (which backbone, which pictures); must be what JSON can hold.
        progress: called with the number of iterations done and the last losses, every ``LOOK_EVERY`` iterations and at
            the end.

    Returns:
        the last losses that were looked at, by name, ``loss`` being their sum; of this process's pictures.

    Raises:
        DetectionError: fewer pictures than a batch, a batch that the processes cannot share, a loss or weights that are
            no longer finite (the last step's too), or a damaged picture.
        FastSSLError: the checkpoint is damaged or of another run.
    """
    pictures = data.with_boxes()
    if config.batch_size % world.size:
        raise DetectionError(
            f"a batch of {config.batch_size} cannot be shared by {world.size} processes: make --batch-size a multiple"
        )
    if len(pictures) < config.batch_size:
        how_many = counted(len(pictures), "picture")
        raise DetectionError(
            f"{data.name}: {how_many} with boxes, fewer than one batch of {config.batch_size}; lower --batch-size"
        )
    synchronise_batchnorm(detector.pyramid.body, device)
    optimizer = create_optimizer(detector, config)
    resume = _Checkpoint(checkpoint, {**(about or {}), **asdict(config)}, world, checkpoint_minutes)
    first, losses = resume.load(detector, optimizer)
    broadcast_module(detector)

    requests = training_requests(
        pictures,
        range(first, config.iterations),
        batch_size=config.batch_size // world.size,
        short_sides=config.short_sides,
        long_side=config.long_side,
        flip=config.flip,
        seed=config.seed,
        rank=world.rank,
        world=world.size,
    )
    detector.train()
    with closing(
        load_batches(requests, divisible=detector.pyramid.divisible, masks=detector.config.masks, workers=workers)
    ) as batches:
        for iteration, batch in enumerate(batches, start=first):
            _seed_sampling(config.seed, iteration, world.rank)
            rate = config.rate(iteration)
            set_lr(optimizer, rate)
            images, targets = to_device(batch, device, detector.normalise)
            parts = detector(images, batch.sizes, targets)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(parts.values())).sum().backward()
            average_gradients(detector.parameters())
            optimizer.step()
            done = iteration + 1
            if done % LOOK_EVERY == 0 or done == config.iterations:
                losses = _look(parts, done, rate)
                if progress is not None:
                    progress(done, losses)
                # Here, where the loss is known to be finite; of what the step made of the weights the next loss would
                # tell.
                if done == config.iterations:
                    _look_behind(detector, images, batch.sizes, targets, done, rate)
                if done == config.iterations or resume.is_due():
                    _require_finite(detector, done, rate)
                    resume.save(detector, optimizer, done, losses)
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


def _look(parts: dict[str, torch.Tensor], done: int, lr: float) -> dict[str, float]:
    values = torch.stack([value.detach() for value in parts.values()]).tolist()
    losses = {"loss": sum(values), **dict(zip(parts, values))}
    if any_rank(not math.isfinite(losses["loss"])):
        raise DetectionError(f"the loss is not finite at iteration {done:,} (learning rate {lr:g}): lower --lr")
    return losses


@torch.no_grad()
def _look_behind(
    detector: Detector,
    images: torch.Tensor,
    sizes: list[tuple[int, int]],
    targets: list[dict[str, torch.Tensor]],
    done: int,
    lr: float,
) -> None:
    """The loss once more, behind the last step. What the BatchNorms keep of it is put back."""
    kept = [buffer.clone() for buffer in detector.buffers()]
    parts = detector(images, sizes, targets)
    for buffer, value in zip(detector.buffers(), kept):
        buffer.copy_(value)
    _look(parts, done, lr)


def _require_finite(detector: Detector, done: int, lr: float) -> None:
    """All processes have the same weights, and come to the same end."""
    tensors = [value for value in detector.state_dict().values() if value.is_floating_point()]
    if not torch.stack([value.isfinite().all() for value in tensors]).all():
        raise DetectionError(f"the weights are not finite behind iteration {done:,} (learning rate {lr:g}): lower --lr")


class _Checkpoint:
    """Where a long run stands, in one file; does nothing without one."""

    def __init__(self, path: Path | None, config: dict[str, Any], world: World, minutes: float):
        # Through JSON, as what is read back: tuples are lists there.
        self.path, self.config, self.world, self.minutes = path, json.loads(json.dumps(config)), world, minutes
        self.saved = time.monotonic()

    def load(self, detector: Detector, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, float]]:
        """Put the file's state into both; (iterations it has done, the last losses), (0, {}) where there is none."""
        if self.path is None or not broadcast_object(self.path.is_file()):
            return 0, {}
        try:
            state = load_checkpoint(self.path)
            if state.get("kind") != KIND or not isinstance(state.get("config"), dict):
                raise FastSSLError(f"{self.path}: holds no detector of this version of fastssl")
            if found := differences(self.config, state["config"]):
                raise FastSSLError(f"{self.path} belongs to a run with other settings ({'; '.join(found[:3])})")
            detector.load_state_dict(state["detector"], strict=True)
            load_optimizer(optimizer, state["optimizer"])
            return state["iteration"], state["losses"]
        except FastSSLError as error:
            why = str(error)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            why = f"{self.path}: does not fit this detector ({why})"
        raise DetectionError(f"{why}; choose another --out, or remove it")

    def is_due(self) -> bool:
        """Whether the last one is old enough."""
        return self.path is not None and time.monotonic() - self.saved >= 60 * self.minutes

    def save(self, detector: Detector, optimizer: torch.optim.Optimizer, done: int, losses: dict[str, float]) -> None:
        """Write the file: whole, or the one before stays."""
        self.saved = time.monotonic()
        if self.path is None or not self.world.is_main:
            return
        state = {"version": VERSION, "kind": KIND, "config": self.config, "iteration": done, "losses": losses}
        state.update(detector=detector.state_dict(), optimizer=optimizer.state_dict())
        try:
            write_state(self.path, state)
        except (OSError, RuntimeError) as error:
            raise FastSSLError(f"{self.path}: not written ({error}); the one before it is untouched") from error
