"""``fastssl pretrain``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from fastssl.cli.command import command_line
from fastssl.cli.common import SomePath, console, json_option, quiet_option, write_json
from fastssl.cli.inputs import ON_CONSOLE, input_options
from fastssl.errors import counted, without_folders
from fastssl.inputs import Wanted, choose_inputs
from fastssl.runs.loggers import LOGGERS, require_loggers


@click.command()
@input_options(click.option("--out", type=SomePath(), metavar="DIR", help="Default: runs/RECIPE-ARCH."))
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto goes on where the run in --out stopped; never starts over and deletes that run's checkpoints; PATH: "
    "of a checkpoint to go on from. Where torchrun or Slurm starts a failed run again,"
    " it goes on with what it has made, whatever is said here.",
)
@click.option(
    "--cache-teacher",
    type=click.IntRange(min=1),
    metavar="N",
    help="With a recipe of method distill: the teacher sees the views of N epochs once, before the first step, and the "
    "epochs share them; kept beside the photos for other runs. The same as --set distill.cache_epochs=N.",
)
@click.option(
    "--log",
    callback=lambda _, __, names: () if names is None else tuple(dict.fromkeys(names.split(","))),
    metavar="NAME,...",
    help="Show the run in tensorboard, wandb, mlflow or trackio; each needs pip install 'fastssl-vision[NAME]'.",
)
@click.option("--check", is_flag=True, help="Compare a compiled or recorded step with the eager one at the start.")
@quiet_option
@json_option
def pretrain(wanted: Wanted, out: Path | None, json_path: str | None, cache_teacher: int | None, **how: Any) -> None:
    """Pre-train a backbone without labels, and show what it learned.

    \b
    fastssl pretrain                                                  # sample photos, minutes on a laptop
    fastssl pretrain --data photos/                                   # yours: a folder, a tar or a .beton file
    fastssl pretrain --arch resnet18 --data photos/ --epochs 100
    fastssl pretrain --arch mobilenetv3_large_100.ra_in1k --data photos/   # begin with timm's ImageNet weights
    fastssl pretrain --recipe distill-few-photos --data photos/ --cache-teacher 4    # learns from a trained network
    fastssl pretrain --arch mobilenetv2 --recipe dino-mobilenetv2-sslight --data photos.beton
    torchrun --nproc-per-node 8 -m fastssl pretrain --arch ...        # several GPUs, the batch shared out

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP save and stop, with status 130. The same command goes on from there, and after
    any other end from the newest checkpoint.
    """
    from fastssl.distributed.world import first_of_host_speaks, world_from_environment

    if unknown := [name for name in how["log"] if name not in LOGGERS]:
        raise click.UsageError(f"--log {unknown[0]!r} is none of {', '.join(LOGGERS)}")
    world = world_from_environment()
    if not world.is_main:
        console.quiet = True  # the first process speaks for all
    elif world.size > 1:
        # torch is not loaded yet, which several processes on a busy machine may take half a minute for.
        console.note(f"{world.size} processes start; each loads torch first, then they meet")

    from fastssl.cli.progress import RunProgress
    from fastssl.pretrain import RunOptions
    from fastssl.pretrain import pretrain as run

    if cache_teacher is not None:
        cached = f"distill.cache_epochs={cache_teacher}"
        if any(cached.startswith(one.partition("=")[0] + "=") for one in wanted.overrides):
            raise click.UsageError("--cache-teacher and distill.cache_epochs say the same thing; give one")
        wanted = dataclasses.replace(wanted, overrides=(*wanted.overrides, cached))
    with first_of_host_speaks():
        require_loggers(how["log"])
        inputs = choose_inputs(wanted, ON_CONSOLE, world.size, out if how["resume"] != "never" else None)
    options = RunOptions(
        recipe_name=inputs.name,
        data=inputs.data,
        val=inputs.val,
        out=out or inputs.folder,
        device=wanted.device,
        pipeline=wanted.pipeline,
        workers=wanted.workers,
        init=inputs.init,
        command=without_folders(command_line(click.get_current_context())),
        **how,
    )
    with RunProgress(console, quiet=not console.notes) as progress:
        summary = run(inputs.recipe, options, progress)
    if summary is not None:
        _print_summary(summary, options.out)
        write_json(json_path, summary)


def _print_summary(summary: dict, out: Path) -> None:
    """The proof that it learned, or that it did not, and where to look."""
    from rich.table import Column, Table

    probe = summary["probe"]
    if probe["rows"]:
        photos = counted(probe["val_samples"], "photo")
        title = f"{summary['arch']}, probed on {photos} of {counted(probe['classes'], 'class')}"
        table = Table("features", Column("kNN", justify="right"), Column("linear", justify="right"), title=title)
        for row in probe["rows"]:
            values = (row["knn"], row["linear"])
            table.add_row(row["name"], *("-" if value is None else f"{value:.1f} %" for value in values))
        console.print(table)
    console.say(summary["verdict"]["text"], style="bold")
    console.say(probe["note"])
    pairs, views = summary["pair_per_s"], summary["view_per_s"]
    rate = f"{pairs:,.0f} pair/s ({views:,.0f} view/s); " if pairs else ""
    share = [summary["share"]["text"]] if summary["share"] else []
    for line in (f"{rate}{summary['bottleneck']}", *share, f"report: {out / 'report.html'}"):
        console.say(line)
