"""``fastssl export``: a backbone in the form in which others take it. ``fastssl push``: on the Hugging Face hub.
``fastssl import``: one that others trained, for evaluate and export. Of several processes the first does it for all.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import SomePath, console, json_option, progress_bar, quiet_option, write_json
from fastssl.cli.evaluate import common
from fastssl.cli.evaluate.common import NOT_NEGATIVE, PHOTOS, choice, option, which_option
from fastssl.distributed.world import world_from_environment
from fastssl.errors import counted, printable

if TYPE_CHECKING:
    from fastssl.weights.export import Exported
    from fastssl.weights.importing import Matched

#: fastssl.weights.export.ENDINGS, and fastssl.weights.importing.LAYOUTS and NETWORK, written out: that package loads
#: torch, which --help should not wait for.
FORMATS = ("timm", "torchvision", "safetensors", "onnx", "executorch", "coreml")
LAYOUTS = ("auto", "timm", "torchvision", "efficientnet", "moco", "dino", "sslight")
WHICH = ("student", "teacher", "query", "key")
_SEEN: dict[str, Any] = {"type": float, "nargs": 3, "metavar": "R G B"}


@click.command()
@common.checkpoint_argument
@click.argument("dst", type=SomePath())
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS),
    default="timm",
    show_default=True,
    help="Who will read it: see above what DST is then.",
)
@which_option
@common.arch_option
@option(
    "--size",
    "Side of the pictures that onnx, executorch, coreml and timm's folder take. Default: the run's, or 224.",
    type=click.IntRange(min=8, max=4096),
    metavar="N",
)
@option(
    "--input",
    "What these three take: raw RGB pixels, 0 .. 255, which the file normalises, or normalised ones. Default: raw, of "
    "onnx normalised.",
    variable="input_",
    **choice("raw", "normalised"),
)
@option("--int8", "Of these three: int8, calibrated and judged on --data.", is_flag=True)
@option("--data", "For --int8: at least 100 photos of the task, best with labels.", **PHOTOS)
@option("--max-drop", "Points of kNN that int8 may cost; more are refused.  [default: 1]", **NOT_NEGATIVE)
@quiet_option
@json_option
def export(checkpoint: Path, dst: Path, format_: str, size: int | None, json_path: str | None, **how: Any) -> None:
    """Write the backbone of a run, a file, a network of timm's with its tag or one of the hub to DST.

    \b
    timm         DST.safetensors, DST.pth: timm.create_model(NAME, num_classes=0, checkpoint_path=DST)
                 any other DST: a folder as on the Hugging Face hub: timm.create_model("local-dir:DST", pretrained=True)
    torchvision  DST.pth, DST.safetensors: torchvision's names. Put an Identity where the network makes classes,
                 then load strictly:
                 net.fc (resnet18, 34, 50), net.classifier[3] (mobilenet_v3_large, mobilenet_v3_small),
                 net.classifier[1] (mobilenet_v2, efficientnet_b0, b1)
    safetensors  DST.safetensors: plain tensors under timm's names
    onnx         DST.onnx: images (N, 3, size, size) -> features (N, F), any N
    executorch   DST.pte: the same with N = 1, for Android and iOS (XNNPACK)
    coreml       DST.mlpackage: an image -> features (1, F), float16, for iOS 16 and macOS 13 and newer
    DST.json beside these three says what goes in.

    Networks that train with several branches and run with one (MobileOne, FastViT, RepViT, GhostNet-V3, ...) are fused
    for the last three. The others keep the branches, which fine-tuning needs and timm.create_model expects:
    timm.utils.reparameterize_model(net) fuses them after that.

    The tensors must be exactly those of the network there. What was written is loaded and must give the same features,
    to 1e-5 of their spread over images (ONNX: 1e-4, run with onnxruntime at batch 1 and 3); otherwise DST stays as it
    was. Core ML runs on Apple's devices alone: its file is not run here. With --int8 kNN on a part of --data (without
    labels: nearest photos) judges the features beside those in float; of coreml, weights alone, as PyTorch computes.

    An earlier export of the same kind, known by what it says of itself, is replaced; anything else, a run's checkpoint
    or weights from elsewhere, is left alone. Of several processes (torchrun, srun) only the first one writes.

    \b
    fastssl export runs/mine mine.safetensors
    fastssl export runs/mine mine.pth --format torchvision --which teacher
    fastssl export runs/mine mine.onnx --format onnx --size 224
    fastssl export runs/mine mine.pte --format executorch --int8 --data photos/
    """
    data, max_drop = how["data"], how["max_drop"]
    if how["int8"] != (data is not None) or (max_drop is not None and not how["int8"]):
        raise click.UsageError("--int8 needs --data, photos to judge on; --data and --max-drop need --int8")
    if not world_from_environment().is_main:
        return

    from fastssl.weights.export import export_backbone
    from fastssl.weights.int8 import Int8
    from fastssl.weights.source import load_weights

    trained = load_weights(checkpoint, how["arch"], how["which"])
    if said := trained.differs("size", size):
        click.echo(said, err=True)
    int8 = Int8(data, 1.0 if max_drop is None else max_drop, progress_bar) if how["int8"] else None
    done = export_backbone(trained, dst, format_, size=size, input=how["input_"], int8=int8)
    step = f", step {trained.step:,}" if trained.step is not None else ""
    click.echo(
        f"{trained.name} ({trained.arch}, {trained.network}{step}) -> {dst}: "
        f"{done.tensors} tensors{', fused' if done.fused else ''}, {_of_file(done)}\n{done.recipe}",
        err=json_path == "-",
    )
    record = {**trained.record(), **asdict(done), "path": dst.name, "recipe": done.recipe.replace(str(dst), dst.name)}
    write_json(json_path, record)


def _of_file(done: Exported) -> str:
    """Size, speed and what became of the features; of int8 beside the float form."""
    forms = [("", done.size_bytes, done.milliseconds)]
    if (int8 := done.int8) is not None:
        forms = [("float ", int8.float_size_bytes, int8.float_milliseconds), ("int8 ", *forms[0][1:])]
    text = " -> ".join(
        f"{form}{size / 1e6:.1f} MB" + (f", {took:.1f} ms" if took else "") for form, size, took in forms
    )
    text += f"; {int8}" if int8 else ""
    if done.difference is None:
        return f"{text}; not run: Core ML is on Apple's devices alone"
    return f"{text}; features in float differ by {done.difference:.1g} of their spread"


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
@click.option("--mean", help="Of its pictures, scaled to 0 .. 1. Default: an export's own, or ImageNet's.", **_SEEN)
@click.option("--std", help="Likewise.", **_SEEN)
@json_option
def import_(foreign: Path, dst: Path, arch: str, json_path: str | None, mean: Any, std: Any, **how: Any) -> None:
    """Take the backbone out of FOREIGN, a checkpoint of MoCo, light-moco, DINO or SSLight or weights for timm,
    torchvision or efficientnet_pytorch, and write it to DST.safetensors, which every command here takes.

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
    if not world_from_environment().is_main:
        return

    from fastssl.weights.importing import import_backbone

    seen = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    matched = import_backbone(foreign, dst, arch, **how, **seen)
    _show(matched, foreign, dst, err=json_path == "-")
    write_json(json_path, {"source": foreign.name, "path": dst.name, **asdict(matched)})


