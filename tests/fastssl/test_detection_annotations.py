"""COCO's format: what is read, what is left out and counted, and one clear line for what is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_tools
from shapes import CATEGORIES, make_shapes

from fastssl.evaluate.detection.annotations import (
    DetectionError,
    _unpacked,
    load_coco,
    require_judgeable,
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_shapes(tmp_path_factory.mktemp("shapes"), 4)


def document(shapes: tuple[Path, Path]) -> dict[str, Any]:
    return json.loads(shapes[0].read_text())


def test_boxes_labels_and_names(shapes: tuple[Path, Path]) -> None:
    found, stored = load_coco(*shapes), document(shapes)
    assert found.categories == CATEGORIES and list(found.categories) == [3, 7, 21] and len(found) == 4
    for picture, image in zip(found.pictures, stored["images"]):
        rows = [row for row in stored["annotations"] if row["image_id"] == image["id"]]
        left, top, width, height = np.array([row["bbox"] for row in rows]).T
        np.testing.assert_allclose(picture.boxes, np.stack([left, top, left + width, top + height], 1), rtol=1e-6)
        assert [list(found.categories)[label - 1] for label in picture.labels] == [row["category_id"] for row in rows]
        assert picture.path.is_file() and (picture.height, picture.width) == (96, 128) and picture.segmentations == ()
    assert not any(found.left_out.values())
    # Without masks their outlines are forgotten; with them they are there, also for pycocotools.
    assert "segmentation" not in found.document["annotations"][0]
    masked = load_coco(*shapes, masks=True)
    assert all(len(picture.segmentations) == len(picture.boxes) for picture in masked.pictures)
    assert masked.document["annotations"][0]["segmentation"] == stored["annotations"][0]["segmentation"]


def test_what_is_left_out_is_counted(shapes: tuple[Path, Path]) -> None:
    stored = document(shapes)
    first = stored["images"][0]["id"]
    own = [row for row in stored["annotations"] if row["image_id"] == first]
    own[0]["iscrowd"] = 1
    own[1]["bbox"] = [5.0, 5.0, 0.0, 8.0]
    extra = {"image_id": first, "category_id": 7}
    stored["annotations"] += [
        {**extra, "id": 900, "bbox": [200.0, 5.0, 10.0, 8.0]},  # to the right of the picture
        {**extra, "id": 901, "bbox": [120.0, -5.0, 20.0, 15.0]},  # over its edges: cut there
    ]
    before = copy.deepcopy(stored)
    found = load_coco(stored, shapes[1], where="x.json", masks=False)
    assert stored == before
    assert found.left_out == {"crowd": 1, "degenerate": 2}
    np.testing.assert_array_equal(found.pictures[0].boxes[-1], [120, 0, 128, 10])
    # All are still there for the judge, with what it needs filled in.
    assert len(found.document["annotations"]) == len(stored["annotations"])
    count = len(stored["annotations"])
    assert found.document["annotations"][-1] == {
        "iscrowd": 0,
        "area": 300.0,
        **extra,
        "id": count,
        "bbox": [120.0, -5.0, 20.0, 15.0],
    }
    # pycocotools loses what has the number 0, or a number twice.
    assert [row["id"] for row in found.document["annotations"]] == list(range(1, count + 1))
    masked = load_coco(stored, shapes[1], where="x.json", masks=True)
    assert masked.left_out["without_mask"] == 1
    assert ["segmentation" in row for row in masked.document["annotations"]] == [True] * (count - 2) + [False] * 2


def test_pictures_without_boxes_are_judged_on_but_not_learned_from(shapes: tuple[Path, Path]) -> None:
    stored = document(shapes)
    empty = stored["images"][2]["id"]
    stored["annotations"] = [row for row in stored["annotations"] if row["image_id"] != empty]
    found = load_coco(stored, shapes[1], where="x.json")
    assert len(found) == 4 and [picture.id for picture in found.with_boxes()] == [
        row["id"] for row in stored["images"] if row["id"] != empty
    ]
    assert found.pictures[2].boxes.shape == (0, 4)


def no_boxes(stored: dict) -> None:
    stored["annotations"] = [{**row, "iscrowd": 1} for row in stored["annotations"]]


def no_masks(stored: dict) -> None:
    for row in stored["annotations"]:
        row["segmentation"] = []


WRONG = {
    "no images": (lambda stored: stored.pop("images"), "images: Field required .expected COCO's format"),
    "no pictures at all": (lambda stored: stored.update(images=[]), "images: List should have at least 1 item"),
    "no categories": (lambda stored: stored.update(categories=[]), "categories: List should have at least 1 item"),
    "annotations are no list": (
        lambda stored: stored.update(annotations={"id": 1}),
        "annotations: Input should be a valid list",
    ),
    "twice the same picture": (
        lambda stored: stored["images"].append(stored["images"][0]),
        r"images\[4\]: 1000 stands there twice",
    ),
    "twice the same category": (
        lambda stored: stored["categories"].append(stored["categories"][1]),
        r"categories\[3\]: 7 stands there twice",
    ),
    "an id that is a word": (lambda stored: stored["images"][1].update(id="one"), r"images\[1\].id: .*; it is 'one'"),
    "no size": (lambda stored: stored["images"][1].pop("width"), r"images\[1\].width: Field required"),
    "no file name": (lambda stored: stored["images"][1].pop("file_name"), r"images\[1\].file_name: Field required"),
    "missing picture": (
        lambda stored: stored["images"][3].update(file_name="gone.jpg"),
        "not there: 1 of its 4 pictures, the first: .*gone.jpg",
    ),
    "unknown picture": (
        lambda stored: stored["annotations"][2].update(image_id=5),
        r"annotations\[2\]: image_id 5 is not in 'images'",
    ),
    "unknown category": (
        lambda stored: stored["annotations"][2].update(category_id=4),
        r"annotations\[2\]: category_id 4 is not in 'categories'",
    ),
    "box of three": (
        lambda stored: stored["annotations"][0].update(bbox=[1, 2, 3]),
        r"annotations\[0\].bbox: .*at least 4 items.*; it is \[1, 2, 3\]",
    ),
    "box that is no number": (
        lambda stored: stored["annotations"][0].update(bbox=[1, 2, 3, float("nan")]),
        r"annotations\[0\].bbox\[3\]: .*; it is nan",
    ),
    "no box": (lambda stored: stored["annotations"][0].pop("bbox"), r"annotations\[0\].bbox: Field required"),
    "only crowds": (no_boxes, "not one box in it"),
    "no outlines": (no_masks, "not one of its annotations has a 'segmentation': leave out --masks"),
    "an outline that is a word": (
        lambda stored: stored["annotations"][0].update(segmentation="x"),
        r"annotations\[0\].segmentation.polygons: .*; it is 'x'",
    ),
    "run lengths of another picture": (
        lambda stored: stored["annotations"][0].update(segmentation={"counts": [1], "size": [1, 1]}),
        r"annotations\[0\]: 'segmentation' has the size \[1, 1\], its picture \[96, 128\]",
    ),
    "run lengths without size": (
        lambda stored: stored["annotations"][0].update(segmentation={"counts": [1]}),
        r"annotations\[0\].segmentation.run lengths.size: Field required",
    ),
}


def first(**values: Any):
    return lambda stored: stored["annotations"][0].update(values)


def crowd(counts: Any):
    return first(iscrowd=1, segmentation={"size": [96, 128], "counts": counts})


HUGE, RUNS = 10**400, r"annotations\[0\]: the 'counts' of its 'segmentation' are no run lengths of 12,288 pixels"
CORNER = r"annotations\[0\](.segmentation.polygons\[0\]\[\d\]: |: a polygon of 'segmentation' has a corner far outside)"
WRONG |= {
    "a corner far away": (first(segmentation=[[0, 0, 1e300, 0, 1e300, 1e300, 0, 1e9]]), CORNER),
    "a crowd's corner far away": (first(segmentation=[[0, 0, 1e300, 0, 1e300, 1e300]], iscrowd=1), CORNER),
    "a corner that is no number": (first(segmentation=[[0, 0, 9, float("nan"), 9, 9]]), CORNER),
    "a corner without end": (first(segmentation=[[0, 0, 9, float("inf"), 9, 9]]), CORNER),
    "a corner beyond floats": (first(segmentation=[[float("nan"), HUGE, 9, 0, 9, 9]]), CORNER),
    "a corner that is true": (first(segmentation=[[0, 0, 9, True, 9, 9]]), CORNER),
    "a crowd of garbage": (crowd("garbage"), RUNS),
    "a crowd of other letters": (crowd("\u00fc\n"), RUNS),
    "a crowd that is too long": (crowd([0, 10**9]), RUNS),
    "a crowd with a word": (crowd(["a", 5]), r"annotations\[0\].segmentation.run lengths.counts\[0\]: .* it is 'a'"),
    "run lengths below zero": (
        first(segmentation={"size": [96, 128], "counts": [-5, 12293]}),
        r"counts\[0\]: .*; it is -5",
    ),
    "a word for the area": (first(area="x"), r"annotations\[0\].area: .*; it is 'x'"),
    "an area below zero": (first(area=-1), r"annotations\[0\].area: .*; it is -1"),
    "a word for iscrowd": (first(iscrowd="0"), r"annotations\[0\].iscrowd: Input should be 0, 1, .*; it is '0'"),
    "a box beyond floats": (first(bbox=[1, 2, 3, HUGE]), r"annotations\[0\].bbox\[3\]: "),
    "an id of 64 bits": (
        lambda stored: stored["images"][1].update(id=2**63),
        r"images\[1\].id: Input should be less than",
    ),
    "twice the same file": (
        lambda stored: stored["images"][1].update(file_name="./0000.jpg"),
        r"images\[1\]: 0000.jpg stands there twice",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_annotations_are_named_in_one_line(case: str, shapes: tuple[Path, Path]) -> None:
    change, words = WRONG[case]
    stored = document(shapes)
    change(stored)
    with pytest.raises(DetectionError, match=words) as error:
        load_coco(stored, shapes[1], where="mine.json", masks=True)
    assert "\n" not in str(error.value) and str(error.value).startswith("mine.json: ")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1, 2]", b"null"])
def test_files_that_are_no_annotations(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(
        DetectionError,
        match=r"x.json: (Invalid JSON|categories: Field required|Input should be).*expected COCO's format",
    ):
        load_coco(tmp_path / "x.json", tmp_path)
    with pytest.raises(DetectionError, match=r"none.json: cannot read"):
        load_coco(tmp_path / "none.json", tmp_path)


def test_sets_of_other_categories(shapes: tuple[Path, Path]) -> None:
    stored = document(shapes)
    stored["categories"].append({"id": 22, "name": "star"})
    one, other = load_coco(*shapes), load_coco(stored, shapes[1], where="other.json")
    require_judgeable(one, one)
    with pytest.raises(
        DetectionError,
        match=r"instances-0.json and other.json have other categories .3 and 4; first difference: id 22, 'star'",
    ):
        require_judgeable(one, other)


def test_only_checked_keys_reach_the_judge(shapes: tuple[Path, Path]) -> None:
    stored = document(shapes)
    for row in stored["annotations"]:
        row.update(area=None, iscrowd=None, ignore="x", score=1)
    stored["images"][0]["license"] = stored["categories"][0]["supercategory"] = "x"
    found = load_coco(stored, shapes[1], where="x.json", masks=True).document
    keys = {
        "images": "id file_name height width",
        "categories": "id name",
        "annotations": "id image_id category_id bbox area iscrowd segmentation",
    }
    for part, known in keys.items():
        assert len(found[part]) == len(stored[part]) and all(set(row) == set(known.split()) for row in found[part])
    for row, own in zip(found["annotations"], stored["annotations"]):
        assert row["iscrowd"] == 0 and row["area"] == own["bbox"][2] * own["bbox"][3]


def test_packed_run_lengths_are_pycocotools_own() -> None:
    for seed in range(20):
        mask = np.asfortranarray(np.random.default_rng(seed).random((50, 70)) < seed / 19, np.uint8)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.reshape(-1)])))
        assert _unpacked(mask_tools.encode(mask)["counts"].decode()) == np.diff([0, *edges, mask.size]).tolist()
    assert _unpacked("o") == _unpacked("oooooooo0") == _unpacked("\n") == []


def test_a_set_whose_objects_are_all_difficult_judges_nobody(shapes: tuple[Path, Path]) -> None:
    stored = document(shapes)
    stored["annotations"] = [{**row, "iscrowd": 1, "difficult": 1} for row in stored["annotations"]]
    with pytest.raises(DetectionError, match=r"x.json: all of its objects are difficult"):
        data = load_coco(stored, shapes[1], where="x.json")
        require_judgeable(data, data)
    stored["annotations"][3]["iscrowd"] = 0
    data = load_coco(stored, shapes[1], where="x.json")
    require_judgeable(data, data)
