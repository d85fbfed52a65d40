"""Classifiers trained all at once, against torch's optimisers, fastssl's LARS and scikit-learn, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.evaluate.features import Features, wilson_interval
from fastssl.evaluate.linear import linear_probe
from fastssl.evaluate.protocols import PROTOCOLS, Trial
from fastssl.evaluate.published_probe import Classifiers, Curves, summary
from fastssl.optim.optimizers import LARS

CPU, WIDTH, CLASSES = torch.device("cpu"), 9, 6
GRID = [Trial(3.0, 0.0), Trial(0.1, 0.0), Trial(3.0, 0.01), Trial(30.0, 0.0)]


def make(count: int, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Overlapping clusters, shifted: features as a ReLU leaves them."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(77))
    return torch.relu(centres[targets] + noise * torch.randn(count, WIDTH, generator=generator) + 0.5), targets


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    features, targets = make(64, seed=epoch)
    return list(zip(features.split(16), targets.split(16)))


def slow(protocol: str, trial: Trial, epochs: int) -> tuple[nn.Linear, list[Tensor]]:
    """One classifier, autograd and an optimiser of its own; and its weights behind every step."""
    chosen = PROTOCOLS[protocol]
    layer = nn.Linear(WIDTH, CLASSES)
    nn.init.normal_(layer.weight, 0.0, 0.01, generator=torch.Generator().manual_seed(5))
    nn.init.zeros_(layer.bias)
    if chosen.optimizer == "lars":
        # As published: the bias is not decayed.
        groups = [
            {"params": [layer.weight], "weight_decay": trial.weight_decay},
            {"params": [layer.bias], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer = LARS(groups, lr=1.0, momentum=0.9)
    else:
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9, weight_decay=trial.weight_decay)
    steps = []
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate(trial.lr, epoch, epochs, 16)
        for features, targets in batches(epoch):
            optimizer.zero_grad()
            functional.cross_entropy(layer(features), targets).backward()
            optimizer.step()
            steps.append(torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1).clone())
    return layer, steps


@pytest.fixture
def float64() -> Iterator[None]:
    """Large rates blow rounding errors up; in float32 the tolerance would have to hide mistakes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.usefixtures("float64")
def test_every_step_of_every_trial_equals_an_optimiser_of_its_own(protocol: str) -> None:
    chosen, epochs = PROTOCOLS[protocol], 3
    # LARS takes a thousandth of the weights' norm as its unit.
    grid = [replace(trial, lr=trial.lr * (100 if chosen.optimizer == "lars" else 1)) for trial in GRID]
    together = Classifiers(chosen, grid, WIDTH, CLASSES, device=CPU, seed=5)
    expected = [slow(protocol, trial, epochs)[1] for trial in grid]
    number = 0
    for epoch in range(epochs):
        rates = [chosen.rate(trial.lr, epoch, epochs, 16) for trial in grid]
        for features, targets in batches(epoch):
            together.step(features, targets, rates)
            for trial, steps in enumerate(expected):
                found = torch.cat([together.weights[trial], together.biases[trial][:, None]], dim=1)
                torch.testing.assert_close(found.detach(), steps[number], rtol=1e-8, atol=1e-10)
            number += 1
    # Decay and rate made a difference that is far above the tolerance.
    assert number == 12 and min((together.weights[0] - together.weights[other]).abs().max() for other in (1, 2)) > 1e-6


def train(grid: list[Trial], epochs: int = 4, protocol: str = "sslight") -> tuple[Classifiers, Curves]:
    chosen = PROTOCOLS[protocol]
    classifiers = Classifiers(chosen, grid, WIDTH, CLASSES, device=CPU, seed=5)
    features, targets = make(300, seed=99)
    judged = {"val": (features, targets, 300), "held_out": (features[:50], targets[:50], 50)}
    return classifiers, classifiers.train(batches, judged, epochs=epochs, batch_size=16)


