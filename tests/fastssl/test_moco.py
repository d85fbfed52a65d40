"""MoCo: the symmetric loss, the queue, the key network, split-BN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.heads import ProjectorConfig
from fastssl.losses import SmoothedInfoNCE
from fastssl.methods.moco import MoCo, MoCoConfig

B = 6


class TinyBackbone(nn.Module):
    """Convolution, BatchNorm, pool: enough to have statistics and a gradient."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean((2, 3))


def make(**options: object) -> MoCo:
    torch.manual_seed(0)
    config = MoCoConfig(queue=8 * B, neighbors=5, split_bn=1, projector=ProjectorConfig(hidden=16, out=8), **options)
    return MoCo(TinyBackbone(), config, batch_size=B, generator=torch.Generator().manual_seed(1)).train()


def images(seed: int = 0) -> Tensor:
    return torch.randn(2 * B, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def test_loss_is_the_sum_of_both_directions_over_the_old_queue() -> None:
    method, views = make(), images()
    queue = method.queue.clone()
    with torch.no_grad():
        query = method.student(views)  # BatchNorm in train mode: the same batch gives the same statistics
        key = method.teacher(views)
    single = SmoothedInfoNCE(temperature=0.1, smoothing=0.2, weighting="stepped", neighbors=5)
    expected = single(query[:B], key[B:], queue) + single(query[B:], key[:B], queue)
    loss, metrics = method([views], torch.arange(2 * B), 0.2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics[0], expected)
    assert not metrics.requires_grad
    torch.testing.assert_close(metrics[1], expected - 2 * single.target_entropy(0.2))
    # Two view groups of B each are the same as one of 2B.
    again, _ = make()([views[:B], views[B:]], torch.arange(2 * B), 0.2)
    torch.testing.assert_close(again, loss)


def test_gradient_reaches_the_student_alone() -> None:
    method = make()
    loss, _ = method([images()], torch.arange(2 * B), 0.2)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_queue_is_first_in_first_out_and_wraps() -> None:
    method = make()
    before = method.queue.clone()
    for number in range(5):
        keys = functional.normalize(torch.full((2 * B, 8), float(number + 1)) + torch.arange(2 * B)[:, None], dim=1)
        place = number * 2 * B % len(before)
        method.enqueue(keys)
        torch.testing.assert_close(method.queue[place : place + 2 * B], keys)
        if number == 0:
            torch.testing.assert_close(method.queue[2 * B :], before[2 * B :])
    assert int(method.queue_pointer) == 5 * 2 * B % len(before)


def test_queue_and_pointer_are_in_the_state() -> None:
    method, other = make(), make()
    method([images()], torch.arange(2 * B), 0.2)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.queue, method.queue) and int(other.queue_pointer) == 2 * B


def test_keys_are_unit_vectors_of_the_teacher_in_order() -> None:
    method, views = make(), images()
    keys = method.keys(views, torch.randperm(2 * B))
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(2 * B))
    torch.testing.assert_close(keys, method.teacher(views))  # one group: the order does not matter


def test_split_bn_normalises_each_group_for_itself_and_puts_the_order_back() -> None:
    torch.manual_seed(0)
    config = MoCoConfig(queue=8 * B, neighbors=5, split_bn=3, projector=ProjectorConfig(hidden=16, out=8))
    method, views = MoCo(TinyBackbone(), config, batch_size=B).train(), images()
    permutation = torch.randperm(2 * B, generator=torch.Generator().manual_seed(5))
    keys = method.keys(views, permutation)
    for group in permutation.chunk(3):
        torch.testing.assert_close(keys[group], method.teacher(views[group]))
    whole = method.teacher(views)
    assert not torch.allclose(keys, whole, atol=1e-3)


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
    method = make()
    same = functional.normalize(torch.ones(B, 8), dim=1)
    spread = functional.normalize(torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    collapsed = method._metrics(torch.tensor(1.0), same, same, 0.0)
    healthy = method._metrics(torch.tensor(1.0), spread, spread, 0.0)
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
    ],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoCoConfig(**options)


def test_queue_must_be_whole_steps_and_groups_large_enough() -> None:
    with pytest.raises(ValueError, match="multiple of twice the batch size"):
        MoCo(TinyBackbone(), MoCoConfig(queue=100), batch_size=B)
    with pytest.raises(ValueError, match="fewer than 2"):
        MoCo(TinyBackbone(), MoCoConfig(queue=8 * B, split_bn=B + 1), batch_size=B)
