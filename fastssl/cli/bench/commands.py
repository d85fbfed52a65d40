"""The bench commands: each takes its options and hands them to the suite of its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastssl.cli.bench.measure import measure
from fastssl.cli.bench.options import data, options, photos, seconds, workers
from fastssl.cli.common import SomePath, console
from fastssl.errors import counted

#: Eleven contenders in turns: with less than three seconds a turn the rates are those of their queues.
_PEERS_SECONDS = 160.0
#: Parameters of the recipe's loader, which ``--peers`` does not measure, and their options.
_OF_A_RECIPE = {"recipes": "recipe", "overrides": "set", "device": "device", "pipelines": "pipeline"}


@click.command()
@options(
    "recipe",
    "set",
    "data",
    "photos",
    "device",
    "many workers",
    "batch",
    "many engines",
    "seconds",
    "runs",
    click.option(
        "--peers",
        is_flag=True,
        help="Instead: our three engines and other people's loaders, two MoCo-v2 views of 224 px, on the CPU; counted "
        "time 160 s.",
    ),
    "json",
)
@click.pass_context
def loader(ctx: click.Context, peers: bool, **chosen: Any) -> None:
    """Decoding, the host's cost in the number of views, and the whole loader; of the other engines the whole loader.

    \b
    fastssl bench loader --recipe light-moco-mobilenetv3 --seconds 10 --json out.jsonl
    fastssl bench loader --data photos.beton --workers 1 --workers 8
    fastssl bench loader --device cuda --pipeline native --pipeline dali --json engines.jsonl
    fastssl bench loader --peers --json peers.jsonl
    """
    if peers:
        _peers(ctx, chosen)
    else:
        measure("loader", **chosen)


def _peers(ctx: click.Context, chosen: dict) -> None:
    from fastssl.benchmarks.suites.peers import left_out

    for name, option in _OF_A_RECIPE.items():
        chosen.pop(name)
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--peers compares fixed views of all engines on the CPU; leave --{option} out")
    if ctx.get_parameter_source("seconds") is click.core.ParameterSource.DEFAULT:
        chosen["seconds"] = _PEERS_SECONDS
    for missing in left_out():
        console.say(f"left out: {missing}")
    settings = len(chosen["data"]) * max(1, len(chosen["workers"]))
    minutes = counted(round(settings * chosen["seconds"] * 1.5 / 60), "minute")
    console.say(f"about {minutes} ...")
    measure("loaders", suite="peers", **chosen)


@click.command()
@options("recipe", "set", "data", "photos", "device", "batch", "runs", "json")
def views(**chosen: Any) -> None:
    """Crop and colour of decoded pictures that lie on the device.

    \b
    fastssl bench views --recipe light-moco-mobilenetv3 --recipe quickstart --json out.jsonl
    """
    measure("views", **chosen)


@click.command()
@options(
    "recipe",
    "set",
    "device",
    click.option(
        "--batch-size",
        "batch_sizes",
        type=click.IntRange(min=1),
        multiple=True,
        help="Queries; may be repeated. Default: the recipe's batch.",
    ),
    "runs",
    "json",
)
def loss(**chosen: Any) -> None:
    """The loss, forward and backward, in turns with the dense form of it.

    \b
    fastssl bench loss --batch-size 256 --batch-size 512 --json out.jsonl
    fastssl bench loss --set moco.queue=16384 --set moco.weighting=geometric --set moco.neighbors=null
    """
    measure("loss", **chosen)


@click.command()
@options(
    "recipe",
    "arch",
    "set",
    "device",
    "batch",
    "many amps",
    "compile",
    "graph",
    "runs",
    click.option("--peers", is_flag=True, help="In turns with a MoCo step as public code writes it, in NCHW memory."),
    "json",
)
def step(**chosen: Any) -> None:
    """The training step on views that are on the device already. A batch that does not fit is halved.

    \b
    fastssl bench step --peers --json out.jsonl
    fastssl bench step --recipe light-moco-mobilenetv3 --amp bf16 --compile --graph --json out.jsonl
    fastssl bench step --arch resnet18 --batch-size 64
    """
    measure("step", **chosen)


@click.command()
@options("recipe", "arch", "set", "data", "photos", "device", "workers", "batch", "amp", "compile", "graph", "engine")
@options("seconds", "runs", "json")
def train(**chosen: Any) -> None:
    """Loader and step together, how much faster the same steps are on cached batches, and what would help.

    What would help is tried: the sentence that is printed holds the predicted and the measured gain.

    \b
    fastssl bench train --recipe light-moco-mobilenetv3 --data photos.beton --seconds 30 --json out.jsonl
    """
    measure("train", **chosen)


@click.command()
@options(
    data(
        "SRC",
        "Folder or tar of photos, as convert-imagenet takes it; 'synthetic' makes JPEGs of ImageNet's usual size.",
    ),
    photos("Number of synthetic photos; of SRC at most so many, evenly spaced."),
    workers("Threads; may be repeated. Default: one a core.", multiple=True),
    "folder",
    "runs",
    click.option("--peers", is_flag=True, help="In turns with ffcv's DatasetWriter, where that is installed."),
    "json",
)
def convert(peers: bool, **chosen: Any) -> None:
    """Whole conversions: JPEGs copied through, and scaled to a short side of 256 px and re-encoded. pair/s are
    photos/s.

    \b
    fastssl bench convert --workers 1 --workers 8 --json out.jsonl
    fastssl bench convert --data photos/ --peers
    """
    from fastssl.pipelines.engines.registry import engine_state

    if peers and (problem := engine_state("ffcv").problem):
        console.say(f"left out: ffcv's DatasetWriter ({problem})")
    measure("convert", peers=peers, **chosen)


@click.command()
@options(
    "data",
    "photos",
    "device",
    workers("Decoding threads, beside one. Default: one a core."),
    seconds("Counted time of decoding; the other figures take as long as their runs do."),
    "folder",
    "runs",
    "json",
)
def ceilings(**chosen: Any) -> None:
    """What this machine can do at most: bare JPEG decoding, memory copies, matrix products, and the disk past the page
    cache.

    Each run writes a file of up to 256 MB and reads it.

    \b
    fastssl bench ceilings --json out.jsonl
    fastssl bench ceilings --data photos.beton --folder /mnt/photos --seconds 30
    """
    measure("ceilings", **chosen)


@click.command()
@click.argument("results", nargs=-1, required=True, type=SomePath(), metavar="RESULTS...")
@click.option(
    "--out", type=SomePath(), default="bench-report", show_default=True, metavar="DIR", help="Made if it is not there."
)
def report(results: tuple[Path, ...], out: Path) -> None:
    """Write what the records in RESULTS say into DIR: report.md, report.html with its plots inside, the plots, and
    recipes.md.

    \b
    fastssl bench train --json train.jsonl
    fastssl bench report train.jsonl loader.jsonl --out bench-report
    """
    from fastssl.benchmarks.harness.report import write_report

    for path in write_report(results, out):
        click.echo(path)
