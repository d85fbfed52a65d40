"""ReSA: the loss as written out, the predictor that only the student has, and when the teacher moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from loss_twins import dense_sinkhorn
from tiny import TWO, B, TinyBackbone, images
from torch import Tensor, nn
from torch.nn import functional

from fastssl.losses.pairs import PairWeights
from fastssl.methods.base import Views
from fastssl.methods.resa import ReSA, ReSAConfig
from fastssl.models.heads import ProjectorConfig
from fastssl.optim.schedules import RunLength

SMALL = ReSAConfig(projector=ProjectorConfig(hidden=16, out=8, layers=3, norm=True, norm_out=True, bias=True))


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(config: ReSAConfig = SMALL, weights: PairWeights = TWO) -> ReSA:
    torch.manual_seed(0)
    method = ReSA(TinyBackbone(), config, views=Views(B, weights)).train()
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def written_out(method: ReSA, views: list[Tensor]) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """(assignment, loss of each pair (target, view)); a pass for each view, the sums sample by sample."""
    out, tau = method.config.projector.out, method.config.temperature
    student = [method.student(view) for view in views]
    with torch.no_grad():
        teacher = [method.teacher(view) for view in views[:2]]
        assigned = dense_sinkhorn(student[0][:, out:] @ teacher[0][:, out:].T, 0.05, 3)
    pairs = {}
    for g, wanted in enumerate(teacher):
        for v, found in enumerate(student):
            if v == g:
                continue
            similar = torch.stack([torch.stack([a @ b for b in wanted[:, :out]]) for a in found[:, :out]]) / tau
            loss = torch.zeros(())
            for i in range(B):
                for j in range(B):
                    of_row = similar[i, j] - torch.logsumexp(similar[i], 0)
                    of_column = similar[i, j] - torch.logsumexp(similar[:, j], 0)
                    loss = loss - assigned[i, j] * (of_row + of_column) / (2 * B)
            pairs[g, v] = loss
    return assigned, pairs


def test_the_loss_and_its_gradient_as_written_out() -> None:
    method, twin, views = make(), make(), images().to(torch.float64)
    _, pairs = written_out(twin, [*views.split(B)])
    expected = (pairs[0, 1] + pairs[1, 0]) / 2
    found = method([views], method.targets([views], {}, {}), {})
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    expected.backward()
    for mine, other in zip(method.student.parameters(), twin.student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    for mine, other in zip(method.buffers(), twin.buffers(), strict=True):  # each view is a pass of its own
        torch.testing.assert_close(mine, other)


def test_local_views_and_their_weight() -> None:
    method, twin = make(weights=PairWeights(2, 0.4, 0.6)), make()
    views = [images(0).to(torch.float64), images(1, size=7).to(torch.float64)]
    _, pairs = written_out(twin, [*views[0].split(B), *views[1].split(B)])
    local = [loss for (_, view), loss in pairs.items() if view > 1]
    expected = 0.4 * (pairs[0, 1] + pairs[1, 0]) / 2 + 0.6 * sum(local) / 4
    torch.testing.assert_close(method(views, method.targets(views, {}, {}), {}).loss, expected)


def test_the_entropy_is_the_least_that_the_loss_can_be() -> None:
    method, views = make(), images().to(torch.float64)
    assigned, _ = written_out(make(), [*views.split(B)])
    found = method([views], method.targets([views], {}, {}), {})
    best = sum(
        functional.cross_entropy(part.log(), part / part.sum(1, keepdim=True), reduction="none") @ part.sum(1) / B
        for part in (assigned, assigned.T)
    )
    torch.testing.assert_close(found.entropy, best / 2)
    assert 0 < float(found.metrics[1]) < float(found.metrics[0])


def test_the_predictor_is_the_students_alone() -> None:
    method = make()
    assert isinstance(method.teacher.projector.predictor, nn.Identity)
    assert len([*method.student.parameters()]) == len([*method.teacher.parameters()]) + 6
    wanted = {
        name: 0.75 * value + 0.25 * method.student.get_parameter(name)
        for name, value in method.teacher.named_parameters()
    }
    method.update_teacher(0.75)
    for name, value in method.teacher.named_parameters():
        torch.testing.assert_close(value, wanted[name])
    without = make(replace(SMALL, predictor=False))
    assert len([*without.student.parameters()]) == len([*without.teacher.parameters()])


def test_the_teacher_has_moved_by_the_momentum_of_the_step_that_it_teaches() -> None:
    run = RunLength(10, 5)
    assert make().rates(4, run)["momentum"] == pytest.approx(0.998)  # half way, as of step 5
    assert make(replace(SMALL, momentum_schedule="constant")).rates(4, run) == {"momentum": 0.996}
