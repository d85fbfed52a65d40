"""What the evaluations share on the command line: their options, the photos' features, the line and the record at the
end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import SomePath, json_option, progress_bar, quiet_option, write_json

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from fastssl.evaluate.features import Bar, Features
    from fastssl.evaluate.photos import LabelledSplit
    from fastssl.evaluate.session import Session
    from fastssl.pipelines.beton.reader import BetonReader

checkpoint_argument = click.argument("checkpoint", type=SomePath())
which_option = click.option(
    "--which",
    type=click.Choice(["student", "teacher"]),
    help="Which of a run's networks. Default: what the file holds; of a run's folder the student.",
)
data_option = click.option(
    "--data", required=True, type=SomePath(), metavar="FOLDER|TAR|FILE.beton", help="Labelled photos to learn from."
)
val_option = click.option(
    "--val",
    type=SomePath(),
    metavar="FOLDER|TAR|FILE.beton",
    help="Labelled photos to judge on. Default: a fifth of --data is held out, the same one for a --seed.",
)
size_option = click.option(
    "--size",
    type=click.IntRange(min=8),
    help="Pixels of the centre crop that the network sees. Default: as the run's own probe; without a run 224.",
)
crop_option = click.option(
    "--crop",
    type=click.FloatRange(0.1, 1.0),
    help="Centre crop's share of the short side. Default: as the run's own probe; without a run 0.875.",
)
device_option = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="Decoding threads. Default: the cores this process may use."
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of everything that is drawn."
)
scratch_option = click.option(
    "--from-scratch",
    is_flag=True,
    help="The same network with random weights: what pre-training has to be compared with.",
)
reestimate_option = click.option(
    "--reestimate-bn",
    type=click.IntRange(min=2),
    metavar="N",
    help="First re-estimate the BatchNorm statistics from the centre crops of N photos of --data.",
)
feature_batch_option = click.option(
    "--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Photos a pass of the network."
)

#: Of the commands that read frozen features of one centre crop.
FEATURE_OPTIONS = (
    checkpoint_argument,
    which_option,
    data_option,
    val_option,
    size_option,
    crop_option,
    device_option,
    feature_batch_option,
    workers_option,
    seed_option,
    reestimate_option,
    quiet_option,
    json_option,
)


def options(*wanted: Callable) -> Callable[[Callable], Callable]:
    """A decorator that gives a command these options, in this order."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(wanted):
            command = option(command)
        return command

    return decorate


def bar(session: Session) -> Bar:
    """What shows progress: the first process's bar."""
    from fastssl.evaluate.features import silent

    return progress_bar if session.is_main else silent


def pictures(session: Session, size: int | None, crop: float | None) -> dict[str, Any]:
    """``size`` and ``crop`` of the pictures: as asked for, which is said where the run's differ, or the run's, or the
    usual ones.
    """
    from fastssl.evaluate.features import EVALUATION_CROP, EVALUATION_SIZE

    trained = session.trained
    for name, asked, own in (("size", size, trained.size), ("crop", crop, trained.crop)):
        if session.is_main and None not in (asked, own) and asked != own:
            click.echo(f"--{name} {asked:g}: the run itself was probed with {own:g} (probe.{name})", err=True)
    return {"size": size or trained.size or EVALUATION_SIZE, "crop": crop or trained.crop or EVALUATION_CROP}


def network(
    session: Session,
    photos: BetonReader,
    indices: np.ndarray | None = None,
    *,
    size: int,
    crop: float,
    batch_size: int,
    workers: int | None,
    reestimate_bn: int | None,
    seed: int,
    **_: Any,
) -> nn.Module:
    """The session's network; if that is asked for, its re-estimated BatchNorm statistics from these photos."""
    from fastssl.evaluate.batchnorm import reestimated
    from fastssl.evaluate.features import require_size

    require_size(session.trained.backbone, size, session.device)
    if not reestimate_bn:
        return session.trained.backbone
    return reestimated(
        session.trained.backbone,
        photos,
        samples=reestimate_bn,
        size=size,
        seed=seed,
        device=session.device,
        batch_size=batch_size,
        workers=workers,
        crop=crop,
        indices=indices,
    )


def split_features(session: Session, split: LabelledSplit, **how: Any) -> tuple[Features, Features]:
    """This process's share of the features of both parts; ``how``: the values of FEATURE_OPTIONS."""
    backbone = network(session, split.train, split.train_index, **how)
    kept = {name: how[name] for name in ("size", "crop", "batch_size", "workers")}
    return (
        share_features(session, backbone, "training photos", split.train, split.train_index, **kept),
        share_features(session, backbone, "validation photos", split.val, split.val_index, **kept),
    )


def share_features(
    session: Session, backbone: nn.Module, label: str, reader: BetonReader, index: np.ndarray, **how: Any
) -> Features:
    """This process's share of the features of the samples ``index``, with a bar."""
    from fastssl.evaluate.features import extract_features, shard

    mine = shard(index)
    with bar(session)(label, len(mine)) as advance:
        return extract_features(backbone, reader, indices=mine, device=session.device, progress=advance, **how)


def finish(session: Session, line: str, record: dict[str, Any] | list[dict[str, Any]], json_path: str | None) -> None:
    """Say ``line`` and write ``record`` (or several), in the first process alone."""
    if session.is_main:
        click.echo(line, err=json_path == "-")
        write_json(json_path, record)


def percent(accuracy: float, confidence: tuple[float, float]) -> str:
    """``68.30 % (95 %: 67.9 to 68.7)``."""
    return f"{accuracy:.2f} % (95 %: {confidence[0]:.1f} to {confidence[1]:.1f})"
