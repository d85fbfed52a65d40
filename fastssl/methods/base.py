"""What all methods share: the shape of a step over views grouped by size.

    rates    what the schedules say for a step, by name: numbers, and switches (True or False)
    noise    what is drawn for a step
    targets  without gradient: keys, or a teacher's probabilities
    embed    the student's pass
    loss     of the embeddings
    after_step   queues and centres, once the optimiser has moved

Those six are what a method fills in. It knows nothing of processes but through the collectives it calls, nothing of
parts of a batch, and nothing of recording: a recorded step reads numbers from the device, and a switch that flips is a
new recording.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastssl.losses.pairs import PairWeights
from fastssl.losses.smoothed_target import rank_weights
from fastssl.models.activations import keep_less
from fastssl.models.backbones import feature_dim
from fastssl.models.drop_path import DropTable
from fastssl.models.group_batchnorm import BatchNorms
from fastssl.models.heads import Projector, ProjectorConfig
from fastssl.optim import schedules
from fastssl.optim.schedules import RunLength, SmoothingSchedule
from fastssl.utils.settings import BelowOne, Natural, Positive, Whole, settings

#: By name: a number, or a tensor with one element on the device, or a switch.
Rates = Mapping[str, "Tensor | float | bool"]


@dataclass(frozen=True)
class MethodConfig:
    """Base of a method's own numbers: which batches go with them."""

    #: the recipe's key that bounds the batch, for messages
    BATCH_KEY: ClassVar[str] = ""
    #: keys that count epochs of the run
    EPOCH_KEYS: ClassVar[tuple[str, ...]] = ()

    @property
    def groups(self) -> int:
        """BatchNorm groups of the teacher's pass."""
        return 1

    @property
    def student_groups(self) -> int:
        """BatchNorm groups of the student's pass."""
        return 1

    @property
    def largest_batch(self) -> int | None:
        """No larger batch can be had; None: there is no bound."""
        return None

    @property
    def view_epochs(self) -> int | None:
        """The epochs share the views of that many; None: each has its own."""
        return None

    def allows(self, batch: int) -> bool:
        """Whether steps of ``batch`` samples go with these numbers."""
        return batch >= 2

    def scaled(self, batch: int, *, photos: int | None = None, processes: int = 1) -> MethodConfig:
        """The nearest numbers that go with ``batch`` samples a step.

        Args:
            photos: in the data set; a queue is then no longer than they are, where that goes. None: no matter how many.
            processes: that share a step.
        """
        return self


@settings()
class SmoothedConfig(MethodConfig):
    """Numbers of the methods whose loss has a smoothed target (``losses.smoothed_target``).

    Attributes:
        temperature: of the softmax (light-moco 0.1, MoCo-v2 0.2).
        smoothing: mass that the target gives to the nearest negatives (0: plain InfoNCE).
        weighting, neighbors: how many of them share the mass, and how: see ``losses.smoothed_target.rank_weights``.
        smoothing_schedule: ``constant``, ``warm`` (0 for ``smoothing_warm_epochs``, then all of it) or ``cosine``
            (grows from 0). light-moco's code gives the weightings ``geometric`` and ``nearest`` a constant mass, 0.4
            and 0.5, which its cosine only switches on behind the first epoch: here ``warm`` with one warm epoch.
        smoothing_warm_epochs: read by ``warm`` only.
    """

    temperature: Positive = 0.1
    smoothing: BelowOne = 0.2
    weighting: str = "stepped"
    neighbors: Whole | None = None
    smoothing_schedule: SmoothingSchedule = "constant"
    smoothing_warm_epochs: Natural = 0

    EPOCH_KEYS = ("smoothing_warm_epochs",)

    def __post_init__(self) -> None:
        if self.smoothing_warm_epochs and self.smoothing_schedule != "warm":
            raise ValueError("smoothing_warm_epochs is read only with smoothing_schedule: warm")
        rank_weights(self.weighting, self.neighbors)  # which says what is wrong with them

    @property
    def sharing(self) -> int:
        """How many nearest negatives share the smoothing; 0 where all do."""
        return len(rank_weights(self.weighting, self.neighbors))

    @property
    def target(self) -> dict[str, Any]:
        """Of these the arguments of ``losses.smoothed_target.SmoothedTarget``."""
        return {name: getattr(self, name) for name in ("temperature", "smoothing", "weighting", "neighbors")}

    def smoothing_rates(self, step: int, run: RunLength) -> dict[str, float | bool]:
        """The present smoothing, under its name; empty without smoothing: the search for neighbours is then left out,
        also of a recorded step.
        """
        if not self.smoothing:
            return {}
        schedule, warm = self.smoothing_schedule, self.smoothing_warm_epochs
        return {"smoothing": schedules.smoothing(step, run, self.smoothing, schedule, warm)}


