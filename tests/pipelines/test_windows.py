from __future__ import annotations

import numpy as np
import pytest

from fastssl.pipelines.plan import order
from fastssl.pipelines.plan.order import batch_indices, epoch_order, last_batch, samples_at
from fastssl.pipelines.plan.windows import FileWindows

COUNTS = [5, 300, 1, 77, 77, 1000, 2, 64, 64, 410]
STARTS = np.append(0, np.cumsum(COUNTS))
TOTAL = int(STARTS[-1])


def whole(windows: FileWindows, seed: int = 7, epoch: int = 0) -> np.ndarray:
    return windows.samples_at(np.arange(windows.starts[-1]), seed, epoch)


@pytest.mark.parametrize("window", [1, 3, 4, 9])
def test_an_epoch_is_every_sample_once_a_group_of_files_at_a_time(window: int) -> None:
    windows = FileWindows(STARTS, window)
    samples, groups = whole(windows), windows.files_ahead(0, 7, 0)
    assert samples.dtype == np.int64 and np.array_equal(np.sort(samples), np.arange(TOTAL))
    assert sorted(file for group in groups for file in group) == list(range(10))
    assert [len(group) for group in groups[:-1]] == [window] * (len(groups) - 1)
    position = 0
    for number, files in enumerate(groups):
        ids = np.concatenate([np.arange(STARTS[file], STARTS[file + 1]) for file in files])
        part = samples[position : position + len(ids)]
        assert np.array_equal(np.sort(part), np.sort(ids))
        assert len(ids) < 100 or not np.array_equal(part, ids)
        for place in (position, position + len(ids) - 1):
            assert windows.files_ahead(place, 7, 0) == groups[number:]
        position += len(ids)


def test_any_positions_in_any_order_are_those_of_the_whole() -> None:
    windows = FileWindows(STARTS, 3)
    positions = np.random.default_rng(0).integers(0, TOTAL, 500)
    assert np.array_equal(windows.samples_at(positions, 7, 2), whole(windows, epoch=2)[positions])
    assert len(windows.samples_at(np.zeros(0, np.int64), 7, 2)) == 0


def test_other_epochs_and_seeds_have_other_files_and_orders() -> None:
    windows = FileWindows(STARTS, 3)
    files = {str(windows.files_ahead(0, seed, epoch)) for seed in (0, 1) for epoch in range(5)}
    orders = {whole(windows, seed, epoch).tobytes() for seed in (0, 1) for epoch in range(5)}
    assert len(files) == len(orders) == 10


def test_what_a_seed_means_never_changes() -> None:
    windows = FileWindows(STARTS, 3)
    assert windows.samples_at(np.arange(66, 72), 7, 3).tolist() == [174, 1505, 56, 250, 58, 139]
    assert windows.files_ahead(0, 7, 3) == [[1, 6, 7], [3, 4, 2], [9, 5, 8], [0]]


def test_groups_of_an_epoch_have_orders_of_their_own() -> None:
    same = FileWindows(np.arange(0, 501, 50), 1)
    parts = whole(same).reshape(10, 50) % 50
    assert len({part.tobytes() for part in parts}) == 10


def test_samples_are_shuffled_over_all_files_of_a_group() -> None:
    # Which of the group's two files stands at its first position, over many epochs: half and half.
    windows = FileWindows(np.array([0, 100, 200, 300, 400]), 2)
    firsts = [windows.samples_at(np.array([0]), 1, epoch)[0] // 100 for epoch in range(4000)]
    leading = [windows.files_ahead(0, 1, epoch)[0][0] for epoch in range(4000)]
    counts = np.bincount(firsts, minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 21.1  # 3 degrees of freedom, 1 in 10,000
    assert abs(np.mean(np.equal(firsts, leading)) - 0.5) < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize(("starts", "window"), [([0, 500], 1), ([0, 200, 500], 2), ([0, 200, 500], 9)])
def test_one_window_of_all_files_is_the_order_without_windows(starts: list[int], window: int) -> None:
    found = samples_at(np.arange(500), 500, 7, 1, FileWindows(np.array(starts), window))
    assert np.array_equal(found, epoch_order(500, 7, 1))


def test_batches_are_cut_from_the_windowed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = FileWindows(STARTS, 3)
    samples = whole(windows)
    monkeypatch.setattr(order, "epoch_order", None)
    parts = [batch_indices(TOTAL, 7, 0, 4, 8, rank, 3, windows) for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), samples[4 * 24 : 5 * 24])
    last = last_batch(TOTAL, 7, 0, 24, windows=windows)
    assert np.array_equal(last, samples[TOTAL // 24 * 24 :])


def test_a_billion_samples_in_a_thousand_files() -> None:
    windows = FileWindows(np.arange(0, 10**9 + 1, 10**6), 16)
    samples = windows.samples_at(np.arange(10**9 - 512, 10**9), 0, 3)
    assert np.isin(samples // 10**6, windows.files_ahead(10**9 - 512, 0, 3)[0]).all()
    assert len(windows.files_ahead(10**9 - 512, 0, 3)) == 1 and len(windows.files_ahead(0, 0, 3)) == 63


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 1"):
        FileWindows(STARTS, 0)
    for position in (-1, TOTAL):
        with pytest.raises(ValueError, match=f"beyond {TOTAL} samples"):
            FileWindows(STARTS, 2).samples_at(np.array([position]), 0, 0)
