"""Pictures with boxes: annotations in COCO's format, checked once and turned into arrays.

The format (Lin et al., "Microsoft COCO", arXiv 1405.0312; https://cocodataset.org/#format-data): one JSON object with
``images``, ``annotations`` and ``categories``. A box is [left, top, width, height] in pixels, a mask a list of polygons
or run lengths; ``iscrowd`` marks a group that nobody is to learn from and that costs nothing when it is found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.errors import FastSSLError, counted

#: Polygons ([[x0, y0, x1, y1, ...], ...] in pixels), or COCO's run lengths ({"size": [h, w], "counts": ...}).
Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]


#: Numbers in a box beyond this are no pixels, and their products soon no numbers.
_LARGEST = 1e15

#: Side in pixels under which a box is taken for empty: scaling and flipping in float32 could close it, and the
#: logarithm of its size is learned.
SMALLEST = 0.01


class DetectionError(FastSSLError):
    """Annotations or pictures from which no detector can be trained or judged."""


@dataclass(frozen=True)
class Picture:
    """One picture and what there is to learn from it.

    Attributes:
        id: of the annotations' file.
        path: of the picture's file.
        height, width: in pixels.
        boxes: (n, 4) float32, left, top, right, bottom in pixels, inside the picture and not empty; crowds left out.
        labels: (n,) int64, 1 .. C; 0 is the background.
        segmentations: n of them; empty where masks were not asked for.
    """

    id: int
    path: Path
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    segmentations: tuple[Segmentation, ...] = ()


@dataclass
class DetectionSet:
    """Annotated pictures.

    Attributes:
        name: of the file that the annotations come from, without its folder.
        pictures: all of them, in the order of the file.
        categories: id -> name, sorted by id; label k of a ``Picture`` is the k-th, from 1.
        document: the annotations in COCO's format, for ``average_precision``: only what it reads, and all of it
            checked.
        left_out: how many annotations are not learned from, by reason: ``crowd``, ``degenerate`` (an empty box, or
            outside its picture), ``without_mask``.
    """

    name: str
    pictures: list[Picture]
    categories: dict[int, str]
    document: dict[str, Any]
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def category_ids(self) -> list[int]:
        """(C,): the id of label k stands at k - 1."""
        return list(self.categories)

    def with_boxes(self) -> list[Picture]:
        """The pictures that there is something to learn from, in the order of the file: 117,266 of COCO's 118,287."""
        return [picture for picture in self.pictures if len(picture.boxes)]


