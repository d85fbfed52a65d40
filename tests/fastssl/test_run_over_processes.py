"""Whole runs through the real loop and loader: two processes end where one does, for every method.

In float64, where rounding does not grow to the size of a mistake (see test_step_over_processes). The same in long, with
the curves of MoCo, is benchmarks/results/processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from teachers import teacher_file

from fastssl.config.recipe import load_recipe, parse_overrides
from fastssl.distributed.world import world_from_environment
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.training.setup import RunOptions, prepare
from fastssl.training.trainer import train

pytestmark = pytest.mark.slow

BATCH = 16
_LENGTH = [
    "arch=resnet10t",
    f"train.batch_size={BATCH}",
    "train.epochs=4",
    "optim.warmup_epochs=1",
    "optim.warmup_lr=null",
    "probe.every_epochs=0",
    "train.log_every=1",
]
_CROPS = ["views.global_size=32", "views.local_size=16", "views.local_count=2"]
_MOCO = [*_CROPS, f"moco.queue={4 * BATCH}", "moco.projector.hidden=32"]
#: method -> recipe, and what makes it small
RUNS = {
    "moco": ("light-moco-mobilenetv3-sslight", [*_MOCO, "moco.split_bn=1"]),
    "moco, shuffle-BN": ("light-moco-mobilenetv3-sslight", [*_MOCO, "moco.split_bn=4"]),
    "simclr": (
        "simclr-mobilenetv3",
        ["views.0.size=32", "simclr.projector.hidden=32", "simclr.neighbors=1", "simclr.weighting=nearest"],
    ),
    "swav": (
        "swav-mobilenetv2-sslight",
        [
            *_CROPS,
            "swav.prototypes=24",
            f"swav.queue={2 * BATCH}",
            "swav.queue_epoch=0",
            "swav.projector.hidden=32",
            "swav.projector.out=16",
        ],
    ),
    "dino": (
        "dino-mobilenetv2-sslight",
        [*_CROPS, "dino.out=48", "dino.projector.hidden=32", "dino.projector.out=16"],
    ),
    "resa": (
        "resa-mobilenetv3",
        ["views.0.size=32", "views.1.size=32", "resa.projector.hidden=32", "resa.projector.out=16"],
    ),
    "empssl": ("empssl-resnet18", [*_CROPS, "empssl.projector.hidden=32", "empssl.projector.out=16"]),
    "distill": (
        "distill-mobilenetv3",
        [
            "views.0.size=32",
            f"distill.teacher={teacher_file()}",
            "distill.cache_epochs=2",
            f"distill.queue={4 * BATCH}",
            "distill.head.hidden=32",
        ],
    ),
}


class _Silence:
    def row(self, row: dict[str, Any], done: int, total: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    note = message


def run_all(data: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Each method's state before and behind its run, and the losses of its steps."""
    torch.set_default_dtype(torch.float64)
    try:
        return {method: run_one(data, out / method, *RUNS[method]) for method in RUNS}
    finally:
        torch.set_default_dtype(torch.float32)


def run_one(data: Path, out: Path, recipe: str, small: list[str]) -> dict[str, Any]:
    chosen = load_recipe(recipe, parse_overrides([*_LENGTH, *small]))
    options = RunOptions(recipe_name=recipe, data=data, out=out, device="cpu", seed=0, workers=1)
    with BetonReader(data) as reader:
        run = prepare(chosen, options, reader, None, _Silence(), world_from_environment(), torch.device("cpu"))
        try:
            start = {name: value.clone() for name, value in run.step.method.state_dict().items()}
            train(run)
        finally:
            run.close()
    rows = run.folder.metrics.rows() if run.folder else []
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    return {"start": start, "state": run.step.method.state_dict(), "losses": losses, "steps": run.position.step}


def test_two_processes_end_where_one_does(beton: Path, tmp_path: Path) -> None:
    (alone,) = run_processes(run_all, 1, beton, tmp_path / "one", timeout=1200)
    together, _ = run_processes(run_all, 2, beton, tmp_path / "two", timeout=1200)
    for method, one in alone.items():
        two = together[method]
        assert one["steps"] == two["steps"] == len(one["losses"]) == 12
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
        moved = 0.0
        for name, value in one["state"].items():
            if value.is_floating_point():
                torch.testing.assert_close(two["state"][name], value, rtol=0, atol=1e-9, msg=f"{method}: {name}")
                moved = max(moved, (value - one["start"][name]).abs().max().item() if value.numel() else 0.0)
            else:  # counters and pointers
                assert torch.equal(two["state"][name], value), (method, name)
        assert moved > 1e-3, method
