"""Faster and Mask R-CNN on a pyramid of ours: torchvision's proposal network and heads, in Detectron2's configuration
where torchvision has the switch.

Ren et al., arXiv 1506.01497; He et al., arXiv 1703.06870; FPN, arXiv 1612.03144. What remains different from
Detectron2, whose figures SSLight publishes: smooth L1 with beta 1/9 in place of L1, two samples a bin in RoIAlign and
no half-pixel shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from fastssl.evaluate.detection.annotations import DetectionError
from fastssl.evaluate.detection.backbone import LEVELS, Pyramid, create_pyramid


@dataclass(frozen=True)
class DetectorConfig:
    """The detector's shape. The defaults are those of the published figures; smaller ones serve small pictures.

    Attributes:
        levels: strides of the backbone's maps that are used.
        masks: add the mask head: four convolutions on 14x14.
        anchor_sizes: in pixels, rising. With all four levels each map has one of them; with fewer each has several, as
            many as are left over, sliding from map to map: (16, 32) has 32, 64, 128 on the first, 64, 128, 256 on the
            second, 128, 256, 512 on its max pool.
        width: channels of the pyramid and of the mask head.
        head_width: of the box head's two fully connected layers.
        proposals: kept in training, behind non-maximum suppression; None: 1000 with all four levels, 2000 with fewer,
            as SSLight has it.
        box_samples: proposals a picture that the box head learns from.
    """

    levels: tuple[int, ...] = LEVELS
    masks: bool = False
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    width: int = 256
    head_width: int = 1024
    proposals: int | None = None
    box_samples: int = 512

    @property
    def training_proposals(self) -> int:
        """``proposals``, resolved."""
        return self.proposals or (1000 if len(self.levels) == len(LEVELS) else 2000)


def anchor_sizes(sizes: Sequence[int], maps: int) -> tuple[tuple[int, ...], ...]:
    """Sizes for each of ``maps`` maps: a window over ``sizes`` that moves by one and ends at the last size.

    Raises:
        DetectionError: fewer sizes than maps.
    """
    window = len(sizes) - maps + 1
    if window < 1:
        raise DetectionError(f"{len(sizes)} anchor sizes for {maps} maps: each needs at least one of its own")
    return tuple(tuple(sizes[first : first + window]) for first in range(maps))


class Detector(nn.Module):
    """Pyramid, proposal network and heads.

    Args:
        backbone: a timm network without its classifier; becomes part of the detector.
        categories: C, without the background.
        config: see there.
        amp: compute backbone and pyramid in bfloat16; proposals, heads and losses stay float32.
    """

    #: of photos with values from 0 to 255
    MEAN = (123.675, 116.28, 103.53)
    STD = (58.395, 57.12, 57.375)
    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, categories: int, config: DetectorConfig = DetectorConfig(), *, amp: bool = False
    ):
        super().__init__()
        self.config, self.amp = config, amp
        self.pyramid: Pyramid = create_pyramid(backbone, config.levels, config.width)
        names = [str(level) for level in range(len(config.levels))]
        sizes = anchor_sizes(config.anchor_sizes, len(names) + 1)
        box_pool = self._pool(names, 7)
        options = {
            "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            "rpn_post_nms_top_n_train": config.training_proposals,
            "box_roi_pool": box_pool,
            "box_head": TwoMLPHead(config.width * 7 * 7, config.head_width),
            "box_predictor": FastRCNNPredictor(config.head_width, categories + 1),
            "box_batch_size_per_image": config.box_samples,
        }
        if config.masks:
            built: FasterRCNN = MaskRCNN(
                self.pyramid,
                mask_roi_pool=self._pool(names, 14),
                mask_head=MaskRCNNHeads(config.width, (config.width,) * 4, 1),
                mask_predictor=MaskRCNNPredictor(config.width, config.width, categories + 1),
                **options,
            )
        else:
            built = FasterRCNN(self.pyramid, **options)
        self.rpn, self.heads = built.rpn, built.roi_heads
        # As in Detectron2: small first weights, so that a new head does not shake the pre-trained network. torchvision
        # keeps torch's.
        nn.init.normal_(self.heads.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.heads.box_predictor.bbox_pred.weight, std=0.001)
        for layer in (self.heads.box_predictor.cls_score, self.heads.box_predictor.bbox_pred):
            nn.init.zeros_(layer.bias)
        self.register_buffer("mean", torch.tensor(self.MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).view(3, 1, 1), persistent=False)

    def _pool(self, names: list[str], size: int) -> MultiScaleRoIAlign:
        """RoIAlign that knows the maps' strides. It would guess them from the first pictures' sizes, and guess wrong
        where these are small and padded.
        """
        pool = MultiScaleRoIAlign(names, size, sampling_ratio=2)
        side = self.pyramid.divisible
        maps = {
            name: torch.zeros(1, 1, side // stride, side // stride) for name, stride in zip(names, self.pyramid.strides)
        }
        pool(maps, [torch.zeros(0, 4)], [(side, side)])
        return pool

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32, ImageNet's mean and deviation."""
        return (images.float() - self.mean) / self.std

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            images: (N, 3, H, W) normalised, 0 in the padding; H and W multiples of ``pyramid.divisible``.
            sizes: (height, width) of each picture without its padding.
            targets: in training mode; as in ``DetectionBatch``.

        Returns:
            in training mode the losses by name, scalars; else for each picture ``boxes`` (n, 4) in pixels of the input,
            ``labels`` (n,), ``scores`` (n,), and with masks ``masks`` (n, 1, 28, 28), probabilities inside the box.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            maps = self.pyramid(images)
        maps = {name: each.float() for name, each in maps.items()}
        listed = ImageList(images, sizes)
        proposals, proposal_losses = self.rpn(listed, maps, targets)
        found, head_losses = self.heads(maps, proposals, sizes, targets)
        return {**proposal_losses, **head_losses} if self.training else found
