"""Pascal VOC's folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shapes import CATEGORIES, make_shapes, make_voc

from fastssl.evaluate.detection.annotations import DetectionError, load_coco
from fastssl.evaluate.detection.voc import load_voc


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return make_voc(tmp_path, make_shapes(tmp_path / "coco", 8))


def test_the_same_pictures_in_both_formats(voc: Path, tmp_path: Path) -> None:
    found = load_voc([voc / "ImageSets/Main/trainval.txt"])
    expected = load_coco(tmp_path / "coco/instances-0.json", tmp_path / "coco/pictures")
    assert list(found.categories.values()) == sorted(CATEGORIES.values()) and found.name == "VOC2007 trainval"
    assert len(found) == 6
    for picture, other in zip(found.pictures, expected.pictures):
        # VOC's pixels are whole.
        np.testing.assert_allclose(picture.boxes, other.boxes, atol=0.51)
        names = [found.categories[list(found.categories)[label - 1]] for label in picture.labels]
        assert names == [CATEGORIES[list(expected.categories)[label - 1]] for label in other.labels]
        assert picture.path == voc.resolve() / "JPEGImages" / other.path.name


def test_several_lists_are_one_set_and_the_second_column_is_not_read(voc: Path) -> None:
    lists = [voc / "ImageSets/Main/trainval.txt", voc / "ImageSets/Main/test.txt"]
    lists[1].write_text("".join(f"{line}  -1\n" for line in lists[1].read_text().split()))
    found = load_voc(lists)
    assert [picture.id for picture in found.pictures] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ] and found.name == "VOC2007 trainval + VOC2007 test"


def test_the_first_pixel_is_number_one_and_the_last_belongs_to_the_box(voc: Path) -> None:
    path = voc / "Annotations/0000.xml"
    path.write_text(
        "<annotation><size><width>128</width><height>96</height></size>"
        "<object><name>disc</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>128</xmax><ymax>96</ymax></bndbox></object>"
        "<object><name>square</name><difficult>1</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></object></annotation>"
    )
    found = load_voc([voc / "ImageSets/Main/trainval.txt"])
    # Difficult ones are learned from, and no loss to miss.
    np.testing.assert_array_equal(found.pictures[0].boxes, [[0, 0, 128, 96], [2, 3, 5, 6]])
    assert [row["iscrowd"] for row in found.document["annotations"][:2]] == [0, 1]


def test_wrong_folders(voc: Path, tmp_path: Path) -> None:
    train, test = (voc / f"ImageSets/Main/{name}.txt" for name in ("trainval", "test"))
    with pytest.raises(
        DetectionError, match=r"test.txt: has objects of the category '.*', which the training pictures do not have"
    ):
        load_voc([test], categories=["star"])
    with pytest.raises(DetectionError, match=r"cannot read the list"):
        load_voc([voc / "ImageSets/Main/none.txt"])
    (tmp_path / "list.txt").write_text("0000\n")
    with pytest.raises(DetectionError, match=r"list.txt: no Annotations and JPEGImages in"):
        load_voc([tmp_path / "list.txt"])
    test.write_text("\n")
    with pytest.raises(DetectionError, match=r"test.txt: names no picture"):
        load_voc([test])
    size = "<annotation><size><width>128</width><height>96</height></size><object>"
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox></object></annotation>"
    for content, words in (
        ("<annotation>", "not an annotation of Pascal VOC"),
        ("<annotation/>", "not an annotation of Pascal VOC"),
        ('<?xml version="1.0" encoding="foo"?><annotation/>', "not an annotation of Pascal VOC"),
        (size + box.format(9), r"not an annotation of Pascal VOC \(an <object> without <name>"),
        (
            size + "<name>disc</name>" + box.format("nan"),
            r"not an annotation of Pascal VOC \(a <bndbox> that is not finite",
        ),
    ):
        (voc / "Annotations/0001.xml").write_text(content)
        with pytest.raises(DetectionError, match=rf"0001.xml: {words}"):
            load_voc([train])
    (voc / "Annotations/0001.xml").unlink()
    with pytest.raises(DetectionError, match=r"0001.xml: cannot read the annotation"):
        load_voc([train])


def test_a_picture_in_two_lists_is_judged_once(voc: Path) -> None:
    lists = [voc / "ImageSets/Main/trainval.txt", voc / "ImageSets/Main/test.txt"]
    lists[1].write_text(lists[1].read_text() + "0000\n0000\n")
    found = load_voc(lists)
    assert len(found) == len({picture.path for picture in found.pictures}) == 8
