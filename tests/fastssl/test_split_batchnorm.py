"""Running statistics of groups that the ranks have shared out, against one process that passes all groups one after the
other.
"""

from __future__ import annotations

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn

from fastssl.distributed.collectives import rank, world_size
from fastssl.distributed.split_batchnorm import SplitBatchNormStats
from fastssl.errors import FastSSLError

GROUPS, STEPS = 6, 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Flatten(),
        nn.LazyLinear(5),
        nn.BatchNorm1d(5, momentum=0.01),
    )
    layers.append(nn.BatchNorm1d(5, track_running_stats=False))
    layers(torch.zeros(2, 3, 5, 5))
    return layers.double().train()


def groups(step: int) -> Tensor:
    """(GROUPS, 4, 3, 5, 5) of this step: each group has a mean and a spread of its own."""
    generator = torch.Generator().manual_seed(step)
    data = torch.randn(GROUPS, 4, 3, 5, 5, generator=generator, dtype=torch.float64)
    scale = torch.arange(1, GROUPS + 1).view(-1, 1, 1, 1, 1)
    return data * scale + scale


def buffers_behind_all_steps() -> dict[str, Tensor]:
    layers, world, own = network(), world_size(), GROUPS // world_size()
    statistics = SplitBatchNormStats(layers, groups=own, rank=rank(), world=world) if world > 1 else None
    for step in range(STEPS):
        before = statistics.before() if statistics else None
        for group in groups(step)[rank() * own : (rank() + 1) * own]:
            layers(group)
        if statistics:
            statistics.combine(before)
    return dict(layers.named_buffers())


@pytest.mark.parametrize("world", [2, 3])
def test_dealt_groups_leave_the_statistics_of_one_process(world: int) -> None:
    alone = buffers_behind_all_steps()
    assert len(alone) == 6 and alone["1.num_batches_tracked"] == 1 + STEPS * GROUPS
    for found in run_processes(buffers_behind_all_steps, world):
        for name, value in alone.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_layer_with_another_recurrence_is_refused_by_name() -> None:
    with pytest.raises(FastSSLError, match=r"layer 0 averages .*momentum=None.*split_bn=1.*split_bn_queries=1"):
        SplitBatchNormStats(nn.Sequential(nn.BatchNorm1d(2, momentum=None)), groups=2, rank=0, world=2)


def test_a_network_without_statistics_has_nothing_to_combine() -> None:
    statistics = SplitBatchNormStats(nn.Linear(2, 2), groups=2, rank=0, world=2)
    statistics.combine(statistics.before())
