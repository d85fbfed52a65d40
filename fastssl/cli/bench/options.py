"""Options that several bench commands share."""

from __future__ import annotations

from pathlib import Path

import click

from fastssl.cli.common import finite

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