class Encoder(nn.Module):
    """Backbone, and the head that stays with it in the moving average.

    Args:
        backbone: images (N, 3, S, S) -> (N, F).
        head: (N, F) -> (N, out).

    Attributes:
        drop: the table that the backbone's drop-path layers read; None: it has none.
        norms: what its BatchNorms share.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.projector = head
        self.drop = DropTable.install(backbone)  # no module: no part of the state
        self.norms = BatchNorms(self)  # nor is this

    def forward(self, images: Tensor | Sequence[Tensor], first: int = 0, *, groups: int = 1, views: int = 1) -> Tensor:
        """One backbone pass for each tensor of ``images``, one head pass over all: (sum of N, out).

        Args:
            first: row of the first image among the views that drop path was drawn for.
            groups: into which the rows are cut, all of one size and one behind the other; BatchNorm sees each alone.
            views: in the rows, one behind the other; as many groups each. See ``BatchNorms.count``.
        """
        images = [images] if isinstance(images, Tensor) else images
        size = sum(map(len, images)) // groups
        if groups > 1 and not self.norms.complete:  # other layers look at a whole batch, too: each group is a pass
            parts, each = [part for batch in images for part in batch.split(size)], groups // views
            numbers = [number for group in range(each) for number in range(group, groups, each)]
            found = {number: self(parts[number], first + number * size) for number in numbers}
            return torch.cat([found[number] for number in range(groups)])
        features = []
        try:
            for batch in images:
                if self.drop is not None:
                    self.drop.first = first
                self.norms.groups = len(batch) // size if groups > 1 else 0
                features.append(self.backbone(batch))
                first += len(batch)
            self.norms.groups = groups if groups > 1 else 0
            embeddings: Tensor = self.projector(features[0] if len(features) == 1 else torch.cat(features))
            self.norms.count(views)
        finally:
            self.norms.forget()
        return embeddings

    def as_teacher(self) -> Encoder:
        """A copy without gradient and drop path."""
        teacher = copy.deepcopy(self).requires_grad_(False)
        DropTable.remove(teacher.backbone)
        teacher.drop, teacher.norms = None, BatchNorms(teacher)
        return teacher


@dataclass(frozen=True)
class Views:
    """The views of one batch on this rank: two global ones first, then the local ones.

    Attributes:
        batch_size: samples a step on this rank. world: ranks that share a step.
        weights: of the pairs; also says how many local views there are.
    """

    batch_size: int
    weights: PairWeights
    world: int = 1

    @property
    def count(self) -> int:
        """Of a sample."""
        return 2 + self.weights.local_views

    @property
    def global_batch(self) -> int:
        """Samples a step on all ranks."""
        return self.batch_size * self.world


@dataclass
class StepOutput:
    """What a batch's embeddings give.

    Attributes:
        loss: scalar with gradient, float32.
        entropy: of the target, the least that the loss can be.
        pair: two views' unit vectors (B, D) without gradient.
        more: further metrics, means over the samples.
        frozen: parameters whose gradient is dropped at this step, so that the optimiser passes them over.
        regulariser: the part of ``loss`` that asks for no target; the metrics leave it out.
    """

    loss: Tensor
    entropy: Tensor | float
    pair: tuple[Tensor, Tensor]
    more: tuple[Tensor, ...] = ()
    frozen: Sequence[nn.Parameter] = ()
    regulariser: Tensor | float = 0.0

    @property
    def metrics(self) -> Tensor:
        """(len(METRICS),) float32 without gradient, on the device: ``loss``; ``kl``, what stands above the entropy;
        ``alignment``, the mean squared distance of the pair; ``embedding_std`` of its first, 1 where they are spread
        evenly over the sphere and 0 where all are one point; and ``more``.
        """
        first, second = self.pair
        alignment = (first - second).square().sum(-1).mean()
        spread = first.std(dim=0).mean() * math.sqrt(first.shape[1])
        loss = self.loss.detach()
        if torch.is_tensor(self.regulariser):  # not minus 0.0, which would be a kernel in every step
            loss = loss - self.regulariser.detach()
        return torch.stack([loss, loss - self.entropy, alignment, spread, *self.more]).float()

    @classmethod
    def of_parts(cls, parts: Sequence[StepOutput]) -> StepOutput:
        """That of a batch whose loss is the mean of its equal parts' losses; of several without gradient."""
        if len(parts) == 1:
            return parts[0]
        means = zip(*((one.loss.detach(), one.regulariser, one.entropy, *one.more) for one in parts))
        loss, regulariser, entropy, *more = (sum(values) / len(parts) for values in means)
        first, second = (torch.cat(views) for views in zip(*(one.pair for one in parts)))
        return cls(loss, entropy, (first, second), tuple(more), parts[0].frozen, regulariser)


