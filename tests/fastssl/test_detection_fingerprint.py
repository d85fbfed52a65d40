"""The fingerprint of annotations: equal for equal content, another for every change that matters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from shapes import make_shapes

from fastssl.evaluate.detection.annotations import DetectionSet, load_coco


def test_annotations(tmp_path: Path) -> None:
    files = make_shapes(tmp_path / "one", 3)
    data = load_coco(*files, masks=True)
    found = data.fingerprint()
    # Elsewhere the same is the same.
    assert len(found) == 16 and load_coco(*make_shapes(tmp_path / "two", 3), masks=True).fingerprint() == found
    own = data.pictures[1]
    changes = [
        {"id": 5},
        {"path": Path("x.jpg")},
        {"height": 97},
        {"boxes": own.boxes + np.float32(0.5)},
        {"labels": own.labels % 3 + 1},
        {"segmentations": own.segmentations[::-1]},
    ]
    sums = {found, load_coco(*files).fingerprint()}
    for change in changes:
        pictures = [data.pictures[0], dataclasses.replace(own, **change), data.pictures[2]]
        sums.add(DetectionSet(data.name, pictures, data.categories, data.document).fingerprint())
    sums.add(DetectionSet(data.name, data.pictures, {**data.categories, 3: "ring"}, data.document).fingerprint())
    assert len(sums) == 2 + len(changes) + 1
