"""Options that several bench commands share, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fastssl.cli.common import finite, json_option

_ENGINES = click.Choice(["native", "dali", "ffcv"])
_AMP: dict[str, Any] = {"type": click.Choice(["auto", "bf16", "off"]), "show_default": True}


def workers(help: str, *, multiple: bool = False) -> Callable:
    """``--workers``."""
    return click.option("--workers", type=click.IntRange(min=1), multiple=multiple, help=help)


def seconds(help: str) -> Callable:
    """``--seconds``."""
    kind = click.FloatRange(min=0, min_open=True)
    return click.option("--seconds", type=kind, callback=finite, default=10.0, show_default=True, help=help)


def data(metavar: str, help: str) -> Callable:
    """``--data``, which may be repeated."""
    return click.option(
        "--data",
        multiple=True,
        default=("synthetic",),
        show_default=True,
        metavar=metavar,
        help=f"{help} May be repeated.",
    )


def photos(help: str) -> Callable:
    """``--photos``."""
    return click.option("--photos", type=click.IntRange(min=1), default=512, show_default=True, help=help)


_OPTIONS: dict[str, Callable] = {
    "recipe": click.option(
        "--recipe",
        "recipes",
        multiple=True,
        default=("light-moco-mobilenetv3",),
        show_default=True,
        metavar="NAME|FILE.yaml",
        help="May be repeated.",
    ),
    "arch": click.option("--arch", metavar="NAME", help="Another network than the recipe's."),
    "set": click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change one value of the recipes, e.g. --set views.0.size=96.",
    ),
    "data": data(
        "FILE.beton",
        "JPEGs to read; 'synthetic' makes some of ImageNet's usual size, 'samples' is the sample set of the package.",
    ),
    "photos": photos("Number of synthetic photos."),
    "device": click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    "workers": workers("Decoding threads. Default: one a core."),
    "many workers": workers("Decoding threads; may be repeated. Default: one a core.", multiple=True),
    "batch": click.option(
        "--batch-size", type=click.IntRange(min=2), help="Pictures a batch. Default: the recipe's, at most 32 on a CPU."
    ),
    "amp": click.option("--amp", default="auto", help="bfloat16 autocast; auto: on a GPU.", **_AMP),
    "many amps": click.option(
        "--amp",
        "amps",
        multiple=True,
        default=("auto",),
        help="bfloat16 autocast; auto: on a GPU. May be repeated.",
        **_AMP,
    ),
    "compile": click.option("--compile", "compiled", is_flag=True, help="Compile the networks first (minutes)."),
    "graph": click.option(
        "--graph", is_flag=True, help="Record the whole step as one CUDA graph, colour operations included."
    ),
    "engine": click.option("--pipeline", type=_ENGINES, default="native", show_default=True, help="Engine."),
    "many engines": click.option(
        "--pipeline",
        "pipelines",
        type=_ENGINES,
        multiple=True,
        default=("native",),
        show_default=True,
        help="Engine; may be repeated.",
    ),
    "seconds": seconds("Counted time of each setting, of all that is compared in it together; warm-up comes on top."),
    "folder": click.option(
        "--folder",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        help="Where temporary files are written, on the disk that is meant.  [default: the system's folder for them]",
    ),
    "runs": click.option(
        "--runs",
        type=click.IntRange(min=5),
        default=5,
        show_default=True,
        help="Counted runs; figures are their medians.",
    ),
    "json": json_option,
}


def options(*names: str | Callable) -> Callable[[Callable], Callable]:
    """The options of these names, and others as they are, in the order of ``--help``."""

    def decorate(command: Callable) -> Callable:
        for name in reversed(names):
            command = (_OPTIONS[name] if isinstance(name, str) else name)(command)
        return command

    return decorate
