"""Fine-tuning against a plain loop, over processes, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_processes
from tiny import TinyBackbone
from torch import Tensor, nn
from torch.nn import functional

from fastssl.distributed.collectives import rank
from fastssl.evaluate.classifier import Classifier
from fastssl.evaluate.features import ProbeError, wilson_interval
from fastssl.evaluate.finetune import SSLIGHT_OPTIM, FinetuneConfig, FinetuneResult, count_correct, finetune
from fastssl.evaluate.photos import LabelledSplit, open_split
from fastssl.models.backbones import create_backbone
from fastssl.optim.optimizers import OptimConfig
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec

CPU = torch.device("cpu")
FAST = dataclasses.replace(SSLIGHT_OPTIM, lr=2.0)
SMALL = FinetuneConfig(FAST, epochs=3, batch_size=16, size=12, crop=0.9)


def half_head() -> tuple[nn.Module, int]:
    """As of a DINO run."""
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.GELU()), 8


def network(*, classes: int = 3, head: bool = False, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(TinyBackbone(), classes, half_head() if head else None, seed=seed)


def run(beton: Path, net: Classifier, config: FinetuneConfig = SMALL, **how: object) -> FinetuneResult:
    with open_split(beton, beton) as split:
        return finetune(net, split, config, device=CPU, workers=1, **how)


# ---------------------------------------------------------------------- the schedule and the views


def test_the_published_schedule() -> None:
    config = FinetuneConfig(epochs=60)
    assert config.batch_size == 1024
    assert config.lr(0) == pytest.approx(0.12) and config.lr(60) == pytest.approx(1e-6)
    assert config.lr(30) == pytest.approx((0.12 + 1e-6) / 2)
    assert config.lr(59) == pytest.approx(1e-6 + (0.12 - 1e-6) * (1 + math.cos(math.pi * 59 / 60)) / 2)
    assert (config.optim.name, config.optim.momentum, config.optim.nesterov, config.optim.weight_decay) == (
        "sgd",
        0.9,
        True,
        0.0,
    )


def test_the_published_views() -> None:
    config = FinetuneConfig()
    train, test = config.train_view, config.test_view
    assert (train.size, train.area, train.interpolation, train.flip) == (224, (0.08, 1.0), "bicubic", 0.5)
    assert (test.size, test.center, test.interpolation, test.flip) == (224, 224 / 256, "bicubic", 0.0)
    for view in (train, test):
        assert view.jitter == view.grey == view.blur == view.solarise == 0 and view.count == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"head_lr_factor": 0.0},
        {"head_lr_factor": float("nan")},
    ],
)
def test_no_configuration(changes: dict) -> None:
    with pytest.raises(ProbeError):
        FinetuneConfig(**changes)


# ---------------------------------------------------------------------- the plain twin


def plain_finetune(net: Classifier, split: LabelledSplit, config: FinetuneConfig, seed: int) -> list[int]:
    """torch's own optimiser and schedule, one photo at a time to judge on; how many were right after each epoch."""
    optimizer = torch.optim.SGD(
        [{"params": net.backbone.parameters()}, {"params": [*net.hidden.parameters(), *net.linear.parameters()]}],
        lr=config.optim.lr * config.batch_size / 256,
        momentum=0.9,
        nesterov=True,
    )
    optimizer.param_groups[1]["lr"] *= config.head_lr_factor
    # Its lower end does not know the factor; here it is 0.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs, eta_min=0.0)
    crop = ViewSpec(size=config.size, area=(0.08, 1.0), interpolation="bicubic", jitter=0.0, grey=0.0, blur=0.0)
    centre = ViewSpec(
        size=config.size, center=config.crop, interpolation="bicubic", flip=0.0, jitter=0.0, grey=0.0, blur=0.0
    )
    classes = sorted(set(split.train.labels[split.train_index].tolist()))
    right = []
    for epoch in range(config.epochs):
        net.train()
        how = {"seed": seed, "workers": 1, "indices": split.train_index, "drop_last": False}
        with ViewLoader(split.train, [crop], config.batch_size, **how) as loader:
            for batch in loader.epoch(epoch):
                loss = functional.cross_entropy(
                    net(batch.views[0].double()), torch.tensor([classes.index(c) for c in batch.label.tolist()])
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        schedule.step()
        net.eval()
        right.append(0)
        with (
            ViewLoader(
                split.val, [centre], 1, workers=1, indices=split.val_index, shuffle=False, drop_last=False
            ) as loader,
            torch.no_grad(),
        ):
            for batch in loader.epoch(0):
                right[-1] += classes[int(net(batch.views[0].double()).argmax())] == int(batch.label)
    return right


def test_it_is_a_plain_loop(beton: Path) -> None:
    config = dataclasses.replace(SMALL, optim=dataclasses.replace(FAST, final_lr=0.0), head_lr_factor=3.0)
    ours, theirs = (network(head=True).double() for _ in range(2))
    with open_split(beton, None, seed=4) as split:
        result = finetune(ours, split, config, device=CPU, workers=1, seed=7)
        before = network(head=True).double().state_dict()
        right = plain_finetune(theirs, split, config, seed=7)
    assert result.accuracies == [100 * count / 9 for count in right] and result.steps_per_epoch == 3
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(
            ours.state_dict()[name], value, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
    for part in ("backbone.body.0.weight", "backbone.body.1.running_mean", "hidden.0.weight", "linear.weight"):
        assert (before[part] - ours.state_dict()[part]).abs().max() > 1e-3, "a network that stands still proves nothing"


def test_adamw_with_decay(beton: Path) -> None:
    """The head's rate, and decay of matrices alone, in the first step: AdamW's is the rate itself, whatever the
    gradient.
    """
    optim = OptimConfig(name="adamw", lr=1.6, weight_decay=0.05, decay_1d=False, final_lr=0.0, per_epoch=True)
    config = dataclasses.replace(SMALL, optim=optim, epochs=1, batch_size=48, head_lr_factor=0.01)
    net, before = network().double(), network().double().state_dict()
    run(beton, net, config)
    rate = 1.6 * 48 / 256
    for name, factor, decay in (
        ("backbone.body.0.weight", 1.0, 0.05),
        ("backbone.body.1.weight", 1.0, 0.0),
        ("linear.weight", 0.01, 0.05),
    ):
        moved = net.state_dict()[name] - before[name] * (1 - rate * factor * decay)
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, rate * factor), rtol=1e-3, atol=0.0)


