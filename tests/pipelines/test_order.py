from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest

from fastssl.pipelines.plan import order, permutation
from fastssl.pipelines.plan.order import (
    SORTED,
    batch_indices,
    batch_permutation,
    epoch_order,
    last_batch,
    steps_per_epoch,
)
from fastssl.pipelines.plan.philox import Stream, keyed_words


@pytest.mark.parametrize("n", [0, 1, 2, 3, 1000, 20_001])
def test_epoch_order_is_a_permutation(n: int) -> None:
    whole = epoch_order(n, 5, 0)
    assert whole.dtype == np.int64 and np.array_equal(np.sort(whole), np.arange(n))


def test_epoch_order_equals_sorting_one_key_at_a_time() -> None:
    keys = []
    for sample in range(101):
        words = [int(word) for word in keyed_words(9, Stream.ORDER, 4, sample // 2)]
        high, low = words[2:] if sample % 2 else words[:2]
        keys.append(((high << 32) | low, sample))
    assert epoch_order(101, 9, 4).tolist() == [sample for _, sample in sorted(keys)]


def test_epoch_order_is_pure_and_read_only() -> None:
    first = epoch_order(500, 1, 2).copy()
    epoch_order.cache_clear()
    np.random.seed(0)
    assert np.array_equal(epoch_order(500, 1, 2), first)
    assert not np.array_equal(epoch_order(500, 1, 3), first)
    assert not np.array_equal(epoch_order(500, 2, 2), first)
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(500, 1, 2)[0] = 0


def test_order_is_uniform() -> None:
    # Where sample 0 lands, over many epochs: chi-square with 9 degrees of freedom, 33.7 is 1 in 10,000.
    places = [int(np.flatnonzero(epoch_order(10, 3, epoch) == 0)[0]) for epoch in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 33.7


@pytest.mark.parametrize("world", [1, 2, 3, 6, 12])
def test_the_global_batch_does_not_depend_on_the_world_size(world: int) -> None:
    n, total = 1003, 24
    assert steps_per_epoch(n, total // world, world) == n // total
    for step in (0, 1, n // total - 1):
        parts = [batch_indices(n, 7, 1, step, total // world, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), epoch_order(n, 7, 1)[step * total : (step + 1) * total])


def test_batches_of_an_epoch_are_disjoint() -> None:
    seen = np.concatenate([batch_indices(100, 0, 0, step, 8) for step in range(steps_per_epoch(100, 8))])
    assert seen.size == 96 and np.unique(seen).size == 96


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, 0, 0, 2, 5), "outside the epoch"),
        ((10, 0, 0, -1, 5), "outside"),
        ((10, 0, 0, 0, 5, 2, 2), "rank"),
        ((10, 0, 0, 0, 0), "batch_size"),
        ((4, 0, 0, 0, 5), "4 samples make 0 steps"),
    ],
)
def test_wrong_steps_and_ranks_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_indices(*arguments)


@pytest.mark.parametrize(("left", "world", "expected"), [(5, 1, 5), (5, 2, 6), (4, 2, 4), (1, 1, 2), (1, 4, 4)])
def test_a_last_batch_is_filled_up_with_the_first_of_the_epoch(left: int, world: int, expected: int) -> None:
    n = 3 * 8 * world + left
    whole, batch = epoch_order(n, 3, 1), last_batch(n, 3, 1, 8, world)
    assert np.array_equal(batch, np.concatenate([whole[-left:], whole[: expected - left]]))
    assert steps_per_epoch(n, 8, world) == 3 and steps_per_epoch(n, 8, world, drop_last=False) == 4


def test_batch_permutation() -> None:
    permutations = {batch_permutation(64, 0, epoch, step).tobytes() for epoch in range(3) for step in range(4)}
    assert len(permutations) == 12
    assert np.array_equal(np.sort(batch_permutation(37, 0, 0, 5)), np.arange(37))
    assert np.array_equal(batch_permutation(37, 0, 1, 5), batch_permutation(37, 0, 1, 5))
    assert not np.array_equal(batch_permutation(37, 0, 1, 5), epoch_order(37, 0, 1))
    with pytest.raises(ValueError, match="step"):
        batch_permutation(4, 0, 0, -1)


def test_rows_of_a_batch_stay_in_their_own_part() -> None:
    parts = batch_permutation(48, 0, 0, 5, parts=3).reshape(3, 16)
    for number, rows in enumerate(parts):
        assert np.array_equal(np.sort(rows), np.arange(16 * number, 16 * (number + 1)))
    assert len({tuple(rows % 16) for rows in parts}) == 3, "each part has an order of its own"


def test_what_a_seed_means_never_changes() -> None:
    # Of the code before sets could be larger than a sort: runs that were begun with it go on.
    assert epoch_order(12, 5, 0).tolist() == [10, 0, 8, 11, 1, 6, 4, 9, 7, 3, 2, 5]
    assert epoch_order(12, 2**63 + 9, 70_000).tolist() == [1, 3, 9, 0, 8, 10, 2, 7, 6, 4, 5, 11]
    assert zlib.crc32(epoch_order(100_003, 7, 3).astype("<i8").tobytes()) == 0x73FC846D
    assert batch_indices(100_003, 7, 3, 11, 6, 1, 2).tolist() == [5505, 32402, 10690, 8192, 43868, 73959]
    last = [74, 24, 973, 545, 217, 324, 528, 834, 221, 579, 121, 155, 398, 263, 37, 1002, 701, 44, 458, 0, 232]
    assert last_batch(1003, 7, 3, 8, 3).tolist() == last
    assert SORTED == 1 << 24
    # Of the code that first could be asked for positions alone.
    many = [622051213, 319284382, 349185523, 725823433, 155457087, 592478677]
    assert batch_indices(10**9, 7, 3, 11, 6, 1, 2).tolist() == many
    assert batch_indices(SORTED + 1, 2**63 + 9, 70_000, 0, 4).tolist() == [4047491, 4993104, 4528932, 7704307]


def test_above_the_stated_size_positions_are_asked_for_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_one = epoch_order(1003, 7, 1).copy()
    epoch_order.cache_clear()
    monkeypatch.setattr(order, "SORTED", 1002)
    whole = epoch_order(1003, 7, 1)
    assert np.array_equal(np.sort(whole), np.arange(1003)) and not np.array_equal(whole, sorted_one)
    epoch_order.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(order, "epoch_order", None)
        assert np.array_equal(batch_indices(1003, 7, 1, 5, 8, 2, 3), whole[5 * 24 + 16 : 6 * 24])
        assert np.array_equal(last_batch(1003, 7, 1, 8, 3), np.concatenate([whole[984:], whole[:2]]))
        keys = permutation.random_keys(7, Stream.ORDER, 1, view=1)
        assert np.array_equal(whole, permutation.permuted(np.arange(1003), 1003, keys))
    epoch_order.cache_clear()


def test_a_billion_samples_take_no_memory() -> None:
    tracemalloc.start()
    parts = [batch_indices(10**9, 7, 1, step, 64, 500, 512) for step in range(3)]
    assert len(np.unique(np.concatenate(parts))) == 3 * 64 and max(map(np.max, parts)) > 10**8
    assert len(last_batch(10**9 + 1, 0, 0, 64, 512)) == (10**9 + 1) % (64 * 512) + 511
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
