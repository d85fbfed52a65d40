"""What ``semi`` and ``finetune`` share: their options, and the way from a checkpoint to a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import SomePath, finite, json_option, quiet_option
from fastssl.cli.evaluate.common import (
    bar,
    checkpoint_argument,
    crop_option,
    data_option,
    device_option,
    finish,
    percent,
    pictures,
    scratch_option,
    seed_option,
    size_option,
    val_option,
    which_option,
    workers_option,
)
from fastssl.errors import FastSSLError, counted

if TYPE_CHECKING:
    import numpy as np

    from fastssl.evaluate.classifier import Classifier
    from fastssl.evaluate.finetune import FinetuneConfig, FinetuneResult
    from fastssl.evaluate.photos import LabelledSplit
    from fastssl.evaluate.session import Session
    from fastssl.optim.optimizers import OptimConfig


class ShareOfLabels(click.ParamType):
    """``1%`` or ``0.01`` -> 0.01."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from fastssl.evaluate.few_labels import parse_share

        if isinstance(value, float):
            return value
        try:
            return parse_share(value)
        except FastSSLError as error:
            self.fail(str(error), param, ctx)


labels_option = click.option(
    "--labels",
    type=ShareOfLabels(),
    metavar="SHARE",
    help="Share of each class's labels to learn from, drawn by --seed: 1%, 10%, 0.05.",
)
head_option = click.option(
    "--head",
    type=click.Choice(["linear", "dino"]),
    default="linear",
    show_default=True,
    help="What stands on the backbone: a new linear layer; or the hidden layers of the run's DINO head, then a new "
    "linear layer.",
)


factor_option = click.option(
    "--head-lr-factor",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    callback=finite,
    help="The head's rate in units of the backbone's.",
)
batch_option = click.option(
    "--batch-size",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Photos a step, of all processes together.",
)


