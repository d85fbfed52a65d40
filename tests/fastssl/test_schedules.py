"""End points and known values of the schedules; no fast path here, so the numbers are worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from fastssl import schedules

RUN = {"total_steps": 1000, "steps_per_epoch": 10}


def test_learning_rate_end_points_per_step() -> None:
    def rate(step: int) -> float:
        return schedules.learning_rate(step, peak=0.12, final=0.02, warmup_epochs=3, **RUN)

    assert rate(0) == pytest.approx(0.12 / 31)
    assert rate(29) == pytest.approx(0.12 * 30 / 31)
    assert rate(30) == 0.12
    assert rate(515) == pytest.approx((0.12 + 0.02) / 2)
    assert rate(1000) == pytest.approx(0.02)
    rates = [rate(step) for step in range(1001)]
    assert all(a < b for a, b in pairwise(rates[:31])), "the warm-up must climb"
    assert all(a > b for a, b in pairwise(rates[30:])), "the cosine must fall"


def test_learning_rate_per_epoch_is_a_staircase() -> None:
    def rate(step: int) -> float:
        return schedules.learning_rate(step, peak=0.12, warmup_epochs=3, per_epoch=True, **RUN)

    assert [rate(10 * epoch) for epoch in range(4)] == pytest.approx([0.03, 0.06, 0.09, 0.12])
    for epoch in range(100):
        assert {rate(10 * epoch + offset) for offset in range(10)} == {rate(10 * epoch)}
    # MoCo's formula after the warm-up, at an arbitrary epoch
    assert rate(570) == pytest.approx(0.12 * 0.5 * (1 + math.cos(math.pi * (57 - 3) / (100 - 3))))
    assert rate(1000) == pytest.approx(0.0, abs=1e-15)


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert schedules.learning_rate(0, peak=0.03, **RUN) == 0.03


@pytest.mark.parametrize("per_epoch", [False, True])
def test_learning_rate_of_a_run_within_its_warmup_only_climbs(per_epoch: bool) -> None:
    rates = [
        schedules.learning_rate(step, total_steps=20, steps_per_epoch=10, peak=1.0, warmup_epochs=2, per_epoch=per_epoch)
        for step in range(21)
    ]
    assert rates == sorted(rates)
    assert rates[0] > 0
    assert rates[-1] == 1.0


def test_ema_momentum_end_points() -> None:
    assert {schedules.ema_momentum(step, total_steps=100, base=0.999) for step in (0, 50, 100)} == {0.999}
    assert schedules.ema_momentum(0, total_steps=100, base=0.99, schedule="cosine") == 0.99
    assert schedules.ema_momentum(100, total_steps=100, base=0.99, schedule="cosine") == 1.0
    quarter = 1 - (1 - 0.99) * (1 + math.cos(math.pi / 4)) / 2
    assert schedules.ema_momentum(25, total_steps=100, base=0.99, schedule="cosine") == pytest.approx(quarter, rel=1e-15)


def test_smoothing_schedules() -> None:
    def mass(step: int, schedule: str, warm_epochs: int = 0) -> float:
        return schedules.smoothing(step, base=0.2, schedule=schedule, warm_epochs=warm_epochs, **RUN)

    assert mass(0, "constant") == mass(999, "constant") == 0.2
    assert [mass(step, "warm", 3) for step in (0, 29, 30, 999)] == [0.0, 0.0, 0.2, 0.2]
    assert mass(0, "warm", 0) == 0.2
    assert [mass(step, "cosine") for step in (0, 9)] == [0.0, 0.0], "the loss skips its search on exactly zero"
    assert mass(10, "cosine") > 0
    assert mass(500, "cosine") == pytest.approx(0.1)
    assert mass(505, "cosine") == mass(500, "cosine"), "one value an epoch"
    assert mass(1000, "cosine") == pytest.approx(0.2)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"'linear'.*constant, cosine"):
        schedules.ema_momentum(0, total_steps=1, base=0.9, schedule="linear")
    with pytest.raises(ValueError, match=r"'linear'.*constant, warm, cosine"):
        schedules.smoothing(0, total_steps=1, steps_per_epoch=1, base=0.2, schedule="linear")
    with pytest.raises(ValueError, match="step 11 lies outside the run of 10"):
        schedules.learning_rate(11, total_steps=10, steps_per_epoch=5, peak=0.1)
    with pytest.raises(ValueError, match="at least one step"):
        schedules.learning_rate(0, total_steps=10, steps_per_epoch=0, peak=0.1)
