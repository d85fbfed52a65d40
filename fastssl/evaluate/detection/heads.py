"""Anchors, proposal network and heads as Detectron2 0.6 has them unless told otherwise (Wu et al.,
https://github.com/facebookresearch/detectron2), over torchvision's modules, whose names the tensors keep.

torchvision rounds anchors and guesses strides from sizes, learns boxes by smooth L1 with beta 1/9 in place of L1, pools
without the shift of half a pixel and with two samples a bin, and has other first weights. One thing stays another: a
mask to learn is cut out of the drawn picture (Detectron2's ``bitmask``), not drawn in every proposal anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align

RATIOS = (0.5, 1.0, 2.0)  # of anchors, height over width


class Anchors(nn.Module):
    """(pictures, maps) -> for each picture, by map, row, column, size and ratio, (n, 4) float32, left, top, right,
    bottom in pixels: centred on (column, row) times the map's stride. ``sizes``, of each map, are the roots of areas.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], strides: Sequence[int]):
        super().__init__()
        self.sizes, self.strides = sizes, strides

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        found = []
        for sizes, stride, each in zip(self.sizes, self.strides, maps):
            sides = [(size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in RATIOS]
            cell = torch.tensor([(-width, -height, width, height) for width, height in sides], device=each.device) / 2
            places = (torch.arange(side, device=each.device) * stride for side in each.shape[-2:])
            y, x = torch.meshgrid(*places, indexing="ij")
            found.append((torch.stack([x, y, x, y], -1)[:, :, None] + cell).reshape(-1, 4))
        return [torch.cat(found)] * len(images.image_sizes)


class Proposals(RegionProposalNetwork):
    """The proposal network over maps of ``width`` channels, which keeps ``kept`` proposals in training. Each loss is a
    sum over the anchors that were drawn to learn from, by the number that was to be drawn.
    """

    def __init__(self, width: int, anchors: Anchors, kept: int):
        head = RPNHead(width, len(anchors.sizes[0]) * len(RATIOS))  # first weights are Detectron2's there
        counts = {"training": 2000, "testing": 1000}, {"training": kept, "testing": 1000}
        super().__init__(anchors, head, 0.7, 0.3, 256, 0.5, *counts, 0.7)

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Of objectness and boxes; both and the targets are of all pictures' anchors one behind another."""
        positive, negative = (torch.cat(chosen).bool() for chosen in self.fg_bg_sampler(labels))
        asked, drawn = self.fg_bg_sampler.batch_size_per_image * len(labels), positive | negative
        scores, wanted = objectness.flatten()[drawn], torch.cat(labels)[drawn]
        offsets, targets = pred_bbox_deltas[positive], torch.cat(regression_targets)[positive]
        judged = functional.binary_cross_entropy_with_logits(scores, wanted, reduction="sum")
        return judged / asked, functional.l1_loss(offsets, targets, reduction="sum") / asked


class RoIPool(nn.Module):
    """(maps "0", "1", ... of these strides, boxes of each picture, ...) -> (boxes of all, C, size, size): RoIAlign with
    as many samples as pixels (He et al., arXiv 1703.06870), for 224 x 224 pixels from stride 16, for twice the side
    from stride 32 (Lin et al., arXiv 1612.03144, equation 1).
    """

    def __init__(self, strides: Sequence[int], size: int):
        super().__init__()
        self.strides, self.size = tuple(strides), size

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        every = torch.cat(boxes)
        numbers = torch.cat([each.new_full((len(each), 1), number) for number, each in enumerate(boxes)])
        side = (every[:, 2:] - every[:, :2]).prod(1).sqrt()
        levels = torch.log2(side / (224 / 16 * self.strides[0])).floor().clamp(0, len(self.strides) - 1)
        pooled = every.new_zeros(len(every), maps["0"].shape[1], self.size, self.size)
        for level, stride in enumerate(self.strides):
            [own] = torch.where(levels == level)
            regions = torch.cat([numbers, every], 1)[own]
            pooled[own] = roi_align(maps[str(level)], regions, self.size, 1 / stride, aligned=True)
        return pooled


class Heads(RoIHeads):
    """Box head, and with ``masks`` mask head, over maps of ``width`` channels and these strides, for ``outputs``
    classes, the background among them; they learn from ``samples`` proposals a picture.
    """

    def __init__(self, width: int, head_width: int, outputs: int, strides: Sequence[int], samples: int, masks: bool):
        parts = [RoIPool(strides, 7), TwoMLPHead(width * 7 * 7, head_width), FastRCNNPredictor(head_width, outputs)]
        parts += [0.5, 0.5, samples, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100]
        if masks:  # drawn by the fan-out, as in Detectron2, but for the logits
            head = MaskRCNNHeads(width, (width,) * 4, 1), MaskRCNNPredictor(width, width, outputs)
            parts += [RoIPool(strides, 14), *head]
        super().__init__(*parts)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("box_head"):
                nn.init.kaiming_uniform_(parameter, a=1)
            elif not name.startswith("mask_head") and "conv5_mask" not in name:
                # Small first logits and offsets: a new head is not to shake the pre-trained network.
                nn.init.normal_(parameter, std=0.01 if "cls_score" in name else 0.001)

    def losses(
        self, maps: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]], targets: list[Any]
    ) -> dict[str, Tensor]:
        """By name. What torchvision's ``forward`` does in training mode, which has smooth L1 in it."""
        boxes, matched, labels, wanted = self.select_training_samples(proposals, targets)
        scores, offsets = self.box_predictor(self.box_head(self.box_roi_pool(maps, boxes, sizes)))
        classes, objects = torch.cat(labels), [each > 0 for each in labels]
        losses = {"loss_classifier": functional.cross_entropy(scores, classes)}
        [positive] = torch.where(classes > 0)
        classes = classes[positive]
        offsets, wanted = offsets.view(len(scores), -1, 4)[positive, classes], torch.cat(wanted)[positive]
        losses["loss_box_reg"] = functional.l1_loss(offsets, wanted, reduction="sum") / len(scores)
        if self.has_mask():
            boxes = [each[which] for each, which in zip(boxes, objects)]
            logits, drawn = self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes, sizes))), []
            for target, index, which, each in zip(targets, matched, objects, boxes):
                regions = torch.cat([index[which, None].to(each), each], 1)
                drawn.append(roi_align(target["masks"][:, None].to(each), regions, logits.shape[-1], aligned=True))
            logits, wanted = logits[torch.arange(len(classes), device=classes.device), classes], torch.cat(drawn)[:, 0]
            apart = functional.binary_cross_entropy_with_logits(logits, (wanted >= 0.5).to(logits), reduction="sum")
            losses["loss_mask"] = apart / max(1, logits.numel())  # a mean over no mask would be no number
        return losses
