"""The parity report: its bounds hold, it notices an engine that is off, and its files say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import need_engine
from PIL import Image
from sklearn.datasets import load_sample_images

from fastssl.benchmarks.studies import parity
from fastssl.pipelines import BetonReader, BetonWriter
from fastssl.pipelines.ops import jpeg

#: What is measured and drawn are the engines that are installed.
pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of two real photographs, all with one short side, as a .beton."""
    path = tmp_path_factory.mktemp("parity") / "photos.beton"
    rng = np.random.default_rng(0)
    with BetonWriter(path, 10, labels=False) as writer:
        for k in range(10):
            height, width = ((120, 160), (160, 120))[k % 2]
            top, left = rng.integers(0, 427 - height), rng.integers(0, 640 - width)
            piece = np.ascontiguousarray(load_sample_images().images[k % 2][top : top + height, left : left + width])
            writer.add(jpeg.encode(piece, 92), height, width)
    return path


@pytest.fixture(scope="module")
def rows(photos: Path) -> list[parity.Row]:
    need_engine("dali")
    need_engine("ffcv")
    return parity.measure(photos, samples=10)


def test_every_engine_keeps_the_bound_of_every_operation(rows: list[parity.Row]) -> None:
    engines = {engine for engine, _ in rows[0].differences}
    assert engines == {"native", "native on device", "dali", "ffcv"}  # all installed: none may be left out silently
    assert [row.operation for row in rows] == list(parity.OPERATIONS)
    for row in rows:
        for engine in engines:
            found = row.differences[engine, "torchvision"]
            most = row.operation.dali_most if engine == "dali" else row.operation.most
            assert found.mean <= row.operation.mean and found.most <= most, (row.operation.name, engine, found)
            assert found.left_out < 0.25


def test_decoding_alone_is_the_same_everywhere(rows: list[parity.Row]) -> None:
    for (engine, _), found in rows[0].differences.items():
        assert found.most < 1e-3, engine  # the roundings of value / 255 * 255


def test_photos_of_several_sizes_are_not_said_to_be_unresized(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "available", lambda: [("native", {"crops": "host"})])
    with BetonReader(beton) as reader:
        several = len({min(size) for size in zip(reader.heights.tolist(), reader.widths.tolist())}) > 1
    (row,) = parity.measure(beton, samples=12, operations=parity.OPERATIONS[:1])
    assert row.operation.name == ("whole photo, reduced" if several else "decode, no resize")


def test_an_engine_that_is_off_is_seen(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = parity._render

    def shifted(reader, chosen, specs, seed, device, options):
        return [np.roll(views, 1, axis=2) for views in real(reader, chosen, specs, seed, device, options)]

    monkeypatch.setattr(parity, "_render", shifted)
    monkeypatch.setattr(parity, "available", lambda: [("native", {"crops": "host"})])
    (row,) = parity.measure(photos, samples=4, operations=parity.OPERATIONS[1:2])
    found = row.differences["native", "torchvision"]
    assert found.mean > row.operation.mean and found.most > row.operation.most and row.beyond("native")
    text = parity.to_markdown(
        [row], [], {"command": "", "host": {"cpu": ""}, "versions": {}, "samples": 4, "data": {"name": ""}}
    )
    assert f"| 0.5 / 3 (12) | **{found.mean:.2f} / " in text
    # As the command: the report is written, and the status says that it is not good.
    monkeypatch.setattr(
        parity.measure, "__kwdefaults__", {**parity.measure.__kwdefaults__, "operations": parity.OPERATIONS[1:2]}
    )
    assert parity.main(["--data", str(photos), "--out", str(tmp_path), "--samples", "3"]) == 1
    assert "further from torchvision than the bound: crop, reduced, bilinear (native)" in capsys.readouterr().err
    assert (tmp_path / "parity.md").is_file()


def test_crop_boxes_are_torchvisions() -> None:
    rows = parity.crop_statistics(4000)
    assert {row["scale"] for row in rows} == {"0.2 to 1", "0.05 to 0.14"}
    for row in rows:
        for name in ("area", "ratio", "top", "left"):
            assert row[name] < 1.6 * row["chance"], row


def test_the_command_writes_table_picture_and_figures(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "OPERATIONS", parity.OPERATIONS[:2])
    monkeypatch.setattr(
        parity.measure, "__kwdefaults__", {**parity.measure.__kwdefaults__, "operations": parity.OPERATIONS}
    )
    monkeypatch.setattr(
        parity, "crop_statistics", lambda: [{"photo": "1x1", "scale": "1", "ratio": 0.1, "chance": 0.2}]
    )
    assert parity.main(["--data", str(photos), "--out", str(tmp_path / "out"), "--samples", "3"]) == 0
    text = (tmp_path / "out" / "parity.md").read_text()
    assert (
        "| crop, reduced, bilinear |" in text
        and "| 1x1 | 1 | 0.1000 | 0.2000 |" in text
        and str(photos.parent) not in text
    )
    figures = json.loads((tmp_path / "out" / "parity.json").read_text())
    engines = len(parity.available())
    assert len(figures["differences"]) == 2 * engines * 2 and figures["samples"] == 3
    with Image.open(tmp_path / "out" / "parity.png") as picture:
        # Beside the names a column of torchvision's views, and two of each engine: its views and their differences.
        assert (picture.width - parity.NAMES) // (parity.TILE + parity.GAP) == 1 + 2 * engines
        assert picture.height > len(parity.OPERATIONS) * (parity.TILE + parity.GAP)
    assert parity.main(["--data", str(tmp_path / "none.beton"), "--out", str(tmp_path / "other")]) == 1
