"""``fastssl evaluate``: figures, JSON, and one clear line for what cannot be evaluated."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from fastssl.backbones import create_backbone, load_backbone, save_backbone
from fastssl.cli import main
from fastssl.evaluate.features import extract_features, split_indices
from fastssl.evaluate.knn import knn_accuracy
from fastssl.pipelines.beton import BetonWriter, side_path
from fastssl.pipelines.convert import ConvertOptions, convert


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "last.safetensors"
    save_backbone(create_backbone("resnet18"), path, arch="resnet18")
    return path


@pytest.fixture(scope="module")
def unlabelled(photo_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    for number, photo in enumerate(sorted(photo_tree.rglob("*.jpg"))[:6]):
        shutil.copy(photo, folder / f"{number}.jpg")
    path = folder.parent / "flat.beton"
    convert(folder, path, ConvertOptions(keep_size=True, short_side=None))
    return path


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of the command line."""
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


SMALL = ("--size", 32, "--device", "cpu", "--workers", 1)


def test_knn_with_validation_photos_equals_the_functions(capsys, checkpoint, beton):
    status, out, _ = run(capsys, "knn", checkpoint, "--data", beton, "--val", beton, *SMALL, "--k", 5, "--json", "-")
    assert status == 0
    record = json.loads(out)  # nothing but the record on standard output
    features = extract_features(load_backbone(checkpoint), beton, size=32, workers=1)
    expected = knn_accuracy(features, features, k=5)
    assert record["accuracy"] == pytest.approx(expected.accuracy) and record["evaluation"] == "knn"
    assert (record["k"], record["train_samples"], record["val_samples"], record["classes"]) == (5, 48, 48, 3)
    assert record["val"] == beton.name and record["held_out_seed"] is None and record["device"] == "cpu"


def test_linear_holds_out_the_same_fifth_every_time(capsys, checkpoint, beton, tmp_path):
    records = []
    for name in ("a.json", "b.json"):
        status, out, _ = run(capsys, "linear", checkpoint, "--data", beton, *SMALL, "--json", tmp_path / name)
        assert status == 0 and "fast linear probe" in out
        records.append(json.loads((tmp_path / name).read_text()))
    for record in records:
        del record["seconds"]
    assert records[0] == records[1]
    labels = np.repeat([0, 1, 2], 16)
    assert records[0]["val_samples"] == len(split_indices(labels, 48)[1]) == 9 and records[0]["train_samples"] == 39
    # The three classes differ in colour, which a random network keeps: a probe that mixes up labels is at 33 %.
    assert records[0]["accuracy"] > 60 and records[0]["held_out_seed"] == 0


def assert_one_line(status, err, *words):
    assert status == 1
    lines = [line for line in err.splitlines() if line.startswith("fastssl:")]
    assert len(lines) == 1 and "Traceback" not in err
    for word in words:
        assert word in lines[0]


def test_unlabelled_photos(capsys, checkpoint, beton, unlabelled):
    status, _, err = run(capsys, "knn", checkpoint, "--data", unlabelled, *SMALL)
    assert_one_line(status, err, str(unlabelled), "no labels")
    status, _, err = run(capsys, "linear", checkpoint, "--data", beton, "--val", unlabelled, *SMALL)
    assert_one_line(status, err, str(unlabelled), "no labels")


def test_classes_that_differ(capsys, checkpoint, beton, photo_tree, tmp_path):
    shutil.copytree(photo_tree, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "green")
    other = tmp_path / "two.beton"
    convert(tmp_path / "two", other, ConvertOptions(keep_size=True, short_side=None))
    status, _, err = run(capsys, "linear", checkpoint, "--data", beton, "--val", other, *SMALL)
    assert_one_line(status, err, "3 and 2 classes", "green")
    # Without names only the counts can be compared.
    side_path(other).unlink()
    status, _, err = run(capsys, "knn", checkpoint, "--data", beton, "--val", other, *SMALL)
    assert_one_line(status, err, "3 and 2 classes")


def test_one_class(capsys, checkpoint, tmp_path):
    path = tmp_path / "one.beton"
    with BetonWriter(path, 10) as writer:
        for shade in range(10):
            writer.add(np.full((20, 20, 3), 20 * shade, np.uint8).tobytes(), 20, 20, 0, 1)
    status, _, err = run(capsys, "linear", checkpoint, "--data", path, *SMALL)
    assert_one_line(status, err, "one class")


def test_wrong_checkpoints(capsys, beton, tmp_path):
    status, _, err = run(capsys, "knn", tmp_path / "none.safetensors", "--data", beton, *SMALL)
    assert_one_line(status, err, "no such checkpoint")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a checkpoint")
    status, _, err = run(capsys, "knn", broken, "--data", beton, *SMALL)
    assert_one_line(status, err, "broken.safetensors")


@pytest.mark.parametrize("arguments", [("knn",), ("nearest", "x"), ("knn", "x"), ("knn", "x", "--data", "y", "--k", "0")])
def test_wrong_usage(capsys, arguments):
    assert run(capsys, *arguments)[0] == 2


def test_help_has_an_example(capsys):
    for command in ("knn", "linear"):
        status, out, _ = run(capsys, command, "--help")
        assert status == 0 and f"fastssl evaluate {command} runs/" in out
