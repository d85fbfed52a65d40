from __future__ import annotations

import math

import numpy as np
import pytest

from fastssl.pipelines.plan.permutation import ROUNDS, permuted, random_keys
from fastssl.pipelines.plan.philox import Stream, keyed_words

SIZES = [1, 2, 3, 4, 5, 37, 1000, 1023, 1024, 1025, 65_537]
WORD = (1 << 64) - 1


def keys_of(seed: int, epoch: int = 0) -> np.ndarray:
    return random_keys(seed, Stream.ORDER, epoch, view=1)


def round_value(digit: int, key: int, base: int) -> int:
    """SplitMix64 of digit + key; of its upper 32 bits a number below the base."""
    mixed = (digit + key) & WORD
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & WORD
    return (((mixed ^ (mixed >> 31)) >> 32) * base) >> 32


def base_of(n: int) -> int:
    return next(base for base in range(math.isqrt(n), n + 2) if base and base * base >= n)


def slow(place: int, n: int, keys: list[int]) -> int:
    base = base_of(n)
    while True:
        left, right = divmod(place, base)
        for key in keys:
            left, right = right, (left + round_value(right, key, base)) % base
        place = left * base + right
        if place < n:
            return place


def place_of(number: int, n: int, keys: list[int]) -> int:
    """The inverse of ``slow``."""
    base = base_of(n)
    while True:
        left, right = divmod(number, base)
        for key in reversed(keys):
            left, right = (right - round_value(left, key, base)) % base, left
        number = left * base + right
        if number < n:
            return number


@pytest.mark.parametrize("n", SIZES)
def test_every_number_comes_once(n: int) -> None:
    found = permuted(np.arange(n), n, keys_of(3))
    assert found.dtype == np.int64 and np.array_equal(np.sort(found), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 5, 37, 1025, (1 << 24) + 1, 10**9, (1 << 62) - 3, 1 << 62])
def test_it_equals_its_slow_twin_and_has_an_inverse(n: int) -> None:
    keys = keys_of(2**64 - 1, 9)
    places = np.unique(np.append(np.random.default_rng(n).integers(0, n, 200), [0, n - 1]))
    found, plain = permuted(places, n, keys).tolist(), keys.tolist()
    assert found == [slow(place, n, plain) for place in places.tolist()]
    assert places.tolist() == [place_of(number, n, plain) for number in found]


def test_keys_are_words_of_their_own() -> None:
    words = keyed_words(5, Stream.ORDER, 2, 8, 3, [0, 1, 2, 3]).T.reshape(-1, 2).astype(object)
    assert random_keys(5, Stream.ORDER, 2, 8, 3).tolist() == [(high << 32) | low for high, low in words.tolist()]
    orders = {
        permuted(np.arange(50), 50, random_keys(seed, Stream.ORDER, epoch, item, view)).tobytes()
        for seed in (0, 1, 1 << 40)
        for epoch in (0, 1)
        for item in (0, 1)
        for view in (1, 3)
    }
    assert len(orders) == 24


def deviation(counts: np.ndarray) -> float:
    """Of chi-squared from its mean, in standard deviations, where all counts are expected alike."""
    expected = counts.sum() / counts.size
    free = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free))


def draws(n: int, epochs: int, rounds: int = ROUNDS) -> np.ndarray:
    return np.stack([permuted(np.arange(n), n, keys_of(11, epoch)[:rounds]) for epoch in range(epochs)])


@pytest.mark.parametrize("n", [36, 37, 64])
def test_no_place_prefers_a_number_and_no_number_its_successor(n: int) -> None:
    found = draws(n, 6000)
    for place in (0, 1, n // 2, n - 1):
        assert abs(deviation(np.bincount(found[:, place], minlength=n))) < 5
    for apart in (1, 7):
        steps = (found[:, apart] - found[:, 0]) % n
        assert abs(deviation(np.bincount(steps, minlength=n)[1:])) < 5


def test_what_two_rounds_leave_is_seen() -> None:
    found = draws(37, 6000, rounds=2)
    steps = (found[:, 1] - found[:, 0]) % 37
    assert deviation(np.bincount(steps, minlength=37)[1:]) > 20


def test_neighbours_of_a_large_set_are_spread_evenly() -> None:
    n = 10**9
    found = permuted(np.arange(5 * 10**8, 5 * 10**8 + 100_000), n, keys_of(0))
    assert abs(deviation(np.bincount(found * 1000 // n, minlength=1000))) < 5
    assert abs(deviation(np.bincount(np.diff(found) % n * 1000 // n, minlength=1000))) < 5
    assert abs(deviation(np.bincount(found % 1000, minlength=1000))) < 5


def test_places_outside_are_refused() -> None:
    for places in ([5], [-1]):
        with pytest.raises(ValueError, match=r"0 \.\. 4"):
            permuted(np.array(places), 5, keys_of(0))
    assert len(permuted(np.zeros(0, np.int64), 0, keys_of(0))) == 0
