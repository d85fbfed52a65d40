"""What the evaluations share on the command line: options, the photos' features, the line and the record at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import SomePath, finite, json_option, progress_bar, quiet_option, write_json

if TYPE_CHECKING:
    from fastssl.evaluate.features import Bar
    from fastssl.evaluate.session import Session

COUNT: dict[str, Any] = {"type": click.IntRange(min=1)}
POSITIVE: dict[str, Any] = {"type": click.FloatRange(min=0, min_open=True), "callback": finite}
NOT_NEGATIVE: dict[str, Any] = {"type": click.FloatRange(min=0), "callback": finite}
PHOTOS: dict[str, Any] = {"type": SomePath(remote=True), "metavar": "FOLDER|TAR|FILE.beton|'PATTERN'"}


def option(name: str, help: str | None = None, *, variable: str | None = None, **more: Any) -> Callable:
    """``click.option``, whose default, if it has one, stands in ``--help``."""
    names = (name, variable) if variable else (name,)
    return click.option(*names, help=help, show_default="default" in more, **more)


def choice(*values: str) -> dict[str, Any]:
    """The type of an option that takes one of ``values``."""
    return {"type": click.Choice(values)}


checkpoint_argument = click.argument("checkpoint", type=SomePath(), metavar="RUN|FILE|TIMM.TAG|hf-hub:NAME")
arch_option = option("--arch", "The network in a FILE of another program that does not say it.", metavar="NAME")
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
FEATURES_OF = checkpoint_argument, which_option, arch_option, data_option, val_option, size_option, crop_option
FEATURES_BY = device_option, workers_option, seed_option, reestimate_option, quiet_option, json_option


def tell(line: str) -> None:
    """For people, whatever goes to standard output."""
    click.echo(line, err=True)


def bar(session: Session) -> Bar:
    """What shows progress: the first process's bar."""
    from fastssl.evaluate.features import silent

    return progress_bar if session.is_main else silent


def finish(session: Session, line: str, record: dict[str, Any] | list[dict[str, Any]], json_path: str | None) -> None:
    """Say ``line`` and write ``record`` (or several), in the first process alone."""
    if session.is_main:
        click.echo(line, err=json_path == "-")
        write_json(json_path, record)
