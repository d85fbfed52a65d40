"""The whole way: a detector learns eight pictures by heart, and its figures are those of pycocotools on what it
saved.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from shapes import make_shapes

from fastssl.evaluate.detection.annotations import DetectionError, load_coco
from fastssl.evaluate.detection.model import DetectorConfig
from fastssl.evaluate.detection.protocol import FIGURES, detection_figures
from fastssl.evaluate.detection.train import TrainingConfig
from fastssl.models.backbones import create_backbone


class Bars:
    """Remembers what a bar was shown for."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int]] = []

    def __call__(self, label: str, total: int, unit: str) -> contextlib.AbstractContextManager:
        self.shown.append((label, total))
        return contextlib.nullcontext(lambda done: None)


def by_hand(annotations: Path, predictions: Path, kind: str) -> dict[str, float | None]:
    """As pycocotools' own example does it, from the two files."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        judge = COCOeval(truth, truth.loadRes(str(predictions)), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: None if value == -1 else 100 * value for name, value in zip(FIGURES, judge.stats[:6])}


@pytest.mark.slow
def test_a_detector_learns_eight_pictures_by_heart(tmp_path: Path) -> None:
    """Slow: half a minute, the test of all parts together. Boxes and masks, from random weights."""
    files = make_shapes(tmp_path / "shapes", 8)
    data = load_coco(*files, masks=True)
    torch.manual_seed(0)
    shape = DetectorConfig(
        levels=(8, 16), masks=True, anchor_sizes=(16, 32, 64), width=48, head_width=128, proposals=100, box_samples=64
    )
    training = TrainingConfig(
        iterations=80,
        batch_size=8,
        optimizer="adamw",
        lr=2e-3,
        weight_decay=1e-4,
        warmup=10,
        short_sides=(96,),
        long_side=128,
    )
    out = tmp_path / "new" / "out"
    figures = detection_figures(
        create_backbone("resnet10t"), data, data, shape, training, test_side=96, out=out, workers=1
    )
    assert figures["box_ap50"] > 90 and figures["mask_ap50"] > 80 and figures["train_loss"] < 1
    for kind, name, file in (("bbox", "box", "predictions-boxes.json"), ("segm", "mask", "predictions-masks.json")):
        expected = by_hand(files[0], out / file, kind)
        assert {figure: figures[f"{name}_{figure}"] for figure in FIGURES} == expected
        assert 0 < expected["ap"] < 100, "figures that could not be any other prove nothing"
    assert sorted(path.name for path in out.iterdir()) == [
        "detect.pt",
        "predictions-boxes.json",
        "predictions-masks.json",
    ]
    # The same again finds the trained detector, and only judges: the training pictures are not looked through once
    # more.
    kept = (out / "predictions-boxes.json").read_text()
    (out / "predictions-boxes.json").unlink()
    other = create_backbone("resnet10t")
    bars = Bars()
    again = detection_figures(other, data, data, shape, training, test_side=96, out=out, workers=1, bar=bars)
    assert [label for label, _ in bars.shown] == [
        "checking the validation pictures",
        "fine-tuning",
        "validation pictures",
    ]
    assert again == figures and json.loads((out / "predictions-boxes.json").read_text()) == json.loads(kept)


def test_damaged_validation_pictures_are_found_before_the_training(tmp_path: Path) -> None:
    train = load_coco(*make_shapes(tmp_path / "train", 4))
    val = load_coco(*make_shapes(tmp_path / "val", 4, seed=1))
    val.pictures[3].path.write_bytes(b"\xff\xd8\xff nothing")
    # A training that would take days.
    endless = TrainingConfig(iterations=10**9, batch_size=4, short_sides=(96,))
    with pytest.raises(DetectionError, match=r"val/pictures/0003.jpg: cannot decode the picture"):
        detection_figures(create_backbone("lcnet_035"), train, val, DetectorConfig(), endless, workers=1)


def test_damaged_training_pictures_are_found_before_the_training(tmp_path: Path) -> None:
    train = load_coco(*make_shapes(tmp_path / "train", 4))
    val = load_coco(*make_shapes(tmp_path / "val", 4, seed=1))
    path = train.pictures[2].path
    path.write_bytes(path.read_bytes()[:-200])  # its header is whole
    endless = TrainingConfig(iterations=10**9, batch_size=1, short_sides=(96,))
    bars = Bars()
    with pytest.raises(DetectionError, match=r"train/pictures/0002.jpg: cannot decode the picture"):
        detection_figures(create_backbone("lcnet_035"), train, val, DetectorConfig(), endless, workers=1, bar=bars)
    assert bars.shown == [("checking the validation pictures", 4), ("checking the training pictures", 4)]


def test_a_set_without_anything_to_find_is_refused_at_once(tmp_path: Path) -> None:
    data = load_coco(*make_shapes(tmp_path, 4))
    for row in data.document["annotations"]:
        row["iscrowd"] = 1
    endless = TrainingConfig(iterations=10**9, batch_size=4, short_sides=(96,))
    with pytest.raises(DetectionError, match=r"instances-0.json: all of its objects are difficult"):
        detection_figures(create_backbone("lcnet_035"), data, data, DetectorConfig(), endless, workers=1)
