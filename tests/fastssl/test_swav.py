"""SwAV: assignments, prototypes, the queue."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import B, TinyBackbone, images
from torch import Tensor
from torch.nn import functional

from fastssl.losses.pairs import PairWeights
from fastssl.losses.sinkhorn import sinkhorn
from fastssl.methods.base import Views
from fastssl.methods.swav import SwAV, SwAVConfig
from fastssl.optim.schedules import RunLength

K, D = 10, 8
SMALL = SwAVConfig(
    prototypes=K, queue=3 * B, queue_epoch=2, projector=replace(SwAVConfig().projector, hidden=16, out=D, init="torch")
)
WEIGHTS = PairWeights(3, 0.4, 0.6)
OFF = {"frozen": False, "fill": False, "queue": False}


def make(config: SwAVConfig = SMALL, weights: PairWeights = WEIGHTS) -> SwAV:
    torch.manual_seed(0)
    return SwAV(TinyBackbone(), config, views=Views(B, weights)).train()


def batch() -> list[Tensor]:
    return [images(0), images(1, views=3, size=7)]


def test_loss_is_the_weighted_mean_over_pairs() -> None:
    method, views = make(), batch()
    with torch.no_grad():
        out = method.student(views)
        scores = out[:, D:].split(B)
        torch.testing.assert_close(out[:, :D].norm(dim=1), torch.ones(5 * B))
        torch.testing.assert_close(out[:, D:], out[:, :D] @ functional.normalize(method.prototypes.weight, dim=1).t())
    assigned = [sinkhorn(s, 0.05, 3) for s in scores[:2]]
    logs = [functional.log_softmax(s / 0.1, dim=1) for s in scores]
    pairs = {(g, v): -(assigned[g] * logs[v]).sum(1).mean() for g in range(2) for v in range(5) if g != v}
    gg = torch.stack([pairs[0, 1], pairs[1, 0]]).mean()
    gl = torch.stack([pairs[g, v] for g in range(2) for v in range(2, 5)]).mean()
    torch.testing.assert_close(method(views, (), OFF).loss, 0.4 * gg + 0.6 * gl)


def test_prototypes_are_normalised_before_the_pass_and_frozen_in_the_first_epoch() -> None:
    method, run = make(), RunLength(100, 10)
    with torch.no_grad():
        method.prototypes.weight.mul_(5)
    method.targets(batch(), {}, OFF)
    torch.testing.assert_close(method.prototypes.weight.detach().norm(dim=1), torch.ones(K))
    (frozen,) = method(batch(), (), method.rates(9, run)).frozen
    assert frozen is method.prototypes.weight and not method(batch(), (), method.rates(10, run)).frozen
    assert sum(name.endswith("prototypes.weight") for name in method.state_dict()) == 1


def test_the_queue_fills_from_its_epoch_and_is_used_when_full() -> None:
    method, run = make(), RunLength(100, 10)
    switched_on = [[name for name, on in method.rates(step, run).items() if on] for step in (0, 10, 19, 20, 22, 23)]
    assert switched_on == [["frozen"], [], [], ["fill"], ["fill"], ["fill", "queue"]]
    assert method.queue.shape == (2, 3 * B, D) and make(replace(SMALL, queue=3 * B + 5)).queue.shape == (
        2,
        3 * B,
        D,
    )  # whole batches
    assert not any(make(replace(SMALL, queue=0)).rates(99, run).values())
    with pytest.raises(ValueError, match="holds no whole batch"):
        make(replace(SMALL, queue=B - 1))


def test_published_queue_is_rounded_down_to_3072() -> None:
    method = SwAV(TinyBackbone(), replace(SwAVConfig(), projector=SMALL.projector), views=Views(128, WEIGHTS, world=8))
    assert method.queue.shape[1] == 3072 and method.queue_batches == 3


def test_a_full_queue_shares_the_prototypes_out_over_more_samples() -> None:
    method = make()
    method.queue.copy_(
        functional.normalize(torch.randn(method.queue.shape, generator=torch.Generator().manual_seed(1)), dim=2)
    )
    scores = (
        functional.normalize(torch.randn(2, B, D, generator=torch.Generator().manual_seed(2)), dim=2)
        @ method.prototypes.weight.detach().t()
    )
    found = method.assign(scores, use_queue=True)
    with torch.no_grad():
        for view in range(2):
            together = sinkhorn(torch.cat([method.prototypes(method.queue[view]), scores[view]]), 0.05, 3)
            torch.testing.assert_close(found[view], together[-B:])
    torch.testing.assert_close(found.sum(-1), torch.ones(2, B))
    assert not torch.allclose(found, method.assign(scores, use_queue=False), atol=1e-3)


def test_assignment_and_loss_are_float32_under_autocast() -> None:
    method = make()
    with torch.autocast("cpu", torch.bfloat16):
        found = method(batch(), (), OFF)
        assigned = method.assign(torch.rand(2, B, K).bfloat16(), use_queue=True)
    assert {found.loss.dtype, found.metrics.dtype, found.pair[0].dtype, assigned.dtype} == {torch.float32}
    torch.testing.assert_close(assigned.sum(-1), torch.ones(2, B), rtol=1e-6, atol=1e-6)
    found.loss.backward()
    assert method.prototypes.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "value"), [("prototypes", 1), ("epsilon", 0.0), ("queue", -1), ("sinkhorn_iterations", 0)]
)
def test_wrong_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"swav.{name}"):
        SwAVConfig(**{name: value})
