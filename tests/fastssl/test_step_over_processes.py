"""Two processes that share a batch make the step that one process makes with the whole of it, for every method.

In float64: the steps of fresh networks blow rounding errors up, in float32 to 1e-3 within four of them, which would
hide a mistake of that size.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import run_processes
from teachers import teacher_file
from torch import Tensor

from fastssl.config.recipe import Recipe, load_recipe
from fastssl.distributed.collectives import all_reduce_mean, rank, world_size
from fastssl.distributed.devices import choose_device
from fastssl.distributed.group import joined
from fastssl.distributed.world import world_from_environment
from fastssl.errors import FastSSLError
from fastssl.optim.schedules import RunLength
from fastssl.training.step import TrainStep

pytestmark = pytest.mark.slow

CPU, BATCH, STEPS = torch.device("cpu"), 16, 4
MULTICROP = {
    "views.global_size": 32,
    "views.local_size": 16,
    "views.local_count": 3,
    "train.batch_size": BATCH,
    "optim.lr": 0.5,
}
CASES = {
    "moco, symmetric, split BatchNorm": (
        "few-photos-moco",
        {
            "views.0.size": 32,
            "train.batch_size": BATCH,
            "moco.queue": 64,
            "moco.projector.hidden": 16,
            "moco.split_bn": 4,
            "arch": "resnet10t",
        },
    ),
    "moco, one-sided, local views": (
        "moco-mobilenetv2-sslight",
        {
            **MULTICROP,
            "moco.queue": 64,
            "moco.projector.hidden": 16,
            "moco.smoothing": 0.2,
            "moco.weighting": "nearest",
        },
    ),
    "moco, symmetric, local views, one group": (
        "light-moco-mobilenetv3-sslight",
        {**MULTICROP, "moco.queue": 64, "moco.projector.hidden": 16, "moco.split_bn": 1},
    ),
    "dino": (
        "dino-mobilenetv2-sslight",
        {**MULTICROP, "dino.out": 48, "dino.projector.hidden": 16, "dino.projector.out": 16},
    ),
    "dino, sinkhorn, koleo": (
        "dino-mobilenetv2-sslight",
        {
            **MULTICROP,
            "dino.out": 48,
            "dino.projector.hidden": 16,
            "dino.projector.out": 16,
            "dino.centering": "sinkhorn",
            "dino.koleo": 0.5,
        },
    ),
    "dino, drop path, weight decay that changes": (
        "dino-vit_tiny-sslight",
        {
            **MULTICROP,
            "optim.lr": 0.005,
            "dino.out": 48,
            "dino.projector.hidden": 16,
            "dino.projector.out": 16,
            "arch": "vit_tiny_patch16_224",
        },
    ),
    "swav, with its queue": (
        "swav-mobilenetv2-sslight",
        {
            **MULTICROP,
            "swav.prototypes": 24,
            "swav.queue": 2 * BATCH,
            "swav.queue_epoch": 0,
            "swav.projector.hidden": 16,
            "swav.projector.out": 16,
        },
    ),
    "simclr, smoothed": (
        "simclr-mobilenetv3",
        {
            "views.0.size": 32,
            "train.batch_size": BATCH,
            "simclr.projector.hidden": 16,
            "simclr.smoothing_schedule": "constant",
        },
    ),
    "resa, local views": (
        "resa-mobilenetv3",
        {"views.preset": "sslight-cnn", **MULTICROP, "resa.projector.hidden": 16, "resa.projector.out": 16},
    ),
    "empssl": (
        "empssl-resnet18",
        {**MULTICROP, "empssl.projector.hidden": 16, "empssl.projector.out": 24, "arch": "resnet10t"},
    ),
    "distill, standardised": (
        "distill-mobilenetv3",
        {
            "views.0.size": 32,
            "train.batch_size": BATCH,
            "distill.teacher": teacher_file(),
            "distill.teacher_size": 40,
            "distill.queue": 64,
            "distill.head.hidden": 16,
            "distill.standardise": "true",
            "optim.lr": 0.5,
        },
    ),
}

#: What the papers' steps are not held to over two processes, see test_reference_steps.py.
OWN = [
    "moco, symmetric, local views, one group",
    "dino, sinkhorn, koleo",
    "dino, drop path, weight decay that changes",
    "simclr, smoothed",
    "resa, local views",
    "empssl",
    "distill, standardised",
]


def recipe(case: str) -> Recipe:
    name, changes = CASES[case]
    # One network for all: BatchNorm with an activation in it, and small. A rate at which four steps move it visibly.
    changes = {"arch": "resnet10t", **changes}
    return load_recipe(name, {key: str(value) for key, value in changes.items()})


def batch(recipe: Recipe, number: int) -> list[Tensor]:
    """The views of the whole batch, (count * B, 3, S, S) for each group, of the default dtype."""
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(spec.count * BATCH, 3, spec.size, spec.size, generator=generator) for spec in recipe.views]


def share(view: Tensor) -> Tensor:
    """This rank's samples of each of a group's views."""
    own = BATCH // world_size()
    rows = view.unflatten(0, (-1, BATCH))[:, rank() * own : (rank() + 1) * own].flatten(0, 1)
    return rows.contiguous(memory_format=torch.channels_last)


def train(cases: list[str]) -> dict[str, dict[str, Tensor]]:
    """State and metrics behind four steps of each case, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        return {case: train_one(case) for case in cases}
    finally:
        torch.set_default_dtype(torch.float32)


