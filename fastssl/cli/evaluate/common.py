"""What the evaluations share on the command line: options, the photos' features, the line and the record at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import SomePath, finite, json_option, progress_bar, quiet_option, write_json
from fastssl.errors import counted

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from fastssl.evaluate.features import Bar, Features
    from fastssl.evaluate.photos import LabelledSplit
    from fastssl.evaluate.session import Session
    from fastssl.pipelines.beton.reader import BetonReader

COUNT: dict[str, Any] = {"type": click.IntRange(min=1)}
POSITIVE: dict[str, Any] = {"type": click.FloatRange(min=0, min_open=True), "callback": finite}
NOT_NEGATIVE: dict[str, Any] = {"type": click.FloatRange(min=0), "callback": finite}
OF_FEATURES = ("size", "crop", "normalisation", "batch_size", "workers")
PHOTOS: dict[str, Any] = {"type": SomePath(remote=True), "metavar": "FOLDER|TAR|FILE.beton|'PATTERN'"}


def option(name: str, help: str | None = None, *, variable: str | None = None, **more: Any) -> Callable:
    """``click.option``, whose default, if it has one, stands in ``--help``."""
    names = (name, variable) if variable else (name,)
    return click.option(*names, help=help, show_default="default" in more, **more)


def choice(*values: str) -> dict[str, Any]:
    """The type of an option that takes one of ``values``."""
    return {"type": click.Choice(values)}


checkpoint_argument = click.argument("checkpoint", type=SomePath())
which_option = option(
    "--which",
    "Which of a run's networks. Default: what the file holds; of a run's folder the student.",
    **choice("student", "teacher"),
)
data_option = option("--data", "Labelled photos to learn from.", required=True, **PHOTOS)
val_option = option(
    "--val",
    "Labelled photos to judge on. Default: a fifth of --data is held out, the same one for a --seed.",
    **PHOTOS,
)
size_option = option(
    "--size",
    "Pixels of the centre crop that the network sees. Default: as the run's own probe; without a run 224.",
    type=click.IntRange(min=8),
)
crop_option = option(
    "--crop",
    "Centre crop's share of the short side. Default: as the run's own probe; without a run 0.875.",
    type=click.FloatRange(0.1, 1.0),
)
device_option = option("--device", default="auto", **choice("auto", "cpu", "cuda"))
workers_option = option("--workers", "Decoding threads. Default: the cores this process may use.", **COUNT)
seed_option = option("--seed", "Of everything that is drawn.", type=click.IntRange(0, 2**63 - 1), default=0)
scratch_option = option(
    "--from-scratch", "The same network with random weights: what pre-training has to be compared with.", is_flag=True
)
reestimate_option = option(
    "--reestimate-bn",
    "First re-estimate the BatchNorm statistics from the centre crops of N photos of --data.",
    type=click.IntRange(min=2),
    metavar="N",
)


def options(*wanted: Callable) -> Callable[[Callable], Callable]:
    """A decorator that gives a command these options, in this order."""
    return lambda command: functools.reduce(lambda found, one: one(found), reversed(wanted), command)


#: What a command with frozen features of one centre crop begins with, and ends with.
FEATURES_OF = checkpoint_argument, which_option, data_option, val_option, size_option, crop_option, device_option
FEATURES_BY = workers_option, seed_option, reestimate_option, quiet_option, json_option


def bar(session: Session) -> Bar:
    """What shows progress: the first process's bar."""
    from fastssl.evaluate.features import silent

    return progress_bar if session.is_main else silent


def pictures(session: Session, asked: SimpleNamespace) -> dict[str, Any]:
    """``size`` and ``crop`` of the pictures: as asked for, which is said where the run's differ, or the run's, or the
    usual ones; and the network's ``normalisation``.
    """
    from fastssl.evaluate.features import EVALUATION_CROP, EVALUATION_SIZE

    found: dict[str, Any] = {"normalisation": session.trained.normalisation}
    for name, usual in (("size", EVALUATION_SIZE), ("crop", EVALUATION_CROP)):
        wanted, own = getattr(asked, name), getattr(session.trained, name)
        if session.is_main and None not in (wanted, own) and wanted != own:
            click.echo(f"--{name} {wanted:g}: the run itself was probed with {own:g} (probe.{name})", err=True)
        found[name] = wanted or own or usual
    return found


def network(
    session: Session, asked: SimpleNamespace, photos: BetonReader, indices: np.ndarray | None = None
) -> nn.Module:
    """The session's network; if that is asked for, with BatchNorm statistics of these photos (see ``reestimated``)."""
    from fastssl.evaluate.batchnorm import reestimated
    from fastssl.evaluate.features import require_size

    backbone, device = session.trained.backbone, session.device
    require_size(backbone, asked.size, device)
    if not asked.reestimate_bn:
        return backbone
    how = {name: getattr(asked, name) for name in (*OF_FEATURES, "seed")}
    return reestimated(backbone, photos, samples=asked.reestimate_bn, device=device, indices=indices, **how)


def features_of(
    session: Session, asked: SimpleNamespace, backbone: nn.Module, label: str, reader: BetonReader, index: np.ndarray
) -> Features:
    """This process's share of the features of the samples ``index``."""
    from fastssl.evaluate.features import share_features

    how = {name: getattr(asked, name) for name in OF_FEATURES}
    return share_features(backbone, reader, index, label, bar(session), device=session.device, **how)


def split_features(session: Session, asked: SimpleNamespace, split: LabelledSplit) -> tuple[Features, Features]:
    """``features_of`` both parts."""
    backbone = network(session, asked, split.train, split.train_index)
    bank = features_of(session, asked, backbone, "training photos", split.train, split.train_index)
    return bank, features_of(session, asked, backbone, "validation photos", split.val, split.val_index)


def finish(session: Session, line: str, record: dict[str, Any] | list[dict[str, Any]], json_path: str | None) -> None:
    """Say ``line`` and write ``record`` (or several), in the first process alone."""
    if session.is_main:
        click.echo(line, err=json_path == "-")
        write_json(json_path, record)


def percent(figures: Mapping[str, Any], prefix: str = "") -> str:
    """``68.30 % (95 %: 67.9 to 68.7), top-5 88.10 %``; without the end where there is no top-5."""
    low, high = figures[f"{prefix}confidence"]
    top5 = figures.get(f"{prefix}top5_accuracy")
    end = "" if top5 is None else f", top-5 {top5:.2f} %"
    return f"{figures[f'{prefix}accuracy']:.2f} % (95 %: {low:.1f} to {high:.1f}){end}"


def photos_of(figures: Mapping[str, Any], size: int, learned: str | None = None) -> str:
    """``9 photos, 3 classes, 39 photos to learn from, 224 px``; ``learned`` in place of the photos to learn from."""
    learned = learned or f"{counted(figures['train_samples'], 'photo')} to learn from"
    judged, classes = counted(figures["val_samples"], "photo"), counted(figures["classes"], "class")
    return f"{judged}, {classes}, {learned}, {size} px"
