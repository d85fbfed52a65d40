"""Faster and Mask R-CNN over a backbone of ours: the very timm module, a feature pyramid on top, and the proposal
network and heads of ``heads``. Ren et al., arXiv 1506.01497; He et al., arXiv 1703.06870.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fastssl.evaluate.detection.annotations import DetectionError
from fastssl.evaluate.detection.heads import Anchors, Heads, Proposals
from fastssl.evaluate.features import evaluating
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation

#: Strides of the maps that detectors use.
LEVELS = (4, 8, 16, 32)


class Pyramid(nn.Module):
    """(N, 3, H, W) -> maps of ``out_channels`` channels, named "0", "1", ... by rising stride, and "pool" at twice the
    last one.

    Attributes:
        body: the backbone, with the names of its tensors as they were.
        strides: of the maps without "pool".
        out_channels: of each.
        divisible: H and W are multiples of it: of the last of the strides, as in Detectron2, and of a patch.

    Raises:
        DetectionError: a stride is none of those ``there``.
    """

    #: a timm network: what it can do beyond ``nn.Module`` is in no type
    body: Any

    def __init__(self, body: nn.Module, strides: Sequence[int], out_channels: int, there: Collection[int]):
        super().__init__()
        if missing := [stride for stride in strides if stride not in there]:
            raise DetectionError(
                f"{type(body).__name__} has no map of stride {missing[0]}, only of {','.join(map(str, there))}: choose "
                "--levels among them"
            )
        self.body, self.strides, self.out_channels = body, tuple(strides), out_channels
        self.divisible = strides[-1]


class ConvolutionalPyramid(Pyramid):
    """For networks whose maps shrink step by step: FPN, Lin et al., arXiv 1612.03144, without norm.

    The deepest map is what the backbone has just before its pooling: for MobileNetV2 and EfficientNet behind the last
    1x1 convolution (1280 channels), for MobileNet-V3, whose last convolution follows the pooling, behind the last
    block.
    """

    def __init__(self, body: Any, strides: Sequence[int], out_channels: int):
        side = 64
        with evaluating(body), torch.no_grad():  # the network itself is asked for its maps, with a black picture
            black = torch.zeros(1, 3, side, side, device=next(body.parameters()).device)
            final, maps = body.forward_intermediates(black)
        fits = final.dim() == 4 and final.shape[-2:] == maps[-1].shape[-2:]
        maps = [*maps[:-1], final] if fits else maps
        # stride -> (index, channels): of several maps of one stride the deepest
        known = {side // each.shape[-1]: (index, each.shape[1]) for index, each in enumerate(maps)}
        super().__init__(body, strides, out_channels, known)
        self.indices = [known[stride][0] for stride in strides]
        self.final = fits and strides[-1] == max(known)
        widths = [known[stride][1] for stride in strides]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        final, maps = self.body.forward_intermediates(images, indices=self.indices)
        if self.final:
            maps[-1] = final
        pyramid: OrderedDict[str, Tensor] = self.fpn(OrderedDict((str(level), each) for level, each in enumerate(maps)))
        return pyramid


class SimplePyramid(Pyramid):
    """For vision transformers, which have one map: ViTDet's simple pyramid, Li et al., arXiv 2203.16527. The last
    block's map, enlarged four and two times by transposed convolutions, as it is, and halved by max pooling; with layer
    norms.
    """

    def __init__(self, body: Any, strides: Sequence[int], out_channels: int):
        patch, width = int(body.patch_embed.patch_size[0]), body.num_features
        super().__init__(body, strides, out_channels, (patch // 4, patch // 2, patch, patch * 2))
        self.divisible = max(self.divisible, patch)

        def enlarge(channels: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)

        twice = nn.Sequential(enlarge(width), LayerNorm2d(width // 2), nn.GELU(), enlarge(width // 2))
        finer = {patch // 4: (twice, width // 4), patch // 2: (enlarge(width), width // 2)}
        scalings = {**finer, patch: (nn.Identity(), width), patch * 2: (nn.MaxPool2d(2), width)}
        self.levels = nn.ModuleList(
            nn.Sequential(
                scaling,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for scaling, channels in (scalings[stride] for stride in strides)
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        [last] = self.body.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        maps = OrderedDict((str(number), level(last)) for number, level in enumerate(self.levels))
        maps["pool"] = functional.max_pool2d(maps[str(len(self.levels) - 1)], 1, 2)
        return maps


def create_pyramid(backbone: Any, levels: Sequence[int] = LEVELS, out_channels: int = 256) -> Pyramid:
    """A pyramid over ``backbone``, a timm network without its classifier, which becomes part of it; the convolutions on
    top are drawn by torch's generator.

    Args:
        levels: strides of the maps that are used, each twice the one before it. (16, 32) is SSLight's form for
            MobileNetV2.
        out_channels: of the pyramid's maps.

    Raises:
        DetectionError: the network shows no maps, or has none of such a stride.
    """
    if not levels or any(low < 1 or high != 2 * low for low, high in itertools.pairwise(levels)):
        found = ",".join(map(str, levels)) or "none"
        raise DetectionError(f"levels are strides that double from one to the next, such as 16,32, not {found}")
    if not hasattr(backbone, "forward_intermediates"):
        name = type(backbone).__name__
        raise DetectionError(f"timm's {name} does not show its feature maps (no forward_intermediates)")
    transformer = hasattr(backbone, "patch_embed") and hasattr(backbone, "blocks")
    kind = SimplePyramid if transformer else ConvolutionalPyramid
    return kind(backbone, levels, out_channels).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class DetectorConfig:
    """The detector's shape. The defaults are those of the published figures; smaller ones serve small pictures.

    Attributes:
        levels: strides of the backbone's maps that are used.
        masks: add the mask head: four convolutions on 14x14.
        anchor_sizes: in pixels, rising; see ``anchor_sizes``.
        width: channels of the pyramid and of the mask head.
        head_width: of the box head's two fully connected layers.
        proposals: kept in training, behind non-maximum suppression; None: 1000 with all four levels, 2000 with fewer,
            as SSLight has it.
        box_samples: proposals a picture that the box head learns from.
        normalisation: with which the backbone was trained.
    """

    levels: tuple[int, ...] = LEVELS
    masks: bool = False
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    width: int = 256
    head_width: int = 1024
    proposals: int | None = None
    box_samples: int = 512
    normalisation: Normalisation = IMAGENET


def anchor_sizes(sizes: Sequence[int], maps: int) -> tuple[tuple[int, ...], ...]:
    """Anchors' sizes for each of ``maps`` maps: a window over ``sizes`` that moves by one and ends at the last size.
    Five maps have one of the five each; SSLight's three (strides 16, 32 and the max pool) have 32, 64, 128, then 64,
    128, 256, then 128, 256, 512.

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

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, categories: int, config: DetectorConfig = DetectorConfig(), *, amp: bool = False
    ):
        super().__init__()
        self.config, self.amp = config, amp
        self.pyramid: Pyramid = create_pyramid(backbone, config.levels, config.width)
        levels, strides = config.levels, (*config.levels, 2 * config.levels[-1])
        anchors = Anchors(anchor_sizes(config.anchor_sizes, len(strides)), strides)
        self.rpn = Proposals(config.width, anchors, config.proposals or (1000 if len(levels) == len(LEVELS) else 2000))
        outputs = categories + 1
        self.heads = Heads(config.width, config.head_width, outputs, levels, config.box_samples, config.masks)
        for name, values in config.normalisation._asdict().items():  # of photos with values from 0 to 255
            self.register_buffer(name, torch.tensor([255 * value for value in values]).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32, less the mean, over the deviation."""
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
        proposals, losses = self.rpn(ImageList(images, sizes), maps, targets)
        if self.training and targets is not None:
            return {**losses, **self.heads.losses(maps, proposals, sizes, targets)}
        found: list[dict[str, Tensor]] = self.heads(maps, proposals, sizes)[0]
        return found