def _check_out(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse before the work what could not be written behind it."""
    if value is None:
        return None
    if value.suffix != ".safetensors" or value.is_dir():
        raise click.BadParameter(f"{value}: the file's name ends in .safetensors", ctx, param)
    if not value.parent.is_dir():
        raise click.BadParameter(f"{value.parent}: no such folder; create it first", ctx, param)
    if value.exists():
        from fastssl.evaluate.classifier import is_classifier

        if not is_classifier(value):
            raise click.BadParameter(
                f"{value}: exists and is no fine-tuned network; it is left alone: choose another name", ctx, param
            )
    return value


out_option = click.option(
    "--out",
    type=SomePath(),
    metavar="FILE.safetensors",
    callback=_check_out,
    help="Write the network of the last epoch as timm reads it (create_model's checkpoint_path).",
)

#: Of both commands, around their own.
BEFORE = (checkpoint_argument, which_option, data_option, val_option)
AFTER = (
    head_option,
    batch_option,
    factor_option,
    scratch_option,
    size_option,
    crop_option,
    device_option,
    workers_option,
    seed_option,
    out_option,
    quiet_option,
    json_option,
)


def fine_tune(
    evaluation: str,
    *,
    pick: Callable[[LabelledSplit], tuple[np.ndarray, dict[str, Any]]],
    epochs: Callable[[float], int],
    optim: OptimConfig,
    checkpoint: Path,
    which: str | None,
    data: Path,
    val: Path | None,
    head: str,
    batch_size: int,
    head_lr_factor: float,
    from_scratch: bool,
    size: int | None,
    crop: float | None,
    device: str,
    workers: int | None,
    seed: int,
    out: Path | None,
    json_path: str | None,
) -> None:
    """Open checkpoint and photos, fine-tune, say and write what came out.

    Args:
        evaluation: name of the record's kind.
        pick: split -> (int64 sample ids that keep their label, what the record says of them; ``labels`` is their
            share).
        epochs: share of the labels -> number of epochs.
    """
    from fastssl.distributed.devices import use_amp
    from fastssl.evaluate.classifier import save_classifier, timm_classifier_name
    from fastssl.evaluate.dino_head_probe import run_file
    from fastssl.evaluate.features import ProbeError
    from fastssl.evaluate.finetune import FinetuneConfig, finetune
    from fastssl.evaluate.photos import open_split
    from fastssl.evaluate.session import open_session

    if out is not None and head != "linear":
        raise click.UsageError(
            "--out writes timm's network, which has no place for the layers of a DINO head; it goes with --head linear"
        )
    if head == "dino":
        checkpoint = run_file(checkpoint)  # backbone and head of one moment
    with (
        open_session(checkpoint, which=which, device=device) as session,
        open_split(data, val, seed=seed, workers=workers) as split,
    ):
        available = len(split.train_index)
        chosen, about = pick(split)
        if not len(chosen):
            raise ProbeError(f"{data}: no labelled photos to learn from")
        if out is not None:
            timm_classifier_name(session.trained.arch)  # better said now than behind the work
        split = dataclasses.replace(split, train_index=chosen)
        config = FinetuneConfig(
            optim, epochs(about["labels"]), batch_size, head_lr_factor, **pictures(session, size, crop)
        )
        network = _network(session, checkpoint, head, len(split.classes), from_scratch=from_scratch, seed=seed)
        amp = use_amp("auto", session.device)
        steps = len(chosen) // batch_size
        with bar(session)(counted(config.epochs, "epoch"), config.epochs * steps * batch_size) as advance:
            result = finetune(
                network, split, config, device=session.device, amp=amp, seed=seed, workers=workers, progress=advance
            )
        record = session.record(
            evaluation,
            **{**split.record(), **about},
            head=head,
            from_scratch=from_scratch,
            seed=seed,
            bfloat16=amp,
            **_protocol(config),
            **dataclasses.asdict(result),
        )
        # First: whatever becomes of --out, the figures are not lost.
        finish(session, _line(session, result, available, config), record, json_path)
        if out is not None and session.is_main:
            names = split.train.classes or []
            classes = [names[label] if label < len(names) else str(label) for label in split.classes.tolist()]
            save_classifier(network, out, arch=session.trained.arch, classes=classes, view=config.test_view)


def _network(
    session: Session, checkpoint: Path, head: str, classes: int, *, from_scratch: bool, seed: int
) -> Classifier:
    import torch

    from fastssl.evaluate.classifier import Classifier
    from fastssl.evaluate.dino_head_probe import load_half_head

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if from_scratch:
            session.forget()
        source = "student" if from_scratch else session.trained.network
        hidden = load_half_head(checkpoint, source, fresh=from_scratch) if head == "dino" else None
    return Classifier(session.trained.backbone, classes, hidden, seed=seed)


def _protocol(config: FinetuneConfig) -> dict[str, Any]:
    optim = config.optim
    return {
        "optimizer": optim.name,
        "peak_lr": optim.peak_lr(config.batch_size),
        "momentum": optim.momentum if optim.name == "sgd" else None,
        **{name: getattr(optim, name) for name in ("lr", "lr_batch", "final_lr", "nesterov", "weight_decay")},
        **{name: getattr(config, name) for name in ("head_lr_factor", "epochs", "batch_size", "size", "crop")},
    }


def _line(session: Session, result: FinetuneResult, available: int, config: FinetuneConfig) -> str:
    name = "random weights" if session.trained.network == "random" else session.trained.network
    labels = counted(available, "label")
    of_labels = f"{result.train_samples:,} of {labels}" if result.train_samples < available else labels
    line = f"fine-tuned {name}, {of_labels}, {counted(result.classes, 'class')}: "
    line += f"{percent(result.accuracy, result.confidence)} of {counted(result.val_samples, 'photo')}"
    if result.top5 is not None:
        line += f", top-5 {result.top5:.2f} %"
    line += f"; best epoch {result.best_epoch} of {len(result.accuracies)}: {result.best_accuracy:.2f} %"
    if left := result.train_samples - result.steps_per_epoch * config.batch_size:
        line += f"; of {counted(left, 'label')} no batch of {config.batch_size:,} can be filled: passed over, "
        line += "others in every epoch"
    if result.unseen:
        line += f"; wrong by necessity, as of classes without a label: {counted(result.unseen, 'photo')}"
    return line
