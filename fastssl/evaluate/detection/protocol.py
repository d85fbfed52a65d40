"""The whole evaluation: a backbone becomes a detector, is fine-tuned on one set of pictures, finds what there is in
another, and is judged by pycocotools, the reference implementation, on the very predictions that are saved.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.distributed.collectives import any_rank, gather_objects, rank
from fastssl.distributed.devices import use_amp
from fastssl.errors import FastSSLError
from fastssl.evaluate.detection.annotations import DetectionSet, Picture, require_judgeable
from fastssl.evaluate.detection.batches import (
    DetectionBatch,
    View,
    check_pictures,
    load_batches,
    scaled_size,
    to_device,
)
from fastssl.evaluate.detection.model import Detector, DetectorConfig
from fastssl.evaluate.detection.train import TrainingConfig, fine_tune
from fastssl.evaluate.features import Bar, evaluating, shard, silent
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.json_text import to_json

#: COCOeval's first six figures: mean over IoU 0.50 to 0.95, at 0.50, at 0.75, and of boxes up to 32^2, up to 96^2 and
#: above 96^2 pixels.
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
#: kind of pycocotools -> what the figures' names begin with, and the file of the predictions
KINDS = {"bbox": ("box", "predictions-boxes.json"), "segm": ("mask", "predictions-masks.json")}


def published(arch: str, voc: bool = False) -> dict[str, Any]:
    """SSLight's settings on COCO, where its figures are from, or on Pascal VOC, by a record's names: its files over
    Detectron2's defaults, as they stand (that for MobileNetV2 on VOC leaves Detectron2's rate). Networks that it does
    not have are compared with its ResNets.
    """
    mobile = arch.startswith("mobilenetv2")
    batch_size, lr, warmup = (16, 0.02, 1000) if not voc else (16, 0.001, 100) if mobile else (32, 0.005, 200)
    return {
        **{"iterations": 24_000 if voc else 90_000, "drops": (18_000, 22_000) if voc else (60_000, 80_000)},
        **{"batch_size": batch_size, "lr": lr, "warmup": warmup, "optimizer": "sgd", "weight_decay": 1e-4},
        **{"short_sides": tuple(range(480 if voc else 640, 801, 32)), "long_side": 1333, "test_side": 800},
        **{"levels": (16, 32) if mobile else (4, 8, 16, 32), "bfloat16": False, "mask_targets": "polygon"},
        # A process groups and pads its own share of a batch. VOC's average precision has eleven points.
        **{"processes": 8, "metric": "voc" if voc else "coco"},
    }


def detection_figures(
    backbone: nn.Module,
    train: DetectionSet,
    val: DetectionSet,
    shape: DetectorConfig,
    training: TrainingConfig,
    *,
    test_side: int = 800,
    amp: str = "auto",
    out: Path | None = None,
    workers: int | None = None,
    about: dict[str, Any] | None = None,
    bar: Bar = silent,
) -> dict[str, Any]:
    """Fine-tune a detector over ``backbone`` on ``train``, judge it on ``val``.

    Before the first step every picture of both is decoded once, each process its share: of the training pictures (those
    with boxes; not of a run that goes on from a ``detect.pt``) that is one pass, where the schedule has twelve.

    Args:
        backbone: a timm network without its classifier, in float32, where it is to run; it is trained in place.
        train, val: of the same categories; read with ``masks`` if ``shape`` has them.
        test_side: short side of the pictures to be judged on, in pixels; the long one is at most
            ``training.long_side``.
        amp: whether backbone and pyramid compute in bfloat16, as of ``use_amp``.
        out: a folder for the predictions and for ``detect.pt``, the checkpoint of ``fine_tune``.
        about: as of ``fine_tune``.

    Returns:
        ``box_ap`` and the others of ``FIGURES`` in percent (None where there is no object of the kind), with masks the
        same of ``mask_``; and ``train_loss``: the last one, of this process's pictures.

    Raises:
        DetectionError: see ``fine_tune``, ``check_pictures`` and ``require_judgeable``.
        OSError: ``out`` cannot be written; it says where.
    """
    require_judgeable(train, val)
    checkpoint = out / "detect.pt" if out is not None else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    goes_on = any_rank(rank() == 0 and checkpoint is not None and checkpoint.is_file())
    learned: list[Picture] = [] if goes_on else train.with_boxes()
    for which, pictures in (("validation", val.pictures), ("training", learned)):
        if pictures:
            mine = [pictures[number] for number in shard(np.arange(len(pictures)))]
            with bar(f"checking the {which} pictures", len(mine), "images") as advance:
                check_pictures(mine, workers, advance)
    torch.manual_seed(training.seed)  # of the first weights of pyramid and heads
    device = next(backbone.parameters()).device
    detector = Detector(backbone, len(train.categories), shape, amp=use_amp(amp, device)).to(device)
    with bar("fine-tuning", training.iterations, "iterations") as advance:
        how: dict[str, Any] = {"workers": workers, "progress": advance}
        losses = fine_tune(detector, train, training, checkpoint=checkpoint, about=about, **how)
    with bar("validation pictures", len(shard(np.arange(len(val)))), "images") as advance:
        how = {"workers": workers, "progress": advance, "short_side": test_side, "long_side": training.long_side}
        rows = predict(detector, val, **how)
    figures: dict[str, Any] = {}
    for kind, (name, file) in KINDS.items() if rank() == 0 else ():
        if kind == "bbox" or shape.masks:
            predictions = of_kind(rows, kind)
            if out is not None:
                write_atomically(out / file, partial(Path.write_text, data=to_json(predictions)))
            found = average_precision(val.document, predictions, kind)
            figures.update({f"{name}_{figure}": value for figure, value in found.items()})
    return {**figures, "train_loss": losses["loss"]}


@torch.no_grad()
def predict(
    detector: Detector,
    data: DetectionSet,
    *,
    short_side: int = 800,
    long_side: int = 1333,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Detections in all pictures of ``data``; the processes share the pictures out, and each gets all detections.

    Every picture goes through the network alone: what is found in it does not depend on its neighbours, or on the
    number of processes.

    Args:
        detector: where it runs. Put into evaluation mode, and back.
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
    batches = load_batches(requests, divisible=detector.pyramid.divisible, workers=workers)
    with evaluating(detector):
        for done, batch in enumerate(batches, start=1):
            images, _ = to_device(batch, detector.mean.device, detector.normalise)
            [found] = detector(images, batch.sizes)
            rows.extend(_rows(batch, found, list(data.categories)))
            progress(done)
    return list(itertools.chain.from_iterable(gather_objects(rows)))


def _rows(batch: DetectionBatch, found: dict[str, Tensor], category_ids: list[int]) -> Iterator[dict[str, Any]]:
    [view] = batch.views
    picture = view.picture
    boxes = found["boxes"] * found["boxes"].new_tensor([picture.width / view.width, picture.height / view.height] * 2)
    size = picture.height, picture.width
    segmentations = [_packed(mask, box, size) for mask, box in zip(found.get("masks", ()), boxes)]
    corners, labels, scores = boxes.double().tolist(), found["labels"].tolist(), found["scores"].tolist()
    for number, ((left, top, right, bottom), label, score) in enumerate(zip(corners, labels, scores)):
        box = [round(value, 3) for value in (left, top, right - left, bottom - top)]
        row = {"image_id": picture.id, "category_id": category_ids[label - 1], "bbox": box, "score": round(score, 6)}
        yield {**row, "segmentation": segmentations[number]} if segmentations else row


def _packed(mask: Tensor, box: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """The 28x28 probabilities, laid into the box and cut at one half, as run lengths."""
    from pycocotools import mask as tools

    # One at a time, and no more than the box: a hundred masks of a photo are 100 MB and more.
    whole, inside, places = np.zeros(size, np.uint8, order="F"), [], []
    for low, high, side in zip(box[:2].tolist(), box[2:].tolist(), reversed(size)):
        first, last = max(0, math.floor(low)), min(side, math.ceil(high))
        inside.append(slice(first, last))
        places.append((torch.arange(first, last, device=mask.device) + 0.5 - low) / (high - low) * 2 - 1)
    grid = torch.stack(torch.meshgrid(*places, indexing="xy"), -1)[None]
    laid = functional.grid_sample(mask[None], grid, align_corners=False)[0, 0] >= 0.5
    whole[inside[1], inside[0]] = laid.cpu().numpy()
    packed = tools.encode(whole)
    return {"size": [int(side) for side in packed["size"]], "counts": packed["counts"].decode()}


def of_kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The rows as COCO's server and pycocotools want them for ``bbox`` or ``segm``: with the other's key in it, sizes
    would be those of the boxes.
    """
    other = {"bbox": "segmentation", "segm": "bbox"}[kind]
    return [{key: value for key, value in row.items() if key != other} for row in rows]


