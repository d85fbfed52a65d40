"""DINO: pairs, centre, teacher, the frozen last layer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from loss_twins import dense_sinkhorn
from tiny import B, TinyBackbone, images
from torch import Tensor
from torch.nn import functional

from fastssl.losses.pairs import PairWeights
from fastssl.methods.base import Views
from fastssl.methods.dino import DINO, DINOConfig
from fastssl.models.heads import ProjectorConfig
from fastssl.optim.schedules import RunLength

K = 24
SMALL = DINOConfig(out=K, projector=replace(DINOConfig().projector, hidden=16, out=8))
RATES = {"momentum": 0.9, "teacher_temperature": 0.05, "frozen": False}
WEIGHTS = PairWeights(3, 0.4, 0.6)


def make(config: DINOConfig = SMALL, weights: PairWeights = WEIGHTS) -> DINO:
    torch.manual_seed(0)
    return DINO(TinyBackbone(), config, views=Views(B, weights)).train()


def batch() -> list[Tensor]:
    return [images(0), images(1, views=3, size=7)]


def test_loss_is_the_weighted_mean_over_pairs() -> None:
    method, views = make(), batch()
    with torch.no_grad():
        method.center.normal_(generator=torch.Generator().manual_seed(3))
        targets = functional.softmax((method.teacher(views[0]) - method.center) / 0.05, dim=1).split(B)
        student = functional.log_softmax(method.student(views) / 0.1, dim=1).split(B)
    pairs = {(g, v): -(targets[g] * student[v]).sum(1).mean() for g in range(2) for v in range(5) if g != v}
    gg = torch.stack([pairs[0, 1], pairs[1, 0]]).mean()
    gl = torch.stack([pairs[g, v] for g in range(2) for v in range(2, 5)]).mean()
    found = method(views, method.targets(views, {}, RATES), RATES)
    torch.testing.assert_close(found.loss, 0.4 * gg + 0.6 * gl)
    # The baseline's weights make it the plain mean over all 2 + 2L pairs.
    plain = make(weights=PairWeights(3, 1 / 4, 3 / 4))
    plain.center.copy_(method.center)
    torch.testing.assert_close(
        plain(views, plain.targets(views, {}, RATES), RATES).loss, torch.stack(list(pairs.values())).mean()
    )


def test_sinkhorn_in_place_of_the_centre() -> None:
    method, views = make(replace(SMALL, centering="sinkhorn")), batch()
    with torch.no_grad():
        wanted = dense_sinkhorn(method.teacher(views[0]), 0.05, 3)
    logits, found = method.targets(views, {}, RATES)
    torch.testing.assert_close(found, wanted)
    method.after_step((logits, found), (logits, logits), RATES)
    assert not method.center.any()


def test_collapse_reads_as_ln_k() -> None:
    """A teacher that says nothing and a student that says nothing: ln K, the value to look for (8.318 for 4096)."""
    method, views = make(), batch()
    with torch.no_grad():
        method.student.projector.last.gain.zero_()
        method.teacher.projector.last.gain.zero_()
    found = method(views, method.targets(views, {}, RATES), RATES)
    assert found.loss.item() == pytest.approx(math.log(K), rel=1e-6)
    values = dict(zip(method.METRICS, found.metrics.tolist()))
    assert values["kl"] == pytest.approx(0, abs=1e-6) and values["target_entropy"] == pytest.approx(1.0)


def test_softmax_and_centring_are_float32_under_autocast() -> None:
    method, views = make(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits, probabilities = method.targets(views, {}, RATES)
        found = method(views, (logits, probabilities), RATES)
    assert {logits.dtype, probabilities.dtype, found.loss.dtype, found.metrics.dtype, method.center.dtype} == {
        torch.float32
    }
    torch.testing.assert_close(
        probabilities.sum(-1), torch.ones(2 * B), rtol=1e-6, atol=1e-6
    )  # bfloat16 would miss by percents
    found.loss.backward()
    assert method.student.projector.last.direction.grad.dtype == torch.float32


def test_gradient_reaches_the_student_alone() -> None:
    method, views = make(), batch()
    method(views, method.targets(views, {}, RATES), RATES).loss.backward()
    trained = [p for p in method.student.parameters() if p.requires_grad]
    # A bias before a BatchNorm has none but rounding noise; all others have.
    assert (
        all(p.grad is not None for p in trained)
        and sum(bool(p.grad.abs().max() > 1e-6) for p in trained) > len(trained) / 2
    )
    assert all(p.grad is None for p in method.teacher.parameters())
    assert not method.student.projector.last.gain.requires_grad


def test_the_last_layer_is_frozen_in_the_first_epoch() -> None:
    method, run = make(), RunLength(100, 10)
    assert [method.rates(step, run)["frozen"] for step in (0, 9, 10)] == [True, True, False]
    last, views = method.student.projector.last, batch()
    targets = method.targets(views, {}, RATES)
    frozen = method(views, targets, {**RATES, "frozen": True}).frozen
    assert {id(p) for p in frozen} == {id(last.direction), id(last.gain)} and not method(views, targets, RATES).frozen
    assert not make(replace(SMALL, freeze_epochs=0)).rates(0, run)["frozen"]


def test_rates() -> None:
    run, method = RunLength(200 * 7, 7), make()
    assert method.rates(0, run) == {"momentum": 0.996, "teacher_temperature": 0.04, "frozen": True}
    assert method.rates(1400, run) == {"momentum": 1.0, "teacher_temperature": 0.07, "frozen": False}


def test_parts_have_the_mean_of_the_whole() -> None:
    """Without BatchNorm in the way any number of parts gives the batch's loss."""
    config = replace(SMALL, projector=ProjectorConfig(hidden=16, out=8, layers=2))
    method, views = make(config), batch()
    method.student.backbone.body[1].eval()
    targets = method.targets(views, {}, RATES)
    whole = method(views, targets, RATES).loss

    def part(rows: Tensor, number: int) -> Tensor:
        return rows.unflatten(0, (-1, 3, B // 3))[:, number].flatten(0, 1)

    losses = [
        method([part(rows, n) for rows in views], tuple(part(rows, n) for rows in targets), RATES).loss
        for n in range(3)
    ]
    torch.testing.assert_close(torch.stack(losses).mean(), whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("out", 1),
        ("teacher_temperature", 0.0),
        ("momentum", 1.1),
        ("momentum_schedule", "linear"),
        ("freeze_epochs", -1),
    ],
)
def test_wrong_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"dino.{name}"):
        DINOConfig(**{name: value})
