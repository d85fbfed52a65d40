"""ViewLoader and the native engine: the same views however they are made, and nothing left behind."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.pipelines import BetonReader, FastSSLError, JpegError, ViewLoader, ViewSpec
from fastssl.pipelines.engines.base import checked_device

GLOBAL = ViewSpec(size=32, count=2, area=(0.3, 1.0))
LOCAL = ViewSpec(size=16, count=3, area=(0.05, 0.3), solarise=0.3)


def batches(path: Path, **options: object) -> list:
    with ViewLoader(path, views=[GLOBAL, LOCAL], **{"batch_size": 8, "seed": 3, **options}) as loader:
        return [(b.index.numpy().copy(), [v.clone() for v in b.views], b.label.numpy().copy()) for b in loader.epoch(1)]


def by_sample(made: list) -> dict[int, list[np.ndarray]]:
    """sample id -> all its views."""
    found = {}
    for index, views, _ in made:
        for position, sample in enumerate(index):
            found[int(sample)] = [v.view(-1, len(index), *v.shape[1:])[:, position].numpy() for v in views]
    return found


def test_shapes_layout_and_labels(beton: Path) -> None:
    with BetonReader(beton) as reader:
        labels = reader.labels
        made = batches(beton)
        assert len(made) == len(reader) // 8
        for index, (large, small), label in made:
            assert large.shape == (16, 3, 32, 32) and small.shape == (24, 3, 16, 16)
            assert large.is_contiguous(memory_format=torch.channels_last) and small.is_contiguous(
                memory_format=torch.channels_last
            )
            assert large.dtype == torch.float32 and torch.isfinite(large).all()
            np.testing.assert_array_equal(label, labels[index])
        seen = np.concatenate([index for index, _, _ in made])
        assert len(set(seen.tolist())) == len(seen)


def test_views_do_not_depend_on_batch_size_workers_or_rank(beton: Path) -> None:
    reference = by_sample(batches(beton, batch_size=12, workers=1))
    others = [
        batches(beton, batch_size=4, workers=3),
        *([b for b in batches(beton, batch_size=6, rank=rank, world=2)] for rank in range(2)),
    ]
    for made in others:
        for sample, views in by_sample(made).items():
            for mine, theirs in zip(views, reference[sample]):
                # Not bit for bit: batched reductions (mean luminance) may be summed in another order.
                np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_ranks_share_the_global_batch(beton: Path) -> None:
    whole = [index for index, _, _ in batches(beton, batch_size=12)]
    parts = [[index for index, _, _ in batches(beton, batch_size=6, rank=rank, world=2)] for rank in range(2)]
    for step, index in enumerate(whole):
        np.testing.assert_array_equal(index, np.concatenate([part[step] for part in parts]))


def test_device_crops_equal_host_crops(beton: Path) -> None:
    host, device = by_sample(batches(beton, crops="host")), by_sample(batches(beton, crops="device"))
    assert host.keys() == device.keys()
    for sample in host:
        for mine, theirs in zip(host[sample], device[sample]):
            # Views are normalised by about 0.225: one grey level is 0.0174. The crops round differently by at most one
            # level, which saturation and contrast can stretch a little.
            assert np.abs(mine - theirs).mean() < 0.0174 / 2


def test_epochs_differ_and_repeat(beton: Path) -> None:
    with ViewLoader(beton, views=[GLOBAL], batch_size=8, seed=3) as loader:
        first = next(iter(loader.epoch(0)))
        again = next(iter(loader.epoch(0)))
        second = next(iter(loader.epoch(1)))
    assert torch.equal(first.index, again.index) and torch.equal(first.views[0], again.views[0])
    assert not torch.equal(first.index, second.index)


def test_view_epochs_are_gone_round_each_in_an_order_of_its_own(beton: Path) -> None:
    def epoch(number: int, **options: object) -> tuple[list[int], dict[int, torch.Tensor]]:
        with ViewLoader(beton, views=[GLOBAL], batch_size=8, seed=3, **options) as loader:
            made = [(b.index.tolist(), b.views[0].clone().unflatten(0, (2, 8))) for b in loader.epoch(number)]
        return [i for ids, _ in made for i in ids], {i: v[:, k] for ids, v in made for k, i in enumerate(ids)}

    (order, views), (_, first) = epoch(5, view_epochs=2), epoch(1)
    assert order == epoch(5)[0] != epoch(1)[0]
    assert len(views) == 48 and all(torch.equal(views[sample], first[sample]) for sample in views)


def test_start_step_goes_on_where_a_run_stopped(beton: Path) -> None:
    with ViewLoader(beton, views=[GLOBAL], batch_size=8, seed=3) as loader:
        whole = [b.index.clone() for b in loader.epoch(2)]
        rest = [b.index.clone() for b in loader.epoch(2, start_step=2)]
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest))


@pytest.mark.parametrize("crops", ["host", "device"])
def test_batches_that_are_kept_are_not_overwritten(beton: Path, crops: str) -> None:
    with ViewLoader(beton, views=[GLOBAL], batch_size=4, seed=3, crops=crops) as loader:
        kept, copies = [], []
        for batch in loader.epoch(0):
            kept.append(batch.views[0])
            copies.append(batch.views[0].clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies))


def test_unshuffled_keeps_the_last_partial_batch(beton: Path) -> None:
    with ViewLoader(beton, views=[ViewSpec.evaluation(32)], batch_size=20, shuffle=False, drop_last=False) as loader:
        index = torch.cat([b.index for b in loader.epoch(0)])
        assert len(loader) == 3
    assert index.tolist() == list(range(48))


def test_indices_restrict_the_loader(beton: Path) -> None:
    chosen = np.array([5, 7, 11, 40])
    with ViewLoader(beton, views=[GLOBAL], batch_size=2, indices=chosen) as loader:
        seen = torch.cat([b.index for b in loader.epoch(0)])
    assert sorted(seen.tolist()) == chosen.tolist()


def test_window_takes_the_files_of_a_set_one_group_after_the_other(beton: Path) -> None:
    with BetonReader(beton) as reader:
        reader.starts = np.array([0, 16, 32, 48])
        with ViewLoader(reader, views=[GLOBAL], batch_size=8, window=1) as loader:
            files = torch.stack([b.index for b in loader.epoch(0)]) // 16
            assert files[::2].equal(files[1::2]) and (files == files[:, :1]).all()
            assert sorted(files[::2, 0].tolist()) == [0, 1, 2]
        with pytest.raises(FastSSLError, match="window=1 shuffles a set's files"):
            ViewLoader(reader, views=[GLOBAL], batch_size=8, window=1, shuffle=False)
    with ViewLoader(beton, views=[GLOBAL], batch_size=8) as loader, ViewLoader(beton, [GLOBAL], 8, window=1) as other:
        assert np.array_equal(loader.request(1, 2).index, other.request(1, 2).index), "one file is one window"


def test_samples_that_stand_in_for_others_leave_the_batch_of_all_processes_as_it_is(beton: Path) -> None:
    with ViewLoader(beton, views=[GLOBAL], batch_size=8, rank=1, world=2) as loader:
        request = loader.request(0, 0)
        sample = int(request.index[3])
        request.index[3] = request.index[4]
        assert request.draw is not None and request.draw(8 + 3).index.tolist() == [sample]


def threads() -> set[str]:
    """The loader's; those of depth-wise gradients stay for the next step."""
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name.startswith("fastssl") and not name.startswith("fastssl-depthwise")}


