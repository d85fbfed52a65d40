"""Twelve training steps of every published method against the papers' steps written out slowly, in float64: weights,
statistics, queue and centre, on one process and on two.
"""

from __future__ import annotations

import copy
import math

import pytest
import reference_steps as slow
import torch
from processes import run_processes
from torch import Tensor

from fastssl.config.recipe import Recipe, load_recipe
from fastssl.distributed.collectives import rank, world_size
from fastssl.distributed.world import world_from_environment
from fastssl.methods.base import Method
from fastssl.optim.schedules import RunLength
from fastssl.training.networks import initial_backbone
from fastssl.training.step import TrainStep

CPU, BATCH = torch.device("cpu"), 16
EPOCHS, PER_EPOCH = 4, 3
RUN = RunLength(EPOCHS * PER_EPOCH, PER_EPOCH)
SMALL = {"train.batch_size": BATCH, "train.epochs": EPOCHS, "optim.warmup_epochs": 1}
LOCAL = {**SMALL, "views.global_size": 32, "views.local_size": 16, "views.local_count": 2, "arch": "test_efficientnet"}
LIGHT = {
    **SMALL,
    "arch": "test_efficientnet",
    "views.0.size": 64,
    "moco.queue": 96,
    "moco.projector.hidden": 16,
    "moco.split_bn": 4,
    "optim.lr": 0.2,
}
DINO = {"dino.out": 24, "dino.projector.hidden": 16, "dino.projector.out": 8, "dino.warmup_teacher_epochs": 3}
CASES = {
    "light-moco": ("light-moco-mobilenetv3", {**LIGHT, "moco.split_bn_queries": 4}),
    "light-moco, views together": (
        "light-moco-mobilenetv3",
        {**LIGHT, "moco.bn_by_view": "false", "moco.split_bn_queries": 1},
    ),
    "MoCo": ("moco-mobilenetv2-sslight", {**LOCAL, "moco.queue": 96, "moco.projector.hidden": 16}),
    "DINO, CNN": ("dino-mobilenetv2-sslight", {**LOCAL, **DINO, "optim.clip_grad": 0.05}),
    "DINO, ViT": (
        "dino-vit_tiny-sslight",
        {**LOCAL, **DINO, "arch": "test_vit", "drop_path": 0.0, "optim.lr": 0.01},
    ),
    "SwAV": (
        "swav-mobilenetv2-sslight",
        {
            **LOCAL,
            "swav.prototypes": 12,
            "swav.queue": 2 * BATCH,
            "swav.queue_epoch": 1,
            "swav.projector.hidden": 16,
            "swav.projector.out": 8,
        },
    ),
}


ALONE = world_from_environment({})
#: State by name, and the loss of each step.
Found = tuple[dict[str, Tensor], list[float]]


def recipe(case: str) -> Recipe:
    name, changes = CASES[case]
    return load_recipe(name, {key: str(value) for key, value in changes.items()})


def batch(chosen: Recipe, number: int) -> list[Tensor]:
    """The views of the whole batch, (B, 3, S, S) each."""
    generator = torch.Generator().manual_seed(number)
    sides = [spec.size for spec in chosen.views for _ in range(spec.count)]
    return [torch.randn(BATCH, 3, side, side, generator=generator) for side in sides]


def grouped(chosen: Recipe, views: list[Tensor]) -> list[Tensor]:
    """This rank's samples, joined as the loader joins them."""
    own, left = BATCH // world_size(), iter(views)
    mine = [
        torch.cat([next(left)[rank() * own : (rank() + 1) * own] for _ in range(spec.count)]) for spec in chosen.views
    ]
    return [view.contiguous(memory_format=torch.channels_last) for view in mine]


def fast(case: str) -> Found:
    """State behind twelve steps of the product, and the loss of each."""
    torch.set_default_dtype(torch.float64)
    try:
        chosen, losses = recipe(case), []
        step = TrainStep(chosen, CPU, amp=False, seed=0, world=world_from_environment() if world_size() > 1 else ALONE)
        for number in range(RUN.total_steps):
            epoch, views = RUN.epoch(number), grouped(chosen, batch(chosen, number))
            losses.append(step(views, step.noise(epoch, number), step.rates(number, RUN))[0].item())
        return step.method.state_dict(), losses
    finally:
        torch.set_default_dtype(torch.float32)


def plain_networks(chosen: Recipe, method: Method) -> list[slow.Network]:
    """Student and, if there is one, teacher, of timm's own layers, with the weights that the run begins with."""
    networks = []
    for ours in method.networks:
        head = ours.projector
        if chosen.method == "dino":
            gain = chosen.dino.learned_gain
            head = slow.DINOHead(slow.plain_mlp(head.mlp), head.last.direction, head.last.gain, learned=gain)
        elif chosen.method == "swav":
            head = slow.SwAVHead(slow.plain_mlp(head.mlp), head.prototypes.weight)
        else:
            head = slow.plain_mlp(head)
        network = slow.Network(initial_backbone(chosen, 0), head)
        network.load_state_dict(copy.deepcopy(ours.state_dict()))
        networks.append(network.double().train())
    return networks


def spared(name: str, p: Tensor) -> bool:
    """SSLight: no decay of one-dimensional tensors and of depth-wise filters."""
    return p.ndim < 2 or (p.ndim == 4 and p.shape[1] == 1)