@pytest.mark.parametrize("protocol", ["sslight", "moco"])
def test_a_trial_among_others_is_what_it_would_be_alone(protocol: str) -> None:
    together, curves = train(GRID, protocol=protocol)
    for number, trial in enumerate(GRID):
        alone, curve = train([trial], protocol=protocol)
        torch.testing.assert_close(together.weights[number], alone.weights[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(curves.loss[:, number], curve.loss[:, 0], rtol=1e-5, atol=1e-6)
        assert torch.equal(curves.right["val"][:, :, number], curve.right["val"][:, :, 0])


def test_curves_equal_a_loop_by_hand() -> None:
    trial, epochs = Trial(3.0, 0.0), 2
    curves = train([trial], epochs)[1]
    layer, _ = slow("sslight", trial, epochs)
    features, targets = make(300, seed=99)
    first = layer(features).topk(5, dim=1).indices == targets[:, None]
    assert curves.right["val"][-1, :, 0].tolist() == [int(first[:, 0].sum()), int(first.sum())]
    assert curves.totals == {"val": 300, "held_out": 50}
    # The very first loss is that of weights that are nearly zero.
    assert (
        curves.loss.shape == (2, 1)
        and 0.5 < float(curves.loss[0, 0]) < 1.8
        and 0 < float(curves.train_accuracy[1, 0]) <= 100
    )


def test_what_counts_as_right() -> None:
    classifiers = Classifiers(PROTOCOLS["moco"], [Trial(1.0, 0.0)] * 3, WIDTH, CLASSES, device=CPU)
    features, targets = make(50)
    targets[:10] = -1
    scores = classifiers.scores(features)
    expected = [int((scores[:, 0].topk(places).indices == targets[:, None]).sum()) for places in (1, 5)]
    with torch.no_grad():
        for weight in classifiers.weights[1:]:
            weight.zero_()  # all classes alike: none is first, and none among the first five of six
        classifiers.biases[2].fill_(torch.nan)
    assert classifiers.right(features, targets).T.tolist() == [expected, [0, 0], [0, 0]]


def test_right_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    classifiers = Classifiers(PROTOCOLS["moco"], GRID, WIDTH, CLASSES, device=CPU)
    features, targets = make(50)
    whole = classifiers.right(features, targets)
    monkeypatch.setattr("fastssl.evaluate.published_probe._SCORES", 7 * len(GRID) * CLASSES)
    assert torch.equal(classifiers.right(features, targets), whole)


@pytest.mark.parametrize(("protocol", "lr"), [("moco", 30.0), ("sslight", 3.0)])
def test_trained_to_convergence_equals_scikit_learn(protocol: str, lr: float) -> None:
    """And so does the fast probe: within half a point, on features that stay the same."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    (features, targets), (asked, truth) = make(3000, seed=1), make(4000, seed=2)
    reference = linear_model.LogisticRegression(C=1e4, max_iter=5000).fit(features.numpy(), targets.numpy())
    expected = 100 * reference.score(asked.numpy(), truth.numpy())
    assert 40 < expected < 95  # neither chance nor without a mistake
    generator = torch.Generator().manual_seed(0)

    def shuffled(_: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(3000, generator=generator)[:2816]
        return [(features[rows], targets[rows]) for rows in order.split(256)]

    chosen = PROTOCOLS[protocol]
    classifiers = Classifiers(chosen, [Trial(lr, 0.0)], WIDTH, CLASSES, device=CPU)
    judged = {"val": (asked, truth, 4000)}
    curves = classifiers.train(shuffled, judged, epochs=chosen.epochs, batch_size=256)
    result = summary(curves, [Trial(lr, 0.0)], CLASSES)
    assert result["accuracy"] == pytest.approx(expected, abs=0.5)
    fast = linear_probe(Features(features, targets, torch.arange(3000)), Features(asked, truth, torch.arange(4000)))
    assert fast.accuracy == pytest.approx(expected, abs=0.5)
    print(f"{protocol}: scikit-learn {expected:.2f}, {protocol} {result['accuracy']:.2f}, fast {fast.accuracy:.2f}")


def counts(*epochs: list[list[int]]) -> Tensor:
    return torch.tensor(epochs)


def test_the_headline_is_the_last_epoch_of_the_first_trial() -> None:
    """Three epochs of two trials, by hand; 10 photos to judge on, 4 held out."""
    val = counts([[3, 2], [6, 6]], [[5, 7], [9, 9]], [[4, 6], [8, 10]])
    held_out = counts([[2, 1], [4, 4]], [[1, 1], [4, 4]], [[3, 2], [4, 4]])
    loss = torch.tensor([[2.0, 2.0], [1.0, 1.0], [0.5, torch.nan]], dtype=torch.float64)
    curves = Curves(loss, 50 * torch.ones(3, 2), {"val": val, "held_out": held_out}, {"val": 10, "held_out": 4})
    grid = [Trial(1.0, 0.0), Trial(2.0, 0.1)]
    found = summary(curves, grid, 9)
    assert (found["accuracy"], found["top5_accuracy"], found["confidence"]) == (40.0, 80.0, wilson_interval(4, 10))
    assert (found["best_epoch"], found["best_accuracy"], found["best_top5_accuracy"]) == (2, 50.0, 90.0)
    assert (
        found["chosen_lr"],
        found["chosen_weight_decay"],
        found["chosen_accuracy"],
        found["chosen_top5_accuracy"],
    ) == (
        2.0,
        0.1,
        60.0,
        100.0,
    )
    assert found["chosen_on"] == "validation photos" and found["accuracy_by_epoch"] == [30.0, 50.0, 40.0]
    assert [row["best_epoch"] for row in found["grid"]] == [2, 2] and [row["train_loss"] for row in found["grid"]] == [
        0.5,
        None,
    ]
    assert "lr" not in found and found["chosen_at_edge"]
    middle = summary(Curves(loss, loss, {"val": val}, {"val": 10}), [Trial(2.0, 0.0), Trial(2.0, 0.1)], 9)
    assert not middle["chosen_at_edge"]  # all have one rate
    on_training = summary(curves, grid, 5, choose_on="held_out")
    assert (on_training["best_epoch"], on_training["best_accuracy"], on_training["chosen_lr"]) == (3, 40.0, 1.0)
    assert on_training["chosen_on"] == "held-out training photos" and on_training["top5_accuracy"] is None
    assert [row["held_out_accuracy"] for row in on_training["grid"]] == [75.0, 50.0]


@pytest.mark.parametrize("protocol", ["moco", "sslight"])
def test_a_diverged_trial_does_not_spoil_the_others(protocol: str) -> None:
    grid = [Trial(3.0, 0.0), Trial(1e300, 0.0)]
    _, curves = train(grid, protocol=protocol)
    alone = train(grid[:1], protocol=protocol)[1]
    found = summary(curves, grid, CLASSES)
    assert found["accuracy"] == summary(alone, grid[:1], CLASSES)["accuracy"] > 100 / CLASSES
    assert found["chosen_lr"] == 3.0 and found["grid"][1]["train_loss"] is None


def test_the_trust_ratio_of_weights_that_are_zero_is_one() -> None:
    protocol = replace(PROTOCOLS["sslight"], init_std=0.0)
    classifiers = Classifiers(protocol, [Trial(1.0, 0.0)], WIDTH, CLASSES, device=CPU)
    layer = nn.Linear(WIDTH, CLASSES)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = LARS(layer.parameters(), lr=0.5)
    features, targets = make(16)
    functional.cross_entropy(layer(features), targets).backward()
    optimizer.step()
    classifiers.step(features, targets, [0.5])
    torch.testing.assert_close(classifiers.weights[0].detach(), layer.weight.detach())
    assert layer.weight.abs().max() > 0