def test_one_view_group_that_is_no_list_is_refused(beton: Path) -> None:
    with pytest.raises(FastSSLError, match="views is a list of ViewSpec"):
        ViewLoader(beton, ViewSpec(size=16), 4)


@pytest.mark.parametrize("crops", ["host", "device"])
def test_early_exit_leaves_no_thread_and_no_buffer(beton: Path, crops: str) -> None:
    assert not threads()
    with ViewLoader(beton, views=[GLOBAL, LOCAL], batch_size=4, crops=crops) as loader:
        for _ in loader.epoch(0):
            assert threads()
            break
        slots = [id(slot) for slot in loader.engine._slots]
    assert slots and not loader.engine._slots
    del loader
    gc.collect()
    assert not threads()


def test_error_in_the_consumer_leaves_no_thread(beton: Path) -> None:
    with pytest.raises(ZeroDivisionError), ViewLoader(beton, views=[GLOBAL], batch_size=4) as loader:
        for _ in loader.epoch(0):
            1 / 0  # noqa: B018
    assert not threads()


def test_thread_count_of_torch_is_left_alone(beton: Path) -> None:
    before = torch.get_num_threads()
    batches(beton, workers=3)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("crops", ["host", "device"])
def test_a_damaged_sample_fails_by_name(damaged: tuple[Path, int], crops: str) -> None:
    path, sample = damaged
    with pytest.raises(JpegError, match=rf"\b{sample}\b"):
        batches(path, crops=crops, batch_size=24)
    assert not threads()