def load_coco(annotations: str | Path, images: str | Path, *, masks: bool = False) -> DetectionSet:
    """Read a file in COCO's format.

    Args:
        annotations: the JSON file.
        images: the folder that its ``file_name`` are in.
        masks: keep the segmentations; without, what they say is forgotten at once (of COCO's 450 MB they are most).

    Raises:
        DetectionError: see ``detection_set``; or the file is missing or no JSON.
    """
    annotations = Path(annotations)
    try:
        document = json.loads(annotations.read_bytes())
    except OSError as error:
        raise DetectionError(f"{annotations}: cannot read the annotations: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DetectionError(f"{annotations}: not a JSON file ({error})") from None
    return detection_set(document, images, where=annotations, masks=masks)


def detection_set(document: Any, images: str | Path, *, where: str | Path, masks: bool = False) -> DetectionSet:
    """Check annotations in COCO's format and turn them into arrays.

    Args:
        document: the parsed JSON. Not changed.
        images: the folder that its ``file_name`` are in.
        where: its file, for messages.
        masks: keep the segmentations; an instance without one is left out then.

    Raises:
        DetectionError: a part or a key is missing or of another kind, an id stands for nothing or for two, a picture is
            listed twice or its file is missing, there is no box at all, or no mask where masks are asked for; with
            masks also: a corner far outside its picture, or run lengths (crowds' too) that do not fill it, for
            pycocotools would crash or hang on them. One line, with the file and the place in it.
    """
    reader = _Reader(where, Path(images), masks)
    categories = reader.categories(document)
    rows = reader.images(document)
    kept = reader.annotations(document, rows, categories)
    pictures = [reader.picture(row, kept[identity]) for identity, row in rows.items()]
    reader.check_files(pictures)
    return DetectionSet(Path(where).name, pictures, categories, reader.for_judging(rows, categories), reader.left_out)


def require_same_categories(train: DetectionSet, val: DetectionSet) -> None:
    """
    Raises:
        DetectionError: the sets differ in an id or a name.
    """
    if train.categories == val.categories:
        return
    differ = sorted(set(train.categories.items()) ^ set(val.categories.items()))
    identity, name = differ[0]
    raise DetectionError(
        f"{train.name} and {val.name} have other categories ({len(train.categories)} and "
        f"{len(val.categories)}; first difference: id {identity}, {name!r}): "
        "a detector can only be judged on what it was taught"
    )


def require_something_to_find(val: DetectionSet) -> None:
    """
    Raises:
        DetectionError: every object of the set is one that it costs nothing to miss: of Pascal VOC, a difficult one.
    """
    if not any(not row["iscrowd"] and min(row["bbox"][2:]) > 0 for row in val.document["annotations"]):
        raise DetectionError(
            f"{val.name}: all of its objects are difficult, which nobody is to find: there is nothing to judge on"
        )


class _Reader:
    """What is known while one file is read: where we are, for messages, and what was left out."""

    def __init__(self, where: str | Path, folder: Path, masks: bool):
        self.where, self.folder, self.masks = where, folder, masks
        self.judged: list[dict[str, Any]] = []
        self.left_out = {"crowd": 0, "degenerate": 0, **({"without_mask": 0} if masks else {})}

    def error(self, text: str) -> DetectionError:
        return DetectionError(f"{self.where}: {text}")

    def rows(self, document: Any, part: str) -> list[dict]:
        rows = document.get(part) if isinstance(document, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self.error(f"no list {part!r} in it; expected COCO's format: images, annotations, categories")
        return rows

    def identity(self, row: dict, key: str, place: str) -> int:
        value = row.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(f"{place}: {key!r} is {value!r}, expected a whole number from 0")
        if value >= 2**63:
            raise self.error(f"{place}: {key!r} is more than 2^63 - 1")
        return value

    def categories(self, document: Any) -> dict[int, str]:
        found: dict[int, str] = {}
        for number, row in enumerate(self.rows(document, "categories")):
            identity = self.identity(row, "id", f"categories[{number}]")
            if identity in found:
                raise self.error(f"categories[{number}]: id {identity} stands there twice")
            found[identity] = str(row.get("name", identity))
        if not found:
            raise self.error("the list 'categories' is empty")
        return dict(sorted(found.items()))

    def images(self, document: Any) -> dict[int, dict]:
        found: dict[int, dict] = {}
        files: set[Path] = set()
        for number, row in enumerate(self.rows(document, "images")):
            place = f"images[{number}]"
            identity = self.identity(row, "id", place)
            if identity in found:
                raise self.error(f"{place}: id {identity} stands there twice")
            if not isinstance(row.get("file_name"), str) or not row["file_name"]:
                raise self.error(f"{place} (id {identity}): no 'file_name'")
            file = Path(row["file_name"])
            if file in files:
                raise self.error(
                    f"{place} (id {identity}): {row['file_name']} is listed a second time, and would be judged twice"
                )
            files.add(file)
            for side in ("height", "width"):
                if self.identity(row, side, f"{place} (id {identity})") < 1:
                    raise self.error(f"{place} (id {identity}): {side!r} is 0")
            found[identity] = row
        if not found:
            raise self.error("the list 'images' is empty")
        return found

    def annotations(self, document: Any, images: dict[int, dict], categories: dict[int, str]) -> dict[int, list[tuple]]:
        """Image id -> (box, label, segmentation) of what is learned from."""
        labels = {identity: label for label, identity in enumerate(categories, start=1)}
        kept: dict[int, list[tuple]] = {identity: [] for identity in images}
        boxes = with_mask = 0
        for number, row in enumerate(self.rows(document, "annotations")):
            place = f"annotations[{number}]"
            picture = self.identity(row, "image_id", place)
            if picture not in images:
                raise self.error(f"{place}: image_id {picture} is not in 'images'")
            category = self.identity(row, "category_id", place)
            if category not in labels:
                raise self.error(f"{place}: category_id {category} is not in 'categories'")
            box = self.box(row, images[picture], place)
            crowd = self.crowd(row, place)
            segmentation = self.segmentation(row, images[picture], place) if self.masks else None
            self.judged.append(self.row_for_judging(row, crowd, segmentation, place))
            # VOC's difficult objects are learned from, as everywhere, but cost nothing when they are missed.
            if crowd and not row.get("difficult"):
                self.left_out["crowd"] += 1
                continue
            if box is None:
                self.left_out["degenerate"] += 1
                continue
            boxes += 1
            if self.masks and segmentation is None:
                self.left_out["without_mask"] += 1
                continue
            with_mask += 1
            kept[picture].append((box, labels[category], segmentation))
        if not boxes:
            raise self.error(
                "not one box in it (crowds and empty boxes do not count): there is nothing to learn or to find"
            )
        if not with_mask:
            raise self.error(
                "not one of its annotations has a 'segmentation': leave out --masks to train on boxes alone"
            )
        return kept

    def box(self, row: dict, image: dict, place: str) -> tuple[float, float, float, float] | None:
        """Left, top, right, bottom inside the picture; None where nothing is left of it."""
        box = row.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not _within(box, _LARGEST):
            raise self.error(f"{place}: 'bbox' is {str(box)[:80]}, expected [left, top, width, height] in pixels")
        left, top, width, height = box
        if width <= 0 or height <= 0:
            return None
        left, right = max(left, 0.0), min(left + width, image["width"])
        top, bottom = max(top, 0.0), min(top + height, image["height"])
        return None if min(right - left, bottom - top) < SMALLEST else (left, top, right, bottom)

    def segmentation(self, row: dict, image: dict, place: str) -> Segmentation | None:
        """What of the row's segmentation can be drawn; None where it has none."""
        found = row.get("segmentation")
        if isinstance(found, dict):
            if (
                not isinstance(found.get("counts"), (list, str))
                or not isinstance(found.get("size"), list)
                or len(found["size"]) != 2
            ):
                raise self.error(f"{place}: 'segmentation' has no 'size' and 'counts'")
            if found["size"] != [image["height"], image["width"]]:
                raise self.error(
                    f"{place}: 'segmentation' has the size {found['size']}, its picture "
                    f"{[image['height'], image['width']]}"
                )
            self.run_lengths(found["counts"], image["height"] * image["width"], place)
            return {"size": found["size"], "counts": found["counts"]}
        if found is None or found == []:
            return None
        if not isinstance(found, list) or not all(isinstance(polygon, list) for polygon in found):
            raise self.error(f"{place}: 'segmentation' is {str(found)[:80]}, expected polygons or run lengths")
        # pycocotools, in C, takes memory for whatever lies between two corners.
        limit = 4 * max(image["height"], image["width"])
        if not all(_within(polygon, limit) for polygon in found):
            raise self.error(
                f"{place}: a polygon of 'segmentation' has a corner that is no number, or far outside its picture"
            )
        # A polygon of less than three corners has no inside, and pycocotools takes one of two for a box.
        polygons = [polygon for polygon in found if len(polygon) >= 6 and len(polygon) % 2 == 0]
        return polygons or None

    def run_lengths(self, counts: list | str, pixels: int, place: str) -> None:
        """That they fill the picture: pycocotools believes whatever they say, and reads past its memory or never
        ends.
        """
        lengths = _unpacked(counts) if isinstance(counts, str) else counts
        numbers = lengths is not None and all(type(length) is int and length >= 0 for length in lengths)
        if not numbers or sum(lengths) != pixels:
            raise self.error(
                f"{place}: the 'counts' of its 'segmentation' are no run lengths of {pixels:,} pixels in all, "
                "as many as its picture has"
            )

    def crowd(self, row: dict, place: str) -> bool:
        value = row.get("iscrowd")
        if value is not None and value not in (0, 1):
            raise self.error(f"{place}: 'iscrowd' is {str(value)[:80]!r}, expected 0 or 1")
        return bool(value)

    def row_for_judging(self, row: dict, crowd: bool, segmentation: Segmentation | None, place: str) -> dict[str, Any]:
        """What pycocotools reads of an annotation, checked or filled in.

        Annotations are numbered from 1: pycocotools takes whatever matches number 0 for not found.
        """
        _, _, width, height = row["bbox"]
        area = row.get("area")
        if area is None:
            area = max(0, width) * max(0, height)
        if not _within([area], _LARGEST**2) or area < 0:
            raise self.error(f"{place}: 'area' is {str(area)[:80]!r}, expected the number of pixels")
        filled = {
            "image_id": row["image_id"],
            "category_id": row["category_id"],
            "bbox": row["bbox"],
            "area": area,
            "iscrowd": int(crowd),
        }
        filled["id"] = len(self.judged) + 1
        return filled if segmentation is None else {**filled, "segmentation": segmentation}

    def picture(self, row: dict, kept: list[tuple]) -> Picture:
        return Picture(
            row["id"],
            self.folder / row["file_name"],
            row["height"],
            row["width"],
            np.array([box for box, _, _ in kept], np.float32).reshape(-1, 4),
            np.array([label for _, label, _ in kept], np.int64),
            tuple(segmentation for _, _, segmentation in kept) if self.masks else (),
        )

    def check_files(self, pictures: list[Picture]) -> None:
        """Better now than hours into the training."""
        missing = [picture.path for picture in pictures if not picture.path.is_file()]
        if missing:
            how_many = counted(len(pictures), "picture")
            raise self.error(
                f"not there: {len(missing):,} of its {how_many}, the first: {missing[0]}; is that the folder?"
            )

    def for_judging(self, images: dict[int, dict], categories: dict[int, str]) -> dict[str, Any]:
        """The checked part of the document: no key that nobody knows reaches pycocotools."""
        return {
            "info": {},
            "images": [{key: row[key] for key in ("id", "file_name", "height", "width")} for row in images.values()],
            "categories": [{"id": identity, "name": name} for identity, name in categories.items()],
            "annotations": self.judged,
        }


def _within(numbers: list, limit: float) -> bool:
    """Whether all are numbers (no truth values, not NaN) from -limit to limit. Of COCO's 45 million corners too, so
    without a loop in Python.
    """
    if not set(map(type, numbers)) <= {int, float}:
        return False
    # max passes over a NaN that is not the first; a sum never does. An integer too large for a float is never added.
    return not numbers or (max(map(abs, numbers)) <= limit and not math.isnan(sum(numbers)))


def _unpacked(text: str) -> list[int] | None:
    """COCO's compressed run lengths, as numbers; None where the text holds none.

    Six bits a character, from "0" on: five of the number, lowest first, and one that says whether it goes on; the last
    of the five is the sign. From the fourth on a number is the difference to the one two before (cocodataset/cocoapi,
    rleToString).
    """
    lengths: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    return None if shift else lengths
