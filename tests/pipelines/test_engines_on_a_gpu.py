"""What engines would do with a GPU, as far as that shows without one."""

from __future__ import annotations

import importlib
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import need_engine
from fake_gpu import FakeEvent, fake_gpu
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastssl.pipelines import BetonReader, ViewLoader, ViewSpec
from fastssl.pipelines.engines.base import EngineSettings, Request
from fastssl.pipelines.engines.dali import DaliEngine
from fastssl.pipelines.engines.native import NativeEngine
from fastssl.pipelines.plan.draw import VIEW_DTYPE

pytestmark = pytest.mark.engines

SPECS = [ViewSpec(size=32, count=2, area=(0.2, 1.0)), ViewSpec(size=16, count=3, interpolation="bicubic")]


def locked(work: Callable, lock: threading.RLock) -> Callable:
    def call(*args: object) -> object:
        with lock:
            return work(*args)

    return call


@pytest.mark.filterwarnings("ignore:colour operations are not compiled:UserWarning")
@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize(("engine", "crops"), [("native", "host"), ("native", "device"), ("ffcv", "auto")])
def test_the_host_neither_waits_nor_copies_from_memory_that_is_not_pinned(
    engine: str, crops: str, colour: bool, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "ffcv":
        need_engine(engine)
    with fake_gpu(monkeypatch, 1) as crossings:
        if engine == "ffcv":
            ffcv = importlib.import_module("fastssl.pipelines.engines.ffcv")
            monkeypatch.setattr(ffcv, "_Epoch", unset_fake_temporarily()(ffcv._Epoch))
            monkeypatch.setattr(ffcv.FfcvEngine, "_views", locked(ffcv.FfcvEngine._views, crossings.lock))
        with ViewLoader(beton, SPECS, 12, device="cuda", pipeline=engine, crops=crops, colour=colour) as loader:
            for epoch in range(2):
                crossings.strict = epoch > 0  # constants are made once, and kept
                for batch in loader.epoch(epoch):
                    for view, spec in zip(batch.views, SPECS):
                        # .device is meta while another thread computes
                        assert view.fake_device == torch.device("cuda", 1)
                        assert view.shape == (12 * spec.count, 3, spec.size, spec.size)
                        assert view.is_contiguous(memory_format=torch.channels_last)
    # The views, or the whole photos; and the tables of colour and crops.
    assert crossings.bytes > 48 * 3 * (2 * 32**2 + 3 * 16**2 if crops != "device" else 48 * 60)
    assert not any(FakeEvent.spinning)


@pytest.mark.parametrize("fault", ["not pinned", "waits for its copy", "back to the host", "the host waits"])
def test_what_makes_the_host_wait_is_seen(fault: str, beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = NativeEngine._to_device

    def faulty(engine: NativeEngine, copied: torch.cuda.Event, host: torch.Tensor) -> torch.Tensor:
        if fault == "not pinned":
            host = host.clone()
        if fault == "waits for its copy":
            return host.to(engine.device)
        there = real(engine, copied, host)
        if fault == "back to the host":
            there.sum().cpu()
        if fault == "the host waits":
            copied.synchronize()
        return there

    monkeypatch.setattr(NativeEngine, "_to_device", faulty)
    with (
        fake_gpu(monkeypatch),
        ViewLoader(beton, SPECS, 12, device="cuda", colour=False) as loader,
        pytest.raises(AssertionError, match=fault),
    ):
        list(loader.epoch(0))


@pytest.fixture
def dali(beton: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DaliEngine]:
    """The engine for GPU 1, before it has built anything."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"copies of {device}")
    with BetonReader(beton) as reader:
        engine = DaliEngine(reader, SPECS, EngineSettings(torch.device("cuda", 1), 12, workers=2))
        yield engine
        engine.close()


def test_dali_knows_every_argument_of_the_graph_for_a_gpu(dali: DaliEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is made for real; to build it takes a driver."""
    need_engine("dali")
    import nvidia.dali
    from nvidia.dali.backend import GetSchema

    monkeypatch.setattr(nvidia.dali.Pipeline, "build", lambda pipeline: None)
    pipeline = dali._build()
    pipeline._build_graph()
    found: dict[str, set[str]] = {}
    for operator in pipeline._ops:
        said = str(operator.spec)
        name, given = re.match(r"OpSpec for (\w+):", said)[1], re.findall(r"^    ([a-z]\w+): ", said, re.MULTILINE)
        every = {"device", "preserve_name"}  # what all operators are given
        assert all(GetSchema(name).HasArgument(argument) for argument in {*given} - every), (name, given)
        found[name] = {*given, *re.findall(r"^    device: (\w+)$", said, re.MULTILINE)}
    assert found["decoders__Image"] >= {"mixed", "jpeg_fancy_upsampling", "preallocate_width_hint"}
    assert all("gpu" in found[name] for name in ("Slice", "Resize", "Flip")) and "antialias" in found["Resize"]
    assert pipeline.device_id == 1 and pipeline.num_threads == 2


def test_dali_takes_memory_for_the_largest_photo_as_far_as_a_batch_of_them_has_room(
    dali: DaliEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dali._largest() == [64, 71]
    monkeypatch.setattr(dali.reader, "shapes", lambda index: (np.array([30_000, 8]), np.array([8, 20_000])))
    height, width = dali._largest()
    assert 0.99 * 2**31 < 12 * 3 * height * width <= 2**31 and height / width == pytest.approx(1.5, rel=1e-3)


def test_dali_gets_nothing_back_that_is_still_being_copied(dali: DaliEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI writes to memory that torch has let go of, and knows nothing of the kernels on torch's streams that have yet
    to read it. Its thread waits for a batch's copies when the next batch is decoded.
    """
    events, waited = [], []

    class Event:
        def __init__(self, blocking: bool):
            assert blocking
            events.append(self)

        def record(self, stream: object) -> None:
            assert stream == "copies of cuda:1"

        def synchronize(self) -> None:
            waited.append(events.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)

    def batch() -> tuple[list[torch.Tensor], list[weakref.ref[torch.Tensor]]]:
        sizes = [spec.size for spec in SPECS for _ in range(spec.count)]
        views = [torch.full((4, size, size, 3), number, dtype=torch.uint8) for number, size in enumerate(sizes)]
        return dali._groups(views), [weakref.ref(view) for view in views]

    groups, lent = batch()
    assert [group.shape for group in groups] == [(8, 3, 32, 32), (12, 3, 16, 16)]
    assert [groups[0][row, 0, 0, 0].item() for row in (0, 4)] == [0, 1]
    assert all(view() is not None for view in lent) and waited == []
    _, second = batch()
    assert all(view() is None for view in lent) and waited == [0]
    dali._free()
    assert all(view() is None for view in second) and waited == [0, 1]


def test_dali_is_not_asked_to_make_its_thread_wait(dali: DaliEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    fed, asked = [], []
    pipeline = SimpleNamespace(
        feed_input=lambda name, values: fed.append((name, len(values))),
        run=lambda *streams: asked.extend(streams) or (),
    )
    monkeypatch.setattr(dali, "_build", lambda: pipeline)
    monkeypatch.setattr(dali, "_groups", lambda views: views)
    plans = [np.zeros((spec.count, 4), VIEW_DTYPE) for spec in SPECS]
    assert dali._views(Request(np.arange(4), plans), [np.zeros(1, np.uint8)] * 4) == []
    assert asked == ["copies of cuda:1"]
    assert fed == [("pictures", 4), *[(f"{what}{view}", 4) for view in range(5) for what in ("start", "end", "flip")]]
