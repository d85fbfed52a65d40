"""The whole evaluation: a backbone becomes a detector, is fine-tuned on one set of pictures and judged on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastssl.distributed.collectives import any_rank
from fastssl.distributed.world import World
from fastssl.errors import FastSSLError
from fastssl.evaluate.detection.annotations import DetectionSet, require_same_categories, require_something_to_find
from fastssl.evaluate.detection.average_precision import average_precision
from fastssl.evaluate.detection.batches import check_pictures
from fastssl.evaluate.detection.model import Detector, DetectorConfig
from fastssl.evaluate.detection.predict import of_kind, predict
from fastssl.evaluate.detection.train import TrainingConfig, fine_tune
from fastssl.evaluate.features import Bar, shard, silent
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.json_text import to_json

#: kind of pycocotools -> what the figures' names begin with, and the file of the predictions
KINDS = {"bbox": ("box", "predictions-boxes.json"), "segm": ("mask", "predictions-masks.json")}


def detection_figures(
    backbone: nn.Module,
    train: DetectionSet,
    val: DetectionSet,
    shape: DetectorConfig,
    training: TrainingConfig,
    *,
    device: torch.device,
    world: World = World(),  # noqa: B008 (frozen)
    test_side: int = 800,
    amp: bool = False,
    out: Path | None = None,
    workers: int | None = None,
    about: dict[str, Any] | None = None,
    bar: Bar = silent,
) -> dict[str, Any]:
    """Fine-tune a detector over ``backbone`` on ``train``, judge it on ``val``.

    Before the first step every picture of both is decoded once and compared with its annotation's size, each process
    its share: of the training pictures (those with boxes) that is one pass, where the schedule has twelve. The masks of
    ``val`` are drawn too; those of ``train`` were checked when they were read. A run that goes on from a ``detect.pt``
    has looked through its training pictures.

    Args:
        backbone: a timm network without its classifier, in float32; it is trained in place.
        train, val: of the same categories; read with ``masks`` if ``shape`` has them.
        world: this process among those that evaluate together; the group is there.
        test_side: short side of the pictures to be judged on, in pixels; the long one is at most
            ``training.long_side``.
        amp: compute backbone and pyramid in bfloat16.
        out: a folder for the predictions and for ``detect.pt``: the detector, and what is needed to go on with its
            training.
        about: as of ``fine_tune``.

    Returns:
        ``box_ap`` and the others of ``FIGURES`` in percent (None where there is no object of the kind), with masks the
        same of ``mask_``, and ``train_loss``: the last one, of this process's pictures.

    Raises:
        DetectionError: see ``fine_tune``, ``check_pictures``, ``require_same_categories`` and
            ``require_something_to_find``.
        FastSSLError: ``out`` cannot be written.
    """
    require_same_categories(train, val)
    require_something_to_find(val)
    checkpoint = None
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FastSSLError(
                f"{out}: cannot make the folder ({error.strerror or error}); choose another --out"
            ) from error
        checkpoint = out / "detect.pt"
    mine = [val.pictures[number] for number in shard(np.arange(len(val)))]
    with bar("checking the validation pictures", len(mine), "images") as advance:
        check_pictures(mine, workers, advance)
    if not any_rank(world.is_main and checkpoint is not None and checkpoint.is_file()):
        learned = train.with_boxes()
        checked = [learned[number] for number in shard(np.arange(len(learned)))]
        with bar("checking the training pictures", len(checked), "images") as advance:
            check_pictures(checked, workers, advance, masks=False)
    torch.manual_seed(training.seed)  # of the first weights of pyramid and heads
    detector = Detector(backbone, len(train.categories), shape, amp=amp).to(device)
    with bar("fine-tuning", training.iterations, "iterations") as advance:
        losses = fine_tune(
            detector,
            train,
            training,
            device=device,
            world=world,
            workers=workers,
            checkpoint=checkpoint,
            about=about,
            progress=lambda done, losses: advance(done),
        )
    with bar("validation pictures", len(mine), "images") as advance:
        sizes = {"short_side": test_side, "long_side": training.long_side}
        rows = predict(detector, val, device=device, workers=workers, progress=advance, **sizes)
    figures: dict[str, Any] = {}
    for kind in ("bbox", "segm") if shape.masks else ("bbox",):
        name, file = KINDS[kind]
        predictions = of_kind(rows, kind)
        if out is not None and world.is_main:
            _write(out / file, predictions)
        found = average_precision(val.document, predictions, kind) if world.is_main else {}
        figures.update({f"{name}_{figure}": value for figure, value in found.items()})
    return {**figures, "train_loss": losses["loss"]}


def _write(path: Path, predictions: list[dict[str, Any]]) -> None:
    try:
        write_atomically(path, lambda temporary: temporary.write_text(to_json(predictions)))
    except OSError as error:
        raise FastSSLError(f"{path}: predictions not written ({error.strerror or error})") from error