def _show(matched: Matched, source: Path, destination: Path, *, err: bool) -> None:
    """What became of each part of the file, a line each."""
    scaled = f", BatchNorm weights scaled from eps {matched.eps:g}" if matched.eps else ""
    rows = [("backbone", matched.taken, f"taken, by {matched.names}'s names{scaled}")]
    if matched.counters:
        zero = "not in the file: begin at 0, evaluation does not read them"
        rows.append(("num_batches_tracked", matched.counters, zero))
    rows += [(printable(row["group"]), row["tensors"], f"left out: {row['why']}") for row in matched.left_out]
    network = f"{matched.network} network, " if matched.network else ""
    title = f"{printable(source.name)}: {matched.arch}, {network}layout {matched.layout}"
    lines = [f"  {group:20} {count:6,}  {why}" for group, count, why in rows]
    click.echo("\n".join([title, *lines, f"written: {destination}"]), err=err)


@click.command()
@click.argument("run", type=SomePath())
@click.argument("name", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make a repository that its owner alone sees.")
@click.option("--update", is_flag=True, help="The repository is there: write over its files.")
@click.option("--license", metavar="ID", help="Of the weights: apache-2.0, cc-by-4.0, ... Default: the card says none.")
@click.option("--pictures", is_flag=True, help="Also views.png and neighbours.png, on which your photos are seen.")
@click.option("--dry-run", type=SomePath(), metavar="DIR", help="Write into DIR what would be sent, and send nothing.")
@which_option
@json_option
def push(
    run: Path, name: str, private: bool, update: bool, dry_run: Path | None, json_path: str | None, **card: Any
) -> None:
    """Put the backbone of RUN, a run's folder, on the Hugging Face hub, with a model card of its figures and recipe.

    timm loads it there: timm.create_model("hf-hub:USER/NAME", pretrained=True, num_classes=0). Of the photos nothing
    is sent but how many they are. Needs `hf auth login`, or HF_TOKEN.

    \b
    fastssl push runs/mine me/places --dry-run places
    fastssl push runs/mine me/places --private --license apache-2.0
    """
    if (private and update) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise click.UsageError("a name is USER/NAME; --private is for a new repository, --update for one that is there")

    from fastssl.report.hub import upload, write_repo

    with tempfile.TemporaryDirectory() as temporary:
        folder = dry_run or Path(temporary) / "repository"
        trained = write_repo(run, name, folder, **card)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        address = None if dry_run else upload(folder, name, private=private, update=update)
    size = f"{counted(len(files), 'file')}, {sum(files.values()) / 1e6:.1f} MB"
    console.say(f"{address or f'{dry_run}, nothing was sent'}: {size}: {', '.join(files)}")
    write_json(json_path, {**trained.record(), "name": name, "address": address, "files": files})
