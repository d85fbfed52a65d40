"""MoCo: symmetric and one-sided losses, local views, the queue, the key network, split-BN."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import TWO, B, TinyBackbone, images
from torch import Tensor
from torch.nn import functional

from fastssl.losses import SmoothedInfoNCE
from fastssl.losses.pairs import PairWeights
from fastssl.methods.base import StepOutput, Views
from fastssl.methods.moco import MoCo, MoCoConfig
from fastssl.models.heads import ProjectorConfig
from fastssl.optim.schedules import RunLength


def make(weights: PairWeights = TWO, **options: object) -> MoCo:
    torch.manual_seed(0)
    config = MoCoConfig(
        **{"queue": 8 * B, "neighbors": 5, "split_bn": 1, "projector": ProjectorConfig(hidden=16, out=8), **options}
    )
    return MoCo(TinyBackbone(), config, views=Views(B, weights), generator=torch.Generator().manual_seed(1)).train()


def step(method: MoCo, views: list[Tensor], smoothing: float = 0.2) -> StepOutput:
    """One batch's loss; its keys are then in the queue."""
    joined = method.images(views)
    keys = method.targets(joined, {"permutation": torch.arange(method.key_views * B)}, {})
    found = method(joined, keys, {"smoothing": smoothing})
    method.after_step(keys, [], {})
    return found


def test_loss_is_the_sum_of_both_directions_over_the_old_queue() -> None:
    method, views = make(), images()
    queue = method.queue.clone()
    with torch.no_grad():
        query = method.student(views)  # BatchNorm in train mode: the same batch gives the same statistics
        key = method.teacher(views)
    single = SmoothedInfoNCE(temperature=0.1, smoothing=0.2, weighting="stepped", neighbors=5)
    expected = single(query[:B], key[B:], queue) + single(query[B:], key[:B], queue)
    found = step(method, [views])
    loss, metrics = found.loss, found.metrics
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics[0], expected)
    assert not metrics.requires_grad
    torch.testing.assert_close(metrics[1], expected - 2 * single.target_entropy(0.2))
    # Two view groups of B each are the same as one of 2B.
    torch.testing.assert_close(step(make(), [views[:B], views[B:]]).loss, loss)


SSLIGHT = PairWeights(3, 0.4, 0.6)


def test_symmetric_loss_with_local_views_is_the_sum_over_both_keys() -> None:
    method, globals_, locals_ = make(SSLIGHT), images(), images(1, views=3, size=7)
    queue = method.queue.clone()
    single = SmoothedInfoNCE(temperature=0.1, smoothing=0.2, weighting="stepped", neighbors=5)
    with torch.no_grad():
        keys = method.teacher(globals_).split(B)
        queries = method.student([globals_, locals_]).split(B)
    expected = 0.0
    for own, key in enumerate(keys):
        gl = torch.stack([single(query, key, queue) for query in queries[2:]]).mean()
        expected = expected + 0.4 * single(queries[1 - own], key, queue) + 0.6 * gl
    torch.testing.assert_close(step(method, [globals_, locals_]).loss, expected)
    assert int(method.queue_pointer) == 2 * B


def test_the_keys_of_a_step_are_not_among_its_negatives() -> None:
    """Enqueued after the logits: a second step on the same batch finds its own keys in the queue, the first one does
    not.
    """
    method, views = make(), images()
    first, again = (step(method, [views], smoothing=0.0).loss.detach() for _ in range(2))
    assert float(again) > float(first) + 0.1  # each query's positive now is a negative, too


def test_gradient_reaches_the_student_alone() -> None:
    method = make()
    step(method, [images()]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_queue_and_pointer_are_in_the_state() -> None:
    method, other = make(), make()
    step(method, [images()])
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.queue, method.queue) and int(other.queue_pointer) == 2 * B


def test_keys_are_unit_vectors_of_the_teacher_in_order() -> None:
    method, views = make(), images()
    keys = method.keys(views, torch.randperm(2 * B))
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(2 * B))
    torch.testing.assert_close(keys, method.teacher(views))  # one group: the order does not matter


def test_split_bn_normalises_each_group_for_itself_and_puts_the_order_back() -> None:
    torch.manual_seed(0)
    method, views = make(split_bn=3), images()
    permutation = torch.randperm(2 * B, generator=torch.Generator().manual_seed(5))
    keys = method.keys(views, permutation)
    for group in permutation.chunk(3):
        torch.testing.assert_close(keys[group], method.teacher(views[group]))
    whole = method.teacher(views)
    assert not torch.allclose(keys, whole, atol=1e-3)


