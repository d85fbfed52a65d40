"""A batch in parts: the loss and the gradients of the whole, one part's activations at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from processes import run_processes
from test_step import BATCH, CPU, METHODS, all_views, multicrop, rates, replayed, run_phases
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.distributed.collectives import rank, world_size
from fastssl.distributed.world import World
from fastssl.training.step import TrainStep

#: A network of which no sample sees another, and drop path.
ALONE = {"arch": "test_vit", "drop_path": 0.5, "optim.name": "sgd"}
CASES = [
    "moco, one-sided",
    "dino",
    "dino, sinkhorn",
    "dino, koleo",
    "swav",
    "simclr, local views",
    "resa, local views",
    "empssl, local views",
    "distill, local views",
]


def recipe_of(case: str, parts: int = 1, *, alone: bool = True, **changes: object):
    name = case.partition(",")[0]
    head = "head" if name == "distill" else "projector"
    own = {**ALONE, f"{name}.{head}.norm": "false"} if alone else {"optim.name": "sgd"}
    if alone and name == "resa":
        own |= {"resa.projector.norm_out": "false", "resa.predictor": "false"}
    return multicrop(case, **own, **changes, **{"train.accumulate": parts})


@pytest.fixture()
def exact() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(step: TrainStep, given: dict[str, list[Tensor]], twin: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """(metrics, gradients by name) of one step. ``twin``: all parts' embeddings with gradient at once."""
    method, found = step.method, {}
    names = {id(parameter): name for name, parameter in method.student.named_parameters()}

    def keep(_: object) -> None:
        found.update({names[id(p)]: p.grad.clone() for p in step._trained if p.grad is not None})

    step.update = keep
    number = rates(step, 1)
    if not twin:
        return step(**given, noise=step.noise(0, 0), rates=number), found
    noise, images = step.noise(0, 0), method.images(given["views"])
    targets = method.targets(images, noise, number)
    shares = [method.embed([step.parts.of(rows, n) for rows in images]) for n in range(step.parts.count)]
    embeddings = torch.stack([one.unflatten(0, (-1, BATCH // step.parts.count)) for one in shares], 1).flatten(0, 2)
    output = method.loss(embeddings, targets, number)
    output.loss.backward()
    keep(None)
    return output.metrics, found


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_a_batch_are_the_batch(case: str, exact: None) -> None:
    """Loss, every other metric and all gradients, with the coins of drop path."""
    whole, cut = (TrainStep(recipe_of(case, parts), CPU, amp=False, seed=0) for parts in (1, 4))
    given = all_views(whole.recipe, torch.float64)
    (expected, slopes), (found, theirs) = (gradients(step, given) for step in (whole, cut))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert slopes.keys() == theirs.keys() and max(slope.abs().max() for slope in slopes.values()) > 1e-4
    for name, slope in slopes.items():
        torch.testing.assert_close(theirs[name], slope, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_batchnorm_sees_a_part_and_its_running_statistics_move_once(case: str, exact: None) -> None:
    """Against all parts' passes with gradient at once, the slow twin."""
    step, twin = (TrainStep(recipe_of(case, 2, alone=False), CPU, amp=False, seed=0) for _ in range(2))
    whole = TrainStep(recipe_of(case, alone=False), CPU, amp=False, seed=0)
    given = all_views(step.recipe, torch.float64)
    seen: list[int] = []
    step.method.student.register_forward_pre_hook(lambda module, inputs: seen.append(sum(map(len, inputs[0]))))
    (found, slopes), (expected, theirs) = gradients(step, given), gradients(twin, given, twin=True)
    rows = step.method.views.count - step.method.hidden_views
    assert seen == [rows * BATCH // 2] * (2 if step.method.divisible else 4)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for name, slope in theirs.items():
        torch.testing.assert_close(slopes[name], slope, rtol=1e-9, atol=1e-12, msg=name)
    gradients(whole, given)
    last = TrainStep(recipe_of(case, 2, alone=False), CPU, amp=False, seed=0).method
    last.embed([step.parts.of(rows, 1) for rows in last.images(given["views"])])  # which moves the statistics
    norms = {name: one for name, one in step.method.student.named_modules() if isinstance(one, _BatchNorm)}
    for name, layer in norms.items():
        once = whole.method.student.get_submodule(name)
        assert int(layer.num_batches_tracked) == int(once.num_batches_tracked), name
        torch.testing.assert_close(layer.running_mean, last.student.get_submodule(name).running_mean)
        torch.testing.assert_close(layer.running_var, last.student.get_submodule(name).running_var)


@pytest.mark.parametrize("case", ["swav", "simclr, local views"])
@pytest.mark.parametrize("amp", [False, True])
def test_two_passes_are_recorded_and_computed_in_bfloat16(case: str, amp: bool) -> None:
    # Of 16 px one pixel is left, where torch 2.15's bfloat16 on a CPU has no gradient for a convolution with a stride.
    changes = {"alone": False, "views.local_size": 24}
    eager = TrainStep(recipe_of(case, 2, **changes), CPU, amp=amp, seed=0)
    graph = recipe_of(case, 2, **changes, **{"train.graph": "true"})
    graphed = TrainStep(graph, CPU, amp=amp, seed=0, record=replayed)
    expected, found = run_phases(eager, 4), run_phases(graphed, 4)
    assert graphed.recorded and not graphed.fallbacks
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=3e-2 if amp else 1e-3, atol=1e-2)
    if amp:
        full = TrainStep(recipe_of(case, 2, **changes), CPU, amp=False, seed=0)
        assert run_phases(full, 1)[0][0] == pytest.approx(expected[0][0], rel=0.05)


def share_of_step(case: str, parts: int) -> dict[str, Tensor]:
    """Metrics and gradients of this process's share of one step, in float64."""
    torch.set_default_dtype(torch.float64)
    world = World(rank(), world_size(), rank()) if world_size() > 1 else World()
    step = TrainStep(recipe_of(case, parts), CPU, amp=False, seed=0, world=world)
    own = BATCH // world.size
    mine = slice(rank() * own, (rank() + 1) * own)
    views = [
        view.unflatten(0, (-1, BATCH))[:, mine].flatten(0, 1) for view in all_views(step.recipe, torch.float64)["views"]
    ]
    given = {"views": [view.contiguous(memory_format=torch.channels_last) for view in views]}
    step.noise = lambda epoch, number, make=step.noise: make(epoch, number, range(BATCH)[mine])
    metrics, slopes = gradients(step, given)
    return {**slopes, "loss": metrics[0]}


@pytest.mark.parametrize("case", ["swav", "simclr, local views"])
def test_parts_of_two_processes_are_the_batch(case: str, exact: None) -> None:
    torch.set_default_dtype(torch.float64)
    expected, found = share_of_step(case, 1), run_processes(share_of_step, 2, case, 2)
    torch.testing.assert_close(sum(one.pop("loss") for one in found) / 2, expected.pop("loss"), rtol=1e-6, atol=1e-6)
    for name, slope in expected.items():
        for one in found:
            torch.testing.assert_close(one[name], slope, rtol=1e-6, atol=1e-9, msg=name)


def test_every_method_is_here() -> None:
    assert {case for case in METHODS if "ViT" not in case} == set(CASES)
