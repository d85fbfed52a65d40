"""``fastssl evaluate detect``: the record, both formats, several processes, and one clear line for what cannot be
done.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from shapes import make_shapes, make_voc
from torch import nn

from fastssl.cli import main
from fastssl.evaluate.detection import model, protocol
from fastssl.evaluate.detection.model import DetectorConfig
from fastssl.evaluate.detection.protocol import published
from fastssl.evaluate.detection.train import TrainingConfig
from fastssl.models.backbones import create_backbone, load_backbone, save_backbone
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation

#: Nothing is learned in one step of four small pictures: what runs is what counts.
SMALL = (
    "--iterations",
    1,
    "--batch-size",
    4,
    "--short-side",
    64,
    "--test-side",
    64,
    "--long-side",
    96,
    "--device",
    "cpu",
    "--workers",
    1,
)


#: The published detector takes seconds a step on a CPU.
SmallShape = functools.partial(DetectorConfig, width=16, head_width=32, proposals=40, box_samples=16)


@pytest.fixture(autouse=True)
def small_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "DetectorConfig", SmallShape)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)  # not what --from-scratch begins with
    path = tmp_path_factory.mktemp("run") / "last.safetensors"
    save_backbone(create_backbone("lcnet_035"), path, arch="lcnet_035")
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_shapes(tmp_path_factory.mktemp("shapes"), 8)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of the command line."""
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "detect", *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def files(shapes: tuple[Path, Path]) -> tuple[object, ...]:
    return ("--data", shapes[0], "--images", shapes[1], "--val", shapes[0])


def test_the_record_says_all(capsys, checkpoint, shapes, tmp_path) -> None:
    arguments = (
        checkpoint,
        *files(shapes),
        *SMALL,
        "--masks",
        "--levels",
        "16,32",
        "--out",
        tmp_path / "out",
        "--json",
        "-",
    )
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    record = json.loads(out)  # nothing but the record on standard output
    expected = {
        "evaluation": "detect",
        "arch": "lcnet_035",
        "data": "instances-0.json",
        "val": "instances-0.json",
        "categories": 3,
        "train_images": 8,
        "val_images": 8,
        "masks": True,
        "levels": [16, 32],
        "from_scratch": False,
        "iterations": 1,
        "batch_size": 4,
        "optimizer": "sgd",
        "lr": 0.02,
        "short_sides": [64],
        "test_side": 64,
        "long_side": 96,
        "left_out_crowd": 0,
        "processes": 1,
        "warmup": 0,
        "drops": [1, 1],
        "bfloat16": False,
        "mask_targets": "bitmask",
        "metric": "coco",
    }
    assert {name: record[name] for name in expected} == expected
    # Against the published protocol: all that this run did otherwise, and nothing else.
    shorter = ["iterations", "drops", "batch_size", "warmup", "short_sides", "long_side", "test_side"]
    assert record["changed"] == [*shorter, "levels", "mask_targets", "processes"]
    assert f"not as published: {', '.join(record['changed'])}" in err
    assert 0 <= record["box_ap"] <= 100 and 0 <= record["mask_ap"] <= 100 and record["train_loss"] > 0
    assert "box AP" in err and "mask AP" in err and "on 8 pictures" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "detect.pt",
        "predictions-boxes.json",
        "predictions-masks.json",
    }
    # Another schedule in the same folder would be another detector.
    status, _, err = run(capsys, *arguments[:-2], "--lr", 0.5)
    assert_one_line(status, err, "detect.pt belongs to a run with other settings", "lr: 0.02 there, 0.5 here")


def test_pascal_voc_and_new_weights(capsys, checkpoint, shapes, tmp_path) -> None:
    lists = make_voc(tmp_path, shapes) / "ImageSets/Main"
    arguments = ("--data", lists / "trainval.txt", "--val", lists / "trainval.txt", *SMALL, "--json", "-")
    records = []
    for more in ((), ("--from-scratch",)):
        status, out, err = run(capsys, checkpoint, *arguments, *more)
        assert status == 0, err
        records.append(json.loads(out))
    assert records[0]["data"] == "VOC2007 trainval" and records[0]["train_images"] == 6 and not records[0]["masks"]
    assert [record["from_scratch"] for record in records] == [False, True]
    # SSLight's batch, rate and warm-up for it are others than for COCO, and its average precision is VOC's own.
    assert {"lr", "metric"} < set(records[0]["changed"]) and "mask_targets" not in records[0]["changed"]
    assert records[0]["train_loss"] != records[1]["train_loss"]


def test_the_schedule_counts_passes(capsys, checkpoint, shapes) -> None:
    # 12.28 passes over 8 pictures in batches of 8
    status, out, err = run(
        capsys,
        checkpoint,
        *files(shapes),
        *SMALL[2:],
        "--batch-size",
        8,
        "--schedule",
        "1x",
        "--short-side",
        32,
        "--json",
        "-",
    )
    assert status == 0, err
    assert json.loads(out)["iterations"] == 12


