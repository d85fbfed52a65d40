"""``fastssl pretrain``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastssl.cli.common import SomePath, console, json_option, pipeline_option, quiet, quiet_option, write_json
from fastssl.pipelines.errors import counted

if TYPE_CHECKING:
    from fastssl.recipe import Recipe


@click.command()
@click.option(
    "--arch",
    required=True,
    metavar="NAME",
    help="Network: mobilenetv3_large, efficientnet_b0, mobilenetv2, resnet18, resnet34, resnet50, vit_tiny, or any timm name.",
)
@click.option(
    "--data",
    type=SomePath(),
    metavar="FILE.beton",
    help="Photos to learn from. Default: the sample set that installs with the package.",
)
@click.option("--val", type=SomePath(), metavar="FILE.beton", help="Labelled photos to probe on. Default: a held-out fifth of --data.")
@click.option(
    "--recipe",
    "recipe_name",
    metavar="NAME|FILE.yaml",
    help="Default: quickstart without --data; with it light-moco-mobilenetv3 on a GPU, few-photos without one.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the recipe, e.g. --set optim.lr=0.1. May be repeated.",
)
@click.option("--out", type=SomePath(), metavar="DIR", help="Default: runs/RECIPE-ARCH.")
@click.option("--epochs", type=click.IntRange(min=1), help="Instead of the recipe's.")
@click.option("--batch-size", type=click.IntRange(min=2), help="Instead of the recipe's; the learning rate follows.")
@pipeline_option
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto goes on where the run in --out stopped; never starts over and deletes that run's checkpoints; PATH: of a checkpoint to go on from. "
    "Where torchrun or Slurm starts a failed run again, it goes on with what it has made, whatever is said here.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads. Default: the cores this process may use.")
@quiet_option
@json_option
def pretrain(
    arch: str,
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
    fastssl pretrain --arch mobilenetv3_large                         # sample photos, minutes on a laptop
    fastssl pretrain --arch mobilenetv3_large --data photos.beton     # yours
    fastssl pretrain --arch mobilenetv2 --recipe dino-mobilenetv2-sslight --data photos.beton
    torchrun --nproc-per-node 8 -m fastssl pretrain --arch ...        # several GPUs: the same command, the batch shared out

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP save and stop, with status 130. The same command goes on from there, and after any other end from the newest checkpoint.
    """
    from fastssl.world import first_of_host_speaks, world_from_environment

    world = world_from_environment()
    if not world.is_main:
        console.quiet = True  # the first process speaks for all
    elif world.size > 1 and not quiet():
        # torch is not loaded yet, which several processes on a busy machine may take half a minute for.
        console.print(f"{world.size} processes start; each loads torch first, then they meet", highlight=False)

    from fastssl.progress import RunProgress
    from fastssl.train import RunOptions
    from fastssl.train import pretrain as run

    with first_of_host_speaks():
        recipe, short = choose_recipe(arch, data, device, recipe_name, overrides, epochs, batch_size)
    if data is None:
        from fastssl.sample_set import ensure_sample_set

        samples = ensure_sample_set()
        data, val = samples.train, val or samples.val
    options = RunOptions(
        recipe_name=short,
        data=data,
        val=val,
        out=out or Path("runs") / f"{short}-{arch}",
        device=device,
        pipeline=pipeline,
        seed=seed,
        workers=workers,
        resume=resume,
    )
    with RunProgress(console, quiet=quiet()) as progress:
        summary = run(recipe, options, progress)
    if summary is None:
        return
    _print_summary(summary, options.out)
    write_json(json_path, summary)


def choose_recipe(
    arch: str,
    data: Path | None,
    device: str,
    recipe_name: str | None,
    overrides: tuple[str, ...],
    epochs: int | None,
    batch_size: int | None,
) -> tuple[Recipe, str]:
    """The recipe that the options ask for, with all their changes, and its name for the records.

    Raises:
        click.UsageError: an option and a --set of the same value.
        FastSSLError: no such recipe, key or network.
    """
    from fastssl.backbones import resolve_arch
    from fastssl.recipe import load_recipe, parse_overrides

    recipe_name = recipe_name or _default_recipe(data, device)
    changes = parse_overrides(overrides)
    for option, key, value in (("--epochs", "train.epochs", epochs), ("--batch-size", "train.batch_size", batch_size)):
        if value is not None and key in changes:
            raise click.UsageError(f"{option} and --set {key} say the same thing; give one")
        if value is not None:
            changes[key] = str(value)
    recipe = replace(load_recipe(recipe_name, changes), arch=arch)
    resolve_arch(arch)  # a mistyped network should fail before the sample set is made
    return recipe, Path(recipe_name).stem


def _default_recipe(data: Path | None, device: str) -> str:
    """The recipe that suits the photos and the machine: 200 epochs at 224 px would take years on a CPU, and a batch of 512 more memory than it has."""
    if data is None:
        return "quickstart"
    from fastssl.devices import choose_device

    if choose_device(device).type == "cuda":
        return "light-moco-mobilenetv3"
    console.print(
        "recipe few-photos, as there is no GPU to train on (the full one: --recipe light-moco-mobilenetv3)", highlight=False, soft_wrap=True
    )
    return "few-photos"


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
            table.add_row(row["name"], *(f"{row[kind]:.1f} %" if row[kind] is not None else "-" for kind in ("knn", "linear")))
        console.print(table)
    console.print(f"{probe['note']}", highlight=False, soft_wrap=True)
    rate = f"{summary['pair_per_s']:,.0f} pair/s ({summary['view_per_s']:,.0f} view/s); " if summary["pair_per_s"] else ""
    console.print(f"{rate}{summary['bottleneck']}", highlight=False, soft_wrap=True)
    if summary["share"]:
        console.print(summary["share"]["text"], highlight=False, soft_wrap=True)
    if summary["next_mark"]:
        console.print(f"next: {summary['next_mark']['note']}\n  {summary['next_mark']['command']}", highlight=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
