"""MoCo-v2: one- or two-sided, with local views, with smoothed InfoNCE (light-moco).

Sources: He et al. 2020 (arXiv 1911.05722), Chen et al. 2020 (arXiv 2003.04297), Lin et al. 2022 (arXiv 2212.07158),
multi-crop as in SSLight (arXiv 2210.02808).

    symmetric (light-moco)    keys of both global views; the loss is the SUM of both keys' terms
    otherwise (SSLight)       keys of global view 1 alone
    term of key g             reduce( nce(q_g', k_g, queue), mean over local views of nce(q_v, k_g, queue) )
                              g' the other global view
    after the step            key <- m * key + (1 - m) * query;  the keys enter the queue

BatchNorm sees what goes through a network together, and the keys' statistics must not give away their queries. As
published (``bn_by_view``) each view is a pass of its own, cut into the shares of as many GPUs as the original ran on,
the keys' in another order. Otherwise all views of one size are one pass of the queries, and the keys' groups are dealt
over both views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.distributed.collectives import gather_rows, gather_views, rank
from fastssl.distributed.split_batchnorm import SplitBatchNormStats
from fastssl.losses import SmoothedInfoNCE
from fastssl.losses.pairs import reduce_pairs
from fastssl.methods.base import Encoder, Method, Rates, SmoothedConfig, StepOutput, Views, new_encoder
from fastssl.methods.queue import Queued
from fastssl.models.heads import ProjectorConfig
from fastssl.optim import schedules
from fastssl.optim.schedules import MomentumSchedule, RunLength
from fastssl.pipelines.plan.order import batch_permutation
from fastssl.utils.settings import Count, Share, Switch, settings


@settings("moco")
class MoCoConfig(SmoothedConfig):
    """The method's own numbers.

    Attributes:
        symmetric: keys of both global views, each with the queries of all other views.
        queue: number of keys kept as negatives; a multiple of the keys of a step, two (or, if not symmetric, one) for
            each sample of the batch.
        momentum: of the key network.
        momentum_schedule: ``constant``, or ``cosine`` up to 1.
        split_bn: groups into which the permuted keys of the whole batch are cut before the key network, so that a query
            and its key do not share BatchNorm statistics (shuffle-BN, also without a second GPU). 1: one group, the
            statistics of the whole batch.
        bn_by_view: one view at a time goes through a network, as in the code of MoCo and light-moco; ``split_bn`` then
            cuts each view of the keys.
        split_bn_queries: groups into which each view of the queries is cut, in the order of the samples: a GPU's share
            each, where the original had that many. 1: the statistics of the whole batch. Needs ``bn_by_view``.
        projector: shape of the head.
    """

    symmetric: Switch = True
    queue: Count = 65536
    momentum: Share = 0.999
    momentum_schedule: MomentumSchedule = "constant"
    split_bn: Count = 8
    bn_by_view: Switch = False
    split_bn_queries: Count = 1
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)

    BATCH_KEY = "moco.queue"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split_bn_queries > 1 and not self.bn_by_view:
            raise ValueError("split_bn_queries cuts one view at a time: it needs bn_by_view: true")

    @property
    def key_views(self) -> int:
        """Global views that keys are made of."""
        return 2 if self.symmetric else 1

    @property
    def groups(self) -> int:
        return self.split_bn

    @property
    def largest_batch(self) -> int:
        return self.queue // self.key_views

    @property
    def student_groups(self) -> int:
        return self.split_bn_queries

    @property
    def pass_views(self) -> int:
        """Views of the keys that the groups are dealt over."""
        return 1 if self.bn_by_view else self.key_views

    def allows(self, batch: int) -> bool:
        queries = self.split_bn_queries
        return (
            batch >= 2
            and self.queue % (self.key_views * batch) == 0
            and self.pass_views * batch // self.split_bn >= 2
            and (queries == 1 or (batch % queries == 0 and batch >= 2 * queries))
        )

    def scaled(self, batch: int, *, photos: int | None = None, processes: int = 1) -> MoCoConfig:
        keys, dealt = self.key_views * batch, self.pass_views * batch
        steps = -(-self.queue // keys)
        if photos is not None:
            # One step's keys are the least; so are the neighbours that share the smoothing.
            steps = min(steps, max(1, photos // keys, -(-self.sharing // keys)))

        def equal(most: int, rows: int) -> int:
            """Each process makes as many groups as the others, all of one size."""
            bound = min(most, rows // 2)
            return max((n for n in range(processes, bound + 1, processes) if rows % n == 0), default=1)

        groups = equal(self.split_bn, dealt) if processes > 1 else max(1, min(self.split_bn, dealt // 2))
        queries = equal(self.split_bn_queries, batch)
        return replace(self, queue=steps * keys, split_bn=groups, split_bn_queries=queries)


class MoCo(Queued, Method):
    """The two networks, the queue, and one training step's loss.

    Args:
        generator: draws the queue's first content (random unit vectors, as in MoCo); on the CPU.

    Raises:
        ValueError: the batch does not fit the queue or the BatchNorm groups.
    """

    teacher: Encoder

    def __init__(
        self, backbone: nn.Module, config: MoCoConfig, *, views: Views, generator: torch.Generator | None = None
    ):
        keys = config.key_views * views.global_batch
        if config.queue % keys:
            times = "twice the batch size" if config.symmetric else "the batch size"
            raise ValueError(f"moco.queue={config.queue} must be a multiple of {times} ({keys})")
        dealt = config.pass_views * views.global_batch
        if dealt // config.split_bn < 2:
            raise ValueError(f"moco.split_bn={config.split_bn} leaves fewer than 2 of {dealt} keys in a group")
        if config.split_bn > 1 and (config.split_bn % views.world or (dealt % config.split_bn and views.world > 1)):
            raise ValueError(
                f"moco.split_bn={config.split_bn} must be 1, or a multiple of the {views.world} processes that "
                f"divides their {dealt} keys"
            )
        groups, batch = config.split_bn_queries, views.global_batch
        if groups > 1 and (groups % views.world or batch % groups or batch < 2 * groups):
            raise ValueError(
                f"moco.split_bn_queries={groups} must be 1, or cut the batch of {batch} into equal groups of at least "
                f"2, as many on each of {views.world} processes"
            )
        super().__init__(new_encoder(backbone, config.projector), views)
        self.config = config
        self.key_views = self.teacher_views = config.key_views
        self.hidden_views = 2 - config.key_views
        # Running statistics of BatchNorm groups, put together over the ranks.
        self._key_stats: SplitBatchNormStats | None = None
        self._query_stats: SplitBatchNormStats | None = None
        self._before_queries: Tensor | None = None
        self.criterion = SmoothedInfoNCE(**config.target)
        if self.criterion.neighbors and self.criterion.neighbors > config.queue:
            raise ValueError(
                f"moco.queue={config.queue} holds fewer keys than the {self.criterion.neighbors} neighbours that "
                "share the smoothing"
            )
        self.begin_queue(config.queue, config.projector.out, generator)

    def rates(self, step: int, run: RunLength) -> dict[str, float | bool]:
        config = self.config
        momentum = schedules.ema_momentum(step, run, config.momentum, config.momentum_schedule)
        return {"momentum": momentum, **config.smoothing_rates(step, run)}

    def synchronise(self, convert: Callable[[nn.Module], object]) -> None:
        """Views that are cut into groups have the statistics of their group, and the running ones are put together."""
        config, world = self.config, self.views.world
        if config.split_bn_queries == 1:
            convert(self.student)
        else:
            passes = (self.views.count - self.hidden_views) * config.split_bn_queries // world
            self._query_stats = SplitBatchNormStats(self.student, groups=passes, rank=rank(), world=world)
        if config.split_bn == 1:
            convert(self.teacher)
        else:
            passes = self.key_views // config.pass_views * config.split_bn // world
            self._key_stats = SplitBatchNormStats(self.teacher, groups=passes, rank=rank(), world=world)

    def noise(self, seed: int, epoch: int, step: int) -> dict[str, Any]:
        """``permutation``: (key views * global batch,) int64, by which the keys are dealt into BatchNorm groups."""
        parts = self.key_views // self.config.pass_views
        return {
            "permutation": batch_permutation(self.key_views * self.views.global_batch, seed, epoch, step, parts=parts)
        }

    def targets(self, images: Sequence[Tensor], noise: Mapping[str, Tensor], rates: Rates) -> tuple[Tensor, ...]:
        """Keys (key views * B, out) of this rank's global views."""
        self._before_queries = self._query_stats.before() if self._query_stats else None
        return (self.keys(images[0][: self.teacher_views * self.views.batch_size], noise["permutation"]),)

    def embed(self, images: Sequence[Tensor]) -> Tensor:
        """Queries: of all views, or all but the one that the key is made of."""
        size = sum(map(len, images)) // self.views.count
        return self.queries([images[0][self.hidden_views * size :], *images[1:]], size)

    def loss(self, embeddings: Tensor, targets: tuple[Tensor, ...], rates: Rates) -> StepOutput:
        """The loss against the queue as it stands."""
        smoothing, (keys,) = rates.get("smoothing", 0.0), targets
        size = len(keys) // self.key_views
        terms = [self._term(embeddings, key, view, smoothing) for view, key in enumerate(keys.split(size))]
        loss = terms[0] + terms[1] if self.config.symmetric else terms[0]
        # The metrics' pair of global views is that of the first key: view 2's where there are two (light-moco's order).
        key = keys[size:] if self.config.symmetric else keys
        entropy = self.criterion.target_entropy(smoothing, negatives=len(self.queue))
        return StepOutput(loss, self.key_views * entropy, (embeddings[:size].detach(), key))

    def _term(self, queries: Tensor, key: Tensor, view: int, smoothing: Tensor | float) -> Tensor:
        """All queries but those of the key's own view against ``key`` (n, out): the reduced loss."""
        size, local = len(key), self.views.weights.local_views
        other = (1 - view) * size if self.config.symmetric else 0
        rest = (2 if self.config.symmetric else 1) * size
        gg = self.criterion(queries[other : other + size], key, self.queue, smoothing)
        gl = self.criterion(queries[rest:], key.repeat(local, 1), self.queue, smoothing) if local else None
        return reduce_pairs(gg, gl, self.views.weights)

    def queries(self, images: Sequence[Tensor], size: int) -> Tensor:
        """Embeddings (views * n, out), view-major, of the queries' views, of n = ``size`` samples each."""
        hidden = self.hidden_views * size
        if not self.config.bn_by_view:
            return self.encode(images, hidden)
        views = sum(map(len, images)) // size
        # Of a part of the batch as many groups as are in it.
        groups = max(1, self.config.split_bn_queries // self.views.world * size // self.views.batch_size)
        return self.encode(images, hidden, groups=views * groups, views=views)

    @torch.no_grad()
    def keys(self, images: Tensor, permutation: Tensor) -> Tensor:
        """Keys of ``images`` (key views * B, 3, S, S), each BatchNorm group normalised for itself, in their order.

        The groups are dealt over the samples of all ranks, and each rank makes the keys of its share of the groups. All
        images go to all ranks for that: a gather has the same shape at every step, which a recorded step needs.
        """
        config, views, world = self.config, self.key_views, self.views.world
        passes = views // config.pass_views
        if config.split_bn == 1:
            return self.teach(images, groups=passes)
        everyone = gather_views(images, views)
        # The rows of every pass, those of the first rank first; the passes of a group follow each other.
        dealt = [
            rows
            for share in permutation.view(passes, world, -1).unbind(1)
            for group in share.tensor_split(config.split_bn // world, 1)
            for rows in group
        ]
        own = len(dealt) // world
        before = self._key_stats.before() if self._key_stats else None
        mine = dealt[rank() * own : (rank() + 1) * own]
        # Groups of one size are one pass, unequal ones (of one process) a pass each. index_select keeps channels-last.
        each = [torch.cat(mine)] if len({len(rows) for rows in mine}) == 1 else mine
        groups = len(mine) // len(each)
        keys = gather_rows(torch.cat([self.teach(everyone.index_select(0, rows), groups=groups) for rows in each]))
        if self._key_stats and before is not None:
            self._key_stats.combine(before)
        keys = torch.empty_like(keys).index_copy_(0, torch.cat(dealt), keys)
        if world == 1:
            return keys
        batch, first = self.views.global_batch, rank() * self.views.batch_size
        return torch.cat([keys.narrow(0, view * batch + first, self.views.batch_size) for view in range(views)])

    def after_step(self, targets: tuple[Tensor, ...], pair: tuple[Tensor, Tensor], rates: Rates) -> None:
        if self._query_stats and self._before_queries is not None:
            self._query_stats.combine(self._before_queries)
        self.enqueue(gather_views(targets[0], self.key_views))
