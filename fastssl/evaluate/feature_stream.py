"""Features of training views, batch by batch: fresh ones every epoch, or those of a few epochs, kept and gone round."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fastssl.distributed.collectives import rank, world_size
from fastssl.errors import counted
from fastssl.evaluate.features import ProbeError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.pipelines.plan.order import epoch_order, steps_per_epoch

#: Photos that go through the network at once, at most: a probe's batch of 4096 is a step of its classifier, not of the
#: network.
PASS = 256
#: Bytes of a block of kept features. Torch takes a power of two where memory is pinned, for 66 GB in one block 128.
BLOCK = 2**30


class FeatureStream:
    """``stream.epoch(e)``: what the classifier's steps of epoch ``e`` read.

    Every photo's view is a function of (seed, epoch, sample), and this process has its part of every batch, so that all
    processes together see what one would: but for the last, partial batch of an epoch, which is filled up until all
    have equal parts (see ``last_batch``). A context manager.

    Args:
        network: images (B, 3, S, S) -> (B, F), on ``device``. It is put into evaluation mode, and no gradient is kept.
        reader: the photos. indices: (n,) sample ids to learn from.
        targets: (len(reader),) int64 class of each sample of the file, on the CPU.
        view: the training view.
        batch_size: of all processes together.
        cached_epochs: 0, or how many epochs' features are kept, in float32 on the host. Later epochs take their
            batches, as they were, reshuffled.
        seed, amp: as in ``extract_features``. loading: ``workers``.

    Attributes:
        steps: batches in an epoch.
        batch: photos of this process in each but the last.

    Raises:
        ProbeError: fewer photos than one batch, or a batch that the processes cannot share.
    """

    def __init__(
        self,
        network: nn.Module,
        reader: BetonReader,
        indices: np.ndarray,
        targets: Tensor,
        view: ViewSpec,
        *,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
        amp: bool = False,
        cached_epochs: int = 0,
        **loading: Any,
    ):
        self.steps, self.batch = steps_per_epoch(len(indices), batch_size, drop_last=False), share_of(batch_size)
        if len(indices) < batch_size:
            photos = counted(len(indices), "photo")
            raise ProbeError(
                f"{reader.path}: {photos} to learn from, fewer than one batch of {batch_size}: lower --batch-size"
            )
        self._network, self._targets, self._device, self._amp, self._seed = network.eval(), targets, device, amp, seed
        self._passes = _passes(self.batch)
        loading |= {"seed": seed, "rank": rank(), "world": world_size(), "indices": indices, "drop_last": False}
        self._loader = ViewLoader(reader, [view], self.batch // self._passes, device, **loading)
        self._kept = cached_epochs
        self._features: list[Tensor] = []  # then (batch, F) of each step that is kept
        self._labels = torch.empty(cached_epochs, self.steps, self.batch, dtype=torch.int64)
        self._rows = [self.batch] * self.steps  # of each step; the last may have fewer

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(features (B, F) float32, targets (B,) int64) of each step, on the device, B in this process's part of the
        batch. Epochs that are kept must come first, and in their order.
        """
        return self._fresh(epoch) if epoch < self._kept or not self._kept else self._again(epoch)

    @torch.no_grad()
    def _fresh(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._loader.epoch(epoch)
        try:
            for step in range(self.steps):
                parts = []
                for batch in islice(batches, self._passes):
                    with torch.autocast(self._device.type, torch.bfloat16, enabled=self._amp):
                        found = self._network(batch.views[0])
                    parts.append((found.float(), self._targets[batch.index]))
                features, targets = map(torch.cat, zip(*parts))
                if epoch < self._kept:
                    if not self._features:
                        # Pinned for a GPU: copies both ways then go by its queue, and the host does not wait for them.
                        shape, pin = (self.batch, features.shape[1]), self._device.type == "cuda"
                        steps, some = self._kept * self.steps, max(1, BLOCK // (4 * shape[0] * shape[1]))
                        for begin in range(0, steps, some):
                            self._features += torch.empty(min(some, steps - begin), *shape, pin_memory=pin).unbind()
                    self._rows[step] = rows = len(features)
                    self._features[epoch * self.steps + step][:rows].copy_(features, non_blocking=True)
                    self._labels[epoch, step, :rows] = targets
                yield features, targets.to(self._device, non_blocking=True)
        finally:
            batches.close()

    def _again(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        kept = epoch % self._kept
        for step in epoch_order(self.steps, self._seed, epoch).tolist():
            rows = self._rows[step]
            features, targets = self._features[kept * self.steps + step][:rows], self._labels[kept, step, :rows]
            yield features.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)

    def __enter__(self) -> FeatureStream:
        return self

    def __exit__(self, *error: object) -> None:
        self._loader.close()


def share_of(batch: int) -> int:
    """A process's photos of a whole batch; refuses one that cannot be dealt out."""
    world = world_size()
    if batch % world:
        raise ProbeError(f"a batch of {batch} cannot be shared by {world} processes: choose a multiple (--batch-size)")
    return batch // world


def _passes(batch: int) -> int:
    """Into how many equal passes of the network a batch is cut: as few as may be; one where no divisor is worth it."""
    fewest = -(-batch // PASS)
    return next((passes for passes in range(fewest, 4 * fewest) if batch % passes == 0), 1)


class ClassTokens(nn.Module):
    """A vision transformer, read at the class tokens of its last ``blocks`` blocks, each through the final norm.

    ``module(images (B, 3, S, S)) -> (B, blocks * F)``, the deepest block's last: 768 wide for ViT-Ti and 4 blocks. So
    do Caron et al., "Emerging properties in self-supervised vision transformers" (DINO), arXiv 2104.14294, appendix
    F.2, for small transformers, and SSLight.

    Raises:
        ProbeError: the network is no vision transformer of timm that reads its class token, or has fewer blocks.
    """

    def __init__(self, backbone: nn.Module, blocks: int):
        super().__init__()
        name = type(backbone).__name__
        if not isinstance(backbone, VisionTransformer) or getattr(backbone, "global_pool", "") != "token":
            raise ProbeError(
                f"this protocol reads a vision transformer's class tokens, and the network ({name}) has none: "
                "choose another --protocol"
            )
        if len(backbone.blocks) < blocks:
            raise ProbeError(f"the network has {len(backbone.blocks)} blocks, this protocol reads the last {blocks}")
        self.backbone, self.blocks = backbone, blocks

    def forward(self, images: Tensor) -> Tensor:
        layers = self.backbone.get_intermediate_layers(images, n=self.blocks, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)
