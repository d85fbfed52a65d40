"""What every evaluation begins and ends with: processes, device, network, photos; and one record of what came out."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastssl.distributed.world import World
from fastssl.evaluate.trained import Trained
from fastssl.models.backbones import create_backbone
from fastssl.utils.digest import add_tensor
from fastssl.utils.versions import describe_git, describe_host, describe_versions


@dataclass
class Session:
    """One evaluation.

    Attributes:
        source: what was asked for. trained: the network of it, on ``device``.
        world: this process among those that evaluate together; the group is there.
        weights: fingerprint of the network as it was loaded.
        started: ``time.monotonic()`` at the start.
    """

    source: str
    trained: Trained
    device: torch.device
    world: World
    weights: str
    started: float

    @property
    def is_main(self) -> bool:
        """Whether this process talks and writes."""
        return self.world.is_main

    def forget(self) -> nn.Module:
        """The same network with weights drawn by torch's generator, in place of the trained one; on the host."""
        backbone = create_backbone(self.trained.arch)
        self.trained = replace(self.trained, backbone=backbone, network="random", step=None)
        return backbone

    def record(self, evaluation: str, **values: Any) -> dict[str, Any]:
        """One flat JSON object: what was evaluated, on what, how, what came out, and with which machine and code.

        Args:
            evaluation: ``knn``, ``linear``, ...: records of one kind stand in one table.
            values: what JSON can hold.
        """
        return {
            "evaluation": evaluation,
            **self.trained.record(),
            **self.trained.normalisation._asdict(),
            "weights": self.weights if self.trained.network != "random" else None,
            **values,
            "device": self.device.type,
            "processes": self.world.size,
            "seconds": time.monotonic() - self.started,
            "host": describe_host(),
            "versions": describe_versions(),
            "git": describe_git(),
        }


@torch.no_grad()
def weights_fingerprint(network: nn.Module) -> str:
    """Which weights these are: 16 hexadecimal digits of names, types, shapes and values of all tensors, alike on any
    device and in any memory layout. File names and steps say little of a network that was copied or trained again.
    """
    total = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        total.update(f"{name} ".encode())
        add_tensor(total, value)
    return total.hexdigest()[:16]
