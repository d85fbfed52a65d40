"""Synthetic photos, windows and the loader benchmark."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import need_engine
from lines import to_line

from fastssl.benchmarks.harness import photos
from fastssl.benchmarks.harness.photos import describe_data, ensure_photos, find_data, write_photos
from fastssl.benchmarks.harness.setting import RecipeSetting
from fastssl.benchmarks.harness.timing import WARM_BATCHES, Window, measure_windows, rate, ratio, stream_window
from fastssl.benchmarks.suites.loader import BareLoop, DecodeEngine, open_loader, requests_of, run
from fastssl.config.recipe import Recipe, load_recipe
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import EngineSettings, EngineStats
from fastssl.pipelines.plan.draw import ViewSpec

CPU = torch.device("cpu")


def setting(recipe: Recipe, data: Path, **options: object) -> RecipeSetting:
    return RecipeSetting(recipe=recipe, recipe_name="quickstart", data=str(data), **options)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "full.beton"
    write_photos(path, 12)
    return path


# ------------------------------------------------------------------ photos


def test_synthetic_photos_cost_what_photos_cost(full_size: Path) -> None:
    with BetonReader(full_size) as reader:
        bits = 8 * reader.sizes / (reader.heights.astype(float) * reader.widths)
        assert sorted(set(zip(reader.heights.tolist(), reader.widths.tolist()))) == [(375, 500), (500, 375)]
        assert 3.0 <= bits.mean() <= 4.5
        assert bits.min() > 2.5 and bits.max() < 5.0
        assert 60_000 <= reader.sizes.mean() <= 110_000
        # Different pictures, not one under several names.
        assert len({reader.encoded(i).tobytes() for i in range(len(reader))}) == len(reader)


def test_synthetic_photos_are_the_same_every_time(tmp_path: Path) -> None:
    sizes = ((48, 64), (64, 48))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_photos(tmp_path / name, 5, seed=seed, sizes=sizes)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and a != c


def test_photos_are_kept_and_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ensure_photos(3, tmp_path)
    written = path.stat().st_mtime_ns
    assert ensure_photos(3, tmp_path) == path and path.stat().st_mtime_ns == written

    def fail(*args: object) -> bytes:
        raise RuntimeError("no encoder")

    monkeypatch.setattr(photos.jpeg, "encode", fail)
    with pytest.raises(RuntimeError, match="no encoder"):
        ensure_photos(4, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_photos_go_elsewhere_when_the_cache_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        path = ensure_photos(2, blocked / "cache")
    with BetonReader(path) as reader:
        assert len(reader) == 2


def test_records_name_synthetic_and_real_data_apart(beton: Path) -> None:
    assert find_data(str(beton)) == (beton, beton.name)
    with BetonReader(beton) as reader:
        about = describe_data(reader, "photos")
        pixels = np.mean(reader.heights.astype(float) * reader.widths)
        assert about["samples"] == len(reader) == 48
        assert about["pixels"] == round(pixels)
        assert about["bits_per_pixel"] == pytest.approx(8 * reader.sizes.mean() / pixels, abs=0.01)


# ------------------------------------------------------------------ windows


def test_windows_come_in_turns_and_ratios_are_within_rounds() -> None:
    calls: list[str] = []
    slow = itertools.cycle([1.0, 2.0, 4.0])  # the machine's speed changes from round to round, the ratio does not

    state = {"factor": 1.0}

    def contender(name: str, speed: float):
        def run(seconds: float) -> Window:
            if len(calls) % 2 == 0:
                state["factor"] = next(slow)
            calls.append(name)
            return Window(seconds=state["factor"], samples=int(100 * speed))

        return run

    windows = measure_windows({"a": contender("a", 3.0), "b": contender("b", 1.0)}, seconds=1.0, runs=5)
    assert calls == list("ab" + "ab" + "ba" + "ab" + "ba" + "ab")  # the first round is the warm-up
    assert len(windows["a"]) == 5
    assert ratio(windows["a"], windows["b"]) == pytest.approx(3.0)
    assert rate(windows["b"]) == pytest.approx(50.0)
    with pytest.raises(ValueError, match="fewer than 5"):
        measure_windows({"a": contender("a", 1.0)}, seconds=1.0, runs=4)


def test_a_window_leaves_out_what_was_ready_before_and_closes_the_stream() -> None:
    stats, closed = EngineStats(), []

    def stream():
        try:
            for number in itertools.count():
                stats.samples += 10
                # Ready beforehand: no time at all. Steady state: 10 ms a batch.
                if number >= WARM_BATCHES - 1:
                    time.sleep(0.01)
                stats.wait_s += 0.005
                yield number
        finally:
            closed.append(True)

    taken: list[int] = []
    window = stream_window(stream, taken.append, stats, 10, CPU, 0.15)
    assert closed == [True]
    assert window.samples == window.decoded == 10 * (len(taken) - WARM_BATCHES)
    assert window.samples / window.seconds <= 10 / 0.01
    assert window.wait_s == pytest.approx(0.005 * (len(taken) - WARM_BATCHES))
    assert window.seconds >= 0.15


# ------------------------------------------------------------------ the loader


def test_the_bare_loop_does_the_work_that_it_says(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture in turn, each thread from its own start; the views are those of the engine's crop."""
    from fastssl.benchmarks.suites import loader

    seen: list[tuple[int, int]] = []
    real = loader.crop_resize_host

    def spy(image, *rest):
        real(image, *rest)
        seen.append((threading.get_ident(), image.shape[0] * 1000 + image.shape[1]))

    monkeypatch.setattr(loader, "crop_resize_host", spy)
    spec = ViewSpec(size=16, count=2)
    with BetonReader(beton) as reader:
        loop = BareLoop(reader, 2, [spec])
        loop(0.0)  # on a new machine the crop is compiled now
        seen.clear()
        window = loop(0.2)
    assert window.samples == window.decoded == len(seen) > 2
    assert len({thread for thread, _ in seen}) == 2
    assert {48 * 1000 + 64, 64 * 1000 + 48} <= {shape for _, shape in seen}
    assert 0 < window.host_cpu_s <= 2.2 * window.seconds