def rates_of(step: TrainStep, number: int, run: RunLength) -> dict[str, float | bool]:
    """Numbers as of the middle of the run, where warm-ups are over; switches as of its third step and later."""
    switches = {name: on for name, on in step.rates(2 + number, run).items() if isinstance(on, bool)}
    return {**step.rates(STEPS + number, run), **switches}


def train_one(case: str) -> dict[str, Tensor]:
    own = BATCH // world_size()
    index = np.arange(100, 100 + BATCH)[rank() * own : (rank() + 1) * own]
    chosen, run, metrics = recipe(case), RunLength(2 * STEPS, 2), []
    step = TrainStep(chosen, CPU, amp=False, seed=0, world=world_from_environment() if world_size() > 1 else ONE)
    before = {name: value.clone() for name, value in step.method.student.state_dict().items()}
    for number in range(STEPS):
        views = [share(view) for view in batch(chosen, number)]
        rates = {**rates_of(step, number, run), "lr": chosen.optim.lr / 10}
        metrics.append(step(views, step.noise(0, number, index), rates).clone())
    return {**step.method.state_dict(), "metrics": torch.stack(metrics), "moved": _distance(before, step)}


def _distance(before: dict[str, Tensor], step: TrainStep) -> Tensor:
    now = step.method.student.state_dict()
    return torch.stack(
        [(now[name] - value).abs().max() for name, value in before.items() if value.is_floating_point()]
    ).max()


ONE = world_from_environment({})


@pytest.fixture(scope="module")
def both() -> tuple[dict, list[dict]]:
    """(of one process, of each of two)."""
    return train(OWN), run_processes(train, 2, OWN, timeout=400)


@pytest.mark.parametrize("case", OWN)
def test_two_processes_are_one(case: str, both: tuple[dict, list[dict]]) -> None:
    one, two = both[0][case], [found[case] for found in both[1]]
    assert one["moved"] > 1e-3, "a network that stands still proves nothing"
    names = recipe(case).method
    for name, value in one.items():
        if name == "metrics":
            # The loss and its KL are means over samples; a spread over half of the photos is another number.
            torch.testing.assert_close(
                torch.stack([found[name] for found in two]).mean(0)[:, :2], value[:, :2], rtol=1e-5, atol=1e-5
            )
        elif value.is_floating_point():
            for found in two:
                torch.testing.assert_close(
                    found[name], value, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{names} {name}: {text}"
                )
        else:
            assert all(torch.equal(found[name], value) for found in two), name


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    from fastssl.distributed.world import World

    with pytest.raises(FastSSLError, match="3 processes must divide the batch of 16"):
        TrainStep(recipe("dino"), CPU, amp=False, seed=0, world=World(0, 3, 0))


def centre_by_hand() -> tuple[Tensor, Tensor]:
    """Rank r's teacher says r + 1 everywhere for global view 1 and twice that for global view 2."""
    from tiny import TinyBackbone

    from fastssl.losses.pairs import PairWeights
    from fastssl.methods import DINO, DINOConfig
    from fastssl.methods.base import Views

    method = DINO(TinyBackbone(), DINOConfig(out=4), views=Views(3, PairWeights(0, 1.0, 0.0), world_size()))
    method.center.fill_(1.0)
    logits = torch.full((2, 3, 4), float(rank() + 1))
    logits[1] *= 2
    kept = logits.clone()
    method.after_step((logits.flatten(0, 1), torch.zeros(())), [], {})
    return method.center, logits - kept


def test_the_centre_of_two_ranks_by_hand() -> None:
    for center, change in run_processes(centre_by_hand, 2):
        # mean over ranks and views: (1 + 2 + 2 + 4) / 4 = 2.25
        torch.testing.assert_close(center, torch.full((4,), 0.9 * 1.0 + 0.1 * 2.25))
        assert not change.any()


# ---------------------------------------------------------------------- on GPUs, over NCCL


def train_on_gpus(case: str, graph: bool) -> tuple[list[float], dict[str, str], Tensor]:
    """(losses of four steps, fallbacks, the student's weights behind them) on one GPU, or on that of each process."""
    world = world_from_environment()
    device = choose_device("cuda", world)
    with joined(world, device):
        chosen = recipe(case)
        chosen = replace(chosen, train=replace(chosen.train, graph=graph))
        own = BATCH // world.size
        index = np.arange(100, 100 + BATCH)[world.rank * own : (world.rank + 1) * own]
        run, losses = RunLength(2 * STEPS, 2), []
        with closing(TrainStep(chosen, device, amp=True, seed=0, world=world)) as step:
            for number in range(STEPS):
                views = [share(view).to(device, torch.bfloat16) for view in batch(chosen, number)]
                rates = {**rates_of(step, number, run), "lr": chosen.optim.lr / 100}
                metrics = step(views, step.noise(0, number, index), rates)
                losses.append(all_reduce_mean(metrics.clone())[0].item())
            return (
                losses,
                step.fallbacks,
                torch.cat([p.detach().flatten() for p in step.method.student.parameters()]).cpu(),
            )


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("graph", [False, True])
def test_two_gpus_are_one_and_part(case: str, graph: bool) -> None:
    """A recorded step that is not let go would keep NCCL from its end forever."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    losses, _, _ = train_on_gpus(case, graph=False)
    two = run_processes(train_on_gpus, 2, case, graph, join=False, timeout=300)
    assert [fallbacks for _, fallbacks, _ in two] == [{}, {}]
    assert torch.equal(two[0][2], two[1][2]), "the ranks have moved apart"
    np.testing.assert_allclose(two[0][0], losses, rtol=3e-2)