def lars_rate(step: int, base: float, first: float = 0.0, last: float = 0.0048) -> float:
    """A line over the first epoch, both ends included, then half a cosine; the ends, for batch 1,024, follow ours."""
    peak, share = base * BATCH / 256, BATCH / 1024
    if step < PER_EPOCH:
        return first * share + (peak - first * share) * step / (PER_EPOCH - 1)
    return slow.cosine(peak, last * share, (step - PER_EPOCH) / (RUN.total_steps - PER_EPOCH))


def reference(case: str) -> Found:
    """The same steps, slowly: what is left behind, by our names, and the losses."""
    torch.set_default_dtype(torch.float64)
    try:
        chosen = recipe(case)
        method = TrainStep(chosen, CPU, amp=False, seed=0).method
        student, *teacher = plain_networks(chosen, method)
        losses, noise, total = [], TrainStep(chosen, CPU, amp=False, seed=0).noise, RUN.total_steps
        if chosen.method == "moco":
            light = case.startswith("light")
            optimizer = slow.Optimizer(student, "sgd", 1e-4, lambda *_: False)
            if not light:
                optimizer = slow.Optimizer(student, "lars", 1e-6, spared)
            moco = slow.MoCo(
                student,
                teacher[0],
                method.queue,
                tau=0.1 if light else 0.2,
                optimizer=optimizer,
                groups=4,
                by_view=case == "light-moco",
                lambdas=None if light else (0.4, 0.6),
            )
            for number in range(total):
                epoch = number // PER_EPOCH
                if light:  # once an epoch: half of the peak in the only epoch of warm-up, times the cosine to the left
                    peak = 0.2 * BATCH / 256 * (0.5 if epoch == 0 else 1)
                    lr = slow.cosine(peak, 0, (epoch - 1) / (EPOCHS - 1))
                    shares = slow.stepped_shares(0.2 * (1 - math.cos(math.pi * epoch / EPOCHS)) / 2)
                else:
                    lr, shares = lars_rate(number, 0.48), []
                permutation = noise(epoch, number)["permutation"]
                losses.append(moco.step(batch(chosen, number), permutation, lr, 0.999, shares))
            state = {"queue": moco.queue, "queue_pointer": torch.tensor(moco.place)}
        elif chosen.method == "dino":
            vit = case.endswith("ViT")
            optimizer = slow.Optimizer(student, "adamw" if vit else "lars", 1e-6, spared)
            dino = slow.DINO(student, teacher[0], 24, (0.4, 0.6), optimizer)
            for number in range(total):
                epoch = number // PER_EPOCH
                lr = lars_rate(number, 0.01, last=1e-5) if vit else lars_rate(number, 0.48)
                momentum = slow.cosine(0.996, 1.0, number / total)
                tau = 0.04 + 0.03 * min(epoch / 2, 1)
                decay = slow.cosine(0.04, 0.4, number / total) if vit else None
                rates = {"lr": lr, "momentum": momentum, "tau": tau, "decay": decay, "frozen": epoch == 0}
                losses.append(dino.step(batch(chosen, number), **rates, clip=math.inf if vit else 0.05))
            state = {"center": dino.centre}
        else:
            optimizer = slow.Optimizer(student, "lars", 1e-6, spared)
            swav = slow.SwAV(student, 2 * BATCH, (0.4, 0.6), optimizer)
            for number in range(total):
                lr, epoch = lars_rate(number, 0.3, first=0.075), number // PER_EPOCH
                losses.append(swav.step(batch(chosen, number), lr=lr, frozen=epoch == 0, fill=epoch >= 1))
            state = {"queue": torch.stack([torch.stack(rows) for rows in swav.queues])}
        for name, network in zip(("student", "teacher"), [student, *teacher]):
            state |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        return state, losses
    finally:
        torch.set_default_dtype(torch.float32)


def require_equal(
    found: tuple[dict[str, Tensor], list[float]], expected: tuple[dict[str, Tensor], list[float]]
) -> None:
    state, wanted = found[0], expected[0]
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            state[name], value, rtol=0, atol=1e-9, check_dtype=False, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)  # metrics are float32


def moved(case: str, state: dict[str, Tensor]) -> float:
    torch.set_default_dtype(torch.float64)
    try:
        before = dict(initial_backbone(recipe(case), 0).named_parameters())
    finally:
        torch.set_default_dtype(torch.float32)
    return max((state[f"student.backbone.{name}"] - p).abs().max().item() for name, p in before.items())


@pytest.fixture(scope="module")
def references() -> dict[str, Found]:
    return {case: reference(case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_twelve_steps_are_the_papers(case: str, references: dict) -> None:
    assert moved(case, references[case][0]) > 3e-3, "a network that stands still proves nothing"
    require_equal(fast(case), references[case])


def both_ranks(cases: list[str]) -> dict[str, Found]:
    return {case: fast(case) for case in cases}


@pytest.mark.slow
def test_twelve_steps_of_two_processes_are_the_papers(references: dict) -> None:
    found = run_processes(both_ranks, 2, list(CASES), timeout=300)
    for case in CASES:
        losses = [sum(pair) / 2 for pair in zip(*(ranks[case][1] for ranks in found))]
        for ranks in found:
            require_equal((ranks[case][0], losses), references[case])
