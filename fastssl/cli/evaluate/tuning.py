"""``fastssl evaluate semi`` and ``finetune``: the whole network trained on, with labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import SomePath, json_option, quiet_option
from fastssl.cli.evaluate import common
from fastssl.cli.evaluate.common import COUNT, NOT_NEGATIVE, POSITIVE, choice, option, options
from fastssl.errors import FastSSLError, counted

if TYPE_CHECKING:
    from fastssl.evaluate.session import Session
    from fastssl.optim.optimizers import OptimConfig

#: Published epochs: 60 for 1 % of the labels, 30 for 10 %. The border between them is ours.
FEW, EPOCHS_FEW, EPOCHS_MORE = 0.05, 60, 30
#: (learning rate for 256 photos, weight decay) by optimiser: ours, of no paper.
DEFAULTS = {"sgd": (0.03, 0.0), "adamw": (5e-4, 0.05)}


def _share(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """``1%`` or ``0.01`` -> 0.01."""
    if value is None:
        return None
    from fastssl.evaluate.photos import parse_share

    try:
        return parse_share(value)
    except FastSSLError as error:
        raise click.BadParameter(str(error), ctx, param) from None


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


#: Of both commands, around their own.
_BEFORE = options(
    common.checkpoint_argument,
    common.which_option,
    common.arch_option,
    common.data_option,
    common.val_option,
    option(
        "--labels",
        "Share of each class's labels to learn from, drawn by --seed: 1%, 10%, 0.05.",
        callback=_share,
        metavar="SHARE",
    ),
)
_AFTER = options(
    option(
        "--head",
        "What stands on the backbone: a new linear layer; or the hidden layers of the run's DINO head, then a new "
        "linear layer.",
        default="linear",
        **choice("linear", "dino"),
    ),
    option("--batch-size", "Photos a step, of all processes together.", type=click.IntRange(min=2), default=1024),
    option("--head-lr-factor", "The head's rate in units of the backbone's.", default=1.0, **POSITIVE),
    common.scratch_option,
    common.size_option,
    common.crop_option,
    common.device_option,
    common.workers_option,
    common.seed_option,
    option(
        "--out",
        "Write the network of the last epoch as timm reads it (create_model's checkpoint_path).",
        type=SomePath(),
        metavar="FILE.safetensors",
        callback=_check_out,
    ),
    quiet_option,
    json_option,
)


@click.command()
@_BEFORE
@option(
    "--list",
    "Instead of a draw: the photos that keep their label, one a line, as SimCLR or SSLight publish them, or positions "
    "in --data.",
    variable="list_path",
    type=SomePath(),
    metavar="FILE",
)
@option(
    "--photos",
    "What --data was converted from: the photos of a --list are then looked up by name.",
    type=SomePath(),
    metavar="DIR|TAR",
)
@option("--epochs", "Default: 60 up to 5 % of the labels, 30 beyond.", **COUNT)
@option("--lr", "Learning rate for 256 photos a step; grows with the batch.", default=0.03, **POSITIVE)
@_AFTER
def semi(lr: float, **how: Any) -> None:
    """Fine-tune the whole network with a few of the labels, as the field reports it for 1 % and 10 % of ImageNet.

    SGD with Nesterov momentum 0.9, no weight decay, half a cosine to 1e-6 that changes once an epoch; random crops and
    flips. SSLight's published figures are those with --head dino and the published lists, in float32 on photos of full
    size, of the best epoch; the record names what was not so.

    \b
    fastssl evaluate semi runs/mine --data train.beton --val val.beton --labels 1%
    fastssl evaluate semi runs/mine --data train.beton --val val.beton --list 1percent.txt \\
        --photos imagenet/train --head dino
    """
    from fastssl.evaluate.features import ProbeError
    from fastssl.evaluate.finetune import SSLIGHT_OPTIM

    if (how["labels"] is None) == (how["list_path"] is None):
        raise click.UsageError("say which photos keep their label: --labels 1% for a draw, or --list FILE")
    if how["photos"] is not None and how["list_path"] is None:
        raise click.UsageError("--photos says where the names of a --list are looked up; a draw reads none")
    if how["list_path"] is not None and how["val"] is None:
        # A fifth that is held out could hold photos of the list.
        raise ProbeError(f"{how['list_path']}: a list goes with photos of their own to judge on; give them with --val")
    _fine_tune("semi", dataclasses.replace(SSLIGHT_OPTIM, lr=lr), SimpleNamespace(**how))


@click.command()
@_BEFORE
@option("--epochs", default=100, **COUNT)
@option(
    "--optimizer", "sgd: Nesterov momentum 0.9. adamw: for vision transformers.", default="sgd", **choice(*DEFAULTS)
)
@option(
    "--lr",
    "Learning rate for 256 photos a step; grows with the batch. Default: 0.03 (AdamW: 0.0005).",
    **POSITIVE,
)
@option("--weight-decay", "On all weights but biases and norms. Default: 0 (AdamW: 0.05).", **NOT_NEGATIVE)
@_AFTER
def finetune(optimizer: Any, weight_decay: float | None, lr: float | None, **how: Any) -> None:
    """Fine-tune the whole network on a labelled data set, as a rule another one than it was pre-trained on.

    Half a cosine to 1e-6 that changes once an epoch; random crops and flips. With --from-scratch the same network
    begins with random weights: the difference is what pre-training is worth. The frozen half of a transfer is `fastssl
    evaluate linear` on the same photos.

    \b
    fastssl evaluate finetune runs/mine --data flowers/train --val flowers/test --json finetune.json
    fastssl evaluate finetune runs/mine --data flowers/train --val flowers/test --from-scratch
    """
    from fastssl.evaluate.finetune import SSLIGHT_OPTIM

    default_lr, default_decay = DEFAULTS[optimizer]
    optim = dataclasses.replace(
        SSLIGHT_OPTIM,
        name=optimizer,
        nesterov=optimizer == "sgd",
        lr=default_lr if lr is None else lr,
        weight_decay=default_decay if weight_decay is None else weight_decay,
    )
    how["labels"] = 1.0 if how["labels"] is None else how["labels"]
    _fine_tune("finetune", optim, SimpleNamespace(**how, list_path=None))


def _fine_tune(evaluation: str, optim: OptimConfig, asked: SimpleNamespace) -> None:
    """Open checkpoint and photos, fine-tune, say and write what came out.

    Args:
        evaluation: the command, which is the record's kind.
        asked: the values of its other options.
    """
    import torch

    from fastssl.distributed.devices import use_amp
    from fastssl.evaluate.classifier import Classifier, load_half_head, run_file, save_classifier, timm_classifier_name
    from fastssl.evaluate.features import ProbeError
    from fastssl.evaluate.finetune import FinetuneConfig, finetune
    from fastssl.evaluate.frozen import pictures
    from fastssl.evaluate.photos import draw_labels, listed_labels, open_split, require_labels
    from fastssl.evaluate.protocols import Pictures, differing
    from fastssl.weights.source import open_session

    dino, seed, out = asked.head == "dino", asked.seed, asked.out
    if out is not None and dino:
        raise click.UsageError(
            "--out writes timm's network, which has no place for the layers of a DINO head; it goes with --head linear"
        )
    # Backbone and head are of one moment.
    checkpoint = run_file(asked.checkpoint) if dino else asked.checkpoint
    with (
        open_session(checkpoint, which=asked.which, arch=asked.arch, device=asked.device) as session,
        open_split(asked.data, asked.val, seed=seed, workers=asked.workers) as split,
    ):
        available, share = split.train_index, asked.labels
        if asked.list_path is not None:
            chosen = listed_labels(asked.list_path, split.train, asked.photos)
            share = len(chosen) / len(available)
        else:
            chosen = available[draw_labels(require_labels(split.train)[available], share, seed)]
        if not len(chosen):
            raise ProbeError(f"{asked.data}: no labelled photos to learn from")
        if out is not None:
            timm_classifier_name(session.trained.arch)  # better said now than behind the work
        split = dataclasses.replace(split, train_index=chosen)
        published = FinetuneConfig(epochs=EPOCHS_FEW if share <= FEW else EPOCHS_MORE)
        epochs = asked.epochs or published.epochs
        seen = pictures(session, asked, common.tell)
        config = FinetuneConfig(optim, epochs, asked.batch_size, asked.head_lr_factor, **seen)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            source, fresh = session.trained.network, asked.from_scratch
            if fresh:
                session.forget()
            hidden = load_half_head(checkpoint, "student" if fresh else source, fresh=fresh) if dino else None
        network = Classifier(session.trained.backbone, len(split.classes), hidden, seed=seed)
        amp = use_amp("auto", session.device)
        with common.bar(session)(counted(epochs, "epoch"), epochs * len(chosen)) as advance:
            how: dict[str, Any] = {"device": session.device, "amp": amp, "seed": seed, "workers": asked.workers}
            result = finetune(network, split, config, progress=advance, **how)
        used = {**split.record(), **config.record(), **dataclasses.asdict(result)}  # of batches the one that was used
        used |= {"labels": share, "head": asked.head, "from_scratch": fresh, "seed": seed, "bfloat16": amp}
        used["peak_lr"] = optim.peak_lr(result.batch_size)
        if evaluation == "semi":
            used |= {"list": asked.list_path and asked.list_path.name, "drawn": asked.list_path is None}
            sslight = {**dataclasses.asdict(Pictures()), **published.record(), "head": "dino", "drawn": False}
            used |= {"protocol": "sslight", "changed": differing(used, sslight)}
        record = session.record(evaluation, **used)
        # First: whatever becomes of --out, the figures are not lost.
        common.finish(session, _line(session, record, len(available)), record, asked.json_path)
        if out is not None and session.is_main:
            names = split.train.classes or []
            classes = [names[label] if label < len(names) else str(label) for label in split.classes.tolist()]
            save_classifier(network, out, arch=session.trained.arch, classes=classes, view=config.test_view)


def _line(session: Session, record: dict[str, Any], available: int) -> str:
    from fastssl.evaluate.frozen import percent

    name = "random weights" if session.trained.network == "random" else session.trained.network
    labels, learned = counted(available, "label"), record["train_samples"]
    of_labels = f"{learned:,} of {labels}" if learned < available else labels
    line = f"fine-tuned {name}, {of_labels}, {counted(record['classes'], 'class')}: "
    line += f"{percent(record)} of {counted(record['val_samples'], 'photo')}"
    if record["top5"] is not None:
        line += f", top-5 {record['top5']:.2f} %"
    line += f"; best epoch {record['best_epoch']} of {record['epochs']}: {record['best_accuracy']:.2f} %"
    if record["steps_per_epoch"] == 1:
        line += "; one step an epoch, with all labels there are: more with a smaller --batch-size"
    if record.get("changed"):
        line += f"; not as published: {', '.join(record['changed'])}"
    if record["unseen"]:
        line += f"; wrong by necessity, as of classes without a label: {counted(record['unseen'], 'photo')}"
    return line