def test_the_published_settings_are_no_change() -> None:
    """By the files of SSLight, which lie over Detectron2's defaults."""
    small = published("mobilenetv2_100")
    assert small["levels"] == (16, 32) and published("resnet18")["levels"] == (4, 8, 16, 32)
    assert small["drops"] == (60_000, 80_000) and small["short_sides"] == (640, 672, 704, 736, 768, 800)
    usual = TrainingConfig(90_000)
    warmup, drops = usual.warmup_and_drops()
    mine = {**vars(usual), "warmup": warmup, "drops": drops}
    assert [name for name, value in small.items() if mine.get(name, value) != value] == []
    voc = published("resnet18", voc=True), published("mobilenetv2_100", voc=True)
    assert [(each["iterations"], each["drops"]) for each in voc] == [(24_000, (18_000, 22_000))] * 2
    assert [(each["warmup"], each["batch_size"]) for each in voc] == [(200, 32), (100, 16)]
    # Rates are of 16 pictures here: 0.01 at 32.
    assert [each["lr"] for each in voc] == [0.005, 0.001] and voc[0]["short_sides"][:2] == (480, 512)


def test_schedule_and_precision_can_be_set(capsys, checkpoint, shapes) -> None:
    more = ("--iterations", 4, "--drops", "1,3", "--warmup", 2, "--float32", "--json", "-")
    status, out, err = run(capsys, checkpoint, *files(shapes), *SMALL, *more)
    assert status == 0, err
    record = json.loads(out)
    assert (record["drops"], record["warmup"], record["bfloat16"]) == ([1, 3], 2, False)


def as_process(arguments: list[str]) -> int:
    model.DetectorConfig = SmallShape
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pytest.mark.slow
def test_two_processes_write_one_record(checkpoint, shapes, tmp_path) -> None:
    arguments = ["evaluate", "detect", checkpoint, *files(shapes), *SMALL, "--masks", "--out", tmp_path / "out"]
    arguments += ["--json", tmp_path / "detect.json"]
    assert run_processes(as_process, 2, list(map(str, arguments)), join=False) == [0, 0]
    [record] = map(json.loads, (tmp_path / "detect.json").read_text().splitlines())
    assert record["processes"] == 2 and record["val_images"] == 8 and 0 <= record["box_ap"] <= 100
    assert 0 <= record["mask_ap"] <= 100
    found = json.loads((tmp_path / "out/predictions-boxes.json").read_text())
    assert len(found) == len({(row["image_id"], *row["bbox"], row["category_id"]) for row in found}), (
        "a picture was judged twice"
    )


def assert_one_line(status: int, err: str, *words: str) -> None:
    assert status == 1, err
    lines = [
        line for line in err.splitlines() if line.startswith("fastssl:") and not line.startswith("fastssl: warning: ")
    ]
    assert len(lines) == 1 and "Traceback" not in err
    for word in words:
        assert word in lines[0]


def changed(folder: Path, change: Callable[[dict], object]) -> tuple[Path, Path]:
    """A small set of its own whose annotations went through ``change``."""
    annotations, images = make_shapes(folder, 4, seed=2)
    document = json.loads(annotations.read_text())
    change(document)
    annotations.write_text(json.dumps(document))
    return annotations, images


