"""The whole of a published probe against a plain loop with torch's own layer, loss and optimisers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fastssl.evaluate import features
from fastssl.evaluate import published_probe as module
from fastssl.evaluate.features import ProbeError
from fastssl.evaluate.photos import open_split, require_labels
from fastssl.evaluate.protocols import PROTOCOLS, LinearProtocol, Trial
from fastssl.evaluate.published_probe import published_probe
from fastssl.models.backbones import create_backbone
from fastssl.optim.optimizers import LARS
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec

CPU = torch.device("cpu")
OPTIONS = {"epochs": 3, "batch_size": 16, "size": 32, "seed": 7, "workers": 1, "device": CPU}


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(0)
    network = create_backbone("resnet10t")
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.2, 1)
    return network


def plain(backbone: nn.Module, path: Path, protocol: LinearProtocol, trial: Trial) -> tuple[list[float], float]:
    """(accuracy behind each epoch, loss of the last) of one classifier, as a script would train it."""
    view = ViewSpec(
        size=32,
        area=(0.08, 1.0),
        interpolation=protocol.interpolation,
        flip=0.5,
        jitter=0.0,
        grey=0.0,
        blur=0.0,
        solarise=0.0,
    )
    judged = replace(ViewSpec.evaluation(32), interpolation=protocol.interpolation)
    layer = nn.Linear(512, 3)
    nn.init.normal_(layer.weight, 0.0, 0.01, generator=torch.Generator().manual_seed(7))
    nn.init.zeros_(layer.bias)
    if protocol.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            layer.parameters(), 1.0, momentum=0.9, weight_decay=trial.weight_decay
        )
    else:
        groups = [{"params": [layer.weight], "weight_decay": trial.weight_decay}, {"params": [layer.bias]}]
        optimizer = LARS(groups, 1.0, momentum=0.9)
    found, loss = [], 0.0
    backbone.eval()
    with (
        ViewLoader(path, [view], 20, seed=7, workers=1, drop_last=False) as train,
        ViewLoader(path, [judged], 48, shuffle=False, workers=1) as val,
    ):
        for epoch in range(3):
            for group in optimizer.param_groups:
                group["lr"] = protocol.rate(trial.lr, epoch, 3, 20)
            losses, photos = [], []
            for batch in train.epoch(epoch):
                with torch.no_grad():
                    features = backbone(batch.views[0])
                error = functional.cross_entropy(layer(features), batch.label)
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
                losses.append(float(error.detach()))
                photos.append(len(batch.label))
            assert photos == [20, 20, 8]
            loss = float(np.average(losses, weights=photos))
            with torch.no_grad():
                for batch in val.epoch(0):
                    predicted = layer(backbone(batch.views[0])).argmax(dim=1)
                    found.append(100 * float((predicted == batch.label).float().mean()))
    return found, loss


@pytest.mark.parametrize(("name", "lrs"), [("moco", (3.0, 0.3)), ("sslight", (3.0, 12.0))])
def test_equals_a_plain_loop(beton: Path, backbone: nn.Module, name: str, lrs: tuple[float, float]) -> None:
    protocol, grid = PROTOCOLS[name], [Trial(lrs[0], 0.0), Trial(lrs[1], 0.001)]
    with open_split(beton, beton) as split:
        record = published_probe(backbone, split, protocol, grid, **{**OPTIONS, "batch_size": 20})
    for row, trial in zip(record["grid"], grid):
        accuracies, loss = plain(backbone, beton, protocol, trial)
        assert row["accuracy"] == pytest.approx(accuracies[-1]) and row["best_accuracy"] == pytest.approx(
            max(accuracies)
        )
        assert row["train_loss"] == pytest.approx(loss, rel=1e-3)
    first, _ = plain(backbone, beton, protocol, grid[0])
    assert record["accuracy_by_epoch"] == pytest.approx(first)
    assert len({row["train_loss"] for row in record["grid"]}) == 2 and record["chosen_accuracy"] > 40
    assert record["changed"] == ["size", "lr", "batch_size", "epochs"] and record["protocol"] == name
    assert record["steps_per_epoch"] == 3


def test_features_that_are_kept_are_those_of_the_first_epochs(beton: Path, backbone: nn.Module) -> None:
    """The first two epochs are the same, the third goes through the first's views again."""
    with open_split(beton, beton) as split:
        grid = [Trial(3.0, 0.0)]
        fresh, kept, all_kept = (
            published_probe(backbone, split, PROTOCOLS["moco"], grid, **OPTIONS, cached_epochs=count)
            for count in (0, 2, 3)
        )
    assert kept["accuracy_by_epoch"][:2] == fresh["accuracy_by_epoch"][:2] and kept["train_loss"] != fresh["train_loss"]
    assert (kept["cached_epochs"], kept["cache_dtype"]) == (2, "float32") and "cached_epochs" in kept["changed"]
    assert all_kept == fresh and fresh["cache_dtype"] is None  # nothing would be read a second time


def test_held_out_photos_are_not_trained_on(beton: Path, backbone: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {"learned": [], "judged": []}

    class Spy(module.FeatureStream):
        def __init__(self, network, reader, indices, *args, **options):
            seen["learned"] += indices.tolist()
            super().__init__(network, reader, indices, *args, **options)

    def extract(*args, indices, **options):
        seen["judged"] += indices.tolist()
        return module_extract(*args, indices=indices, **options)

    module_extract = features.extract_features
    monkeypatch.setattr(module, "FeatureStream", Spy)
    monkeypatch.setattr(features, "extract_features", extract)
    options = {**OPTIONS, "epochs": 1, "choose_on": "held_out"}
    with open_split(beton, None) as split:
        record = published_probe(backbone, split, PROTOCOLS["sslight"], [Trial(0.05, 0.0)], **options)
    assert (
        sorted(seen["learned"] + seen["judged"]) == list(range(48))
        and len(seen["learned"]) == record["train_samples"] == 36
    )
    assert record["val_samples"] == 9 and record["chosen_on"] == "held-out training photos"
    with open_split(beton, None) as split, pytest.raises(ProbeError, match="nothing to hold out"):
        first = np.unique(require_labels(split.train)[split.train_index], return_index=True)[1]
        split = replace(split, train_index=split.train_index[first])
        published_probe(backbone, split, PROTOCOLS["sslight"], [Trial(0.05, 0.0)], **options)


def test_a_transformer_is_read_at_four_blocks(beton: Path) -> None:
    with open_split(beton, None) as split:
        network, grid, options = create_backbone("vit_tiny"), [Trial(0.01, 0.0)], {**OPTIONS, "epochs": 1}
        record = published_probe(network, split, PROTOCOLS["sslight-vit"], grid, **options)
        assert (record["features"], record["class_tokens"], record["interpolation"]) == (768, 4, "bicubic")
        record = published_probe(network, split, PROTOCOLS["sslight"], grid, **options)
        assert record["features"] == 192  # what the backbone returns
