"""Every recipe, at reduced size, through the real command line: it trains, stops, saves, goes on where it stood, and
ends.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from teachers import teacher_file

from fastssl.cli import main
from fastssl.config.recipe import load_recipe, recipe_names
from fastssl.methods import METHODS
from fastssl.models.backbones import create_backbone, load_backbone, save_backbone
from fastssl.pipelines.plan.multicrop import MultiCrop
from fastssl.training import trainer
from fastssl.training.setup import Setup

#: In `make test`: one a method
QUICK = (
    "few-photos",
    "light-moco-mobilenetv3",
    "dino-mobilenetv2-baseline",
    "swav-mobilenetv2-baseline",
    "resa-mobilenetv3",
    "distill-few-photos",
)
#: What makes a recipe small. The number of views, the pair weights, the optimiser and the schedules stay its own.
ALWAYS = [
    "train.epochs=1",
    "train.batch_size=8",
    "train.log_every=3",
    "probe.size=32",
    "probe.online_samples=20",
    "probe.final_samples=24",
]
SMALLER = {
    "moco": ["moco.queue=64", "moco.projector.hidden=16"],
    "dino": ["dino.out=64", "dino.projector.hidden=16", "dino.projector.out=16"],
    "swav": [
        "swav.prototypes=20",
        "swav.queue=20",
        "swav.queue_epoch=0",
        "swav.projector.hidden=16",
        "swav.projector.out=16",
    ],
    "simclr": ["simclr.neighbors=5", "simclr.projector.hidden=16"],
    "resa": ["resa.projector.hidden=16", "resa.projector.out=16"],
    "empssl": ["empssl.projector.hidden=16", "empssl.projector.out=16"],
    "distill": [
        f"distill.teacher={teacher_file()}",
        "distill.teacher_size=40",
        "distill.queue=64",
        "distill.head.hidden=16",
    ],
}


def command(name: str, beton: Path, out: Path) -> list[str]:
    recipe = load_recipe(name)
    sizes = [f"views.{number}.size=32" for number in range(len(recipe.views))]
    if isinstance(recipe.views, MultiCrop):
        sizes = ["views.global_size=32", "views.local_size=16"]
    overrides = [*ALWAYS, *SMALLER[recipe.method], *sizes]
    if recipe.method == "moco" and recipe.moco.split_bn > 1:
        overrides.append("moco.split_bn=2")
    if recipe.method == "moco" and recipe.moco.split_bn_queries > 1:
        overrides.append("moco.split_bn_queries=2")
    first, weights = [], out.with_name("first.safetensors")
    if recipe.frozen_bn:  # a recipe for weights that others trained
        first = ["--init-from", str(weights)]
        if not weights.exists():
            save_backbone(create_backbone(recipe.arch), weights, arch=recipe.arch)
    found = [
        "pretrain",
        *first,
        "--arch",
        recipe.arch,
        "--recipe",
        name,
        "--data",
        str(beton),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--workers",
        "1",
    ]
    return found + [argument for item in overrides for argument in ("--set", item)]


def cli(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in recipe_names()]
)
def test_it_trains_stops_and_goes_on(name: str, beton: Path, tmp_path: Path) -> None:
    out, original = tmp_path / "run", trainer.make_step

    def stop_at_three(run: Setup, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 2:
            run.stop.set()
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", stop_at_three)
        assert cli(command(name, beton, out)) == 130
    saved = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
    assert saved["position"]["step"] == 3
    assert cli(command(name, beton, out)) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    method, _ = METHODS[load_recipe(name).method]
    assert [row["step"] for row in steps] == [3, 6]
    assert all(math.isfinite(row[value]) for row in steps for value in method.METRICS)
    # What moved: the weights, in both halves of the run.
    ended = torch.load(out / "checkpoints" / "last.pt", weights_only=True)["method"]
    weight = next(key for key in ended if key.startswith("student.backbone") and ended[key].dim() == 4)
    assert not torch.equal(ended[weight], saved["method"][weight])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["recipe"] == name and not summary["fallbacks"]
    assert all(math.isfinite(row["linear"]) for row in summary["probe"]["rows"])
    backbone = load_backbone(out / "checkpoints" / "last.safetensors")
    assert torch.isfinite(backbone(torch.zeros(1, 3, 32, 32))).all()
    with_teacher = any(key.startswith("teacher.") for key in ended)
    assert (out / "checkpoints" / "last-teacher.safetensors").exists() == with_teacher
    if load_recipe(name).probe.teacher:
        assert summary["probe"]["rows"][-1]["name"] == "its teacher"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "dino-vit_tiny-sslight",
        "swav-mobilenetv2-sslight",
        "moco-mobilenetv2-sslight",
        "simclr-mobilenetv3",
        "resa-mobilenetv3",
        "empssl-resnet18",
        "distill-mobilenetv3",
    ],
)
def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(name: str, beton: Path, tmp_path: Path) -> None:
    """Queues, centres, uniforms of drop path and all: resuming is exact for every method."""
    original = trainer.make_step

    def stop_at_four(run: Setup, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 3:
            run.stop.set()
        return metrics

    assert cli(command(name, beton, tmp_path / "whole")) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", stop_at_four)
        assert cli(command(name, beton, tmp_path / "stopped")) == 130
    assert cli(command(name, beton, tmp_path / "stopped")) == 0
    whole, stopped = (
        torch.load(tmp_path / run / "checkpoints" / "last.pt", weights_only=True)["method"]
        for run in ("whole", "stopped")
    )
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
