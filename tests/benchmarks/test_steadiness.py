"""The verdicts on made-up series: what is steady passes, what leaks or slows down fails, with its numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastssl.benchmarks.studies.steadiness import (
    MB,
    Window,
    after_warmup,
    blocks,
    count,
    creep,
    memory,
    memory_limit,
    rate,
    slopes,
    thirds,
    windows,
)
from fastssl.benchmarks.studies.vitals import Sample


def series(
    seconds: int,
    own_mb=lambda t: 600.0,
    threads=lambda t: 3,
    descriptors=lambda t: 5,
    step=lambda t: 2 * t,
    waiting=lambda t: 0.0,
):
    """One sample a second, probes from the start."""
    return [
        Sample(
            t,
            int(own_mb(t) * MB),
            int(own_mb(t) * MB),
            threads(t),
            descriptors(t),
            float(t),
            waiting(t),
            3,
            step(t),
            probes=9,
        )
        for t in range(seconds)
    ]


def slow_creep(x, y):
    """The same by loops over all pairs, on all points."""
    found = sorted((b - a) / (t - s) for (s, a), (t, b) in itertools.combinations(zip(x, y), 2))
    return float(np.quantile(found, 0.25)), float(np.median(found))


def test_slopes_are_those_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.uniform(0, 100, 20)), rng.normal(size=20)
    assert creep(x, y) == pytest.approx(slow_creep(x, y))  # 20 points are 20 blocks of one
    assert len(slopes(x, y)) == 190
    assert slopes([0, 1, 2], [0, 3, 6]).tolist() == [3, 3, 3]


def test_a_block_is_the_median_of_its_part() -> None:
    x, y = blocks(range(6), [1, 100, 1, 2, 2, -50], count=2)
    assert x == [1, 4] and y == [1, 2]


def test_thirds_are_consecutive() -> None:
    assert [list(part) for part in thirds(range(7))] == [[0, 1], [2, 3, 4], [5, 6]]


def test_the_warm_up_ends_behind_a_third_and_two_probes() -> None:
    samples = [Sample(t, 0, 0, 1, 1, 0, 0, 0, None, probes=t // 20) for t in range(91)]
    assert after_warmup(samples)[0].seconds == 40
    assert after_warmup([Sample(t, 0, 0, 1, 1, 0, 0, 0, None, probes=9) for t in range(91)])[0].seconds == 30
    assert after_warmup([]) == []


def staircase(t: float, rng_steps) -> float:
    """A heap as it was measured: flat, and now and then a step."""
    return 600 + sum(size for at, size in rng_steps if t >= at)


@pytest.mark.parametrize("steps", [[], [(75, 2.5)], [(60, 0.7), (100, 2.5)], [(45, 0.7), (70, 0.5), (110, 2.5)]])
def test_two_minutes_tell_a_leak_of_a_megabyte_a_minute_from_steps_of_the_heap(steps: list) -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.05, 120)
    clean = memory(series(120, lambda t: staircase(t, steps) + noise[t]))
    leaking = memory(series(120, lambda t: staircase(t, steps) + noise[t] + t / 60))
    assert clean.passed and clean.figures["mb_per_hour"] < 20, clean.words
    assert not leaking.passed and leaking.figures["mb_per_hour"] > 40, leaking.words
    assert "MB an hour (limit 30" in leaking.words


def test_the_longer_it_was_watched_the_less_may_creep() -> None:
    assert [memory_limit(seconds) for seconds in (10, 600, 900, 1800, 36000)] == [30, 30, 20, 10, 10]
    slow = 20 / 3600  # 20 MB an hour
    assert (
        memory(series(120, lambda t: 600 + slow * t)).passed
        and not memory(series(3600, lambda t: 600 + slow * t)).passed
    )


@pytest.mark.parametrize("every", [5, 10])
def test_a_leak_at_every_epoch_is_a_leak(every: int) -> None:
    """One MB a minute, in pieces."""
    assert not memory(series(120, lambda t: 600 + (t // every) * every / 60)).passed


def test_what_grows_in_a_few_large_pieces_is_seen_by_its_size() -> None:
    found = memory(series(3600, lambda t: 600 + 30 * (t > 2400)))
    assert found.figures["mb_per_hour"] == 0 and not found.passed


def test_peaks_and_what_shrinks_are_no_leak() -> None:
    assert memory(series(300, lambda t: 600 + 200 * (t % 30 == 0))).passed
    assert memory(series(300, lambda t: 600 - t / 10)).passed


def test_a_leak_that_hides_in_saw_teeth_is_seen_in_the_long_run() -> None:
    assert memory(series(3600, lambda t: 600 + 5 * (t % 20) / 20)).passed
    assert not memory(series(3600, lambda t: 600 + 5 * (t % 20) / 20 + t / 60)).passed


def test_too_little_is_not_steady() -> None:
    assert not memory(series(5)).passed and "tell nothing" in memory(series(5)).words
    assert not count(series(5), "threads", "threads").passed
    assert not any(verdict.passed for verdict in rate([Window(1, 1, 0)] * 5))


def test_counts_are_judged_by_their_floor() -> None:
    assert count(series(300, threads=lambda t: 3 + 4 * (t % 7 == 0)), "threads", "threads").passed
    assert count(series(300, threads=lambda t: 5 - (t > 250)), "threads", "threads").passed
    one_more = count(series(300, threads=lambda t: 3 + (t > 190) + 4 * (t % 7 == 0)), "threads", "threads")
    assert not one_more.passed and one_more.figures == {"first": 3, "last": 4, "most": 8}
    assert not count(series(300, descriptors=lambda t: 5 + t // 60), "open files", "descriptors").passed


def rows(samples, step_s=lambda step: 0.5):
    """Lines of metrics whose step ``k`` took ``step_s(k)`` seconds."""
    seconds, found = 0.0, []
    for step in range(1, samples[-1].step + 1):
        seconds += step_s(step)
        found.append({"kind": "step", "step": step, "seconds": seconds})
    return found


def test_windows_hold_the_rate_by_hand() -> None:
    samples = series(120)
    found = windows(samples, rows(samples), batch_size=8, number=8)
    assert 6 <= len(found) <= 8 and all(window.pair_per_s == pytest.approx(16) for window in found)
    assert windows(samples, [], 8) == [] and windows([], [], 8) == []


def test_time_without_a_core_is_taken_off() -> None:
    samples = series(120, waiting=lambda t: max(0.0, t - 80) / 2)  # in the last third half of the time went to others
    found = windows(samples, rows(samples, lambda step: 0.5 if step <= 160 else 1.0), batch_size=8)
    steady, worst = rate(found)
    assert steady.passed and worst.passed, (steady.words, worst.words)
    assert steady.figures["clock_last"] == pytest.approx(8) and steady.figures["last"] == pytest.approx(16, rel=0.01)
    unshared = series(120)
    assert not rate(windows(unshared, rows(unshared, lambda step: 0.5 if step <= 160 else 1.0), batch_size=8))[0].passed


def test_slowing_down_and_a_stall_fail() -> None:
    samples = series(300)
    steady, worst = rate(windows(samples, rows(samples), 8))
    assert steady.passed and worst.passed and steady.figures["last_of_first"] == pytest.approx(1)
    slower, _ = rate(windows(samples, rows(samples, lambda step: 0.5 + step / 1500), 8))
    assert not slower.passed and slower.figures["last_of_first"] < 0.85
    steady, stall = rate(windows(samples, rows(samples, lambda step: 3.0 if 400 < step < 420 else 0.5), 8))
    assert steady.passed and not stall.passed and stall.figures["worst_of_median"] < 0.5


def test_a_run_that_stands_still_has_no_windows() -> None:
    assert windows(series(300, step=lambda t: 7), [{"kind": "step", "step": 7, "seconds": 1.0}], 8) == []