def test_a_file_smaller_than_a_batch_still_makes_long_epochs(beton: Path) -> None:
    with BetonReader(beton) as reader, open_loader(reader, [ViewSpec(size=16)], 100, CPU, workers=1) as loader:
        assert len(loader) > 500
        assert len(next(loader.epoch(0)).index) == 100


def test_the_decode_engine_decodes_and_renders_nothing(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, deliver = [], DecodeEngine._deliver
    monkeypatch.setattr(DecodeEngine, "_deliver", lambda *of: (slots.append(of[1]), deliver(*of))[1])
    with (
        BetonReader(beton) as reader,
        open_loader(reader, [ViewSpec(size=16)], 8, CPU, workers=2, crops="device") as loader,
    ):
        engine = DecodeEngine(reader, loader.views, EngineSettings(CPU, 8, workers=2, crops="device"))
        run_ = engine.run(requests_of(loader))
        rendered = next(run_)
        # What lies in the ring is the decoded batch, packed: the work that is being timed was done.
        (slot,), start = slots, 0
        for sample in rendered.request.index:
            picture = reader.decode(int(sample))
            assert torch.equal(slot.packed[start : start + picture.size], torch.from_numpy(picture).flatten())
            start += picture.size
        assert rendered.views == []
        run_.close()
        engine.close()


@pytest.mark.slow
def test_the_hosts_cost_is_that_of_as_many_views_as_the_recipe_has(full_size: Path) -> None:
    _, cost, views = run(setting(load_recipe("empssl-resnet18"), full_size, workers=1, batch_size=16, seconds=0.5))
    assert list(cost.details["times_1_view"]) == ["1 view", "2 views", "2 + 18 views"]
    assert cost.view_per_s == pytest.approx(20 * cost.pair_per_s)
    assert views.view_per_s == pytest.approx(20 * views.pair_per_s)


@pytest.mark.slow
def test_loader_records(full_size: Path) -> None:
    recipe = load_recipe("quickstart", {"views.0.size": "32"})
    decode, cost, views = run(setting(recipe, full_size, workers=2, batch_size=32, seconds=2.0))
    assert [r.details["part"] for r in (decode, cost, views)] == ["decode", "host cost", "views"]
    for record in (decode, views):
        assert record.bench == "loader" and record.runs == 5 and record.workers == 2 and record.batch_size == 32
        assert record.view_per_s == pytest.approx(2 * record.pair_per_s)
        assert record.median_s == pytest.approx(32 / record.pair_per_s)
        assert record.fraction_of_ceiling == pytest.approx(record.view_per_s / record.ceiling)
        assert record.details["data"]["name"] == "full.beton"
    # Processor time, because the test machine is shared: the engine adds little to the decoding, and views add next to
    # nothing.
    assert decode.details["host_cpu_of_bare"] < 1.35
    assert cost.details["times_1_view"]["2 + 6 views"] < 1.3
    assert cost.view_per_s == pytest.approx(8 * cost.pair_per_s)
    assert cost.pair_per_s == pytest.approx(1e3 / cost.details["host_cpu_ms"]["2 + 6 views"])
    assert cost.ceiling_name == "bare decode loop, per processor second"
    assert sum(views.details["share"].values()) == pytest.approx(1.0, abs=0.35)
    assert 0 <= views.details["consumer_wait_share"] <= 1
    for record in (decode, cost, views):
        to_line(record)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastssl-decode")]


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["dali", "ffcv"])
def test_other_engines_have_one_record(engine: str, beton: Path) -> None:
    need_engine(engine)
    recipe = load_recipe("quickstart", {"views.0.size": "32"})
    (views,) = run(setting(recipe, beton, workers=1, batch_size=8, seconds=0.5, pipeline=engine))
    assert views.pipeline == engine and views.details["part"] == "views" and views.details["seconds"] == 0.5
    assert views.pair_per_s > 0 and views.fraction_of_ceiling == pytest.approx(views.view_per_s / views.ceiling)
    assert views.ceiling_name == "bare decode and crop loop, 1 thread" and "colour" in views.bottleneck + str(
        views.details["share"]
    )