def require_pycocotools() -> None:
    """
    Raises:
        FastSSLError: it is not installed.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise FastSSLError(
            "detection is judged by pycocotools, which is not installed: pip install 'fastssl-vision[detect]'"
        ) from error


def average_precision(
    document: dict[str, Any], predictions: list[dict[str, Any]], kind: str
) -> dict[str, float | None]:
    """What ``COCOeval`` says of ``predictions``, in percent: ``FIGURES`` by name, None where there is no object of that
    size.

    Args:
        document: annotations in COCO's format, as in ``DetectionSet.document``. Not changed.
        predictions: rows as of ``predict`` and ``of_kind``. Not changed.
        kind: ``bbox`` or ``segm``; of masks only annotations that have one are judged.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it talks
        truth, found = COCO(), COCO()
        rows = [row for row in document["annotations"] if kind == "bbox" or "segmentation" in row]
        truth.dataset = {**document, "annotations": [dict(row) for row in rows]}  # it writes into them
        truth.createIndex()
        if predictions:
            found = truth.loadRes([dict(row) for row in predictions])
        else:  # which loadRes does not take
            found.dataset = {**document, "annotations": []}
            found.createIndex()
        judge = COCOeval(truth, found, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: None if value < 0 else 100 * float(value) for name, value in zip(FIGURES, judge.stats)}
