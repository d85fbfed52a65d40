"""Drop path whose random numbers are data: a table, drawn for (seed, epoch, sample, view, layer).

Drop path (stochastic depth, Huang et al., arXiv 1603.09382) leaves out a residual branch for a random part of the
samples. Drawn inside the step, its uniform numbers would depend on the number of ranks and be lost at a restart; drawn
like the views they depend on neither, and a recorded step reads them like any other input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from timm.layers import DropPath
from torch import Tensor, nn

from fastssl.pipelines.plan.philox import Stream, keyed_words


def drop_path_layers(backbone: nn.Module) -> list[tuple[nn.Module, str, DropPath]]:
    """(parent, name, layer) of every drop-path layer that drops something: timm's convolution blocks hold one also
    where they have no shortcut to drop it from.
    """
    return [
        (parent, name, layer)
        for parent in backbone.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, DropPath) and layer.drop_prob > 0 and getattr(parent, "has_skip", True)
    ]


class DropTable:
    """The uniforms of one step, shared by all layers of a network.

    Attributes:
        layers: number of drop-path layers.
        uniforms: (layers, N) float32, uniform in 0 .. 1, on the device; None: nothing is dropped.
        first: column of the first sample of the pass that runs.
    """

    def __init__(self, layers: int):
        self.layers, self.first = layers, 0
        self.uniforms: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> DropTable:
        return self  # a copy of the network reads the same uniforms

    @classmethod
    def install(cls, backbone: nn.Module) -> DropTable | None:
        """Put a ``PlannedDropPath`` in the place of every drop-path layer of timm's; None if there are none."""
        places = drop_path_layers(backbone)
        if not places:
            return None
        table = cls(len(places))
        for number, (parent, name, layer) in enumerate(places):
            setattr(parent, name, PlannedDropPath(float(layer.drop_prob), table, number))
        return table

    @staticmethod
    def remove(backbone: nn.Module) -> None:
        """Put an identity in the place of every such layer."""
        for parent in list(backbone.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, (PlannedDropPath, DropPath)):
                    setattr(parent, name, nn.Identity())

    def draw(self, seed: int, epoch: int, index: Sequence[int] | NDArray[np.int64], views: int) -> NDArray[np.float32]:
        """(layers, views * B) uniforms for these samples, view-major."""
        slots = -(-self.layers // 4)
        words = keyed_words(
            seed,
            Stream.DROP_PATH,
            epoch,
            np.asarray(index, np.int64)[None, None, :],
            np.arange(views)[None, :, None],
            np.arange(slots)[:, None, None],
        )  # (4, slots, views, B)
        words = words.swapaxes(0, 1).reshape(4 * slots, -1)[: self.layers]
        uniforms: NDArray[np.float32] = (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
        return uniforms


class PlannedDropPath(nn.Module):
    """In training mode: drops a branch where its sample's number lies below ``drop_prob``, and scales the others up."""

    def __init__(self, drop_prob: float, table: DropTable, number: int):
        super().__init__()
        self.drop_prob, self.table, self.number = drop_prob, table, number

    def forward(self, branch: Tensor) -> Tensor:
        uniforms = self.table.uniforms
        if not self.training or uniforms is None:
            return branch
        first = self.table.first
        keep = (uniforms[self.number, first : first + len(branch)] >= self.drop_prob).to(branch.dtype)
        return branch * (keep / (1 - self.drop_prob)).view(-1, *[1] * (branch.dim() - 1))
