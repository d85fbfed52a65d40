"""End points and known values of the schedules; no fast path here, so the numbers are worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from fastssl.losses.smoothed_target import DEFAULT_SMOOTHING
from fastssl.methods.base import SmoothedConfig
from fastssl.optim import schedules
from fastssl.optim.optimizers import OptimConfig
from fastssl.optim.schedules import RunLength

RUN = RunLength(1000, 10)


def learning_rate(step: int, run: RunLength, *, peak: float, final: float = 0.0, **options: object) -> float:
    return OptimConfig(lr=peak, lr_batch=0, final_lr=final, **options).rate(step, run, 1)


def test_learning_rate_end_points_per_step() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, RUN, peak=0.12, final=0.02, warmup_epochs=3)

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
        return learning_rate(step, RUN, peak=0.12, warmup_epochs=3, per_epoch=True)

    # light-moco's warm-up is multiplied by its cosine, too, which at epoch 3 of 100 is 1.
    left = [0.5 * (1 + math.cos(math.pi * (epoch - 3) / (100 - 3))) for epoch in range(4)]
    climb = [0.03 * left[0], 0.06 * left[1], 0.09 * left[2], 0.12]
    assert [rate(10 * epoch) for epoch in range(4)] == pytest.approx(climb, rel=1e-12)
    for epoch in range(100):
        assert {rate(10 * epoch + offset) for offset in range(10)} == {rate(10 * epoch)}
    # MoCo's formula after the warm-up, at an arbitrary epoch
    assert rate(570) == pytest.approx(0.12 * 0.5 * (1 + math.cos(math.pi * (57 - 3) / (100 - 3))))
    assert rate(1000) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("per_epoch", [False, True])
def test_a_rate_that_is_held_falls_in_the_rest_of_the_run(per_epoch: bool) -> None:
    def rate(step: int) -> float:
        return learning_rate(step, RUN, peak=0.12, final=0.02, warmup_epochs=3, hold=0.6, per_epoch=per_epoch)

    assert rate(0) < 0.12 / 3 and rate(30) == rate(300) == rate(600) == 0.12
    assert rate(800) == pytest.approx(0.07) and rate(1000) == pytest.approx(0.02)
    within = learning_rate(500, RUN, peak=0.12, warmup_epochs=30, hold=0.1)
    assert within == learning_rate(500, RUN, peak=0.12, warmup_epochs=30), "a warm-up that is longer comes first"


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, RUN, peak=0.03) == 0.03


@pytest.mark.parametrize("per_epoch", [False, True])
def test_learning_rate_of_a_run_within_its_warmup_only_climbs(per_epoch: bool) -> None:
    rates = [
        learning_rate(step, RunLength(20, 10), peak=1.0, warmup_epochs=2, per_epoch=per_epoch) for step in range(21)
    ]
    assert rates == sorted(rates)
    assert rates[0] > 0
    assert rates[-1] == 1.0


def test_ema_momentum_end_points() -> None:
    run = RunLength(100, 10)
    assert {schedules.ema_momentum(step, run, 0.999, "constant") for step in (0, 50, 100)} == {0.999}
    assert schedules.ema_momentum(0, run, 0.99, "cosine") == 0.99
    assert schedules.ema_momentum(100, run, 0.99, "cosine") == 1.0
    quarter = 1 - (1 - 0.99) * (1 + math.cos(math.pi / 4)) / 2
    assert schedules.ema_momentum(25, run, 0.99, "cosine") == pytest.approx(quarter, rel=1e-15)


@pytest.mark.parametrize(("weighting", "mass"), [("geometric", 0.4), ("nearest", 0.5)])
def test_a_constant_mass_that_a_cosine_switches_on(weighting: str, mass: float) -> None:
    """light-moco's code gives these two weightings their mass whenever what its cosine says is above 0."""
    schedule = {"smoothing_schedule": "warm", "smoothing_warm_epochs": 1}
    config = SmoothedConfig(smoothing=mass, weighting=weighting, **schedule)
    for epoch in range(100):
        said = 0.2 * (1 - 0.5 * (1 + math.cos(math.pi * epoch / 100)))
        assert config.smoothing_rates(10 * epoch, RUN)["smoothing"] == (mass if said > 0 else 0.0)
    assert DEFAULT_SMOOTHING[weighting] == mass


