"""Pictures with boxes: annotations in COCO's format, checked once and turned into arrays.

The format (Lin et al., "Microsoft COCO", arXiv 1405.0312; https://cocodataset.org/#format-data): one JSON object with
``images``, ``annotations`` and ``categories``. A box is [left, top, width, height] in pixels, a mask a list of polygons
or run lengths; ``iscrowd`` marks a group that nobody is to learn from and that costs nothing when it is found.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, WrapValidator
from typing_extensions import NotRequired, TypedDict

from fastssl.errors import FastSSLError, counted

#: Polygons ([[x0, y0, x1, y1, ...], ...] in pixels), or COCO's run lengths ({"size": [h, w], "counts": ...}).
Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]

#: Side in pixels under which a box is taken for empty: scaling and flipping in float32 could close it, and the
#: logarithm of its size is learned.
SMALLEST = 0.01


class DetectionError(FastSSLError):
    """Annotations or pictures from which no detector can be trained or judged."""


# ---------------------------------------------------------------------- the format; keys that nobody knows are left out

_Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Side = Annotated[_Whole, Field(ge=1)]
#: Numbers in a box beyond this are no pixels, and their products soon no numbers.
_Number = Annotated[float, Field(strict=True, ge=-1e15, le=1e15, allow_inf_nan=False)]


class _RunLengths(TypedDict):
    size: Annotated[list[_Whole], Field(min_length=2, max_length=2)]
    counts: list[_Whole] | str


class _Image(TypedDict):
    id: _Whole
    file_name: Annotated[str, Field(strict=True, min_length=1)]
    height: _Side
    width: _Side


class _Category(TypedDict):
    id: _Whole
    name: NotRequired[Any]


class _Annotation(TypedDict):
    image_id: _Whole
    category_id: _Whole
    bbox: Annotated[list[_Number], Field(min_length=4, max_length=4)]
    area: NotRequired[Annotated[float, Field(strict=True, ge=0, le=1e30)] | None]
    iscrowd: NotRequired[Literal[0, 1, False, True, None]]
    difficult: NotRequired[Any]


def _kind(value: object) -> str:
    return "nothing" if value is None else "run lengths" if isinstance(value, dict) else "polygons"


class _Masked(_Annotation):
    segmentation: NotRequired[
        Annotated[
            # Whole numbers stay whole: the fingerprint of a run that is to go on is of what the file says.
            Annotated[list[list[_Number]], WrapValidator(lambda value, check: check(value) and value), Tag("polygons")]
            | Annotated[_RunLengths, Tag("run lengths")]
            | Annotated[None, Tag("nothing")],
            Discriminator(_kind),
        ]
    ]


_Row = TypeVar("_Row")


class _Document(TypedDict, Generic[_Row]):
    categories: Annotated[list[_Category], Field(min_length=1)]
    images: Annotated[list[_Image], Field(min_length=1)]
    annotations: list[_Row]


_FORMATS: dict[bool, TypeAdapter[Any]] = {
    False: TypeAdapter(_Document[_Annotation]),
    True: TypeAdapter(_Document[_Masked]),
}


def _problem(error: ValidationError) -> str:
    """``annotations[0].bbox[3]: Input should be a finite number; it is nan``."""
    first = error.errors(include_url=False)[0]
    steps = [step for step in first["loc"] if "[" not in str(step)]  # without the kinds of a union
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    text = f"{place}: {first['msg']}" if place else first["msg"]
    if first["type"] not in ("missing", "json_invalid"):
        text += f"; it is {reprlib.repr(first['input'])}"
    return text if len(steps) > 1 else f"{text} (expected COCO's format: images, annotations, categories)"


# ---------------------------------------------------------------------- what is made of it


@dataclass(frozen=True)
class Picture:
    """One picture and what there is to learn from it.

    Attributes:
        id, path, height, width: its number in the annotations, its file, its size in pixels.
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

    def with_boxes(self) -> list[Picture]:
        """The pictures that there is something to learn from, in the order of the file: 117,266 of COCO's 118,287."""
        return [picture for picture in self.pictures if len(picture.boxes)]

    def fingerprint(self) -> str:
        """Of what a detector learns from, as 16 hexadecimal digits: categories, and of every picture with boxes id,
        file name (without its folder), size, boxes, labels and segmentations. The pictures are not read.
        """
        total = hashlib.sha256(json.dumps(list(self.categories.items())).encode())
        for picture in self.with_boxes():
            about = [picture.id, picture.path.name, picture.height, picture.width, len(picture.boxes)]
            total.update(json.dumps(about).encode())
            total.update(picture.boxes.tobytes() + picture.labels.tobytes())
            total.update(json.dumps(picture.segmentations).encode())
        return total.hexdigest()[:16]


