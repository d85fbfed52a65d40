"""A short sum that tells two sets of annotations apart, whatever their files are called."""

from __future__ import annotations

import hashlib
import json

from fastssl.evaluate.detection.annotations import DetectionSet


def annotations_fingerprint(data: DetectionSet) -> str:
    """Of what a detector learns from: categories, and of every picture with boxes id, file name (without its folder),
    size, boxes, labels and segmentations, in their order: 16 hexadecimal digits. The pictures themselves are not read.
    """
    total = hashlib.sha256(json.dumps(list(data.categories.items())).encode())
    for picture in data.with_boxes():
        total.update(
            json.dumps([picture.id, picture.path.name, picture.height, picture.width, len(picture.boxes)]).encode()
        )
        total.update(picture.boxes.tobytes() + picture.labels.tobytes())
        total.update(json.dumps(picture.segmentations).encode())
    return total.hexdigest()[:16]
