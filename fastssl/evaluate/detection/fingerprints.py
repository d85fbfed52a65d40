"""Short sums that tell two networks and two sets of annotations apart, whatever their files are called."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from fastssl.evaluate.detection.annotations import DetectionSet


def of_network(network: nn.Module) -> str:
    """Of all names, shapes and values of its state: 16 hexadecimal digits, the same on every device."""
    total = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def of_annotations(data: DetectionSet) -> str:
    """Of what a detector learns from: categories, and of every picture with boxes id, file name (without its folder), size, boxes, labels and
    segmentations, in their order: 16 hexadecimal digits. The pictures themselves are not read.
    """
    total = hashlib.sha256(json.dumps(list(data.categories.items())).encode())
    for picture in data.with_boxes():
        total.update(json.dumps([picture.id, picture.path.name, picture.height, picture.width, len(picture.boxes)]).encode())
        total.update(picture.boxes.tobytes() + picture.labels.tobytes())
        total.update(json.dumps(picture.segmentations).encode())
    return total.hexdigest()[:16]
