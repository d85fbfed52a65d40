"""The bench commands: each takes its options and hands them to the suite of its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fastssl.cli.bench.measure import measure
from fastssl.cli.common import SomePath, console, finite, json_option
from fastssl.errors import counted

#: Eleven contenders in turns: with less than three seconds a turn the rates are those of their queues.
_PEERS_SECONDS = 160.0
#: Parameters of the recipe's loader, which ``--peers`` does not measure, and their options.
_OF_A_RECIPE = {"recipes": "recipe", "overrides": "set", "device": "device", "pipelines": "pipeline"}

_COUNT = click.IntRange(min=1)
_ENGINE = click.Choice(["native", "dali", "ffcv", "torchcodec"])
_AMP, _AMP_HELP = click.Choice(["auto", "bf16", "off"]), "bfloat16 autocast; auto: on a GPU."
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_MANY: dict[str, Any] = {"multiple": True}
_DATA: dict[str, Any] = {**_MANY, "default": ("synthetic",)}
_PHOTOS: dict[str, Any] = {"type": _COUNT, "default": 512}
_SECONDS: dict[str, Any] = {"type": click.FloatRange(min=0, min_open=True), "callback": finite, "default": 10.0}


def option(names: str, help: str | None = None, **settings: Any) -> Callable:
    """A click option, which shows its default where it has one; ``names``: with its parameter's, if that is another."""
    settings.setdefault("show_default", "default" in settings)
    return click.option(*names.split(), help=help, **settings)


_OPTIONS: dict[str, Callable] = {
    "recipe": option(
        "--recipe recipes", "May be repeated.", default=("light-moco-mobilenetv3",), metavar="NAME|FILE.yaml", **_MANY
    ),
    "arch": option("--arch", "Another network than the recipe's.", metavar="NAME"),
    "set": option(
        "--set overrides", "Change one value of the recipes, e.g. --set views.0.size=96.", metavar="KEY=VALUE", **_MANY
    ),
    "data": option(
        "--data",
        "JPEGs to read; 'synthetic' makes some of ImageNet's usual size, 'samples' is the sample set of the package. "
        "May be repeated.",
        metavar="FILE.beton|'PATTERN'",
        **_DATA,
    ),
    "photos": option("--photos", "Number of synthetic photos.", **_PHOTOS),
    "device": option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"),
    "workers": option("--workers", "Decoding threads. Default: one a core.", type=_COUNT),
    "many workers": option(
        "--workers", "Decoding threads; may be repeated. Default: one a core.", type=_COUNT, **_MANY
    ),
    "batch": option(
        "--batch-size", "Pictures a batch. Default: the recipe's, at most 32 on a CPU.", type=click.IntRange(min=2)
    ),
    "queries": option(
        "--batch-size batch_sizes", "Queries; may be repeated. Default: the recipe's batch.", type=_COUNT, **_MANY
    ),
    "amp": option("--amp", _AMP_HELP, type=_AMP, default="auto"),
    "many amps": option("--amp amps", f"{_AMP_HELP} May be repeated.", type=_AMP, default=("auto",), **_MANY),
    "compile": option("--compile compiled", "Compile the networks first (minutes).", is_flag=True),
    "graph": option("--graph", "Record the whole step as one CUDA graph, colour operations included.", is_flag=True),
    "engine": option("--pipeline", "Engine.", type=_ENGINE, default="native"),
    "many engines": option(
        "--pipeline pipelines", "Engine; may be repeated.", type=_ENGINE, default=("native",), **_MANY
    ),
    "seconds": option(
        "--seconds",
        "Counted time of each setting, of all that is compared in it together; warm-up comes on top.",
        **_SECONDS,
    ),
    "folder": option(
        "--folder",
        "Where temporary files are written, on the disk that is meant.  [default: the system's folder for them]",
        type=_FOLDER,
        metavar="DIR",
    ),
    "runs": option("--runs", "Counted runs; figures are their medians.", type=click.IntRange(min=5), default=5),
    "json": json_option,
}


def options(*names: str | Callable) -> Callable[[Callable], Callable]:
    """The options of these names, and others as they are, in the order of ``--help``."""

    def decorate(command: Callable) -> Callable:
        for name in reversed(names):
            command = (_OPTIONS[name] if isinstance(name, str) else name)(command)
        return command

    return decorate


