"""``fastssl embed``: the rows are evaluate's, in any format and number of processes; memory; and what is refused."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_processes

from fastssl.api import embed
from fastssl.cli import main
from fastssl.errors import FastSSLError
from fastssl.evaluate import embed as module
from fastssl.evaluate.features import Features, extract_features
from fastssl.evaluate.session import weights_fingerprint
from fastssl.models.backbones import create_backbone, load_backbone, save_backbone
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.writer import BetonWriter

HOW = {"size": 32, "device": "cpu", "workers": 1, "batch_size": 5}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "last.safetensors"
    save_backbone(create_backbone("lcnet_035"), path, arch="lcnet_035")
    return path


@pytest.fixture(scope="module")
def expected(weights, beton):
    """(48, F) of the evaluation's own function."""
    return extract_features(load_backbone(weights), beton, size=32, batch_size=5, workers=1).features.numpy()


def sidecar(out):
    return json.loads(Path(f"{out}.json").read_text())


def test_rows_are_bit_equal_to_evaluates(weights, beton, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_HELD", 3)  # 48 photos in parts of 15
    out = tmp_path / "features.npy"
    record = embed(weights, beton, out, **HOW)
    found = np.load(out, allow_pickle=False)
    assert found.dtype == np.float32 and np.array_equal(found, expected)
    about = sidecar(out)
    assert about["columns"] == {
        "id": list(range(48)),
        "path": [None] * 48,
        "label": ["blue"] * 16 + ["green"] * 16 + ["red"] * 16,
    }
    assert about["made_from"] == {"weights": str(weights), "data": str(beton)}
    assert record["weights"] == weights_fingerprint(load_backbone(weights)) == about["weights"]
    assert (record["photos"], record["width"], record["size"], record["crop"]) == (48, expected.shape[1], 32, 0.875)
    assert "columns" not in record and str(tmp_path) not in json.dumps(record)  # records are passed on
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npy", "features.npy.json"]


def test_csv_and_parquet_hold_the_same_numbers(weights, photo_tree, beton, expected, tmp_path):
    embed(weights, beton, tmp_path / "f.csv", photos=photo_tree, **HOW)
    with open(tmp_path / "f.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:4] == ["id", "path", "label", "f0"] and rows[17][:3] == ["17", "green/01.jpg", "green"]
    assert np.array_equal(np.array([row[3:] for row in rows], np.float32), expected)
    parquet = pytest.importorskip("pyarrow.parquet")
    embed(weights, photo_tree, tmp_path / "f.parquet", half=True, **HOW)
    table = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert (table["id"][17], table["path"][17], table["label"][17]) == (17, "green/01.jpg", "green")
    assert np.array_equal(np.array(table["features"], np.float16), expected.astype(np.float16))
    assert sidecar(tmp_path / "f.csv")["columns"]["path"] == table["path"]


def test_photos_without_labels_have_paths(weights, photo_tree, tmp_path):
    (tmp_path / "flat").mkdir()
    for name in ("b.jpg", "a.jpg"):
        shutil.copy(photo_tree / "red" / "00.jpg", tmp_path / "flat" / name)
    embed(weights, tmp_path / "flat", tmp_path / "one.npy", **HOW)
    columns = sidecar(tmp_path / "one.npy")["columns"]
    assert columns == {"id": [0, 1], "path": ["a.jpg", "b.jpg"], "label": [None, None]}


def embed_alone(weights, data, out):
    return embed(weights, data, out, **HOW).get("processes")


@pytest.mark.parametrize("world", [2, 3])
def test_processes_write_one_file_together(weights, beton, expected, tmp_path, world):
    out = tmp_path / "features.npy"
    assert run_processes(embed_alone, world, weights, beton, out, join=False) == [world, *[None] * (world - 1)]
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-5)  # other batches
    assert len(sidecar(out)["columns"]["id"]) == 48 and len(list(tmp_path.iterdir())) == 2


def embed_or_say(weights, data, out):
    try:
        embed(weights, data, out, **HOW)
    except Exception as error:
        return str(error)


def test_what_one_process_cannot_read_leaves_nothing(weights, damaged, tmp_path):
    out = tmp_path / "features.npy"
    said = run_processes(embed_or_say, 2, weights, damaged[0], out, join=False)
    assert "sample 13" in said[0] and "another process has ended" in said[1] and not list(tmp_path.glob("features*"))


def test_the_command(weights, photo_tree, tmp_path, capsys):
    arguments = ["embed", weights, "--data", photo_tree, "--out", tmp_path / "f.npy", "--size", 32, "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments), "--workers", "1", "--json", "-"])
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert stop.value.code == 0 and record["evaluation"] == "embed" and record["photos"] == 48
    assert "f.npy: 48 photos, 1280 x float32\n" in captured.err


class Anonymous:
    """A bar that measures: memory of this process that is not a file's, in bytes."""

    def __init__(self):
        self.seen = [self.now()]

    @staticmethod
    def now():
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    @contextmanager
    def watching(self):
        """Look once a millisecond."""
        done = threading.Event()

        def look():
            while not done.wait(0.001):
                self.seen.append(self.now())

        thread = threading.Thread(target=look)
        thread.start()
        yield
        done.set()
        thread.join()

    @contextmanager
    def __call__(self, label, total, unit="images"):
        yield lambda done: self.seen.append(self.now())


def test_memory_is_that_of_some_batches(weights, tmp_path, monkeypatch):
    """100,000 photos and 200 MB of features that were made up."""
    with BetonWriter(tmp_path / "many.beton", 100_000, labels=False) as writer:
        for _ in range(100_000):
            writer.add(bytes(12), 2, 2, mode=MODE_RAW)

    def made_up(backbone, reader, indices, **how):
        rows = torch.from_numpy(indices)
        return Features(rows.float()[:, None].repeat(1, 512), rows, rows)

    monkeypatch.setattr(module, "extract_features", made_up)
    bar = Anonymous()
    embed(weights, tmp_path / "many.beton", tmp_path / "f.npy", bar=bar, **{**HOW, "batch_size": 64})
    found = np.load(tmp_path / "f.npy", mmap_mode="r")
    assert found.shape == (100_000, 512) and np.array_equal(found[:, 7], np.arange(100_000))
    assert len(bar.seen) == 1 + 49 and max(bar.seen) - bar.seen[0] < 40e6


def refused(weights, data, out, **how):
    with pytest.raises(FastSSLError) as error:
        embed(weights, data, out, **{**HOW, **how})
    return str(error.value)


def test_what_cannot_be_written_or_read_is_one_line(weights, beton, photo_tree, damaged, tmp_path, monkeypatch):
    assert ".npy, .csv or .parquet" in refused(weights, beton, tmp_path / "f.pt")
    assert "no such folder" in refused(weights, beton, tmp_path / "none" / "f.npy")
    photos = tmp_path / "photos.csv"
    photos.write_text(f"{photo_tree}/red/00.jpg\n{photo_tree}/red/01.jpg\n")
    assert "overwritten" in refused(weights, photos, photos)
    old = tmp_path / "f.npy"
    old.write_bytes(b"kept")
    assert "sample 13" in refused(weights, damaged[0], old)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'fastssl-vision[parquet]'" in refused(weights, beton, tmp_path / "f.parquet")
    assert old.read_bytes() == b"kept" and not list(tmp_path.glob("*.features*"))


def test_features_that_are_no_numbers_are_refused(weights, beton, tmp_path, monkeypatch):
    for value, half, words in ((np.nan, False, "beyond float32"), (1e6, True, "beyond float16")):
        rows = torch.full((48, 4), value)
        monkeypatch.setattr(module, "extract_features", lambda *_, rows=rows, **__: Features(rows, rows, rows))
        message = refused(weights, beton, tmp_path / "f.npy", half=half, batch_size=48)
        assert words in message and os.listdir(tmp_path) == []
