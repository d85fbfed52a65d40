"""The model of a training loop, and what it advises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastssl.benchmarks.harness.photos import write_photos
from fastssl.benchmarks.harness.timing import Window
from fastssl.benchmarks.suites.train import Loop, Remedy, in_words, more_threads, per_sample, shrunken
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.training.bottleneck import smaller_side

#: A GPU's loop: the step takes 1 ms of a sample and little of the host, a photo 8 ms of one of 16 cores, on 4 threads.
GPU = Loop(step_s=1e-3, step_cpu_s=1e-3, loader_s=2e-3, loader_cpu_s=8e-3, threads=4, cores=16)


def test_the_longest_of_step_loader_and_cores_decides() -> None:
    assert GPU.sample_s == 2e-3  # the loader
    assert replace(GPU, loader_s=0.5e-3).sample_s == 1e-3  # the step
    assert replace(GPU, cores=2).sample_s == pytest.approx(9e-3 / 2)  # the cores


def test_threads_help_until_the_step_is_the_slower_one() -> None:
    threads, remedy = more_threads(GPU)
    assert (threads, remedy.words) == (8, "add 4 decode threads (--workers 8)")
    assert remedy.predicted == pytest.approx(2.0)
    # On a CPU whose cores the step fills, more threads win nothing; nor do they where there is no core left.
    assert (
        more_threads(Loop(step_s=5e-3, step_cpu_s=1e-2, loader_s=2e-3, loader_cpu_s=2e-3, threads=1, cores=2)) is None
    )
    assert more_threads(replace(GPU, threads=16)) is None


def test_one_thread_more_is_one_thread() -> None:
    loop = Loop(step_s=1e-4, step_cpu_s=1e-4, loader_s=2e-3, loader_cpu_s=2e-3, threads=1, cores=2)
    threads, remedy = more_threads(loop)
    assert threads == 2 and remedy.words == "add 1 decode thread (--workers 2)"
    # Both cores are then full of the photos and the step: not twice as fast.
    assert remedy.predicted == pytest.approx(2e-3 / (2.1e-3 / 2))


def test_a_cheaper_loader_helps_as_far_as_it_was_the_limit() -> None:
    assert GPU.gain(GPU.with_loader(1.5e-3, 6e-3)) == pytest.approx(2 / 1.5)
    assert GPU.gain(GPU.with_loader(0.1e-3, 1e-3)) == pytest.approx(2.0)  # then the step
    shared = Loop(step_s=5e-3, step_cpu_s=1e-2, loader_s=2e-3, loader_cpu_s=4e-3, threads=2, cores=2)
    assert shared.gain(shared.with_loader(1e-3, 2e-3)) == pytest.approx(14 / 12)


def test_what_the_loop_takes_above_the_model_shrinks_with_the_loaders_work() -> None:
    shared = Loop(step_s=4e-3, step_cpu_s=6e-3, loader_s=1e-3, loader_cpu_s=2e-3, threads=2, cores=2).seen(5e-3)
    assert shared.excess_s == pytest.approx(1e-3) and shared.sample_s == pytest.approx(5e-3)
    assert shared.gain(shared.with_loader(0.5e-3, 0.5e-3)) == pytest.approx(5 / 4.25)
    assert shared.gain(shared.with_threads(1)) == pytest.approx(1.0)
    assert shared.seen(3e-3).excess_s == 0  # a loop cannot be faster than its parts: what was measured faster is noise


def test_costs_are_medians_over_windows() -> None:
    windows = [Window(seconds=s, samples=10, cpu_s=2 * s) for s in (1.0, 2.0, 9.0)]
    assert per_sample(windows) == (pytest.approx(0.2), pytest.approx(0.4))


def test_words() -> None:
    remedies = [(Remedy("add 3 decode threads (--workers 7)", 1.4), 1.33)]
    assert (
        in_words(0.37, remedies, shared=False)
        == "data-bound 37%: add 3 decode threads (--workers 7) (predicted 1.40x, measured 1.33x)"
    )
    assert in_words(0.02, [], shared=True).startswith("step-bound: data costs 2% of the time")
    assert "share all cores" in in_words(0.2, [], shared=True) and "neither" in in_words(0.2, [], shared=False)


def test_photos_are_shrunk_as_conversion_would(tmp_path: Path) -> None:
    path = tmp_path / "photos.beton"
    write_photos(path, 12)
    with BetonReader(path) as reader:
        assert smaller_side(reader, [ViewSpec(size=224), ViewSpec(size=96)]) == 256
        assert smaller_side(reader, [ViewSpec(size=384)]) is None  # the photos are 375 px
        with shrunken(reader, 128) as small, BetonReader(small) as found:
            assert len(found) == 12
            assert np.minimum(found.heights, found.widths).tolist() == [128] * 12
            assert found.decode(11).shape == (found.heights[11], found.widths[11], 3)
        assert not small.exists()


def test_raw_photos_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "raw.beton"
    with BetonWriter(path, 1) as writer:
        writer.add(np.zeros((300, 300, 3), np.uint8), 300, 300, mode=MODE_RAW)
    with BetonReader(path) as reader:
        assert smaller_side(reader, [ViewSpec(size=32)]) is None
