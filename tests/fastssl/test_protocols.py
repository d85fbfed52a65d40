"""The published protocols: their numbers against the sources, their schedules against torch's."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from fastssl.cli.evaluate import frozen
from fastssl.evaluate.protocols import KNN_PROTOCOLS, PROTOCOLS, SWEEP, Trial, differing, trials


def test_the_command_line_offers_them_all() -> None:
    assert tuple(PROTOCOLS) == frozen._PROTOCOLS and tuple(KNN_PROTOCOLS) == frozen._KNN_PROTOCOLS


@pytest.mark.parametrize(
    ("name", "peak", "batch", "epochs", "optimizer", "interpolation", "class_tokens"),
    [
        ("light-moco", 1.6, 4096, 90, "sgd", "bilinear", 0),
        ("light-moco-lars", 1.6, 4096, 90, "lars", "bilinear", 0),
        ("moco", 30.0, 256, 100, "sgd", "bilinear", 0),
        ("sslight", 0.8, 4096, 100, "lars", "bicubic", 0),
        ("sslight-vit", 0.04, 1024, 100, "sgd", "bicubic", 4),
    ],
)
def test_numbers_as_published(
    name: str, peak: float, batch: int, epochs: int, optimizer: str, interpolation: str, class_tokens: int
) -> None:
    protocol = PROTOCOLS[name]
    assert (protocol.batch_size, protocol.epochs, protocol.optimizer, protocol.class_tokens) == (
        batch,
        epochs,
        optimizer,
        class_tokens,
    )
    assert protocol.rate(protocol.lr, 0, epochs, batch) == pytest.approx(peak)
    assert (protocol.momentum, protocol.weight_decay, protocol.init_std) == (0.9, 0.0, 0.01)
    view = protocol.view()
    assert (view.size, view.area, view.interpolation, view.flip) == (224, (0.08, 1.0), interpolation, 0.5)
    assert view.jitter == view.grey == view.blur == view.solarise == 0 and view.center is None


def rates(name: str, epochs: int, batch: int) -> list[float]:
    protocol = PROTOCOLS[name]
    return [protocol.rate(protocol.lr, epoch, epochs, batch) for epoch in range(epochs)]


def test_schedules_equal_torchs() -> None:
    for name in PROTOCOLS:
        protocol = PROTOCOLS[name]
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=protocol.lr * protocol.batch_size / 256)
        if name == "moco":
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [60, 80], 0.1)
        else:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, protocol.epochs, 1e-6 if name.startswith("sslight") else 0.0
            )
        for rate in rates(name, protocol.epochs, protocol.batch_size):
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            optimizer.step()
            schedule.step()


def test_batch_and_length_move_the_rate() -> None:
    assert rates("moco", 10, 64) == pytest.approx([7.5] * 6 + [0.75] * 2 + [0.075] * 2)
    assert rates("sslight", 4, 256)[2] == pytest.approx(1e-6 + (0.05 - 1e-6) * (1 + math.cos(math.pi / 2)) / 2)


def test_the_grid() -> None:
    protocol = PROTOCOLS["sslight"]
    assert trials(protocol) == [Trial(0.05, 0.0)]
    swept = trials(protocol, sweep=True)
    assert swept[0] == Trial(0.05, 0.0) and [trial.lr for trial in swept] == pytest.approx(
        [0.05 * factor for factor in SWEEP]
    )
    assert trials(protocol, [1.0, 3.0, 1.0], [0.0, 1e-4]) == [
        Trial(1.0, 0.0),
        Trial(3.0, 0.0),
        Trial(1.0, 1e-4),
        Trial(3.0, 1e-4),
    ]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_no_setting_can_be_changed_unnoticed(name: str) -> None:
    """Whatever fields a protocol has, each is found by its own name."""
    protocol = PROTOCOLS[name]
    record = protocol.record()
    assert differing(record, record) == []
    for field in fields(protocol):
        key = "protocol" if field.name == "name" else field.name
        assert differing(replace(protocol, **{field.name: "another"}).record(), record) == [key]
    assert {"size", "crop", "scaled_to", "val_scaled_to", "bfloat16", "cached_epochs", "choose_on"} < record.keys()


def test_light_mocos_source_says_what_is_not_known() -> None:
    for name in ("light-moco", "light-moco-lars"):
        assert "which of them gave the published figures is not known" in PROTOCOLS[name].source


def test_a_record_names_the_protocol_and_its_source() -> None:
    record = PROTOCOLS["sslight-vit"].record()
    assert (
        record["protocol"] == "sslight-vit"
        and "2210.02808" in record["source"]
        and record["lr"] == 0.01
        and "name" not in record
    )
