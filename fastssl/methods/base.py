"""What all methods share: the shape of a step over views grouped by size.

    images(views)                            views of one size are one batch: one pass of the backbone for each size
    targets = method.targets(images, ...)    without gradient: keys, or a teacher's probabilities
    loss    = method.part_loss(images, targets, ...)    the student's pass, one pass of the head over all views, one reducer for the pairs
    (optimiser, moving average)
    method.after_step(...)                   queues, centres

A method keeps no clock. What changes during a run comes as ``rates`` (numbers that follow a schedule; under a recorded
step they are read from the device), ``noise`` (what was drawn for this step) and ``phase`` (what the step does at all:
a frozen layer, a queue in use; a change of phase is a new recording).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastssl.losses.pairs import PairWeights
from fastssl.models.backbones import feature_dim
from fastssl.models.drop_path import DropTable
from fastssl.models.heads import Projector, ProjectorConfig
from fastssl.optim import schedules
from fastssl.optim.schedules import RunLength

#: Number by name, or a tensor with one element on the device.
Rates = Mapping[str, "Tensor | float"]


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
    def largest_batch(self) -> int | None:
        """No larger batch can be had; None: there is no bound."""
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


class Encoder(nn.Module):
    """Backbone, and the head that stays with it in the moving average.

    Args:
        backbone: images (N, 3, S, S) -> (N, F).
        head: (N, F) -> (N, out).
        drop: the table that the backbone's drop-path layers read; None: it has none.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, drop: DropTable | None = None):
        super().__init__()
        self.backbone = backbone
        self.projector = head
        self.drop = drop  # no module: no part of the state

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """One backbone pass for each tensor of ``images``, one head pass over all: (sum of N, out)."""
        if isinstance(images, Tensor):
            return self.projector(self._features(images, 0))
        features, first = [], 0
        for batch in images:
            features.append(self._features(batch, first))
            first += len(batch)
        return self.projector(features[0] if len(features) == 1 else torch.cat(features))

    def _features(self, images: Tensor, first: int) -> Tensor:
        if self.drop is not None:
            self.drop.first = first
        return self.backbone(images)


@dataclass(frozen=True)
class Views:
    """The views of one batch on this rank: two global ones first, then the local ones.

    Attributes:
        batch_size: samples a step on this rank.
        weights: of the pairs; also says how many local views there are.
        world: ranks that share a step.
    """

    batch_size: int
    weights: PairWeights
    world: int = 1

    @property
    def count(self) -> int:
        """Views of a sample."""
        return 2 + self.weights.local_views

    @property
    def global_batch(self) -> int:
        """Samples a step on all ranks."""
        return self.batch_size * self.world


@dataclass
class PartLoss:
    """What one part of a batch gives.

    Attributes:
        loss: scalar with gradient, float32.
        metrics: (len(METRICS),) float32 without gradient, on the device.
        kept: what ``after_step`` wants to see again, without gradient.
    """

    loss: Tensor
    metrics: Tensor
    kept: Tensor | None = None


