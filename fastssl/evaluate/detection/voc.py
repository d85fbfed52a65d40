"""Pascal VOC's folders, turned into COCO's format in memory.

    VOC2007/ImageSets/Main/trainval.txt     names of pictures, one a line
    VOC2007/Annotations/000005.xml          <object> with <name>, <difficult>, <bndbox>
    VOC2007/JPEGImages/000005.jpg

Everingham et al., "The Pascal visual object classes (VOC) challenge", IJCV 2010. Its boxes count pixels from 1 and
include the last one. Difficult objects are learned from; in the judging they neither count as missed nor as wrongly
found, as the challenge has it (here: COCO's ``iscrowd``).
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastssl.evaluate.detection.annotations import DetectionError, DetectionSet, load_coco


def load_voc(lists: Sequence[Path], *, categories: Sequence[str] | None = None) -> DetectionSet:
    """Read the pictures that one or more lists name, for instance the trainval lists of 2007 and 2012 as one set.

    Args:
        lists: files of a ``ImageSets/Main`` folder.
        categories: the names in the order of their ids, from 1; None: those that occur, sorted.

    Raises:
        DetectionError: a file is missing or damaged, an object has another category than these, or what
            ``load_coco`` raises.
    """
    # Once each: a picture is in the lists of several classes.
    entries = list(dict.fromkeys((folder, name) for path in lists for folder, name in _names(path)))
    images, annotations = [], list[dict[str, Any]]()
    for number, (folder, name) in enumerate(entries, start=1):
        size, objects = _read(folder / "Annotations" / f"{name}.xml")
        images.append({"id": number, "file_name": str(folder / "JPEGImages" / f"{name}.jpg"), **size})
        annotations += [{"image_id": number, **each} for each in objects]
    found = sorted({row["name"] for row in annotations})
    names = found if categories is None else list(categories)
    if unknown := sorted(set(found) - set(names)):
        raise DetectionError(
            f"{lists[0]}: has objects of the category {unknown[0]!r}, which the training pictures do not have"
        )
    ids = {name: number for number, name in enumerate(names, start=1)}
    for row in annotations:
        row["category_id"] = ids[row.pop("name")]
    known = [{"id": number, "name": name} for name, number in ids.items()]
    document = {"images": images, "annotations": annotations, "categories": known}
    loaded = load_coco(document, Path(), where=lists[0])
    loaded.name = " + ".join(f"{path.resolve().parents[2].name} {path.stem}" for path in lists)
    return loaded


def _names(path: Path) -> list[tuple[Path, str]]:
    """(the folder with Annotations and JPEGImages, name) of each picture."""
    folder = path.resolve().parent.parent.parent
    if not (folder / "Annotations").is_dir() or not (folder / "JPEGImages").is_dir():
        raise DetectionError(
            f"{path}: no Annotations and JPEGImages in {folder}; expected .../VOC2007/ImageSets/Main/trainval.txt"
        )
    try:
        names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]  # some have a second column
    except (OSError, UnicodeDecodeError) as error:
        raise DetectionError(f"{path}: cannot read the list of pictures: {error}") from None
    if not names:
        raise DetectionError(f"{path}: names no picture")
    return [(folder, name) for name in names]


def _read(path: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """(height and width, objects by COCO's keys but with their category's ``name``) of one picture."""
    try:
        root = ElementTree.fromstring(path.read_bytes())
        size, objects = {side: int(root.findtext(f"size/{side}", "")) for side in ("height", "width")}, []
        for item in root.iter("object"):
            sides = [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            if not all(map(math.isfinite, sides)):
                raise ValueError("a <bndbox> that is not finite")
            name, difficult = item.findtext("name", "").strip(), item.findtext("difficult", "0").strip() == "1"
            if not name:
                raise ValueError("an <object> without <name>")
            left, top, right, bottom = sides
            box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
            objects.append({"name": name, "bbox": box, "iscrowd": difficult, "difficult": difficult})
    except OSError as error:
        raise DetectionError(f"{path}: cannot read the annotation: {error.strerror or error}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise DetectionError(f"{path}: not an annotation of Pascal VOC ({error})") from None
    return size, objects
