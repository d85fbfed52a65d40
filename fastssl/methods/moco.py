"""MoCo-v2 with a symmetric loss and smoothed InfoNCE (light-moco).

Sources: He et al. 2020 (arXiv 1911.05722), Chen et al. 2020 (arXiv 2003.04297), Lin et al. 2022 (arXiv 2212.07158).

    q1, q2 = query(view 1), query(view 2)           k1, k2 = key(view 1), key(view 2)     (no gradient)
    loss   = nce(q1, k2, queue) + nce(q2, k1, queue)        a sum of the two terms, as light-moco has it
    after the step:  key <- m * key + (1 - m) * query;  both key batches enter the queue

Both views go through the query network in one pass of 2B images: they are drawn from one distribution, so BatchNorm
sees two samples of the same statistics at once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.backbones import feature_dim
from fastssl.heads import Projector, ProjectorConfig
from fastssl.losses import SmoothedInfoNCE


@dataclass(frozen=True)
class MoCoConfig:
    """The method's own numbers.

    Attributes:
        temperature: of the softmax (light-moco 0.1, MoCo-v2 0.2).
        smoothing: mass that the target gives to the nearest negatives (0: plain InfoNCE).
        weighting: how the mass is shared: ``uniform_topk``, ``stepped``, ``geometric``, ``nearest``, ``uniform_all``, ``thirds``.
        neighbors: number of nearest negatives that share it; None: the weighting's published number.
        smoothing_schedule: ``constant``, ``warm`` (0 for ``smoothing_warm_epochs``, then all of it) or ``cosine`` (grows from 0).
        smoothing_warm_epochs: read by ``warm`` only.
        queue: number of keys kept as negatives; a multiple of twice the batch.
        momentum: of the key network.
        momentum_schedule: ``constant``, or ``cosine`` up to 1.
        split_bn: groups into which the permuted key batch is cut before the key network, so that a query and its key do not
            share BatchNorm statistics (shuffle-BN without a second GPU). 1: none.
        projector: shape of the head.
    """

    temperature: float = 0.1
    smoothing: float = 0.2
    weighting: str = "stepped"
    neighbors: int | None = None
    smoothing_schedule: str = "constant"
    smoothing_warm_epochs: int = 0
    queue: int = 65536
    momentum: float = 0.999
    momentum_schedule: str = "constant"
    split_bn: int = 8
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)

    def __post_init__(self) -> None:
        if self.smoothing_schedule not in ("constant", "warm", "cosine"):
            raise ValueError(f"moco.smoothing_schedule={self.smoothing_schedule!r} is not one of constant, warm, cosine")
        if self.momentum_schedule not in ("constant", "cosine"):
            raise ValueError(f"moco.momentum_schedule={self.momentum_schedule!r} is not one of constant, cosine")
        if self.smoothing_warm_epochs and self.smoothing_schedule != "warm":
            raise ValueError("moco.smoothing_warm_epochs is read only with smoothing_schedule: warm")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"moco.momentum must lie in 0..1, got {self.momentum}")
        if self.split_bn < 1 or self.queue < 1:
            raise ValueError("moco.split_bn and moco.queue must be at least 1")


class Encoder(nn.Module):
    """Backbone and projector: images (N, 3, S, S) -> unit vectors (N, out)."""

    def __init__(self, backbone: nn.Module, config: ProjectorConfig):
        super().__init__()
        self.backbone = backbone
        self.projector = Projector(feature_dim(backbone), config)

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


class MoCo(nn.Module):
    """The two networks, the queue, and one training step's loss.

    Args:
        backbone: the query network's backbone; the key network starts as its copy.
        config: see ``MoCoConfig``.
        batch_size: samples a step, for the check that the queue is a whole number of steps long.
        generator: draws the queue's first content (random unit vectors, as in MoCo); on the CPU.
    """

    #: names of the values in ``metrics``, in the order of the vector that ``forward`` returns
    METRICS = ("loss", "kl", "alignment", "embedding_std")

    def __init__(self, backbone: nn.Module, config: MoCoConfig, *, batch_size: int, generator: torch.Generator | None = None):
        super().__init__()
        if config.queue % (2 * batch_size):
            raise ValueError(f"moco.queue={config.queue} must be a multiple of twice the batch size ({2 * batch_size})")
        if (2 * batch_size) // config.split_bn < 2:
            raise ValueError(f"moco.split_bn={config.split_bn} leaves fewer than 2 of {2 * batch_size} keys in a group")
        self.config = config
        self.student = Encoder(backbone, config.projector)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.loss = SmoothedInfoNCE(
            temperature=config.temperature, smoothing=config.smoothing, weighting=config.weighting, neighbors=config.neighbors
        )
        if self.loss.neighbors and self.loss.neighbors > config.queue:
            raise ValueError(
                f"moco.queue={config.queue} holds fewer keys than the {self.loss.neighbors} neighbours that share the smoothing"
            )
        queue = torch.randn(config.queue, config.projector.out, generator=generator)
        # Buffers, and persistent: a run that resumed with a fresh queue would be another run.
        self.register_buffer("queue", functional.normalize(queue, dim=1))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))
        self._student_parameters = list(self.student.parameters())
        self._teacher_parameters = list(self.teacher.parameters())
        self.compute_with(self.student, self.teacher)

    def compute_with(self, student: nn.Module, teacher: nn.Module) -> None:
        """Let these networks make the passes: bfloat16 or compiled forms of ``student`` and ``teacher``, which stay what is trained and saved."""
        self._computing = (student, teacher)  # in a tuple, which nn.Module does not register: they are no part of the state

    def forward(self, views: list[Tensor], permutation: Tensor, smoothing: Tensor | float) -> tuple[Tensor, Tensor]:
        """Loss of one batch; the batch's keys are then in the queue.

        Args:
            views: one tensor (2B, 3, S, S), view-major; or two of (B, 3, S, S).
            permutation: (2B,) int64, the order in which the keys are dealt into BatchNorm groups.
            smoothing: the schedule's present value.

        Returns:
            the loss (scalar, with gradient) and (len(METRICS),) float32 without gradient, both on the device.
        """
        images = self.images(views)
        keys = self.keys(images, permutation)
        loss, metrics = self.part_loss(images, keys, smoothing)
        self.enqueue(keys)
        return loss, metrics

    @staticmethod
    def images(views: list[Tensor]) -> Tensor:
        """The views as one batch, (2B, 3, S, S), view-major."""
        return views[0] if len(views) == 1 else torch.cat(views)

    def encode(self, images: Tensor) -> Tensor:
        """Queries (N, out) of ``images``, by the form of the student that computes."""
        return self._computing[0](images)

    def part_loss(self, images: Tensor, keys: Tensor, smoothing: Tensor | float, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Loss of one part of the batch against the queue as it stands: a pass with gradient over 2B / parts images.

        The mean over all parts is the loss of the whole batch but for one thing: the query network's BatchNorms see a part at a time.

        Args:
            images: (2B, 3, S, S), view-major.
            keys: (2B, out), those of all images.
            smoothing: the schedule's present value.
            part, parts: which of how many; ``parts`` divides B.

        Returns:
            as ``forward``.
        """
        size = len(images) // (2 * parts)
        if parts > 1:
            images, keys = (torch.cat([half.narrow(0, part * size, size) for half in tensor.chunk(2)]) for tensor in (images, keys))
        first_query, second_query = self.encode(images).chunk(2)
        first_key, second_key = keys.chunk(2)
        loss = self.loss(first_query, second_key, self.queue, smoothing) + self.loss(second_query, first_key, self.queue, smoothing)
        with torch.no_grad():
            return loss, self._metrics(loss, first_query, second_key, smoothing)

    @torch.no_grad()
    def keys(self, images: Tensor, permutation: Tensor) -> Tensor:
        """Keys (2B, out) of ``images``, each BatchNorm group normalised for itself, in the order of ``images``."""
        teacher = self._computing[1]
        if self.config.split_bn == 1:
            return teacher(images)
        # index_select keeps channels-last; each group is one forward pass, so that any network's BatchNorm is served.
        shuffled = images.index_select(0, permutation)
        keys = torch.cat([teacher(group) for group in shuffled.tensor_split(self.config.split_bn)])
        return torch.empty_like(keys).index_copy_(0, permutation, keys)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write the keys over the oldest ones. The pointer lives on the device: no host sync."""
        count = len(keys)
        places = (self.queue_pointer + torch.arange(count, device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys.to(self.queue.dtype))
        self.queue_pointer.add_(count).remainder_(len(self.queue))

    @torch.no_grad()
    def update_teacher(self, momentum: float | Tensor) -> None:
        """key <- momentum * key + (1 - momentum) * query: parameters only; the key network keeps its own BN statistics.

        Args:
            momentum: a number, or a tensor with one element on the device: a schedule may then change it under a captured graph.
        """
        if not isinstance(momentum, Tensor):
            torch._foreach_lerp_(self._teacher_parameters, self._student_parameters, 1 - momentum)
            return
        way = torch._foreach_sub(self._student_parameters, self._teacher_parameters)
        torch._foreach_mul_(way, 1 - momentum)
        torch._foreach_add_(self._teacher_parameters, way)

    def _metrics(self, loss: Tensor, query: Tensor, key: Tensor, smoothing: Tensor | float) -> Tensor:
        """The values named in METRICS.

        The loss of a soft target is at least the target's entropy: ``kl`` is what stands above that. ``embedding_std`` is 1
        for directions spread evenly over the sphere and 0 when all embeddings are one point.
        """
        kl = loss - 2 * self.loss.target_entropy(smoothing, queue_size=len(self.queue))
        alignment = (query - key).square().sum(dim=1).mean()
        spread = query.std(dim=0).mean() * query.shape[1] ** 0.5
        return torch.stack([loss.detach(), kl.detach(), alignment, spread]).float()