class Method(nn.Module):
    """Base of all methods.

    Attributes:
        METRICS: names of the values in ``StepOutput.metrics``; these four come first.
        HAS_TEACHER: whether there is a moving average of the student.
        student, teacher: the network that is trained, and its moving average, or None.
        teacher_views: how many global views the teacher's pass is over.
        hidden_views: how many of the first views the student's pass leaves out.
        divisible: whether a batch's loss is the mean of its parts' losses: parts of it need one pass, others two.
    """

    METRICS: ClassVar[tuple[str, ...]] = ("loss", "kl", "alignment", "embedding_std")
    HAS_TEACHER: ClassVar[bool] = True

    teacher_views: int = 2
    hidden_views: int = 0
    divisible: bool = True

    def __init__(self, student: Encoder, views: Views):
        super().__init__()
        self.views = views
        self.student = student
        self.teacher = student.as_teacher() if self.HAS_TEACHER else None
        keep_less(student)  # the teacher's activations, without gradient, stay in place
        if self.teacher is not None:
            moved = dict(self.teacher.named_parameters())  # of a head that it does not have, none
            self._student_parameters: list[Tensor] = [p for name, p in student.named_parameters() if name in moved]
            self._teacher_parameters: list[Tensor] = list(moved.values())
        self.set_forward_modules(*self.networks)

    @property
    def networks(self) -> list[nn.Module]:
        """The student, and the teacher if there is one."""
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def set_forward_modules(self, *networks: Callable[..., Tensor]) -> None:
        """Let these make the passes: forms of ``networks``, which stay what is trained and saved."""
        self._computing = networks  # nn.Module does not register a tuple: they are no part of the state

    # ------------------------------------------------------------------ the views

    @staticmethod
    def images(views: Sequence[Tensor]) -> list[Tensor]:
        """Neighbouring views of one size joined, (n B, 3, S, S) view-major each: one backbone pass for each."""
        groups = [list(group) for _, group in groupby(views, lambda view: view.shape[1:])]
        return [group[0] if len(group) == 1 else torch.cat(group) for group in groups]

    def encode(self, images: Tensor | Sequence[Tensor], first: int = 0, *, groups: int = 1, views: int = 1) -> Tensor:
        """The student's embeddings of ``images``, by the form of it that computes; see ``Encoder.forward``."""
        return self._computing[0](images, first, groups=groups, views=views)

    def teach(self, images: Tensor, *, groups: int = 1) -> Tensor:
        """The teacher's output for ``images``, by the form of it that computes."""
        return self._computing[1](images, groups=groups)

    def synchronise(self, convert: Callable[[nn.Module], object]) -> None:
        """Let the BatchNorms look at the samples of all ranks; ``convert`` makes those of a network do so, in place."""
        for network in self.networks:
            convert(network)

    def freeze_batchnorm(self) -> bool:
        """Let the backbones' BatchNorms normalise with their running statistics, which then stay as they are, also in
        training; scale and shift learn. False: there are none.
        """
        everywhere = chain.from_iterable(cast(Encoder, network).backbone.modules() for network in self.networks)
        layers = [layer for layer in everywhere if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        for layer in layers:
            layer.eval()
        return bool(layers)

    # ------------------------------------------------------------------ what a method fills in

    def rates(self, step: int, run: RunLength) -> dict[str, float | bool]:
        """This method's scheduled numbers and switches at ``step``; ``momentum`` is the teacher's."""
        return {}

    def noise(self, seed: int, epoch: int, step: int) -> dict[str, Any]:
        """Host arrays drawn for this step, by name; each becomes a tensor on the device."""
        return {}

    def targets(self, images: Sequence[Tensor], noise: Mapping[str, Tensor], rates: Rates) -> tuple[Tensor, ...]:
        """What the student is to match, without gradient: tensors whose rows are view-major, as those of ``images``."""
        return ()

    def embed(self, images: Sequence[Tensor]) -> Tensor:
        """The student's pass: all that the loss is told of the images, rows view-major, without the hidden views.

        Args:
            images: (n B, 3, S, S) for each size, see ``images``; of a part of the batch under ``train.accumulate``.
        """
        return self.encode(images)

    def loss(self, embeddings: Tensor, targets: tuple[Tensor, ...], rates: Rates) -> StepOutput:
        """The loss of what ``embed`` gave; ``targets`` are of the same samples."""
        raise NotImplementedError

    def forward(self, images: Sequence[Tensor], targets: tuple[Tensor, ...], rates: Rates) -> StepOutput:
        """The student's pass and the loss."""
        return self.loss(self.embed(images), targets, rates)

    def after_step(self, targets: tuple[Tensor, ...], pair: tuple[Tensor, Tensor], rates: Rates) -> None:
        """Move queues and centres. ``pair``: of ``StepOutput``; like ``targets`` of the whole batch."""

    @torch.no_grad()
    def update_teacher(self, momentum: float | Tensor) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student: parameters only; the teacher keeps its own
        BatchNorm statistics. A tensor (one element, on the device) may change under a recorded step.
        """
        if self.teacher is None:
            return
        if not isinstance(momentum, Tensor):
            torch._foreach_lerp_(self._teacher_parameters, self._student_parameters, 1 - momentum)
            return
        way = torch._foreach_sub(self._student_parameters, self._teacher_parameters)
        torch._foreach_mul_(way, 1 - momentum)
        torch._foreach_add_(self._teacher_parameters, way)


def new_encoder(backbone: nn.Module, config: ProjectorConfig) -> Encoder:
    """Backbone and projector: images -> unit vectors (N, out)."""
    return Encoder(backbone, Projector(feature_dim(backbone), config))
