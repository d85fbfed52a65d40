"""Fingerprints: equal for equal content, others for every change that matters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from shapes import make_shapes

from fastssl.backbones import create_backbone
from fastssl.evaluate.detection import fingerprints
from fastssl.evaluate.detection.annotations import DetectionSet, load_coco


def test_networks() -> None:
    network = create_backbone("lcnet_035")
    found = fingerprints.of_network(network)
    assert len(found) == 16 and found == fingerprints.of_network(network.to(memory_format=torch.channels_last))
    network.bn1.running_mean[0] += 1  # no parameter, but of the network
    assert fingerprints.of_network(network) != found


def test_annotations(tmp_path: Path) -> None:
    files = make_shapes(tmp_path / "one", 3)
    data = load_coco(*files, masks=True)
    found = fingerprints.of_annotations(data)
    # Elsewhere the same is the same.
    assert len(found) == 16 and fingerprints.of_annotations(load_coco(*make_shapes(tmp_path / "two", 3), masks=True)) == found
    own = data.pictures[1]
    changes = [
        {"id": 5},
        {"path": Path("x.jpg")},
        {"height": 97},
        {"boxes": own.boxes + np.float32(0.5)},
        {"labels": own.labels % 3 + 1},
        {"segmentations": own.segmentations[::-1]},
    ]
    sums = {found, fingerprints.of_annotations(load_coco(*files))}
    for change in changes:
        pictures = [data.pictures[0], dataclasses.replace(own, **change), data.pictures[2]]
        sums.add(fingerprints.of_annotations(DetectionSet(data.name, pictures, data.categories, data.document)))
    sums.add(fingerprints.of_annotations(DetectionSet(data.name, data.pictures, {**data.categories, 3: "ring"}, data.document)))
    assert len(sums) == 2 + len(changes) + 1