def test_each_view_of_a_group_is_a_pass_of_its_own() -> None:
    method, views = make(split_bn=3, bn_by_view=True, split_bn_queries=2), images()
    permutation = torch.from_numpy(method.noise(0, 0, 5)["permutation"])
    keys = method.keys(views, permutation)
    for rows in (*permutation[:B].chunk(3), *permutation[B:].chunk(3)):
        torch.testing.assert_close(keys[rows], method.teacher(views[rows]))
        assert len(set((rows // B).tolist())) == 1
    queries = method.queries([views], B)
    for rows in torch.arange(2 * B).chunk(4):
        torch.testing.assert_close(queries[rows], method.student(views[rows]))
    assert not torch.allclose(queries, method.student(views), atol=1e-3)


def test_teacher_follows_by_the_momentum_and_keeps_its_statistics() -> None:
    method = make()
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1)
    before = [p.clone() for p in method.teacher.parameters()]
    statistics = method.teacher.backbone.body[1].running_mean.clone()
    method.student(images())  # moves the student's statistics
    method.update_teacher(0.9)
    for old, new, target in zip(before, method.teacher.parameters(), method.student.parameters()):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * target)
    assert torch.equal(method.teacher.backbone.body[1].running_mean, statistics)


def test_collapse_shows_in_the_metrics() -> None:
    same = functional.normalize(torch.ones(B, 8), dim=1)
    spread = functional.normalize(torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    collapsed = StepOutput(torch.tensor(1.0), 0.0, (same, same)).metrics
    healthy = StepOutput(torch.tensor(1.0), 0.0, (spread, spread)).metrics
    assert float(collapsed[3]) == pytest.approx(0, abs=1e-6) and float(healthy[3]) == pytest.approx(1, abs=0.02)
    assert float(collapsed[2]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing_schedule": "linear"}, "smoothing_schedule"),
        ({"momentum_schedule": "step"}, "momentum_schedule"),
        ({"smoothing_warm_epochs": 3}, "warm"),
        ({"momentum": 1.5}, "momentum"),
        ({"split_bn": 0}, "split_bn"),
        ({"split_bn_queries": 2}, "bn_by_view: true"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoCoConfig(**options)


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        ({"queue": 100}, 1, "multiple of twice the batch size"),
        ({"queue": 100, "symmetric": False}, 1, "multiple of the batch size"),
        ({"split_bn": B + 1}, 1, "fewer than 2"),
        ({"split_bn": 3}, 2, "must be 1, or a multiple of the 2 processes"),
        ({"queue": 2 * B}, 2, "multiple of twice the batch size"),
        ({"bn_by_view": True, "split_bn": B}, 1, "fewer than 2 of 6 keys"),
        ({"bn_by_view": True, "split_bn_queries": 4}, 1, "cut the batch of 6"),
        ({"bn_by_view": True, "split_bn_queries": 3}, 2, "on each of 2 processes"),
    ],
)
def test_queue_must_be_whole_steps_and_groups_large_enough(options: dict, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoCo(
            TinyBackbone(),
            MoCoConfig(**{"queue": 8 * B, "split_bn": 1, "neighbors": 5, **options}),
            views=Views(B, TWO, world),
        )


def test_rates_follow_the_schedules_and_no_smoothing_is_none() -> None:
    run = RunLength(100, 10)
    rates = make(momentum=0.5, momentum_schedule="cosine", smoothing_schedule="warm", smoothing_warm_epochs=2).rates(
        0, run
    )
    assert rates == {"momentum": 0.5, "smoothing": 0.0}
    assert make(smoothing=0.0).rates(50, run) == {"momentum": 0.999}


def test_numbers_that_go_with_another_batch() -> None:
    config = MoCoConfig(queue=64, split_bn=8)
    assert [batch for batch in range(1, 40) if config.allows(batch)] == [8, 16, 32] and config.largest_batch == 32
    scaled = config.scaled(6)
    assert scaled.allows(6) and (scaled.queue, scaled.split_bn) == (72, 6)
    one_sided = MoCoConfig(queue=64, split_bn=1, symmetric=False)
    assert one_sided.largest_batch == 64 and one_sided.allows(64)
    by_view = MoCoConfig(queue=64, split_bn=8, bn_by_view=True, split_bn_queries=8)
    assert [batch for batch in range(1, 40) if by_view.allows(batch)] == [16, 32]
    fewer = by_view.scaled(12)
    assert fewer.allows(12) and (fewer.split_bn, fewer.split_bn_queries) == (6, 6)
    # No search through all numbers up to a typo.
    assert dataclasses.replace(by_view, split_bn=10**18, split_bn_queries=10**18).scaled(12) == fewer
    shared = by_view.scaled(20, processes=2)
    assert shared.allows(20) and (shared.split_bn, shared.split_bn_queries) == (4, 4)