@pytest.mark.parametrize("crops", ["host", "device"])
def test_a_damaged_sample_is_skipped_and_counted(damaged: tuple[Path, int], crops: str) -> None:
    path, sample = damaged
    with ViewLoader(path, views=[GLOBAL], batch_size=24, seed=3, crops=crops, on_bad="skip") as loader:
        seen = [(b.index.tolist(), b.views[0].clone()) for b in loader.epoch(0)]
        assert loader.stats.skipped == [sample]
    assert all(sample not in index for index, _ in seen)
    for index, views in seen:
        for number in {n for n in index if index.count(n) > 1}:
            first, second = [p for p, n in enumerate(index) if n == number]
            assert torch.equal(views[first], views[second])  # the donor's picture, not stale memory
    assert sum(len(index) - len(set(index)) for index, _ in seen) == 1


def test_wrong_options_are_named(beton: Path) -> None:
    with pytest.raises(FastSSLError, match="lower the batch size"):
        ViewLoader(beton, views=[GLOBAL], batch_size=1000)
    with pytest.raises(FastSSLError, match="crops='gpu' is not one of auto, host, device"):
        ViewLoader(beton, views=[GLOBAL], batch_size=4, crops="gpu")
    for wrong in (0, 2.5, "8", True, None):
        with pytest.raises(FastSSLError, match=r"batch_size must be a whole number of at least 1, got"):
            ViewLoader(beton, views=[GLOBAL], batch_size=wrong)
    with pytest.raises(FastSSLError, match=r"workers must be a whole number of at least 1, got 1\.5"):
        ViewLoader(beton, views=[GLOBAL], batch_size=4, workers=1.5)
    with pytest.raises(FastSSLError, match="device='gpu' is not a device of torch"):
        ViewLoader(beton, views=[GLOBAL], batch_size=4, device="gpu")
    with pytest.raises(FastSSLError, match="is not a floating-point dtype"):
        ViewLoader(beton, views=[GLOBAL], batch_size=4, dtype=torch.uint8)
    ViewLoader(beton, views=[GLOBAL], batch_size=np.int64(4)).close()  # NumPy's whole numbers are whole numbers
    with ViewLoader(beton, views=[GLOBAL], batch_size=4) as loader:
        pass
    with pytest.raises(FastSSLError, match="closed"):
        next(iter(loader.epoch(0)))


def test_a_missing_gpu_is_said_at_once(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FastSSLError, match="torch sees no NVIDIA GPU here"):
        ViewLoader(beton, views=[GLOBAL], batch_size=4, device="cuda")


def test_cuda_is_the_gpu_that_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [checked_device(name) for name in ("cuda", "cuda:1", "cpu")] == [
        torch.device(name) for name in ("cuda:3", "cuda:1", "cpu")
    ]


def test_host_work_is_counted(beton: Path) -> None:
    with ViewLoader(beton, views=[GLOBAL], batch_size=8) as loader:
        total = sum(len(b.index) for b in loader.epoch(0))
        assert loader.stats.samples == total
        assert loader.stats.host_cpu_s > 0


@pytest.mark.gpu
def test_cuda_views_equal_cpu_views(beton: Path) -> None:
    cpu, cuda = (
        by_sample(batches(beton)),
        by_sample([(i, [v.cpu() for v in views], n) for i, views, n in batches(beton, device="cuda")]),
    )
    for sample in cpu:
        for mine, theirs in zip(cpu[sample], cuda[sample]):
            assert np.abs(mine - theirs).mean() < 0.0174
