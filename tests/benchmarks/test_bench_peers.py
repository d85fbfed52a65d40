"""The peers do the work that ours do, and the comparison says who was there."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import need_engine

from fastssl.benchmarks.harness.setting import Setting
from fastssl.benchmarks.harness.table import cells
from fastssl.benchmarks.suites import peers
from fastssl.pipelines.engines.registry import EngineState

SIZE = 24


def take(stream, count: int = 2) -> list:
    try:
        return list(islice(stream, count))
    finally:
        stream.close()


@pytest.mark.parametrize(
    ("transform", "dtype"),
    [(peers.torchvision_crops, torch.uint8), (peers.torchvision_moco, torch.float32)],
    ids=["crops", "augmented"],
)
def test_a_data_loader_gives_two_different_views(transform, dtype: torch.dtype, beton: Path) -> None:
    workers = peers.Workers(peers.PillowPhotos(beton, transform(SIZE)), 4, 1)
    try:
        for _ in range(2):  # a stream that was left can be followed by another, from the same processes
            for first, second in take(workers()):
                assert first.shape == second.shape == (4, 3, SIZE, SIZE) and first.dtype == dtype
                assert not torch.equal(first, second)
            processes = list(workers._loader._iterator._workers)
            assert all(process.is_alive() for process in processes)
    finally:
        workers.close()
    assert not any(process.is_alive() for process in processes)


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["ffcv", "dali"])
def test_ffcv_and_dali_decode_for_each_view(engine: str, beton: Path) -> None:
    need_engine(engine)
    threads = torch.get_num_threads()
    make = {"ffcv": peers._ffcv_per_view, "dali": peers._dali_per_view}[engine]
    for first, second in take(make(beton, SIZE, 4, 1)()):
        assert first.shape == second.shape == (4, SIZE, SIZE, 3) and first.dtype == torch.uint8
        assert not torch.equal(first, second)
    assert torch.get_num_threads() == threads


@pytest.mark.engines
def test_one_run_measures_all_and_names_who_is_missing(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        peers, "engine_state", lambda name: EngineState(name, None, "not installed" if name == "ffcv" else None)
    )
    need_engine("dali")
    for name in ("AUGMENTED", "CROPS"):
        monkeypatch.setattr(peers, name, replace(getattr(peers, name), size=SIZE))
    records = peers.run(Setting(data=str(beton), workers=1, batch_size=4, seconds=0.6))
    found = {(record.details["part"], record.details["loader"]): record for record in records}
    parts = {part: {loader for one, loader in found if one == part} for part in ("crops", "augmented")}
    pillow = "torchvision on Pillow in a DataLoader"
    lightly = {"lightly's MoCoV2Transform in a DataLoader"} if importlib.util.find_spec("lightly") else set()
    assert parts["crops"] == {"native", "dali", pillow, "DALI, decoding for each view"}
    assert parts["augmented"] == {"native", "dali", pillow} | lightly
    assert "ffcv" in records[0].details["missing"] and ("lightly" in records[0].details["missing"]) == (not lightly)
    for (_, loader), record in found.items():
        assert record.pair_per_s > 0 and (record.ratio_to_peer is None) == (loader == "native")
    beside = found["crops", pillow]
    assert f"native is {beside.ratio_to_peer:.2f}x {pillow}" in cells(beside)[-1]
