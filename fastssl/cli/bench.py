"""``fastssl bench``: images a second of each part, beside what limits it."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from fastssl.cli.command import command_line
from fastssl.cli.common import SomePath, console, finite, json_option, write_json
from fastssl.errors import FastSSLError, counted
from fastssl.utils.json_text import to_json

if TYPE_CHECKING:
    from fastssl.benchmarks.harness.records import Record
    from fastssl.config.recipe import Recipe

#: A name for the reader, and the measurement.
Job = tuple[str, "Callable[[], list[Record]]"]

recipe_option = click.option(
    "--recipe",
    "recipes",
    multiple=True,
    default=("light-moco-mobilenetv3",),
    show_default=True,
    metavar="NAME|FILE.yaml",
    help="May be repeated.",
)
arch_option = click.option("--arch", metavar="NAME", help="Another network than the recipe's.")
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the recipes, e.g. --set views.0.size=96.",
)
data_option = click.option(
    "--data",
    multiple=True,
    default=("synthetic",),
    show_default=True,
    metavar="FILE.beton",
    help="JPEGs to read; 'synthetic' makes some of ImageNet's usual size, 'samples' is the sample set of the "
    "package. May be repeated.",
)
photos_option = click.option(
    "--photos", type=click.IntRange(min=1), default=512, show_default=True, help="Number of synthetic photos."
)
device_option = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
batch_option = click.option(
    "--batch-size", type=click.IntRange(min=2), help="Pictures a batch. Default: the recipe's, at most 32 on a CPU."
)
runs_option = click.option(
    "--runs", type=click.IntRange(min=5), default=5, show_default=True, help="Counted runs; figures are their medians."
)
seconds_option = click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    callback=finite,
    default=10.0,
    show_default=True,
    help="Counted time of each setting, of all that is compared in it together; warm-up comes on top.",
)
amp_option = click.option(
    "--amp",
    type=click.Choice(["auto", "bf16", "off"]),
    default="auto",
    show_default=True,
    help="bfloat16 autocast; auto: on a GPU.",
)
compile_option = click.option("--compile", "compiled", is_flag=True, help="Compile the networks first (minutes).")
graph_option = click.option(
    "--graph", is_flag=True, help="Record the whole step as one CUDA graph, colour operations included."
)
folder_option = click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where temporary files are written, on the disk that is meant.  [default: the system's folder for them]",
)

#: Eleven contenders in turns: with less than three seconds a turn the rates are those of their queues.
_PEERS_SECONDS = 160.0


@click.group(subcommand_metavar="WHAT [ARGS]...")
def bench() -> None:
    """Measure images/s of the loader, the views, the loss, the step, of training as a whole, or of the conversion; and
    what the machine can do.

    Every figure is a median of alternating runs after a warm-up, and stands beside a ceiling that was measured in the
    same process. A pair is one source picture with all its views.

    \b
    fastssl bench loader --seconds 10 --json loader.jsonl
    fastssl bench train --recipe light-moco-mobilenetv3 --data photos.beton
    """
    # torch's profiler, which counts bytes here, talks to the terminal unless told not to before torch is loaded.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@bench.command()
@recipe_option
@set_option
@data_option
@photos_option
@device_option
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    multiple=True,
    help="Decoding threads; may be repeated. Default: one a core.",
)
@batch_option
@click.option(
    "--pipeline",
    "pipelines",
    type=click.Choice(["native", "dali", "ffcv"]),
    multiple=True,
    default=("native",),
    show_default=True,
    help="Engine; may be repeated.",
)
@seconds_option
@runs_option
@click.option(
    "--peers",
    is_flag=True,
    help="Instead: our three engines and other people's loaders, two MoCo-v2 views of 224 px, on the CPU; counted "
    "time 160 s.",
)
@json_option
@click.pass_context
def loader(
    ctx, recipes, overrides, data, photos, device, workers, batch_size, pipelines, seconds, runs, peers, json_path
) -> None:
    """Decoding, the host's cost in the number of views, and the whole loader; of the other engines the whole loader.

    \b
    fastssl bench loader --recipe light-moco-mobilenetv3 --seconds 10 --json out.jsonl
    fastssl bench loader --data photos.beton --workers 1 --workers 8
    fastssl bench loader --device cuda --pipeline native --pipeline dali --json engines.jsonl
    fastssl bench loader --peers --json peers.jsonl
    """
    if peers:
        _peers(ctx, data, workers or (None,), batch_size, seconds, runs, photos, json_path)
        return
    from fastssl.benchmarks.suites.loader import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)
    settings = itertools.product(_load(recipes, overrides), data, workers or (None,), dict.fromkeys(pipelines))
    _measure(
        json_path,
        [
            (
                f"loader, {name}, {engine}, {source}{_threads(threads)}",
                lambda recipe=recipe, name=name, source=source, threads=threads, engine=engine: run(
                    recipe, name, source, place, threads, batch_size, seconds, runs, photos, engine
                ),
            )
            for (recipe, name), source, threads, engine in settings
        ],
    )


def _peers(ctx: click.Context, data, workers, batch_size, seconds, runs, photos, json_path) -> None:
    from fastssl.benchmarks.suites.peers import left_out, run

    option = {"recipes": "recipe", "overrides": "set", "pipelines": "pipeline"}
    for name in ("recipes", "overrides", "device", "pipelines"):
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--peers compares fixed views of all engines on the CPU; leave --{option.get(name, name)} out"
            )
    if ctx.get_parameter_source("seconds") is click.core.ParameterSource.DEFAULT:
        seconds = _PEERS_SECONDS
    for missing in left_out():
        console.print(f"left out: {missing}", highlight=False, markup=False, soft_wrap=True)
    settings = len(data) * len(workers)
    minutes = counted(round(settings * seconds * 1.5 / 60), "minute")
    console.print(f"about {minutes} ...", highlight=False, markup=False)
    options = {
        "seconds": seconds,
        "runs": runs,
        "photos": photos,
        **({} if batch_size is None else {"batch_size": batch_size}),
    }
    _measure(
        json_path,
        [
            (
                f"loaders, {source}{_threads(threads)}",
                lambda source=source, threads=threads: run(source, workers=threads, **options),
            )
            for source, threads in itertools.product(data, workers)
        ],
    )


@bench.command()
@recipe_option
@set_option
@data_option
@photos_option
@device_option
@batch_option
@runs_option
@json_option
def views(recipes, overrides, data, photos, device, batch_size, runs, json_path) -> None:
    """Crop and colour of decoded pictures that lie on the device.

    \b
    fastssl bench views --recipe light-moco-mobilenetv3 --recipe quickstart --json out.jsonl
    """
    from fastssl.benchmarks.suites.views import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)
    _measure(
        json_path,
        [
            (
                f"views, {name}, {source}",
                lambda recipe=recipe, name=name, source=source: run(
                    recipe, name, source, place, batch_size, runs, photos
                ),
            )
            for (recipe, name), source in itertools.product(_load(recipes, overrides), data)
        ],
    )


@bench.command()
@recipe_option
@set_option
@device_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    multiple=True,
    help="Queries; may be repeated. Default: the recipe's batch.",
)
@runs_option
@json_option
def loss(recipes, overrides, device, batch_size, runs, json_path) -> None:
    """The loss, forward and backward, in turns with the dense form of it.

    \b
    fastssl bench loss --batch-size 256 --batch-size 512 --json out.jsonl
    fastssl bench loss --set moco.queue=16384 --set moco.weighting=geometric --set moco.neighbors=null
    """
    from fastssl.benchmarks.suites.loss import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)

    def measure(recipe: Recipe, name: str, queries: int) -> list[Record]:
        if recipe.method != "moco":
            raise FastSSLError(
                f"{name}: bench loss measures smoothed InfoNCE, which {recipe.method} does not use; name a MoCo recipe"
            )
        moco = recipe.moco
        records = run(
            place,
            queries,
            moco.queue,
            moco.projector.out,
            runs,
            temperature=moco.temperature,
            smoothing=moco.smoothing,
            weighting=moco.weighting,
            neighbors=moco.neighbors,
        )
        return [replace(record, recipe=name) for record in records]

    _measure(
        json_path,
        [
            (f"loss, {name}, {counted(queries, 'query')}", partial(measure, recipe, name, queries))
            for recipe, name in _load(recipes, overrides)
            for queries in batch_size or (recipe.train.batch_size,)
        ],
    )


@bench.command()
@recipe_option
@arch_option
@set_option
@device_option
@batch_option
@click.option(
    "--amp",
    "amps",
    type=click.Choice(["auto", "bf16", "off"]),
    multiple=True,
    default=("auto",),
    show_default=True,
    help="bfloat16 autocast; auto: on a GPU. May be repeated.",
)
@compile_option
@graph_option
@runs_option
@click.option("--peers", is_flag=True, help="In turns with a MoCo step as public code writes it, in NCHW memory.")
@json_option
def step(recipes, arch, overrides, device, batch_size, amps, compiled, graph, runs, peers, json_path) -> None:
    """The training step on views that are on the device already. A batch that does not fit is halved.

    \b
    fastssl bench step --peers --json out.jsonl
    fastssl bench step --recipe light-moco-mobilenetv3 --amp bf16 --compile --graph --json out.jsonl
    fastssl bench step --arch resnet18 --batch-size 64
    """
    from fastssl.benchmarks.suites.step import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)
    _measure(
        json_path,
        [
            (
                f"step, {name}, amp {amp}",
                lambda recipe=recipe, name=name, amp=amp: run(
                    recipe, name, place, batch_size, amp, compiled, runs, peers, graph
                ),
            )
            for amp, (recipe, name) in itertools.product(amps, _load(recipes, overrides, arch))
        ],
    )


@bench.command()
@recipe_option
@arch_option
@set_option
@data_option
@photos_option
@device_option
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads. Default: one a core.")
@batch_option
@amp_option
@compile_option
@graph_option
@click.option(
    "--pipeline", type=click.Choice(["native", "dali", "ffcv"]), default="native", show_default=True, help="Engine."
)
@seconds_option
@runs_option
@json_option
def train(
    recipes,
    arch,
    overrides,
    data,
    photos,
    device,
    workers,
    batch_size,
    amp,
    compiled,
    graph,
    pipeline,
    seconds,
    runs,
    json_path,
) -> None:
    """Loader and step together, how much faster the same steps are on cached batches, and what would help.

    What would help is tried: the sentence that is printed holds the predicted and the measured gain.

    \b
    fastssl bench train --recipe light-moco-mobilenetv3 --data photos.beton --seconds 30 --json out.jsonl
    """
    from fastssl.benchmarks.suites.train import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)
    _measure(
        json_path,
        [
            (
                f"train, {name}, {source}",
                lambda recipe=recipe, name=name, source=source: run(
                    recipe,
                    name,
                    source,
                    place,
                    workers,
                    batch_size,
                    amp,
                    compiled,
                    seconds,
                    runs,
                    photos,
                    graph,
                    pipeline,
                ),
            )
            for (recipe, name), source in itertools.product(_load(recipes, overrides, arch), data)
        ],
    )


@bench.command("convert")
@click.option(
    "--data",
    multiple=True,
    default=("synthetic",),
    show_default=True,
    metavar="SRC",
    help="Folder or tar of photos, as convert-imagenet takes it; 'synthetic' makes JPEGs of ImageNet's usual size. "
    "May be repeated.",
)
@click.option(
    "--photos",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Number of synthetic photos; of SRC at most so many, evenly spaced.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), multiple=True, help="Threads; may be repeated. Default: one a core."
)
@folder_option
@runs_option
@click.option("--peers", is_flag=True, help="In turns with ffcv's DatasetWriter, where that is installed.")
@json_option
def convert_bench(data, photos, workers, folder, runs, peers, json_path) -> None:
    """Whole conversions: JPEGs copied through, and scaled to a short side of 256 px and encoded anew. pair/s are
    photos/s.

    \b
    fastssl bench convert --workers 1 --workers 8 --json out.jsonl
    fastssl bench convert --data photos/ --peers
    """
    from fastssl.benchmarks.suites.convert import run
    from fastssl.pipelines.engines.registry import engine_state

    if peers and (problem := engine_state("ffcv").problem):
        console.print(f"left out: ffcv's DatasetWriter ({problem})", highlight=False, markup=False, soft_wrap=True)
    _measure(
        json_path,
        [
            (
                f"convert, {source}{_threads(threads)}",
                lambda source=source, threads=threads: run(source, threads, runs, photos, peers, folder),
            )
            for source, threads in itertools.product(data, workers or (None,))
        ],
    )


@bench.command()
@data_option
@photos_option
@device_option
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads, beside one. Default: one a core.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    callback=finite,
    default=10.0,
    show_default=True,
    help="Counted time of decoding; the other figures take as long as their runs do.",
)
@folder_option
@runs_option
@json_option
def ceilings(data, photos, device, workers, seconds, folder, runs, json_path) -> None:
    """What this machine can do at most: bare JPEG decoding, memory copies, matrix products, and the disk past the page
    cache.

    Each run writes a file of up to 256 MB and reads it.

    \b
    fastssl bench ceilings --json out.jsonl
    fastssl bench ceilings --data photos.beton --folder /mnt/photos --seconds 30
    """
    from fastssl.benchmarks.suites.ceilings import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)
    _measure(
        json_path,
        [
            (f"ceilings, {source}", lambda source=source: run(source, place, workers, seconds, runs, photos, folder))
            for source in data
        ],
    )


@bench.command()
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.5),
    callback=finite,
    default=60.0,
    show_default=True,
    help="How long each run is watched. The first third is warm-up; what leaks 1 MB a minute shows within 2 minutes.",
)
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    default=("few-photos",),
    show_default=True,
    metavar="NAME|FILE.yaml",
    help="May be repeated.",
)
@arch_option
@set_option
@data_option
@photos_option
@device_option
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads. Default: one a core.")
@batch_option
@folder_option
@json_option
def soak(minutes, recipes, arch, overrides, data, photos, device, workers, batch_size, folder, json_path) -> None:
    """Watch a real pre-training from outside: does its memory grow, its rate fall, does it leave threads or files
    behind?

    Epochs without end, a probe behind each, forty checkpoints or more; then it is stopped as Ctrl-C does. Each line of
    the judgement has its numbers and its limit; the status is 1 when one fails.

    \b
    fastssl bench soak --minutes 60 --json soak.jsonl
    fastssl bench soak --minutes 2 --arch lcnet_035 --data samples --batch-size 64 --workers 1
    """
    from fastssl.benchmarks.studies.soak import require_steady, run
    from fastssl.benchmarks.suites.loader import default_batch
    from fastssl.distributed.devices import choose_device

    place, found = choose_device(device), []

    def watch(recipe: Recipe, name: str, source: str) -> list[Record]:
        sized = replace(recipe, train=replace(recipe.train, batch_size=default_batch(recipe, place, batch_size)))
        records = run(sized, name, source, place.type, workers, minutes, photos, folder, say)
        for verdict in records[0].details["verdicts"]:
            say(f"{'ok  ' if verdict['passed'] else 'FAIL'}  {verdict['name']}: {verdict['words']}")
        found.extend(records)
        return records

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    _measure(
        json_path,
        [
            (f"soak, {name}, {source}", lambda recipe=recipe, name=name, source=source: watch(recipe, name, source))
            for (recipe, name), source in itertools.product(_load(recipes, overrides, arch), data)
        ],
    )
    for record in found:
        require_steady(record)


@bench.command()
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


def _load(names: Iterable[str], overrides: Iterable[str], arch: str | None = None) -> list[tuple[Recipe, str]]:
    from fastssl.config.recipe import load_recipe, parse_overrides
    from fastssl.models.backbones import resolve_arch

    if arch is not None:
        resolve_arch(arch)  # a mistyped network should fail before anything is measured
    changes = parse_overrides(overrides)
    loaded = [(load_recipe(name, changes), Path(name).stem) for name in names]
    return [(replace(recipe, arch=arch) if arch else recipe, name) for recipe, name in loaded]


def _measure(json_path: str | None, jobs: list[Job]) -> None:
    """Run the jobs one after the other; every record is printed and written when it is there, so that a stop loses
    none.

    Each gets the running command in its details, so that its reader can make it again.

    Raises:
        FastSSLError: after all jobs, if some failed; the first failure is its cause.
    """
    from fastssl.benchmarks.harness.table import COLUMNS, cells, line

    command = command_line(click.get_current_context())

    def show(texts: Iterable[str]) -> None:
        console.print(line(tuple(texts)), highlight=False, markup=False, soft_wrap=True)

    failures: list[tuple[str, Exception]] = []
    written: list[dict] = []
    with _open(json_path) as file:
        show(COLUMNS)
        for label, job in jobs:
            try:
                records = job()
            except Exception as error:  # the other settings are worth their figures all the same
                failures.append((label, error))
                console.print(f"failed: {label}: {_words(error)}", highlight=False, markup=False, soft_wrap=True)
                continue
            for record in records:
                record = replace(record, details={**(record.details or {}), "command": command})
                show(cells(record))
                written.append(asdict(record))
                _add(file, json_path, written)
    if failures:
        label, error = failures[0]
        others = f" ({len(failures)} of {counted(len(jobs), 'setting')} failed)" if len(jobs) > 1 else ""
        raise FastSSLError(f"{label}: {_words(error)}{others}") from error


def _add(file: TextIO | None, json_path: str | None, records: list[dict]) -> None:
    """Bring the last of ``records`` to the file of lines; without one write the document of all of them anew."""
    try:
        if file is None:
            write_json(json_path, records)
        else:
            file.write(to_json(records[-1]) + "\n")
            file.flush()
    except OSError as error:
        with suppress(OSError, AttributeError):
            file.close()  # what is left in its buffer would be tried again at the end
        raise FastSSLError(
            f"{json_path}: a result was not written ({error.strerror or error}); it is in the table above"
        ) from error


def _threads(number: int | None) -> str:
    return f", {counted(number, 'thread')}" if number else ""


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, FastSSLError) else f"{type(error).__name__}: {text}"


def _open(json_path: str | None) -> nullcontext[TextIO | None] | TextIO:
    """The file of lines; None where there is none, or a document is written."""
    if json_path is None or json_path.lower().endswith(".json"):
        write_json(json_path, [])  # what cannot be written should fail before it is measured
        return nullcontext(None)
    return nullcontext(sys.stdout) if json_path == "-" else open(json_path, "w", encoding="utf-8")