def load_coco(
    annotations: str | Path | dict[str, Any], images: str | Path, *, masks: bool = False, where: str | Path = ""
) -> DetectionSet:
    """Read annotations in COCO's format, check them and turn them into arrays.

    Args:
        annotations: a JSON file, or what was parsed of one, which is not changed.
        images: the folder that its ``file_name`` are in.
        masks: keep the segmentations, and leave instances without one out; without, what they say is forgotten at once
            (of COCO's 450 MB they are most).
        where: the file, for messages, where ``annotations`` is none.

    Raises:
        DetectionError: one line, with the file and the place in it: no JSON, a part or a key is missing or of another
            kind, an id stands for nothing or for two, a picture is listed twice or its file is missing, there is no box
            at all, or no mask where masks are asked for; with masks also: a corner far outside its picture, or run
            lengths (crowds' too) that do not fill it, for pycocotools would crash or hang on them.
    """
    file = Path(where) if isinstance(annotations, dict) else Path(annotations)
    try:
        content = annotations if isinstance(annotations, dict) else file.read_bytes()
    except OSError as error:
        raise DetectionError(f"{file}: cannot read the annotations: {error.strerror or error}") from None
    format = _FORMATS[masks]
    try:
        document = format.validate_json(content) if isinstance(content, bytes) else format.validate_python(content)
        return _detection_set(document, Path(images), file.name, masks)
    except (ValidationError, DetectionError) as error:
        what = _problem(error) if isinstance(error, ValidationError) else error
        raise DetectionError(f"{file}: {what}") from None


def _detection_set(document: Any, folder: Path, name: str, masks: bool) -> DetectionSet:
    for part, key in (("categories", "id"), ("images", "id"), ("images", "file_name")):
        _require_once(part, (Path(row[key]) if key == "file_name" else row[key] for row in document[part]))
    categories = dict(sorted((row["id"], str(row.get("name", row["id"]))) for row in document["categories"]))
    labels = {identity: label for label, identity in enumerate(categories, start=1)}
    images = {row["id"]: row for row in document["images"]}
    kept: dict[int, list[tuple]] = {identity: [] for identity in images}
    left_out = {"crowd": 0, "degenerate": 0, **({"without_mask": 0} if masks else {})}
    for number, row in enumerate(document["annotations"]):
        place = f"annotations[{number}]"
        for key, part, known in (("image_id", "images", images), ("category_id", "categories", labels)):
            if row[key] not in known:
                raise DetectionError(f"{place}: {key} {row[key]} is not in '{part}'")
        image = images[row["image_id"]]
        difficult = row.pop("difficult", False)
        segmentation = _drawable(row.pop("segmentation", None), image, place)
        if segmentation is not None:
            row["segmentation"] = segmentation
        # The judge reads these. pycocotools takes whatever matches number 0 for not found.
        row["id"], row["iscrowd"] = number + 1, int(row.get("iscrowd") or 0)
        if row.get("area") is None:
            row["area"] = max(0, row["bbox"][2]) * max(0, row["bbox"][3])
        box = _inside(row["bbox"], image)
        # VOC's difficult objects are learned from, as everywhere, but cost nothing when they are missed.
        if row["iscrowd"] and not difficult:
            left_out["crowd"] += 1
        elif box is None:
            left_out["degenerate"] += 1
        elif masks and segmentation is None:
            left_out["without_mask"] += 1
        else:
            kept[row["image_id"]].append((box, labels[row["category_id"]], segmentation))
    if not any(kept.values()):
        if left_out.get("without_mask"):
            raise DetectionError("not one of its annotations has a 'segmentation': leave out --masks to train on boxes")
        raise DetectionError("not one box in it (crowds and empty ones do not count): there is nothing to find")
    pictures = []
    for identity, row in images.items():
        boxes, numbers, segmentations = zip(*kept[identity]) if kept[identity] else ((), (), ())
        about = identity, folder / row["file_name"], row["height"], row["width"]
        arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(numbers, np.int64)
        pictures.append(Picture(*about, *arrays, segmentations if masks else ()))
    # Better now than hours into the training.
    if missing := [picture.path for picture in pictures if not picture.path.is_file()]:
        of = f"{len(missing):,} of its {counted(len(pictures), 'picture')}"
        raise DetectionError(f"not there: {of}, the first: {missing[0]}; is that the folder?")
    judged = {**document, "info": {}, "categories": [{"id": id_, "name": said} for id_, said in categories.items()]}
    return DetectionSet(name, pictures, categories, judged, left_out)


