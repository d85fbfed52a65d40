"""What is counted for a step, against the collectives that a step really calls and the checkpoint that is really written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.benchmarks.memory import tensor_bytes
from fastssl.benchmarks.scale_traffic import traffic
from fastssl.benchmarks.step import random_views
from fastssl.checkpoint import Position, load_checkpoint, save_checkpoint
from fastssl.recipe import Recipe, load_recipe
from fastssl.schedules import RunLength
from fastssl.step import TrainStep
from fastssl.world import World

BATCH, WORLD = 8, 2
RECIPES = {
    "few-photos-moco": {"views.0.size": "32", "moco.queue": "32", "moco.split_bn": "2"},
    "dino-mobilenetv2-sslight": {"views.global_size": "32", "views.local_size": "32", "dino.out": "64", "train.batch_size": str(BATCH)},
    "dino-mobilenetv2-baseline": {"views.global_size": "64", "views.local_size": "32", "dino.out": "64", "train.batch_size": str(BATCH)},
    "swav-mobilenetv2-sslight": {
        "views.global_size": "32",
        "views.local_size": "32",
        "swav.prototypes": "30",
        "swav.queue": "16",
        "swav.queue_epoch": "0",
    },
    "simclr-mobilenetv3": {"views.0.size": "32", "simclr.neighbors": "5"},
}


def small(name: str) -> Recipe:
    options = {"arch": "lcnet_035", "train.batch_size": str(BATCH), "zero_init_residual": "false", **RECIPES[name]}
    return load_recipe(name, {key: value for key, value in options.items() if key != "zero_init_residual" or name == "few-photos-moco"})


@pytest.fixture
def group() -> Iterator[list[tuple[str, int]]]:
    """This process as one of two whose partner never answers: the list gets (collective, bytes received)."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=fake.FakeStore())
    called: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:

        def all_reduce(tensor: torch.Tensor, *args: object, **options: object) -> None:
            if tensor.dtype != torch.int32:  # hosts that ask each other
                called.append(("reduce", tensor.numel() * tensor.element_size()))

        def gather(everyone: torch.Tensor, own: torch.Tensor) -> None:
            called.append(("gather", everyone.numel() * everyone.element_size()))
            everyone.copy_(torch.cat([own, own]))

        patch.setattr(dist, "all_reduce", all_reduce)
        patch.setattr(dist, "all_gather_into_tensor", gather)
        yield called
    dist.destroy_process_group()


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_calls_what_was_counted(name: str, group: list[tuple[str, int]]) -> None:
    recipe = small(name)
    step = TrainStep(recipe, torch.device("cpu"), amp=False, seed=0, world=World(0, WORLD))
    views = random_views(recipe, BATCH // WORLD, torch.device("cpu"))
    length, method = RunLength(100, 10), step.method
    late = 60  # nothing is frozen any more, a queue is in use
    group.clear()
    step(views, step.noise(6, 0), step.rates(late, length), phase=method.phase(late, length))
    found = traffic(recipe, BATCH, WORLD)
    assert len(group) == found.collectives
    assert found.gradient_bytes == 4 * found.parameters == max(size for kind, size in group if kind == "reduce")
    # images are counted in bfloat16 and were float32 here; BatchNorm's backward pass, not counted because it is small, sums two numbers a channel
    sizes, student = len({spec.size for spec in recipe.views}), method.student
    backward = sum(8 * layer.num_features * sizes for layer in student.backbone.modules() if isinstance(layer, _BatchNorm))
    backward += sum(8 * layer.num_features for layer in student.projector.modules() if isinstance(layer, _BatchNorm))
    expected = found.gradient_bytes + found.batchnorm_bytes + 2 * found.image_bytes + found.embedding_bytes + backward
    assert sum(size for _, size in group) == expected


def test_one_process_sends_nothing() -> None:
    found = traffic(small("few-photos-moco"), BATCH, 1)
    assert found.collectives == found.gathered_bytes == 0 and found.parameters > 0


@pytest.mark.parametrize("name", ["few-photos-moco", "dino-mobilenetv2-sslight"])
def test_a_checkpoint_has_the_bytes_that_were_counted(name: str, tmp_path: Path) -> None:
    recipe = small(name)
    step = TrainStep(recipe, torch.device("cpu"), amp=False, seed=0)
    for parameter in step.method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    step.optimizer.step()
    save_checkpoint(tmp_path, method=step.method, optimizer=step.optimizer, position=Position(), config={}, arch=recipe.arch)
    state = load_checkpoint(tmp_path / "last.pt")
    saved = tensor_bytes(state["method"]) + tensor_bytes(state["optimizer"]["state"])
    assert traffic(recipe, BATCH, 1).checkpoint_bytes == saved
    assert saved <= (tmp_path / "last.pt").stat().st_size < 1.1 * saved + 500_000


def test_more_processes_gather_more_of_batchnorm_and_a_larger_batch_more_images() -> None:
    recipe = small("few-photos-moco")
    recipe = replace(recipe, moco=replace(recipe.settings, queue=4096))
    one, more, larger = traffic(recipe, 64, 2), traffic(recipe, 64, 8), traffic(recipe, 128, 2)
    assert more.batchnorm_bytes == 4 * one.batchnorm_bytes and more.image_bytes == one.image_bytes
    assert larger.image_bytes == 2 * one.image_bytes == 2 * 2 * 64 * 3 * 32 * 32 * 2
