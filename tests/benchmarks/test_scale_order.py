"""Orders without memory, against twins on Python's integers and lists."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fastssl.benchmarks import scale_order
from fastssl.benchmarks.scale_order import ROUNDS, Windows, feistel_order, neighbours, windowed_order
from fastssl.pipelines.errors import FastSSLError

WORD = 2**64 - 1


def twin(position: int, n: int, seed: int, epoch: int, tweak: int) -> int:
    """One position, on integers of any length."""
    bits = max(2, (n - 1).bit_length())
    low, high = bits // 2, bits - bits // 2
    keys = [int(key) for key in scale_order._keys(seed, epoch, tweak, ROUNDS)]

    def mix(value: int, key: int) -> int:
        value = (value + key) & WORD
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
        return value ^ (value >> 31)

    while True:
        left, right = divmod(position, 2**low)
        for number, key in enumerate(keys):
            if number % 2:
                right ^= mix(left, key) % 2**low
            else:
                left ^= mix(right, key) % 2**high
        position = left * 2**low + right
        if position < n:
            return position


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_every_sample_comes_once_and_where_the_twin_says(n: int) -> None:
    order = feistel_order(np.arange(n), n, seed=7, epoch=2)
    assert sorted(order.tolist()) == list(range(n))
    for position in range(0, n, max(1, n // 50)):
        assert order[position] == twin(position, n, 7, 2, 0)


def test_a_billion_samples_can_be_asked_for_anywhere() -> None:
    places = np.array([[0, 1], [999_999_999, 123_456_789]])
    found = feistel_order(places, 10**9, seed=2**64 - 1, epoch=3, tweak=2**30 + 5)
    assert found.shape == (2, 2) and found.dtype == np.int64
    assert found.ravel().tolist() == [twin(int(place), 10**9, 2**64 - 1, 3, 2**30 + 5) for place in places.ravel()]


def test_seed_epoch_and_tweak_all_change_the_order() -> None:
    orders = [feistel_order(np.arange(500), 500, *key) for key in ((0, 0), (1, 0), (0, 1), (2**32, 0))]
    orders += [feistel_order(np.arange(500), 500, 0, 0, tweak=tweak) for tweak in (1, 2, 2**24)]
    for number, order in enumerate(orders):
        for other in orders[:number]:
            assert (order == other).mean() < 0.05


def test_positions_look_as_if_drawn_evenly() -> None:
    """First place, and the way from one place to the next, over 4,000 epochs of 37 samples: chi-squared stays near its degrees of freedom."""
    orders = np.array([feistel_order(np.arange(37), 37, seed=1, epoch=epoch) for epoch in range(4000)])
    for values in (orders[:, 0], orders[:, 20], (orders[:, 1] - orders[:, 0]) % 37):
        kinds = 36 if 0 not in Counter(values.tolist()) else 37
        counts = np.array([count for _, count in sorted(Counter(values.tolist()).items())])
        expected = 4000 / kinds
        assert len(counts) == kinds and ((counts - expected) ** 2 / expected).sum() < 36 + 5 * np.sqrt(72)


def test_few_rounds_would_be_seen() -> None:
    """The number space is a square of 256 rows. With two rounds the rows of samples of one column still differ as the rows of their positions do."""
    place = np.arange(2**16 - 256)

    def kept(rounds: int) -> float:
        order = feistel_order(np.arange(2**16), 2**16, 0, 0, rounds=rounds) >> 8
        return float((order[place] ^ order[place + 256] == (place >> 8) ^ ((place + 256) >> 8)).mean())

    assert kept(2) == 1.0 and kept(ROUNDS) == pytest.approx(1 / 256, rel=0.3)


@pytest.mark.parametrize(("position", "n"), [(5, 5), (0, 0), (0, 2**62 + 1)])
def test_nonsense_is_refused(position: int, n: int) -> None:
    with pytest.raises(FastSSLError):
        feistel_order(position, n, 0, 0)


def windows_twin(n: int, seed: int, epoch: int, windows: Windows) -> list[int]:
    """The whole order by lists: chunks of the turned file, dealt into windows, each window's samples shuffled."""
    start = twin(0, n, seed, epoch, 1)
    turned = [(start + number) % n for number in range(n)]
    chunks = [turned[first : first + windows.chunk] for first in range(0, n - windows.chunk + 1, windows.chunk)]
    dealt = [chunks[twin(place, len(chunks), seed, epoch, 0)] for place in range(len(chunks))]
    order = []
    for number in range(len(dealt) // windows.chunks):
        inside = [sample for chunk in dealt[number * windows.chunks : (number + 1) * windows.chunks] for sample in chunk]
        order += [inside[twin(place, len(inside), seed, epoch, 2 + number)] for place in range(len(inside))]
    return order


@pytest.mark.parametrize(("n", "chunk", "chunks"), [(200, 7, 4), (64, 8, 8), (1000, 16, 3)])
def test_windows_are_those_of_the_lists(n: int, chunk: int, chunks: int) -> None:
    windows = Windows(chunk, chunks)
    order = windowed_order(np.arange(windows.length(n)), n, 4, 9, windows)
    assert order.tolist() == windows_twin(n, 4, 9, windows)
    assert len(set(order.tolist())) == windows.length(n) > n - windows.samples
    backwards = windowed_order(np.arange(windows.length(n))[::-1], n, 4, 9, windows)
    assert (backwards[::-1] == order).all()


def test_what_is_left_out_changes_with_the_epoch() -> None:
    windows, seen = Windows(8, 4), set()
    for epoch in range(40):
        seen |= set(windowed_order(np.arange(windows.length(50)), 50, 0, epoch, windows).tolist())
    assert windows.length(50) == 32 and len(seen) == 50


def test_neighbours_are_counted() -> None:
    windows, batch = Windows(16, 8), 32
    order = windowed_order(np.arange(windows.length(100_000)), 100_000, 0, 0, windows)
    start = int(feistel_order(0, 100_000, 0, 0, tweak=1))
    chunk = ((order - start) % 100_000 // 16).reshape(-1, batch)
    found = (chunk[:, :, None] == chunk[:, None, :]).sum() / chunk.size - 1
    assert found == pytest.approx(neighbours(batch, windows), rel=0.02)


def test_windows_need_samples() -> None:
    with pytest.raises(FastSSLError, match="fewer than a window"):
        windowed_order(0, 10, 0, 0, Windows(4, 4))
    with pytest.raises(FastSSLError, match="outside"):
        windowed_order(32, 40, 0, 0, Windows(4, 8))
