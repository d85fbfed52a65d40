"""A small set in COCO's format: coloured squares, discs and triangles on pictures with the spectrum of photos. Made on
the spot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import jpeg_bytes, make_photo
from PIL import Image, ImageDraw

#: Ids as real sets have them: neither from 1 nor without gaps.
CATEGORIES = {3: "disc", 7: "square", 21: "triangle"}
_COLOURS = {3: (230, 40, 40), 7: (40, 220, 60), 21: (50, 70, 240)}


def polygon_of(category: int, left: float, top: float, side: float) -> list[float]:
    """Corners [x0, y0, x1, y1, ...] of a shape that touches all four sides of its box (the disc nearly)."""
    if category == 7:
        corners = [(0, 0), (1, 0), (1, 1), (0, 1)]
    elif category == 21:
        corners = [(0, 1), (0.5, 0), (1, 1)]
    else:
        angles = np.arange(24) * np.pi / 12
        corners = [(0.5 + 0.5 * np.cos(angle), 0.5 + 0.5 * np.sin(angle)) for angle in angles]
    return [float(value) for x, y in corners for value in (left + side * x, top + side * y)]


def make_shapes(folder: Path, pictures: int, *, height: int = 96, width: int = 128, seed: int = 0) -> tuple[Path, Path]:
    """Write ``pictures`` JPEGs and their annotations; (the .json, the folder of the pictures). Two or three shapes a
    picture, which do not touch.
    """
    images = folder / "pictures"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": key, "name": name} for key, name in CATEGORIES.items()],
    }
    for number in range(pictures):
        identity = 1000 + 7 * number
        photo = (make_photo(seed + number, height, width) * 0.5 + 40).astype(np.uint8)
        image = Image.fromarray(photo)
        draw = ImageDraw.Draw(image)
        cells = rng.permutation(6)[: 2 + number % 2]
        for cell in cells:
            category = int(rng.choice(list(CATEGORIES)))
            room = min(height // 2, width // 3)
            side = float(rng.uniform(0.55, 0.9) * room)
            left = width // 3 * (cell % 3) + float(rng.uniform(0, room - side))
            top = height // 2 * (cell // 3) + float(rng.uniform(0, room - side))
            polygon = polygon_of(category, left, top, side)
            draw.polygon(polygon, fill=_COLOURS[category])
            xs, ys = polygon[::2], polygon[1::2]
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": identity,
                    "category_id": category,
                    "bbox": box,
                    "segmentation": [polygon],
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        (images / f"{number:04}.jpg").write_bytes(jpeg_bytes(np.asarray(image), quality=95))
        document["images"].append({"id": identity, "file_name": f"{number:04}.jpg", "height": height, "width": width})
    path = folder / f"instances-{seed}.json"
    path.write_text(json.dumps(document))
    return path, images


def make_voc(folder: Path, shapes: tuple[Path, Path]) -> Path:
    """The same pictures in Pascal VOC's folders: all but two in ``trainval.txt``, the last two in ``test.txt``; the
    folder VOC2007.
    """
    document, voc = json.loads(shapes[0].read_text()), folder / "VOC2007"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (voc / part).mkdir(parents=True)
    names = []
    for image in document["images"]:
        name = Path(image["file_name"]).stem
        names.append(name)
        (voc / "JPEGImages" / image["file_name"]).write_bytes((shapes[1] / image["file_name"]).read_bytes())
        objects = ""
        for row in document["annotations"]:
            if row["image_id"] == image["id"]:
                left, top, width, height = row["bbox"]
                sides = {"xmin": left + 1, "ymin": top + 1, "xmax": left + width, "ymax": top + height}
                box = "".join(f"<{side}>{round(value)}</{side}>" for side, value in sides.items())
                label = f"<name>{CATEGORIES[row['category_id']]}</name>"
                objects += f"<object>{label}<difficult>0</difficult><bndbox>{box}</bndbox></object>"
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
        (voc / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (voc / "ImageSets/Main/trainval.txt").write_text("\n".join(names[:-2]) + "\n")
    (voc / "ImageSets/Main/test.txt").write_text("\n".join(names[-2:]) + "\n")
    return voc