class Method(nn.Module):
    """Base of all methods.

    Attributes:
        METRICS: names of the values in ``PartLoss.metrics``.
        HAS_TEACHER: whether there is a moving average of the student.
        DIVISIBLE: whether a batch's loss is the mean of its parts' losses, so that ``train.accumulate`` may cut it.
        student, teacher: the network that is trained, and its moving average, or None.
    """

    METRICS: ClassVar[tuple[str, ...]] = ("loss",)
    HAS_TEACHER: ClassVar[bool] = True
    DIVISIBLE: ClassVar[bool] = True

    def __init__(self, student: Encoder, views: Views):
        super().__init__()
        self.views = views
        self.student = student
        self.teacher = _teacher_of(student) if self.HAS_TEACHER else None
        if self.teacher is not None:
            self._student_parameters = list(self.student.parameters())
            self._teacher_parameters = list(self.teacher.parameters())
        self.compute_with(self.student, self.teacher)

    def compute_with(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Let these networks make the passes: bfloat16 or compiled forms of ``student`` and ``teacher``, which stay
        what is trained and saved.
        """
        self._computing = (
            student,
            teacher,
        )  # in a tuple, which nn.Module does not register: they are no part of the state

    # ------------------------------------------------------------------ the views

    def images(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Neighbouring views of one size joined, (n B, 3, S, S) view-major each: one backbone pass for each."""
        joined: list[list[Tensor]] = []
        for view in views:
            if joined and joined[-1][0].shape[1:] == view.shape[1:]:
                joined[-1].append(view)
            else:
                joined.append([view])
        return [group[0] if len(group) == 1 else torch.cat(group) for group in joined]

    def global_images(self, images: Sequence[Tensor], count: int = 2) -> Tensor:
        """The first ``count`` global views, (count B, 3, S, S)."""
        return images[0][: count * self.views.batch_size]

    def part_of(self, rows: Tensor, part: int, parts: int) -> Tensor:
        """The ``part``-th share of the samples of view-major ``rows`` (n B, ...): (n B / parts, ...), view-major."""
        if parts == 1:
            return rows
        batch, size = self.views.batch_size, self.views.batch_size // parts
        return torch.cat([rows.narrow(0, first + part * size, size) for first in range(0, len(rows), batch)])

    def encode(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """The student's embeddings of ``images``, by the form of it that computes."""
        return self._computing[0](images)

    def student_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """What the student's pass is over."""
        return list(images)

    def student_coins(self, table: Tensor) -> Tensor:
        """Of drop path: (layers, views * B) as drawn -> (rows of the student's pass, layers)."""
        return table.t()

    def teacher_images(self, images: Sequence[Tensor]) -> Tensor | None:
        """What the teacher's pass is over; None: there is no teacher."""
        return None if self.teacher is None else self.global_images(images)

    # ------------------------------------------------------------------ what a method fills in

    def rates(self, step: int, run: RunLength) -> dict[str, float]:
        """This method's scheduled numbers at ``step``."""
        return {}

    def phase(self, step: int, run: RunLength) -> tuple:
        """What the step does that is no number; hashable."""
        return ()

    def frozen(self, phase: tuple) -> Sequence[nn.Parameter]:
        """Parameters whose gradient is dropped in this phase, so that the optimiser passes them over."""
        return ()

    def synchronise(self, convert: Callable[[nn.Module], nn.Module]) -> None:
        """Let the BatchNorms look at the samples of all ranks; ``convert`` makes them do so."""
        self.student = convert(self.student)
        if self.teacher is not None:
            self.teacher = convert(self.teacher)
        self.compute_with(self.student, self.teacher)

    def noise(self, seed: int, epoch: int, step: int) -> dict[str, Any]:
        """Host arrays drawn for this step, by name; each becomes a tensor on the device."""
        return {}

    def targets(self, images: Sequence[Tensor], noise: Mapping[str, Tensor], rates: Rates) -> Any:
        """What the student is to match, without gradient."""
        return None

    def part_loss(
        self, images: Sequence[Tensor], targets: Any, rates: Rates, phase: tuple = (), part: int = 0, parts: int = 1
    ) -> PartLoss:
        """The loss of one of ``parts`` equal shares of the samples."""
        raise NotImplementedError

    def after_step(self, targets: Any, kept: Sequence[Tensor], phase: tuple = ()) -> None:
        """Move queues and centres; called after the optimiser."""

    @torch.no_grad()
    def update_teacher(self, momentum: float | Tensor) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student: parameters only; the teacher keeps its own
        BatchNorm statistics.

        Args:
            momentum: a number, or a tensor with one element on the device: a schedule may then change it under a
                captured graph.
        """
        if self.teacher is None:
            return
        if not isinstance(momentum, Tensor):
            torch._foreach_lerp_(self._teacher_parameters, self._student_parameters, 1 - momentum)
            return
        way = torch._foreach_sub(self._student_parameters, self._teacher_parameters)
        torch._foreach_mul_(way, 1 - momentum)
        torch._foreach_add_(self._teacher_parameters, way)


def smoothing_rates(config: Any, step: int, run: RunLength) -> dict[str, float]:
    """The present smoothing of a target, under its name; empty without smoothing: the search for neighbours is then
    left out, also of a recorded step.

    Args:
        config: with ``smoothing``, ``smoothing_schedule`` and ``smoothing_warm_epochs``.
    """
    if not config.smoothing:
        return {}
    return {
        "smoothing": schedules.smoothing(
            step,
            total_steps=run.total_steps,
            steps_per_epoch=run.steps_per_epoch,
            base=config.smoothing,
            schedule=config.smoothing_schedule,
            warm_epochs=config.smoothing_warm_epochs,
        )
    }


def new_encoder(backbone: nn.Module, config: ProjectorConfig) -> Encoder:
    """Backbone and projector: images -> unit vectors (N, out)."""
    return Encoder(backbone, Projector(feature_dim(backbone), config), DropTable.install(backbone))


def _teacher_of(student: Encoder) -> Encoder:
    teacher = copy.deepcopy(student).requires_grad_(False)
    DropTable.remove(teacher.backbone)
    teacher.drop = None
    return teacher


@torch.no_grad()
def embedding_std(embeddings: Tensor) -> Tensor:
    """1 for unit vectors spread evenly over the sphere, 0 when all are one point: (N, D) -> scalar."""
    return embeddings.detach().std(dim=0).mean() * embeddings.shape[1] ** 0.5
