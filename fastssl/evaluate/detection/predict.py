"""What a detector finds, in COCO's format for results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from fastssl.distributed.collectives import gather_uneven
from fastssl.evaluate.detection.annotations import DetectionSet
from fastssl.evaluate.detection.average_precision import mask_tools
from fastssl.evaluate.detection.batches import DetectionBatch, View, load_batches, scaled_size, to_device
from fastssl.evaluate.detection.model import Detector
from fastssl.evaluate.features import evaluating, shard


@torch.no_grad()
def predict(
    detector: Detector,
    data: DetectionSet,
    *,
    device: torch.device,
    short_side: int = 800,
    long_side: int = 1333,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Detections in all pictures of ``data``, those without boxes included; the processes share the pictures out, and
    each gets all detections.

    Every picture goes through the network alone: what is found in it does not depend on its neighbours, or on the
    number of processes.

    Args:
        detector: on ``device``. Put into evaluation mode, and back.
        data: its boxes are not read.
        short_side, long_side: of the scaled pictures, in pixels.
        progress: called with the number of this process's pictures that are done.

    Returns:
        rows of ``image_id``, ``category_id``, ``bbox`` [left, top, width, height] in pixels of the original picture (to
        1e-3), ``score`` (to 1e-6), and with a mask head ``segmentation`` as compressed run lengths; in the order of the
        pictures, in each by falling score.
    """
    rows: list[dict[str, Any]] = []
    mine = [data.pictures[number] for number in shard(np.arange(len(data)))]
    requests = ([View(each, *scaled_size(each.height, each.width, short_side, long_side))] for each in mine)
    batches = load_batches(requests, divisible=detector.pyramid.divisible, workers=workers, ahead=8)
    with evaluating(detector):
        for done, batch in enumerate(batches, start=1):
            images, _ = to_device(batch, device, detector.normalise)
            [found] = detector(images, batch.sizes)
            rows.extend(_rows(batch, found, data.category_ids))
            if progress is not None:
                progress(done)
    return _of_all_processes(rows)


def _rows(batch: DetectionBatch, found: dict[str, Tensor], category_ids: list[int]) -> Iterator[dict[str, Any]]:
    view = batch.views[0]
    picture = view.picture
    scale = found["boxes"].new_tensor([picture.width / view.width, picture.height / view.height] * 2)
    boxes = found["boxes"] * scale
    size = picture.height, picture.width
    segmentations = [_packed(mask, box, size) for mask, box in zip(found.get("masks", ()), boxes)]
    corners, labels, scores = boxes.double().cpu().numpy(), found["labels"].tolist(), found["scores"].tolist()
    for number, ((left, top, right, bottom), label, score) in enumerate(zip(corners, labels, scores)):
        box = [round(float(value), 3) for value in (left, top, right - left, bottom - top)]
        row = {"image_id": picture.id, "category_id": category_ids[label - 1], "bbox": box, "score": round(score, 6)}
        yield {**row, "segmentation": segmentations[number]} if segmentations else row


def _packed(mask: Tensor, box: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """The 28x28 probabilities, laid into the box and cut at one half, as run lengths."""
    # One at a time: a hundred masks of a photo are 100 MB and more.
    whole = paste_masks_in_image(mask[None], box[None], size)[0, 0] >= 0.5
    packed = mask_tools().encode(np.asfortranarray(whole.cpu().numpy().astype(np.uint8)))
    return {"size": [int(side) for side in packed["size"]], "counts": packed["counts"].decode()}


def _of_all_processes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all processes, in their order: one JSON object a line, so that the texts can simply be joined."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    everyone = gather_uneven(torch.from_numpy(np.frombuffer(bytearray(text), np.uint8)))
    return [json.loads(line) for line in everyone.numpy().tobytes().splitlines()]


def of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The rows as COCO's server and pycocotools want them for ``bbox`` or ``segm``: with the other's key in it, sizes
    would be those of the boxes.
    """
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    return [{key: value for key, value in row.items() if key != other} for row in rows]
