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

from fastssl.evaluate.detection.annotations import DetectionError, DetectionSet, detection_set


def load_voc(lists: Sequence[Path], *, categories: Sequence[str] | None = None) -> DetectionSet:
    """Read the pictures that one or more lists name, for instance the trainval lists of 2007 and 2012 as one set.

    Args:
        lists: files of a ``ImageSets/Main`` folder.
        categories: the names in the order of their ids, from 1; None: those that occur, sorted.

    Raises:
        DetectionError: a file is missing or damaged, an object has another category than these, or what
            ``detection_set`` raises.
    """
    # Once each: a picture is in the lists of several classes.
    entries = list(dict.fromkeys((folder, name) for path in lists for folder, name in _names(path)))
    parsed = [_read(folder, name) for folder, name in entries]
    found = sorted({label for _, _, objects in parsed for label, _, _ in objects})
    names = list(categories) if categories is not None else found
    if unknown := sorted(set(found) - set(names)):
        raise DetectionError(
            f"{lists[0]}: has objects of the category {unknown[0]!r}, which the training pictures do not have"
        )
    images, annotations = [], []
    for number, ((folder, name), (height, width, objects)) in enumerate(zip(entries, parsed), start=1):
        path = folder / "JPEGImages" / f"{name}.jpg"
        images.append({"id": number, "file_name": str(path), "height": height, "width": width})
        for label, box, difficult in objects:
            flags = {"iscrowd": difficult, "difficult": difficult}
            annotations.append({"image_id": number, "category_id": names.index(label) + 1, "bbox": box, **flags})
    known = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    document = {"images": images, "annotations": annotations, "categories": known}
    loaded = detection_set(document, Path(), where=lists[0])
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
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DetectionError(f"{path}: cannot read the list of pictures: {error}") from None
    # Lists of one class have a second column.
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise DetectionError(f"{path}: names no picture")
    return [(folder, name) for name in names]


def _read(folder: Path, name: str) -> tuple[int, int, list[tuple[str, list[float], bool]]]:
    """(height, width, objects) of one picture; an object is (category, [left, top, width, height], difficult)."""
    path = folder / "Annotations" / f"{name}.xml"
    try:
        root = ElementTree.fromstring(path.read_bytes())
        height, width = int(root.findtext("size/height", "")), int(root.findtext("size/width", ""))
        objects = []
        for item in root.iter("object"):
            sides = (float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            left, top, right, bottom = sides
            if not all(map(math.isfinite, (left, top, right, bottom))):
                raise ValueError("a <bndbox> that is not finite")
            label = item.findtext("name", "").strip()
            if not label:
                raise ValueError("an <object> without <name>")
            box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
            objects.append((label, box, item.findtext("difficult", "0").strip() == "1"))
    except OSError as error:
        raise DetectionError(f"{path}: cannot read the annotation: {error.strerror or error}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise DetectionError(f"{path}: not an annotation of Pascal VOC ({error})") from None
    return height, width, objects
