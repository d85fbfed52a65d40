"""What every evaluation begins and ends with: processes, device, network, photos; and one record of what came out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastssl.distributed.devices import choose_device
from fastssl.distributed.group import joined
from fastssl.distributed.world import World, first_of_host_speaks, world_from_environment
from fastssl.evaluate.fingerprint import weights_fingerprint
from fastssl.evaluate.trained import Trained, load_trained
from fastssl.utils.versions import describe_git, describe_host, describe_versions


@dataclass
class Session:
    """One evaluation.

    Attributes:
        trained: the checkpoint's network, on ``device``.
        device: where it runs.
        world: this process among those that evaluate together; the group is there.
        weights: fingerprint of the network as it was loaded.
        started: ``time.monotonic()`` at the start.
    """

    trained: Trained
    device: torch.device
    world: World
    weights: str
    started: float = field(default_factory=time.monotonic)

    @property
    def is_main(self) -> bool:
        """Whether this process talks and writes."""
        return self.world.is_main

    def record(self, evaluation: str, **values: Any) -> dict[str, Any]:
        """One flat JSON object: what was evaluated, on what, by which protocol, what came out, and with which machine
        and code.

        Args:
            evaluation: ``knn``, ``linear``, ...: records of one kind stand in one table.
            values: by name; must be what JSON can hold.
        """
        return {
            "evaluation": evaluation,
            **self.trained.record(),
            "weights": self.weights if self.trained.network != "random" else None,
            **values,
            "device": self.device.type,
            "processes": self.world.size,
            "seconds": time.monotonic() - self.started,
            "host": describe_host(),
            "versions": describe_versions(),
            "git": describe_git(),
        }


@contextmanager
def open_session(checkpoint: str | Path, *, which: str | None = None, device: str = "auto") -> Iterator[Session]:
    """The checkpoint's network on its device, and the processes (under torchrun or srun) as one group, inside the
    block.

    Raises:
        FastSSLError: see ``load_trained``, ``choose_device`` and ``joined``.
    """
    world = world_from_environment()
    started = time.monotonic()
    with first_of_host_speaks():
        chosen = choose_device(device, world)
        trained = load_trained(checkpoint, which)
    weights = weights_fingerprint(trained.backbone)
    with joined(world, chosen):
        trained.backbone.to(chosen)
        yield Session(trained, chosen, world, weights, started)
