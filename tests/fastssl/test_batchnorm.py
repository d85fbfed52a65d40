"""BatchNorm statistics of centre crops, without labels and without touching a weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastssl.cli import main
from fastssl.errors import FastSSLError
from fastssl.evaluate.batchnorm import has_batchnorm, reestimated
from fastssl.evaluate.features import extract_features
from fastssl.models.backbones import create_backbone, save_backbone
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.pipelines.plan.order import epoch_order

SIZE = 24


def network() -> nn.Module:
    torch.manual_seed(0)
    backbone = create_backbone("lcnet_035")
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as training on other views may leave them
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    return backbone


def test_statistics_are_the_mean_over_batches_of_centre_crops(beton: Path) -> None:
    backbone = network()
    first = next(name for name, layer in backbone.named_modules() if isinstance(layer, nn.BatchNorm2d))
    with BetonReader(beton) as reader:
        found = reestimated(backbone, reader, samples=40, size=SIZE, batch_size=16, seed=3)
        chosen = sorted(epoch_order(len(reader), 3, 0)[:39].tolist())  # three equal batches of the 40
        spec = ViewSpec.evaluation(SIZE, crop=0.875)
        with ViewLoader(reader, [spec], 13, indices=torch.tensor(chosen).numpy(), shuffle=False) as loader:
            maps = [backbone.conv_stem(batch.views[0]) for batch in loader.epoch(0)]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    var = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
    layer = found.get_submodule(first)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-4, atol=1e-5)
    assert layer.momentum == backbone.get_submodule(first).momentum


def test_weights_and_the_network_itself_stay_as_they_are(beton: Path) -> None:
    backbone = network().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with BetonReader(beton) as reader:
        found = reestimated(backbone, reader, samples=10**6, size=SIZE)
        features = extract_features(found, reader, size=SIZE).features
        again = extract_features(reestimated(backbone, reader, samples=48, size=SIZE), reader, size=SIZE).features
    assert torch.equal(features, again) and found.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])
        same = torch.equal(found.state_dict()[name], value)
        assert same == ("running" not in name and "num_batches" not in name), name


def test_a_network_without_batchnorm_is_refused(beton: Path) -> None:
    backbone = create_backbone("vit_tiny")
    assert not has_batchnorm(backbone) and has_batchnorm(network())
    with BetonReader(beton) as reader, pytest.raises(FastSSLError, match="no BatchNorm"):
        reestimated(backbone, reader, samples=8, size=32)


def test_evaluate_takes_them_when_asked(beton: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "network.safetensors"
    save_backbone(network(), checkpoint, arch="lcnet_035")
    records = {}
    for name, extra in (("stored", []), ("anew", ["--reestimate-bn", "32"])):
        out = tmp_path / f"{name}.json"
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    "evaluate",
                    "knn",
                    str(checkpoint),
                    "--data",
                    str(beton),
                    "--size",
                    str(SIZE),
                    "--device",
                    "cpu",
                    "--json",
                    str(out),
                    *extra,
                ]
            )
        assert stop.value.code == 0
        records[name] = json.loads(out.read_text())
    assert records["stored"]["reestimate_bn"] is None and records["anew"]["reestimate_bn"] == 32
    assert (
        records["anew"]["accuracy"] >= records["stored"]["accuracy"]
    )  # the colours of the classes survive sane statistics


def test_photos_come_from_those_that_may_be_looked_at_and_one_is_too_few(beton: Path) -> None:
    some = torch.arange(0, 48, 3).numpy()
    with BetonReader(beton) as reader:
        found, all_of_them = (
            reestimated(network(), reader, samples=16, size=SIZE, indices=ids) for ids in (some, None)
        )
        twice = reestimated(network(), reader, samples=48, size=SIZE, indices=some[::-1].copy())
        with pytest.raises(FastSSLError, match=r"photos\.beton: BatchNorm statistics need at least two photos, not 1"):
            reestimated(network(), reader, samples=16, size=SIZE, indices=some[:1])
    means = [
        next(layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)).running_mean
        for net in (found, all_of_them, twice)
    ]
    torch.testing.assert_close(means[0], means[2])  # the sixteen, in whatever order they were named
    assert not torch.allclose(means[0], means[1])
