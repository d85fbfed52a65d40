"""``fastssl import``: a backbone that others trained, for evaluate and export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastssl.cli.common import SomePath, json_option, write_json

if TYPE_CHECKING:
    from fastssl.weights.match import Matched

#: fastssl.weights.layouts.LAYOUTS and NETWORK, written out: that package loads torch, which --help should not wait for.
LAYOUTS = ("auto", "timm", "torchvision", "moco", "dino", "sslight")
WHICH = ("student", "teacher", "query", "key")


@click.command("import")
@click.argument("foreign", type=SomePath())
@click.argument("dst", type=SomePath())
@click.option("--arch", required=True, metavar="NAME", help="The network that is in it: a short name or timm's.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="auto", show_default=True, help="Who wrote it.")
@click.option(
    "--which",
    type=click.Choice(WHICH),
    help="Of two networks: the student is MoCo's query encoder, the teacher its key encoder.  [default: student]",
)
@json_option
def import_(foreign: Path, dst: Path, arch: str, layout: str, which: str | None, json_path: str | None) -> None:
    """Take the backbone out of FOREIGN, a checkpoint of MoCo, light-moco, DINO or SSLight or weights for timm or
    torchvision, and write it to DST.safetensors, which every command here takes.

    Every tensor is matched by name and shape; one that is missing is an error. Projectors, classifiers, queues and
    optimisers are left out and listed. Nothing in FOREIGN is run: a file that needs more than tensors and settings is
    refused. DST is replaced only if it was imported. Of several processes (torchrun, srun) only the first one writes.

    timm's tf_ networks (tf_efficientnet_b0, ...) have the names and shapes of the plain ones but pad as TensorFlow
    does, which the file does not tell: give --arch their own name, never the plain network's, which would take them and
    give other features.

    \b
    fastssl import checkpoint_0199.pth.tar moco.safetensors --arch mobilenetv3_large
    fastssl import DINO_mobilenet_v2_last_ckpt.pth.tar sslight.safetensors --arch mobilenetv2 --which teacher
    fastssl evaluate knn sslight.safetensors --data train.beton --val val.beton
    """
    from fastssl.distributed.world import world_from_environment

    if not world_from_environment().is_main:
        return  # the first process does it for all

    from fastssl.weights.importing import import_backbone

    matched = import_backbone(foreign, dst, arch, layout=layout, which=which)
    _show(matched, foreign, dst, err=json_path == "-")
    write_json(json_path, {"source": foreign.name, "path": dst.name, **matched.record()})


def _show(matched: Matched, source: Path, destination: Path, *, err: bool) -> None:
    """What became of each part of the file, a line each."""
    from fastssl.errors import printable

    scaled = f", BatchNorm weights scaled from eps {matched.eps:g}" if matched.eps else ""
    rows = [("backbone", matched.taken, f"taken, by {matched.names}'s names{scaled}")]
    if matched.counters:
        zero = "not in the file: begin at 0, evaluation does not read them"
        rows.append(("num_batches_tracked", matched.counters, zero))
    rows += [(printable(group), count, f"left out: {why}") for group, count, why in matched.left_out]
    network = f"{matched.network} network, " if matched.network else ""
    title = f"{printable(source.name)}: {matched.arch}, {network}layout {matched.layout}"
    lines = [f"  {group:20} {count:6,}  {why}" for group, count, why in rows]
    click.echo("\n".join([title, *lines, f"written: {destination}"]), err=err)