def test_smoothing_schedules() -> None:
    def mass(step: int, schedule: str, warm_epochs: int = 0) -> float:
        return schedules.smoothing(step, RUN, 0.2, schedule, warm_epochs)

    assert mass(0, "constant") == mass(999, "constant") == 0.2
    assert [mass(step, "warm", 3) for step in (0, 29, 30, 999)] == [0.0, 0.0, 0.2, 0.2]
    assert mass(0, "warm", 0) == 0.2
    assert [mass(step, "cosine") for step in (0, 9)] == [0.0, 0.0], "the loss skips its search on exactly zero"
    assert mass(10, "cosine") > 0
    assert mass(500, "cosine") == pytest.approx(0.1)
    assert mass(505, "cosine") == mass(500, "cosine"), "one value an epoch"
    assert mass(1000, "cosine") == pytest.approx(0.2)


SSLIGHT = RunLength(200 * 1251, 1251)


def test_sslight_learning_rate_at_its_end_points() -> None:
    """DINO on CNNs at batch 1024: a line from 0 to 1.92 over 10 epochs, both ends included, then a cosine to 0.0048."""

    def rate(step: int, **changes: float) -> float:
        return learning_rate(
            step, SSLIGHT, peak=1.92, final=0.0048, warmup_epochs=10, warmup_lr=changes.get("start", 0.0)
        )

    assert rate(0) == 0.0 and rate(12_509) == 1.92 and rate(12_510) == 1.92
    assert rate(1) == pytest.approx(1.92 / 12_509) and rate(12_511) < 1.92
    left = 190 * 1251
    middle = 0.0048 + 0.5 * (1.92 - 0.0048) * (1 + math.cos(math.pi * 1000 / left))
    assert rate(12_510 + 1000) == pytest.approx(middle, rel=1e-12)
    assert rate(SSLIGHT.total_steps - 1) == pytest.approx(0.0048, abs=1e-9)
    assert rate(0, start=0.075) == 0.075  # SwAV's warm-up begins there
    one = learning_rate(0, RunLength(10, 1), peak=1.0, warmup_epochs=1, warmup_lr=0.0)
    assert one == 0.0  # a warm-up of one step is its first end, as numpy's linspace has it


def test_sslight_ema_ends_at_one() -> None:
    def momentum(step: int) -> float:
        return schedules.ema_momentum(step, SSLIGHT, 0.996, "cosine")

    assert momentum(0) == 0.996 and momentum(SSLIGHT.total_steps) == 1.0
    assert 1 - momentum(SSLIGHT.total_steps - 1) < 1e-12  # the last step


def test_teacher_temperature_rises_by_the_epoch() -> None:
    run = RunLength(1400, 7)

    def tau(epoch: int, warm: int = 50) -> float:
        return schedules.teacher_temperature(epoch * 7, run, first=0.04, last=0.07, warm_epochs=warm)

    assert tau(0) == 0.04 and tau(49) == tau(50) == tau(199) == 0.07 and tau(48) < 0.07
    assert tau(10) == pytest.approx(0.04 + 0.03 * 10 / 49)
    within = [schedules.teacher_temperature(70 + k, run, first=0.04, last=0.07, warm_epochs=50) for k in range(7)]
    assert len(set(within)) == 1
    assert tau(0, warm=0) == 0.07 and (tau(0, warm=1), tau(1, warm=1)) == (0.04, 0.07)


def test_weight_decay_follows_half_a_cosine() -> None:
    def decay(step: int) -> float:
        return schedules.half_cosine(step / 100, 0.04, 0.4)

    assert decay(0) == 0.04 and decay(100) == 0.4 and decay(50) == pytest.approx(0.22)


@pytest.mark.parametrize(("epochs", "steps"), [(0.2, 6), (0.25, 6), (0.5, 5), (0.5, 1251), (1.3, 7), (3, 10)])
def test_a_warm_up_of_a_fraction_of_an_epoch_ends_at_the_peak(epochs: float, steps: int) -> None:
    run = RunLength(10 * steps, steps)
    rates = [learning_rate(step, run, peak=2.0, warmup_epochs=epochs, warmup_lr=0.25) for step in range(10 * steps)]
    last = math.ceil(epochs * steps) - 1
    assert max(rates) == rates[last] == 2.0
    if last:
        assert rates[: last + 1] == pytest.approx([0.25 + 1.75 * step / last for step in range(last + 1)])
