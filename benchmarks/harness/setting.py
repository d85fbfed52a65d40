"""What a bench command measures and how: its options, checked and at hand for the suite behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastssl.benchmarks.harness.photos import describe_data, find_data
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.timing import MIN_RUNS
from fastssl.config.recipe import Recipe
from fastssl.distributed.devices import use_amp
from fastssl.models.backbones import resolve_arch
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.utils.cores import available_cores

#: Batch on a CPU when none is asked for: a recipe's own would need gigabytes of buffers, and rates do not depend on it.
CPU_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One measurement. Each suite reads the fields that its command has an option for.

    Attributes:
        data, photos: see :func:`fastssl.benchmarks.harness.photos.find_data`.
        workers, batch_size: decoding threads and pictures; None: one thread for each core, and what the suite takes.
        seconds: of all counted windows together; warm-up comes on top.
        runs: counted runs or windows of each contender, at least five.
        peers, folder: in turns with other people's code; for temporary files, None: the system's.
    """

    data: str = "synthetic"
    photos: int = 512
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int | None = None
    batch_size: int | None = None
    seconds: float = 10.0
    runs: int = MIN_RUNS
    peers: bool = False
    folder: Path | None = None

    @property
    def threads(self) -> int:
        return self.workers or available_cores()

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @contextmanager
    def open(self) -> Iterator[tuple[BetonReader, dict[str, str | int | float]]]:
        """The photos, and how a record speaks of them."""
        path, name = find_data(self.data, self.photos)
        with open_beton(path) as reader:
            yield reader, describe_data(reader, name)

    def record(self, bench: str, **values: Any) -> Record:
        """A record with what is set here, and ``values``."""
        return Record(**{"bench": bench, "device": self.device.type, "runs": self.runs, **values})


@dataclass(frozen=True, kw_only=True)
class RecipeSetting(Setting):
    """A measurement of a recipe, whose ``batch_size`` is by default the recipe's, at most CPU_BATCH on a CPU.

    Attributes:
        recipe, recipe_name: all numbers of views and step; ``recipe.arch`` is the network.
        pipeline, amp: the engine; ``auto``, ``bf16`` or ``off``.
        compiled, graph: compile the networks; record the step as a CUDA graph. If that fails the record says so and is
            of the step without it.
    """

    recipe: Recipe
    recipe_name: str
    amp: str = "auto"
    compiled: bool = False
    graph: bool = False
    pipeline: str = "native"

    @property
    def batch(self) -> int:
        return self.batch_size or default_batch(self.recipe, self.device)

    @property
    def views(self) -> int:
        return sum(spec.count for spec in self.recipe.views)

    @property
    def in_bf16(self) -> bool:
        return use_amp(self.amp, self.device)

    @property
    def arch(self) -> str:
        return resolve_arch(self.recipe.arch)

    def record(self, bench: str, **values: Any) -> Record:
        return super().record(bench, **{"recipe": self.recipe_name, **values})


def default_batch(recipe: Recipe, device: torch.device) -> int:
    """The recipe's batch; on a CPU at most CPU_BATCH."""
    return recipe.train.batch_size if device.type == "cuda" else min(recipe.train.batch_size, CPU_BATCH)


def rates(pair_per_s: float, batch: int, views: int, fraction: float) -> dict[str, float]:
    """The fields of a record's rate: source pictures a second, ``batch`` of them a run, ``views`` of each, and what
    ``fraction`` of the ceiling that is.
    """
    view_per_s = views * pair_per_s
    return {
        "batch_size": batch,
        "pair_per_s": pair_per_s,
        "view_per_s": view_per_s,
        "median_s": batch / pair_per_s,
        "ceiling": view_per_s / fraction,
        "fraction_of_ceiling": fraction,
    }