WRONG = {
    "missing picture": (
        lambda stored: stored["images"][1].update(file_name="gone.jpg"),
        (),
        ("gone.jpg", "not there: 1 of its 4 pictures"),
    ),
    "unknown category": (
        lambda stored: stored["annotations"][1].update(category_id=5),
        (),
        ("annotations[1]", "category_id 5"),
    ),
    "unknown picture": (
        lambda stored: stored["annotations"][1].update(image_id=5),
        (),
        ("annotations[1]", "image_id 5"),
    ),
    "other categories": (
        lambda stored: stored["categories"].append({"id": 30, "name": "star"}),
        (),
        ("other categories", "'star'"),
    ),
    "no boxes": (lambda stored: stored.update(annotations=[]), (), ("not one box",)),
    "no masks": (
        lambda stored: [row.pop("segmentation") for row in stored["annotations"]],
        ("--masks",),
        ("segmentation", "--masks"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_annotations(case: str, capsys, checkpoint, shapes, tmp_path) -> None:
    change, more, words = WRONG[case]
    annotations, images = changed(tmp_path, change)
    status, _, err = run(
        capsys, checkpoint, *files(shapes), "--val", annotations, "--val-images", images, *SMALL, *more
    )
    assert_one_line(status, err, *words)


def test_the_folder_of_another_network_or_other_boxes_is_refused(
    capsys, checkpoint, shapes, tmp_path, monkeypatch
) -> None:
    """Of the same name, step and number of pictures."""
    for folder in ("one", "other"):
        (tmp_path / folder / "mine").mkdir(parents=True)
        torch.manual_seed(len(folder))
        save_backbone(create_backbone("lcnet_035"), tmp_path / folder / "mine/last.safetensors", arch="lcnet_035")
    own, images = changed(tmp_path / "shapes", lambda stored: None)
    kept = own.read_text()
    more = (
        "--data",
        own,
        "--images",
        images,
        "--val",
        shapes[0],
        "--val-images",
        shapes[1],
        *SMALL,
        "--out",
        tmp_path / "out",
    )
    status, _, err = run(capsys, tmp_path / "one/mine/last.safetensors", *more)
    assert status == 0, err
    status, _, err = run(capsys, tmp_path / "other/mine/last.safetensors", *more)
    assert_one_line(status, err, "detect.pt belongs to a run with other settings", "backbone_weights: ")
    # The same weights, trained on pictures with another std: the file says it, and the detector hears of it.
    (tmp_path / "own/mine").mkdir(parents=True)
    backbone, std = load_backbone(tmp_path / "one/mine/last.safetensors"), (0.5, 0.5, 0.5)
    seen = {"mean": IMAGENET.mean, "std": std}
    save_backbone(backbone, tmp_path / "own/mine/last.safetensors", arch="lcnet_035", **seen)
    shown: list[Normalisation] = []

    def build(backbone: nn.Module, categories: int, config: DetectorConfig, **how: Any) -> model.Detector:
        shown.append(config.normalisation)
        return model.Detector(backbone, categories, config, **how)

    monkeypatch.setattr(protocol, "Detector", build)
    status, _, err = run(capsys, tmp_path / "own/mine/last.safetensors", *more)
    assert_one_line(
        status, err, "detect.pt belongs to a run with other settings", "std: None there, [0.5, 0.5, 0.5] here"
    )
    assert shown == [Normalisation(IMAGENET.mean, std)]
    document = json.loads(kept)
    document["annotations"][0]["bbox"][2] -= 1
    own.write_text(json.dumps(document))
    status, _, err = run(capsys, tmp_path / "one/mine/last.safetensors", *more)
    assert_one_line(status, err, "detect.pt belongs to a run with other settings", "train_annotations: ")
    own.write_text(kept)
    status, _, err = run(capsys, tmp_path / "one/mine/last.safetensors", *more)
    assert status == 0, err


def test_damaged_pictures(capsys, checkpoint, shapes, tmp_path) -> None:
    annotations, images = make_shapes(tmp_path, 4, seed=3)
    whole = (images / "0002.jpg").read_bytes()
    (images / "0002.jpg").write_bytes(whole[: len(whole) // 2])
    status, _, err = run(
        capsys,
        checkpoint,
        "--data",
        annotations,
        "--images",
        images,
        "--val",
        shapes[0],
        "--val-images",
        shapes[1],
        *SMALL,
    )
    assert_one_line(status, err, "0002.jpg", "cannot decode the picture")
    status, _, err = run(capsys, checkpoint, *files(shapes), "--val", annotations, "--val-images", images, *SMALL)
    assert_one_line(status, err, "0002.jpg", "cannot decode the picture")


def test_wrong_files(capsys, checkpoint, shapes, beton, tmp_path) -> None:
    status, _, err = run(capsys, checkpoint, *files(shapes), "--val", tmp_path / "none.json", *SMALL)
    assert_one_line(status, err, "none.json", "cannot read")
    status, _, err = run(capsys, checkpoint, "--data", beton, "--images", shapes[1], "--val", shapes[0], *SMALL)
    assert_one_line(status, err, beton.name, "COCO's format")
    status, _, err = run(capsys, checkpoint, *files(shapes), *SMALL, "--levels", "32,64")
    assert_one_line(status, err, "no map of stride 64", "--levels")
    voc = make_voc(tmp_path, shapes) / "ImageSets/Main/trainval.txt"
    status, _, err = run(capsys, checkpoint, "--data", voc, "--val", voc, *SMALL, "--masks")
    assert_one_line(status, err, "trainval.txt", "no masks")
    status, _, err = run(capsys, tmp_path / "none.safetensors", *files(shapes), *SMALL)
    assert_one_line(status, err, "no such file or folder")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--levels", "4;8"), "whole numbers"),
        (("--drops", "18000-22000"), "--drops"),
        (("--short-side", "800-640"), "640-800"),
        (("--short-side", "x"), "640-800"),
        (("--lr", "nan"), "nan"),
    ],
)
def test_wrong_usage(more, word, capsys, checkpoint, shapes) -> None:
    status, _, err = run(capsys, checkpoint, *files(shapes), *more)
    assert status == 2 and word in err


def test_the_pictures_of_a_json_must_be_said(capsys, checkpoint, shapes) -> None:
    status, _, err = run(capsys, checkpoint, "--data", shapes[0], "--val", shapes[0], *SMALL)
    assert status == 2 and "--images" in err


def test_help_has_an_example(capsys) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "fastssl evaluate detect runs/" in out
