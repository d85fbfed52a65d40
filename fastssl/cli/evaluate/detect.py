"""``fastssl evaluate detect``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import SomePath, finite, json_option, quiet_option
from fastssl.cli.evaluate.common import (
    arch_option,
    bar,
    checkpoint_argument,
    device_option,
    finish,
    option,
    options,
    scratch_option,
    seed_option,
    which_option,
    workers_option,
)
from fastssl.errors import counted

if TYPE_CHECKING:
    from fastssl.evaluate.detection.annotations import DetectionSet


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    try:
        return None if value is None else tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 16,32", ctx, param) from None


def _short_sides(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """``640-800`` -> 640, 672, ..., 800; ``640`` -> 640."""
    low, _, high = value.partition("-")
    try:
        first, last = int(low), int(high or low)
    except ValueError:
        first, last = 0, 0
    if not 32 <= first <= last:
        raise click.BadParameter(
            f"{value!r} is not a side in pixels (from 32 on) or a range of them such as 640-800", ctx, param
        )
    return tuple(range(first, last + 1, 32))


_FILE: dict[str, Any] = {"type": SomePath(), "metavar": "FILE"}
_FOLDER: dict[str, Any] = {**_FILE, "metavar": "DIR"}
_COUNT, _SIDE = click.IntRange(min=1), click.IntRange(min=32)
_PASSES = "1x: 12.28 passes over the pictures with boxes, which is 90,000 iterations of 16 for COCO."
_DROPS = "From which on the rate is a tenth of what it was. Default: two thirds and eight ninths of all."
_WARMUP = "Iterations in which the rate rises. Default: 1000, or a tenth of all where that is less."
_RATE = "Peak rate for 16 pictures, scaled with the batch. Default: 0.02, with adamw 0.0001."
_SIDES, _RANGE = "Of training pictures, in steps of 32.", "PIXELS|FROM-TO"
_MAPS = "Strides of the maps that are used; 16,32 is SSLight's form for MobileNetV2."
_OUT = "Folder for detector and predictions. A run that was stopped goes on from there (at most ten minutes are lost)."


@click.command()
@options(
    checkpoint_argument,
    which_option,
    arch_option,
    option("--data", "Annotations to learn from: .json or a VOC list.", required=True, multiple=True, **_FILE),
    option("--images", "Pictures that the .json of --data speaks of.", **_FOLDER),
    option("--val", "Annotations to judge on.", required=True, **_FILE),
    option("--val-images", "Their pictures. Default: --images.", **_FOLDER),
    option("--masks", "Also segment: Mask R-CNN in place of Faster R-CNN. Needs segmentations.", is_flag=True),
    option("--schedule", _PASSES, type=click.Choice(["1x", "2x"]), default="1x"),
    option("--iterations", "In place of --schedule.", type=_COUNT),
    option("--drops", _DROPS, callback=_numbers, metavar="ITERATION,..."),
    option("--warmup", _WARMUP, type=click.IntRange(min=0)),
    option("--batch-size", "Pictures a step, of all processes.", type=_COUNT, default=16),
    option("--optimizer", "Default: sgd, for vision transformers adamw.", type=click.Choice(["sgd", "adamw"])),
    option("--lr", _RATE, type=click.FloatRange(min=0, min_open=True), callback=finite),
    option("--short-side", _SIDES, variable="short_sides", default="640-800", callback=_short_sides, metavar=_RANGE),
    option("--test-side", "Short side of the pictures to be judged on.", type=_SIDE, default=800),
    option("--long-side", "Of all pictures, at most.", type=_SIDE, default=1333),
    option("--levels", _MAPS, default="4,8,16,32", callback=_numbers),
    option("--float32", "As published; on a GPU backbone and pyramid otherwise compute in bfloat16.", is_flag=True),
    option("--out", _OUT, **_FOLDER),
    scratch_option,
    device_option,
    workers_option,
    seed_option,
    quiet_option,
    json_option,
)
def detect(checkpoint: Path, json_path: str | None, **how: Any) -> None:
    """Object detection: the backbone is fine-tuned under Faster R-CNN with FPN (vision transformers: a simple pyramid),
    all layers, and judged by COCO's AP.

    Annotations are a .json in COCO's format, or a list of Pascal VOC (a .txt in ImageSets/Main); VOC lists may be
    several. Under torchrun or srun the processes share the pictures.

    \b
    fastssl evaluate detect runs/mine --json detect.json \\
        --data instances_train2017.json --images train2017 --val instances_val2017.json --val-images val2017
    fastssl evaluate detect runs/mine --iterations 24000 --drops 18000,22000 --warmup 100 --short-side 480-800 \\
        --data VOC2007/ImageSets/Main/trainval.txt \\
        --data VOC2012/ImageSets/Main/trainval.txt --val VOC2007/ImageSets/Main/test.txt
    """
    import torch

    from fastssl.distributed.devices import use_amp
    from fastssl.distributed.world import first_of_host_speaks
    from fastssl.evaluate.detection.model import DetectorConfig
    from fastssl.evaluate.detection.protocol import detection_figures, published, require_pycocotools
    from fastssl.evaluate.detection.train import TrainingConfig, iterations_of
    from fastssl.pipelines.plan.draw import IMAGENET
    from fastssl.weights.source import open_session

    require_pycocotools()
    with open_session(checkpoint, which=how["which"], arch=how["arch"], device=how["device"]) as session:
        with first_of_host_speaks():
            train = _read(how["data"], how["images"], how["masks"], "--images")
            names, images = list(train.categories.values()), how["val_images"] or how["images"]
            judged = _read((how["val"],), images, how["masks"], "--val-images", categories=names)
        if how["from_scratch"]:
            torch.manual_seed(how["seed"])
            session.forget().to(session.device)
        arch, learned, amp = session.trained.arch, len(train.with_boxes()), "off" if how["float32"] else "auto"
        optimizer = how["optimizer"] or ("adamw" if arch.startswith(("vit_", "deit")) else "sgd")
        lr, weight_decay = {"sgd": (0.02, 1e-4), "adamw": (1e-4, 0.1)}[optimizer]
        training = TrainingConfig(
            iterations=how["iterations"] or iterations_of(how["schedule"], learned, how["batch_size"]),
            optimizer=optimizer,
            lr=how["lr"] or lr,
            weight_decay=weight_decay,
            **{name: how[name] for name in ("batch_size", "warmup", "drops", "short_sides", "long_side", "seed")},
        )
        about = {
            "data": train.name,
            "val": judged.name,
            "categories": len(train.categories),
            "train_images": learned,
            "val_images": len(judged),
            **{name: how[name] for name in ("masks", "levels", "from_scratch", "test_side")},
        }
        # Names and steps are alike in runs that are not. New weights are said by the seed, and may differ in their last
        # bit from machine to machine.
        weights = None if how["from_scratch"] else session.weights
        resumed: dict[str, Any] = {"backbone_weights": weights, "train_annotations": train.fingerprint()}
        normalisation = session.trained.normalisation
        resumed |= {} if normalisation == IMAGENET else normalisation._asdict()  # older files do not say it
        for reason, count in train.left_out.items():
            if count and session.is_main:
                words = f"{reason.replace('_', ' ')} annotation"
                click.echo(f"{train.name}: not learned from: {counted(count, words)}", err=True)
        figures = detection_figures(
            session.trained.backbone,
            train,
            judged,
            DetectorConfig(levels=how["levels"], masks=how["masks"], normalisation=normalisation),
            training,
            about={**session.trained.record(), **about, **resumed},
            amp=amp,
            bar=bar(session),
            **{name: how[name] for name in ("test_side", "out", "workers")},
        )
        settings = {**asdict(training), **dict(zip(("warmup", "drops"), training.warmup_and_drops())), "metric": "coco"}
        settings |= {"bfloat16": use_amp(amp, session.device)} | ({"mask_targets": "bitmask"} if how["masks"] else {})
        left_out = {f"left_out_{reason}": count for reason, count in train.left_out.items()}
        record = session.record("detect", **about, **settings, **left_out, **figures)
        expected = published(arch, voc=how["data"][0].suffix == ".txt")
        record["changed"] = [name for name, value in expected.items() if record.get(name, value) != value]
        finish(session, _line(figures, len(judged), record["changed"]), record, json_path)


def _read(
    lists: tuple[Path, ...], images: Path | None, masks: bool, option: str, categories: list[str] | None = None
) -> DetectionSet:
    """COCO's format or VOC's, as the files' names say."""
    from fastssl.evaluate.detection.annotations import DetectionError, load_coco
    from fastssl.evaluate.detection.voc import load_voc

    if all(path.suffix == ".txt" for path in lists):
        if masks:
            raise DetectionError(
                f"{lists[0]}: Pascal VOC's boxes have no masks; leave out --masks, or give COCO's format"
            )
        return load_voc(lists, categories=categories)
    if len(lists) > 1 or lists[0].suffix != ".json":
        raise DetectionError(
            f"{lists[-1]}: expected one .json in COCO's format, or lists of Pascal VOC (ImageSets/Main/trainval.txt)"
        )
    if images is None:
        raise click.UsageError(f"{lists[0].name} is in COCO's format: {option} says where its pictures are")
    return load_coco(lists[0], images, masks=masks)


def _line(figures: dict, pictures: int, changed: list[str]) -> str:
    """``box AP 34.1 (AP50 53.6, AP75 36.5); mask AP ... on 5,000 pictures; not as published: lr``."""
    parts = []
    for name in ("box", "mask"):
        if f"{name}_ap" in figures:
            values = (figures[f"{name}_{figure}"] for figure in ("ap", "ap50", "ap75"))
            mean, half, strict = ("-" if value is None else f"{value:.1f}" for value in values)
            parts.append(f"{name} AP {mean} (AP50 {half}, AP75 {strict})")
    but = f"; not as published: {', '.join(changed)}" if changed else ""
    return f"{'; '.join(parts)} on {counted(pictures, 'picture')}{but}"