def test_it_repeats_bit_for_bit_and_the_seed_counts(beton: Path) -> None:
    nets, results = [network() for _ in range(3)], []
    for net, seed in zip(nets, (3, 3, 4)):
        results.append(run(beton, net, seed=seed))
    states = [net.state_dict() for net in nets]
    assert results[0] == results[1] and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert results[0].losses != results[2].losses


# ---------------------------------------------------------------------- what comes out


def test_colours_are_learned_and_the_figures_fit_together(beton: Path) -> None:
    seen: list[int] = []
    result = run(beton, network(), dataclasses.replace(SMALL, epochs=6), progress=seen.append)
    assert result.best_accuracy > 80, "three classes of different colour"
    assert (
        result.accuracy == result.accuracies[-1]
        and len(result.accuracies) == len(result.losses) == len(result.learning_rates) == 6
    )
    assert result.best_accuracy == max(result.accuracies) and result.best_epoch == 1 + result.accuracies.index(
        result.best_accuracy
    )
    assert result.confidence == wilson_interval(round(result.accuracy * 48 / 100), 48)
    assert result.losses[-1] < result.losses[0] and result.train_accuracies[-1] > result.train_accuracies[0]
    assert (result.train_samples, result.val_samples, result.classes, result.unseen, result.steps_per_epoch) == (
        48,
        48,
        3,
        0,
        3,
    )
    assert result.top5 is None and result.best_top5 is None and result.top5_confidence is None  # of three classes
    assert seen == [16 * step for step in range(1, 19)]


class Fixed(nn.Module):
    """A backbone whose feature is the same for every photo."""

    num_features = 7

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(7))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale.expand(len(images), 7)


def test_top_one_and_top_five_by_hand(beton: Path) -> None:
    """Seven classes that are the labels of 48 photos; the logits are the same for all: 6 > 5 > ... > 0."""
    net = Classifier(Fixed(), 7)
    with torch.no_grad():
        net.linear.weight.zero_()
        net.linear.bias.copy_(torch.arange(7.0))
    with open_split(beton, beton) as split:
        split.train.labels = split.val.labels = np.arange(48) % 7  # 7, 7, 7, 7, 7, 7, 6 of each
        assert count_correct(net, split, SMALL, device=CPU) == (6, 6 + 4 * 7)
        # Without class 3, 6 is the last but one of six: what was class 3 is never right.
        split = dataclasses.replace(split, train_index=np.flatnonzero(split.train.labels != 3))
        net = Classifier(Fixed(), 6)
        with torch.no_grad():
            net.linear.weight.zero_()
            net.linear.bias.copy_(torch.tensor([5.0, 0, 1, 2, 3, 4]))
        assert count_correct(net, split, SMALL, device=CPU) == (
            7,
            7 + 3 * 7 + 6,
        )  # first label 0; then 6, 5, 4 and 2, not 1


def test_classes_that_only_the_photos_judged_on_have(beton: Path) -> None:
    with open_split(beton, beton) as split:
        split = dataclasses.replace(split, train_index=np.flatnonzero(split.train.labels != 1))
        result = finetune(network(classes=2), split, dataclasses.replace(SMALL, epochs=6), device=CPU, workers=1)
    assert (result.classes, result.unseen, result.train_samples) == (2, 16, 32)
    assert 100 / 3 < result.best_accuracy <= 200 / 3


@pytest.mark.parametrize("arch", ["lcnet_035", "resnet10t"])
def test_real_networks_in_bfloat16(beton: Path, arch: str) -> None:
    torch.manual_seed(0)
    net = Classifier(create_backbone(arch), 3)
    config = FinetuneConfig(epochs=1, batch_size=16, size=32)
    result = run(beton, net, config, amp=True)
    assert math.isfinite(result.losses[0]) and all(parameter.dtype == torch.float32 for parameter in net.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 3, 32, 32)).dtype == torch.float32


