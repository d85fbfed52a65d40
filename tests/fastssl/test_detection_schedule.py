"""How long, and at which rate."""

from __future__ import annotations

import pytest

from fastssl.evaluate.detection.annotations import DetectionError
from fastssl.evaluate.detection.train import TrainingConfig, iterations_of


def test_coco_gets_the_published_number_of_iterations() -> None:
    assert iterations_of("1x", 117_266, 16) == 90_000 and iterations_of("2x", 117_266, 16) == 180_000
    assert iterations_of("1x", 117_266, 64) == 22_500
    assert iterations_of("1x", 5_011, 16) == round(12.2798 * 5_011 / 16)  # VOC 2007: as many passes
    assert iterations_of("1x", 1, 1000) == 1


def test_rates_of_the_published_schedule() -> None:
    rates = TrainingConfig(90_000, lr=0.02)
    assert rates.rate(0) == pytest.approx(0.02 / 1000) and rates.rate(500) == pytest.approx(0.02 * (0.001 + 0.999 / 2))
    for iteration, rate in (
        (1000, 0.02),
        (59_999, 0.02),
        (60_000, 0.002),
        (79_999, 0.002),
        (80_000, 0.0002),
        (89_999, 0.0002),
    ):
        assert rates.rate(iteration) == pytest.approx(rate), iteration
    double = TrainingConfig(180_000, lr=0.02)
    assert [double.rate(iteration) for iteration in (119_999, 120_000, 160_000)] == pytest.approx([0.02, 0.002, 0.0002])


def test_drops_and_warm_up_can_be_set() -> None:
    """SSLight's schedule for Pascal VOC."""
    voc = TrainingConfig(24_000, lr=0.02, drops=(18_000, 22_000), warmup=100)
    assert voc.warmup_and_drops() == (100, (18_000, 22_000))
    expected = {0: 0.00002, 50: 0.01001, 99: 0.0198002, 100: 0.02, 17_999: 0.02, 18_000: 0.002, 21_999: 0.002}
    for iteration, rate in {**expected, 22_000: 0.0002, 23_999: 0.0002}.items():
        assert voc.rate(iteration) == pytest.approx(rate), iteration
    assert TrainingConfig(100, drops=(10, 20, 30), warmup=0, lr=1.0).rate(99) == pytest.approx(0.001)
    # Not set, they follow the length, and the first iteration behind two thirds is the first of the lower rate.
    for wrong in ({"drops": (0, 50)}, {"drops": (-5,)}, {"drops": (50, 100)}, {"drops": (60, 50)}, {"warmup": 101}):
        with pytest.raises(DetectionError, match=r"--(drops|warmup)"):
            TrainingConfig(100, **wrong)
    assert TrainingConfig(100).warmup_and_drops() == (10, (67, 89))
    assert TrainingConfig(90_000).warmup_and_drops() == (1000, (60_000, 80_000))


def test_short_runs_warm_up_for_a_tenth() -> None:
    rates = TrainingConfig(50, lr=1.0)
    assert rates.rate(0) == pytest.approx(0.001) and rates.rate(4) < 1 and rates.rate(5) == 1
    assert TrainingConfig(1, lr=1.0).rate(0) == 1
    assert TrainingConfig(50, lr=1.0, warmup=0).rate(0) == 1 and TrainingConfig(50, lr=1.0, warmup=20).rate(19) < 1
