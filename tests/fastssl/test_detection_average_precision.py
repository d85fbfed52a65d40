"""Average precision: cases whose figures are known without a program."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from pycocotools import mask as mask_tools

from fastssl.errors import FastSSLError
from fastssl.evaluate.detection import protocol as module
from fastssl.evaluate.detection.protocol import FIGURES, average_precision, of_kind

SQUARE = [[10, 10, 50, 10, 50, 50, 10, 50]]


def document() -> dict[str, Any]:
    row = {"category_id": 4, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0, "segmentation": SQUARE}
    return {
        "info": {},
        "images": [{"id": number, "height": 100, "width": 100, "file_name": "x"} for number in (1, 2)],
        "categories": [{"id": 4, "name": "x"}],
        "annotations": [{"id": number, "image_id": number, **row} for number in (1, 2)],
    }


def found(image: int, box: list[float], score: float = 0.9) -> dict[str, Any]:
    return {"image_id": image, "category_id": 4, "bbox": box, "score": score}


def test_perfect_half_and_nothing() -> None:
    truth = document()
    before = copy.deepcopy(truth)
    whole = [found(1, [10, 10, 40, 40]), found(2, [10, 10, 40, 40])]
    kept = copy.deepcopy(whole)
    perfect = average_precision(truth, whole, "bbox")
    assert perfect == {"ap": 100, "ap50": 100, "ap75": 100, "ap_small": None, "ap_medium": 100, "ap_large": None}
    assert truth == before and whole == kept, "its input is the caller's"
    assert average_precision(truth, [], "bbox") == {**dict.fromkeys(FIGURES, 0.0), "ap_small": None, "ap_large": None}
    # One of two found: precision 1 up to recall 0.5, 51 of COCO's 101 recall points.
    assert average_precision(truth, whole[:1], "bbox")["ap"] == pytest.approx(100 * 51 / 101)
    # An overlap of 32/40 = 0.8 counts at 0.50 .. 0.80, seven of ten thresholds.
    narrow = [found(1, [10, 10, 32, 40]), found(2, [10, 10, 32, 40])]
    figures = average_precision(truth, narrow, "bbox")
    assert figures["ap"] == pytest.approx(70) and figures["ap50"] == 100 and figures["ap75"] == 100


def test_masks_are_judged_by_their_own_size() -> None:
    truth = document()
    packed = mask_tools.merge(mask_tools.frPyObjects(SQUARE, 100, 100))
    outline = {"size": [100, 100], "counts": packed["counts"].decode()}
    # Boxes that are wrong: masks do not care.
    rows = [{**found(number, [0, 0, 99, 99]), "segmentation": outline} for number in (1, 2)]
    assert average_precision(truth, of_kind(rows, "segm"), "segm")["ap"] == pytest.approx(100)
    assert average_precision(truth, of_kind(rows, "bbox"), "bbox")["ap50"] == 0
    assert all("bbox" not in row for row in of_kind(rows, "segm")) and all(
        "segmentation" not in row for row in of_kind(rows, "bbox")
    )


def test_annotations_without_a_mask_are_not_judged_as_masks() -> None:
    truth = document()
    packed = mask_tools.merge(mask_tools.frPyObjects(SQUARE, 100, 100))
    del truth["annotations"][1]["segmentation"]
    rows = [{**found(1, [0, 0, 1, 1]), "segmentation": {"size": [100, 100], "counts": packed["counts"].decode()}}]
    assert average_precision(truth, of_kind(rows, "segm"), "segm")["ap"] == pytest.approx(100)


def test_without_pycocotools_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(FastSSLError, match=r"pip install 'fastssl-vision\[detect\]'"):
        module.require_pycocotools()