# ---------------------------------------------------------------------- several processes


def tune_shared(beton: Path) -> dict[str, dict]:
    """State and figures in float64: a network with and without half a head; 47 photos to judge on, which two processes
    cannot share evenly, and 46 to train on, whose last batch of 14 they can.
    """
    found = {}
    for name, head in (("linear", False), ("half head", True)):
        net = network(head=head, seed=rank()).double()  # the others begin with what the first one has
        with open_split(beton, beton) as split:
            split = dataclasses.replace(split, val_index=np.arange(47), train_index=np.arange(2, 48))
            result = finetune(net, split, dataclasses.replace(SMALL, head_lr_factor=2.0), device=CPU, workers=1, seed=2)
        found[name] = {"state": net.state_dict(), "result": dataclasses.asdict(result)}
    with open_split(beton, beton) as split:
        split = dataclasses.replace(split, val_index=np.array([3]))  # fewer photos to judge on than processes
        found["one photo"] = count_correct(network(), split, SMALL, device=CPU)
    return found


def test_two_processes_are_one(beton: Path) -> None:
    one, two = tune_shared(beton), run_processes(tune_shared, 2, beton)
    assert [found.pop("one photo") for found in (one, *two)] in ([(1, 1)] * 3, [(0, 1)] * 3)
    for name, alone in one.items():
        start = network(head=name == "half head").double().state_dict()
        assert (
            max((alone["state"][key] - value).abs().max() for key, value in start.items() if value.is_floating_point())
            > 1e-2
        )
        for both in (found[name] for found in two):
            for key, value in alone["state"].items():
                torch.testing.assert_close(both["state"][key], value, rtol=1e-6, atol=1e-9)
            for field, value in alone["result"].items():
                assert both["result"][field] == (value if value is None else pytest.approx(value, rel=1e-9)), field
    assert one["linear"]["result"]["steps_per_epoch"] == 3


# ---------------------------------------------------------------------- what cannot be


def test_batches_that_cannot_be(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProbeError, match="a batch of 1: BatchNorm needs at least 2 photos"):
        run(beton, network(), dataclasses.replace(SMALL, batch_size=1))
    monkeypatch.setattr("fastssl.evaluate.feature_stream.world_size", lambda: 3)
    with pytest.raises(ProbeError, match="a batch of 16 cannot be shared by 3 processes"):
        run(beton, network())


def test_fewer_photos_than_a_batch_are_one(beton: Path) -> None:
    asked, whole = (dataclasses.replace(SMALL, batch_size=size) for size in (1024, 48))
    nets = [network(), network()]
    few, all_of_them = (run(beton, net, config) for net, config in zip(nets, (asked, whole)))
    assert few == all_of_them and (few.batch_size, few.steps_per_epoch) == (48, 1)
    assert few.learning_rates[0] == pytest.approx(2.0 * 48 / 256)


@pytest.mark.parametrize("world", [1, 2])
def test_a_last_batch_of_one_photo(beton: Path, world: int) -> None:
    """Half a DINO head normalises vectors, which BatchNorm refuses of a single photo."""
    results = run_processes(tune_seventeen, world, beton) if world > 1 else [tune_seventeen(beton)]
    for result in results:
        assert (result.train_samples, result.steps_per_epoch) == (17, 2) and all(map(math.isfinite, result.losses))


def tune_seventeen(beton: Path) -> FinetuneResult:
    with open_split(beton, beton) as split:
        split = dataclasses.replace(split, train_index=np.arange(10, 27))
        return finetune(network(classes=2, head=True), split, SMALL, device=CPU, workers=1)


def test_one_class(beton: Path) -> None:
    with open_split(beton, beton) as split:
        split = dataclasses.replace(split, train_index=np.flatnonzero(split.train.labels == 1))
        with pytest.raises(ProbeError, match="of one class only"):
            finetune(network(classes=1), split, SMALL, device=CPU, workers=1)


def test_a_size_that_the_network_cannot_take(beton: Path) -> None:
    net = Classifier(create_backbone("vit_tiny_patch16_224"), 3)
    with pytest.raises(ProbeError, match=r"cannot take pictures of 20 px .*: change --size") as error:
        run(beton, net, dataclasses.replace(SMALL, size=20))
    assert "\n" not in str(error.value)


def test_divergence(beton: Path) -> None:
    config = dataclasses.replace(SMALL, optim=dataclasses.replace(SSLIGHT_OPTIM, lr=1e38))
    with pytest.raises(ProbeError, match=r"diverged: the loss is (nan|inf) in epoch \d of 3; lower --lr"):
        run(beton, network(), config)
    broken = network()
    nn.init.constant_(broken.linear.bias, float("nan"))
    with pytest.raises(ProbeError, match="the checkpoint's training has diverged"):
        run(beton, broken)