def _require_once(part: str, keys: Iterable[Hashable]) -> None:
    seen: set[Hashable] = set()
    for number, key in enumerate(keys):
        if key in seen:
            raise DetectionError(f"{part}[{number}]: {key} stands there twice")
        seen.add(key)


def _inside(box: list[float], image: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom inside the picture; None where nothing is left of it."""
    left, top, width, height = box
    if width <= 0 or height <= 0:
        return None
    left, right = max(left, 0.0), min(left + width, image["width"])
    top, bottom = max(top, 0.0), min(top + height, image["height"])
    return None if min(right - left, bottom - top) < SMALLEST else (left, top, right, bottom)


def _drawable(found: Segmentation | None, image: dict[str, Any], place: str) -> Segmentation | None:
    """What of a segmentation can be drawn; None where there is nothing."""
    height, width = image["height"], image["width"]
    if isinstance(found, Mapping):
        if list(found["size"]) != [height, width]:
            raise DetectionError(f"{place}: 'segmentation' has the size {found['size']}, its picture {[height, width]}")
        # pycocotools believes whatever they say, and reads past its memory or never ends.
        lengths = _unpacked(found["counts"]) if isinstance(found["counts"], str) else found["counts"]
        if min(lengths, default=-1) < 0 or sum(lengths) != height * width:
            raise DetectionError(
                f"{place}: the 'counts' of its 'segmentation' are no run lengths of {height * width:,} pixels in all, "
                "as many as its picture has"
            )
        return found
    # pycocotools, in C, takes memory for whatever lies between two corners.
    limit = 4 * max(height, width)
    if any(max(map(abs, polygon), default=0) > limit for polygon in found or ()):
        raise DetectionError(f"{place}: a polygon of 'segmentation' has a corner far outside its picture")
    # A polygon of less than three corners has no inside, and pycocotools takes one of two for a box.
    return [polygon for polygon in found or () if len(polygon) >= 6 and len(polygon) % 2 == 0] or None


#: Six bits a character, from "0" on: five of the number, lowest first, and one that says whether it goes on.
_PACKED = re.compile("[P-o]{0,6}[0-O]")


def _unpacked(text: str) -> list[int]:
    """COCO's compressed run lengths, as numbers; none where the text is something else.

    The last character's fifth bit is the sign. From the fourth number on each is the difference to the one two before
    (cocodataset/cocoapi, rleToString).
    """
    packed, lengths = _PACKED.findall(text), list[int]()
    if "".join(packed) != text:
        return []
    for letters in packed:
        bits = [ord(letter) - 48 for letter in letters]
        value = sum((five & 31) << 5 * place for place, five in enumerate(bits))
        value -= (bits[-1] & 16) << 1 << 5 * (len(bits) - 1)
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
    return lengths


def require_judgeable(train: DetectionSet, val: DetectionSet) -> None:
    """
    Raises:
        DetectionError: the sets differ in an id or a name of their categories; or every object of ``val`` is one that
            it costs nothing to miss: of Pascal VOC, a difficult one.
    """
    if differ := sorted(set(train.categories.items()) ^ set(val.categories.items())):
        identity, name = differ[0]
        which = f"{len(train.categories)} and {len(val.categories)}; first difference: id {identity}, {name!r}"
        raise DetectionError(f"{train.name} and {val.name} have other categories ({which})")
    if not any(not row["iscrowd"] and min(row["bbox"][2:]) > 0 for row in val.document["annotations"]):
        raise DetectionError(f"{val.name}: all of its objects are difficult: there is nothing to judge on")
