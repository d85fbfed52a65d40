"""``fastssl pretrain``."""

from __future__ import annotations

from pathlib import Path

import click

from fastssl.cli.command import command_line
from fastssl.cli.common import SomePath, console, json_option, pipeline_option, quiet, quiet_option, write_json
from fastssl.cli.inputs import (
    arch_option,
    batch_option,
    choose_inputs,
    data_option,
    epochs_option,
    recipe_option,
    val_option,
)
from fastssl.errors import counted, without_folders


@click.command()
@arch_option
@data_option
@val_option
@recipe_option
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the recipe, e.g. --set optim.lr=0.1. May be repeated.",
)
@click.option("--out", type=SomePath(), metavar="DIR", help="Default: runs/RECIPE-ARCH.")
@epochs_option
@batch_option
@pipeline_option
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto goes on where the run in --out stopped; never starts over and deletes that run's checkpoints; PATH: "
    "of a checkpoint to go on from. "
    "Where torchrun or Slurm starts a failed run again, it goes on with what it has made, whatever is said here.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Decoding threads. Default: the cores this process may use."
)
@quiet_option
@json_option
def pretrain(
    arch: str | None,
    data: Path | None,
    val: Path | None,
    recipe_name: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    epochs: int | None,
    batch_size: int | None,
    pipeline: str,
    device: str,
    seed: int,
    resume: str,
    workers: int | None,
    json_path: str | None,
) -> None:
    """Pre-train a backbone without labels, and show what it learned.

    \b
    fastssl pretrain                                                  # sample photos, minutes on a laptop
    fastssl pretrain --data photos/                                   # yours: a folder, a tar or a .beton file
    fastssl pretrain --arch resnet18 --data photos/ --epochs 100
    fastssl pretrain --arch mobilenetv2 --recipe dino-mobilenetv2-sslight --data photos.beton
    torchrun --nproc-per-node 8 -m fastssl pretrain --arch ...        # several GPUs, the batch shared out

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP save and stop, with status 130. The same command goes on from there, and after
    any other end from the newest checkpoint.
    """
    from fastssl.distributed.world import first_of_host_speaks, world_from_environment

    world = world_from_environment()
    if not world.is_main:
        console.quiet = True  # the first process speaks for all
    elif world.size > 1 and not quiet():
        # torch is not loaded yet, which several processes on a busy machine may take half a minute for.
        console.print(f"{world.size} processes start; each loads torch first, then they meet", highlight=False)

    from fastssl.cli.progress import RunProgress
    from fastssl.pretrain import RunOptions
    from fastssl.pretrain import pretrain as run

    with first_of_host_speaks():
        inputs = choose_inputs(
            arch=arch,
            data=data,
            val=val,
            device=device,
            recipe_name=recipe_name,
            overrides=overrides,
            epochs=epochs,
            batch_size=batch_size,
            workers=workers,
            processes=world.size,
        )
    options = RunOptions(
        recipe_name=inputs.name,
        data=inputs.data,
        val=inputs.val,
        out=out or Path("runs") / f"{inputs.name}-{inputs.recipe.arch}",
        device=device,
        pipeline=pipeline,
        seed=seed,
        workers=workers,
        resume=resume,
        command=without_folders(command_line(click.get_current_context())),
    )
    with RunProgress(console, quiet=quiet()) as progress:
        summary = run(inputs.recipe, options, progress)
    if summary is None:
        return
    _print_summary(summary, options.out)
    write_json(json_path, summary)


def _print_summary(summary: dict, out: Path) -> None:
    """The proof that it learned, or that it did not, and where to look."""
    from rich.table import Table

    probe = summary["probe"]
    if probe["rows"]:
        photos = counted(probe["val_samples"], "photo")
        table = Table(title=f"{summary['arch']}, probed on {photos} of {counted(probe['classes'], 'class')}")
        table.add_column("features")
        table.add_column("kNN", justify="right")
        table.add_column("linear", justify="right")
        for row in probe["rows"]:
            table.add_row(
                row["name"], *(f"{row[kind]:.1f} %" if row[kind] is not None else "-" for kind in ("knn", "linear"))
            )
        console.print(table)
    console.print(summary["verdict"]["text"], style="bold", highlight=False, soft_wrap=True)
    console.print(f"{probe['note']}", highlight=False, soft_wrap=True)
    rate = (
        f"{summary['pair_per_s']:,.0f} pair/s ({summary['view_per_s']:,.0f} view/s); " if summary["pair_per_s"] else ""
    )
    console.print(f"{rate}{summary['bottleneck']}", highlight=False, soft_wrap=True)
    if summary["share"]:
        console.print(summary["share"]["text"], highlight=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