@click.command()
@options("recipe", "set", "data", "photos", "device", "many workers", "batch", "many engines", "seconds", "runs")
@option(
    "--peers",
    "Instead: our three engines and other people's loaders, two MoCo-v2 views of 224 px, on the CPU; counted "
    "time 160 s.",
    is_flag=True,
)
@options("json")
@click.pass_context
def loader(ctx: click.Context, peers: bool, **chosen: Any) -> None:
    """Decoding, the host's cost in the number of views, and the whole loader; of the other engines the whole loader.

    \b
    fastssl bench loader --recipe light-moco-mobilenetv3 --seconds 10 --json out.jsonl
    fastssl bench loader --data photos.beton --workers 1 --workers 8
    fastssl bench loader --device cuda --pipeline native --pipeline dali --json engines.jsonl
    fastssl bench loader --peers --json peers.jsonl
    """
    if not peers:
        measure("loader", **chosen)
        return
    from fastssl.benchmarks.suites.peers import left_out

    for name, flag in _OF_A_RECIPE.items():
        chosen.pop(name)
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--peers compares fixed views of all engines on the CPU; leave --{flag} out")
    if ctx.get_parameter_source("seconds") is click.core.ParameterSource.DEFAULT:
        chosen["seconds"] = _PEERS_SECONDS
    for missing in left_out():
        console.say(f"left out: {missing}")
    settings = len(chosen["data"]) * max(1, len(chosen["workers"]))
    console.say(f"about {counted(round(settings * chosen['seconds'] * 1.5 / 60), 'minute')} ...")
    measure("loaders", suite="peers", **chosen)


@click.command()
@options("recipe", "set", "data", "photos", "device", "batch", "amp", "runs", "json")
def views(**chosen: Any) -> None:
    """Crop and colour of decoded pictures that lie on the device, into the precision of the step.

    \b
    fastssl bench views --recipe light-moco-mobilenetv3 --recipe quickstart --json out.jsonl
    """
    measure("views", **chosen)


@click.command()
@options("recipe", "set", "device", "queries", "runs", "json")
def loss(**chosen: Any) -> None:
    """The loss, forward and backward, in turns with the dense form of it.

    \b
    fastssl bench loss --batch-size 256 --batch-size 512 --json out.jsonl
    fastssl bench loss --set moco.queue=16384 --set moco.weighting=geometric --set moco.neighbors=null
    """
    measure("loss", **chosen)


@click.command()
@options("recipe", "arch", "set", "device", "batch", "many amps", "compile", "graph", "runs")
@option("--peers", "In turns with a MoCo step as public code writes it, in NCHW memory.", is_flag=True)
@option(
    "--count",
    "Instead: launches, bytes, memory by part of a GPU's step, counted on any machine, at the recipe's own batch.",
    is_flag=True,
)
@options("json")
def step(count: bool, **chosen: Any) -> None:
    """The training step on views that are on the device already. A batch that does not fit is halved.

    \b
    fastssl bench step --count --recipe light-moco-mobilenetv3 --json out.jsonl
    fastssl bench step --peers --json out.jsonl
    fastssl bench step --recipe light-moco-mobilenetv3 --amp bf16 --compile --graph --json out.jsonl
    fastssl bench step --arch resnet18 --batch-size 64
    """
    if not count:
        measure("step", **chosen)
        return
    if chosen["peers"] or chosen["graph"] or chosen["device"] != "auto":
        what = "our step for a GPU as it is written, or with --compile"
        raise click.UsageError(f"--count takes {what}; leave --peers, --graph and --device out")
    from fastssl.benchmarks.suites.count import table

    measure("count", show=table, **chosen)


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
    option(
        "--data",
        "Folder or tar of photos, as convert-imagenet takes it; 'synthetic' makes JPEGs of ImageNet's usual size. May "
        "be repeated.",
        metavar="SRC",
        **_DATA,
    ),
    option("--photos", "Number of synthetic photos; of SRC at most so many, evenly spaced.", **_PHOTOS),
    option("--workers", "Threads; may be repeated. Default: one a core.", type=_COUNT, **_MANY),
    "folder",
    "runs",
    option("--peers", "In turns with ffcv's DatasetWriter, where that is installed.", is_flag=True),
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
    option("--workers", "Decoding threads, beside one. Default: one a core.", type=_COUNT),
    option("--seconds", "Counted time of decoding; the other figures take as long as their runs do.", **_SECONDS),
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
@option("--out", "Made if it is not there.", type=SomePath(), default="bench-report", metavar="DIR")
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
