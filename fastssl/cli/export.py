"""``fastssl export``: a backbone in the form in which others take it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from fastssl.cli.common import SomePath, json_option, write_json
from fastssl.cli.evaluate.common import which_option

#: fastssl.weights.export.ENDINGS, written out: that package loads torch, which --help should not wait for.
FORMATS = ("timm", "torchvision", "safetensors", "onnx")


@click.command()
@click.argument("checkpoint", type=SomePath())
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
@click.option(
    "--size",
    type=click.IntRange(min=8, max=4096),
    metavar="N",
    help="Side of the pictures: of onnx's input; of timm's folder for its config.json. Default: the run's, or 224.",
)
@json_option
def export(
    checkpoint: Path, dst: Path, format_: str, which: str | None, size: int | None, json_path: str | None
) -> None:
    """Write the backbone of CHECKPOINT, a run's folder or one of its files, to DST.

    \b
    timm         DST.safetensors, DST.pth: timm.create_model(NAME, num_classes=0, checkpoint_path=DST)
                 any other DST: a folder as on the Hugging Face hub: timm.create_model("local-dir:DST", pretrained=True)
    torchvision  DST.pth, DST.safetensors: torchvision's names. Put an Identity where the network makes classes,
                 then load strictly:
                 net.fc (resnet18, 34, 50), net.classifier[3] (mobilenet_v3_large, mobilenet_v3_small),
                 net.classifier[1] (mobilenet_v2, efficientnet_b0, b1)
    safetensors  DST.safetensors: plain tensors under timm's names
    onnx         DST.onnx: images (N, 3, size, size) -> features (N, F), any N

    Networks that train with several branches and run with one (MobileOne, FastViT, RepViT, GhostNet-V3, ...) are fused
    for onnx. The other formats keep the branches, which fine-tuning needs and timm.create_model expects:
    timm.utils.reparameterize_model(net) fuses them after that.

    The tensors must be exactly those of the network there. What was written is loaded and must give the same features,
    to 1e-5 of their spread over images (ONNX: 1e-4, run with onnxruntime at batch 1 and 3); otherwise DST stays as it
    was. An earlier export of the same kind, known by what it says of itself, is replaced; anything else that is there,
    a run's checkpoint or weights from elsewhere, is left alone. Of several processes (torchrun, srun) only the first
    one writes.

    \b
    fastssl export runs/mine mine.safetensors
    fastssl export runs/mine mine.pth --format torchvision --which teacher
    fastssl export runs/mine mine.onnx --format onnx --size 224
    """
    from fastssl.distributed.world import world_from_environment

    if not world_from_environment().is_main:
        return  # the first process does it for all

    from fastssl.evaluate.trained import load_trained
    from fastssl.weights.export import export_backbone

    trained = load_trained(checkpoint, which)
    if None not in (size, trained.size) and size != trained.size:
        click.echo(f"--size {size}: the run itself was probed with {trained.size} (probe.size)", err=True)
    done = export_backbone(trained, dst, format_, size=size)
    step = f", step {trained.step:,}" if trained.step is not None else ""
    click.echo(
        f"{trained.name} ({trained.arch}, {trained.network}{step}) -> {dst}: "
        f"{done.tensors} tensors{', fused' if done.fused else ''}, {done.size_bytes / 1e6:.1f} MB, features "
        f"differ by {done.difference:.1g} of their spread\n{done.recipe}",
        err=json_path == "-",
    )
    record = {**trained.record(), **asdict(done), "path": dst.name, "recipe": done.recipe.replace(str(dst), dst.name)}
    write_json(json_path, record)
