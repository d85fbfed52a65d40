"""A pre-training that takes a second, and how to compare two of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastssl.config.recipe import Recipe, load_recipe, parse_overrides
from fastssl.training.setup import RunOptions

#: 2 epochs of 6 steps on 48 photos, metrics in blocks of 4 steps
SMALL = [
    "arch=lcnet_035",
    "views.0.size=32",
    "train.epochs=2",
    "train.batch_size=8",
    "train.log_every=4",
    "moco.queue=64",
    "moco.projector.hidden=16",
    "moco.projector.out=8",
    "probe.online_samples=40",
    "probe.final_samples=40",
    "probe.size=32",
    "probe.every_epochs=1",
]


class Silent:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.messages: list[str] = []

    def row(self, row: dict, done: int, total: int) -> None:
        self.rows.append(row)

    def message(self, text: str) -> None:
        self.messages.append(text)

    note = message


def small(*overrides: str) -> Recipe:
    return load_recipe("few-photos-moco", parse_overrides([*SMALL, *overrides]))


def options(beton: Path, out: Path, **changes: object) -> RunOptions:
    return RunOptions(
        **{"recipe_name": "few-photos-moco", "data": beton, "out": out, "device": "cpu", "workers": 1, **changes}
    )


def state(out: Path) -> dict:
    """The content of the newest checkpoint."""
    return torch.load(out / "checkpoints" / "last.pt", weights_only=True)


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


def rows(out: Path) -> list[dict]:
    """Of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one: dict, other: dict) -> bool:
    """Whether two states are equal to the last bit: both networks, queue and the optimiser's momentum."""
    moments = [[state["momentum_buffer"] for state in found["optimizer"]["state"].values()] for found in (one, other)]
    return all(torch.equal(one["method"][name], other["method"][name]) for name in other["method"]) and all(
        map(torch.equal, *moments)
    )
