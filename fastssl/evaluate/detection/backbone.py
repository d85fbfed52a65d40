"""Feature pyramids over a backbone of ours: the very timm module, its maps, and a few convolutions on top.

* Networks whose maps shrink step by step (ResNet, MobileNet, EfficientNet): FPN, Lin et al., arXiv 1612.03144,
  without norm.
* Vision transformers, which have one map at one stride: ViTDet's simple pyramid, Li et al., arXiv 2203.16527, with its
  layer norms.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fastssl.evaluate.detection.annotations import DetectionError
from fastssl.evaluate.features import evaluating

#: Strides of the maps that detectors use.
LEVELS = (4, 8, 16, 32)


class Pyramid(nn.Module):
    """(N, 3, H, W) -> maps of ``out_channels`` channels, named "0", "1", ... by rising stride, and "pool" at twice the
    last one.

    H and W are multiples of ``divisible``.

    Attributes:
        body: the backbone, with the names of its tensors as they were.
        strides: of the maps without "pool".
        out_channels: of each.
    """

    def __init__(self, body: nn.Module, strides: Sequence[int], out_channels: int):
        super().__init__()
        self.body, self.strides, self.out_channels = body, tuple(strides), out_channels

    #: a timm network: what it can do beyond ``nn.Module`` is in no type
    body: Any

    @property
    def divisible(self) -> int:
        """Padding to multiples of the coarsest stride makes every map's size exact, and with it the anchors' places."""
        return 2 * self.strides[-1]


class ConvolutionalPyramid(Pyramid):
    """FPN over a backbone's maps of the strides ``strides``.

    The deepest map is what the backbone has just before its pooling: for MobileNetV2 and EfficientNet behind the last
    1x1 convolution (1280 channels), for MobileNet-V3, whose last convolution follows the pooling, behind the last
    block.
    """

    def __init__(
        self,
        body: nn.Module,
        strides: Sequence[int],
        out_channels: int,
        channels: dict[int, tuple[int, int]],
        final: bool,
    ):
        super().__init__(body, strides, out_channels)
        self.indices = [channels[stride][0] for stride in strides]
        self.final = final
        widths = [channels[stride][1] for stride in strides]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        final, maps = self.body.forward_intermediates(images, indices=self.indices)
        if self.final:
            maps[-1] = final
        pyramid: OrderedDict[str, Tensor] = self.fpn(OrderedDict((str(level), each) for level, each in enumerate(maps)))
        return pyramid


class SimplePyramid(Pyramid):
    """ViTDet's pyramid: the last block's map, enlarged four and two times by transposed convolutions, as it is, and
    halved by max pooling.
    """

    def __init__(self, body: nn.Module, strides: Sequence[int], out_channels: int, width: int, patch: int):
        super().__init__(body, strides, out_channels)

        def enlarge(channels: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)

        scalings = {
            patch // 4: (
                nn.Sequential(enlarge(width), LayerNorm2d(width // 2), nn.GELU(), enlarge(width // 2)),
                width // 4,
            ),
            patch // 2: (enlarge(width), width // 2),
            patch: (nn.Identity(), width),
            patch * 2: (nn.MaxPool2d(2), width),
        }
        self.levels = nn.ModuleList()
        for stride in strides:
            scaling, channels = scalings[stride]
            self.levels.append(
                nn.Sequential(
                    scaling,
                    nn.Conv2d(channels, out_channels, 1, bias=False),
                    LayerNorm2d(out_channels),
                    nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                    LayerNorm2d(out_channels),
                )
            )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        [last] = self.body.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        maps = OrderedDict((str(number), level(last)) for number, level in enumerate(self.levels))
        maps["pool"] = functional.max_pool2d(maps[str(len(self.levels) - 1)], 1, 2)
        return maps


def create_pyramid(backbone: Any, levels: Sequence[int] = LEVELS, out_channels: int = 256) -> Pyramid:
    """A pyramid over ``backbone``, which becomes part of it; the convolutions on top are drawn by torch's generator.

    Args:
        backbone: a timm network without its classifier.
        levels: strides of the maps that are used, each twice the one before it. (16, 32) is SSLight's form for
            MobileNetV2.
        out_channels: of the pyramid's maps.

    Raises:
        DetectionError: the network shows no maps, or has none of such a stride.
    """
    levels = tuple(levels)
    if not levels or any(low < 1 or high != 2 * low for low, high in itertools.pairwise(levels)):
        raise DetectionError(
            f"levels are strides that double from one to the next (4,8,16,32 or 16,32), not {_listed(levels)}"
        )
    name = type(backbone).__name__
    if not hasattr(backbone, "forward_intermediates"):
        raise DetectionError(
            f"timm's {name} does not show its feature maps (no forward_intermediates): detection cannot use it"
        )
    if hasattr(backbone, "patch_embed") and hasattr(backbone, "blocks"):
        patch = int(backbone.patch_embed.patch_size[0])
        _require_levels(levels, (patch // 4, patch // 2, patch, patch * 2), name)
        pyramid: Pyramid = SimplePyramid(backbone, levels, out_channels, backbone.num_features, patch)
    else:
        channels, final = _maps(backbone)
        _require_levels(levels, tuple(channels), name)
        pyramid = ConvolutionalPyramid(backbone, levels, out_channels, channels, final and levels[-1] == max(channels))
    return pyramid.to(memory_format=torch.channels_last)


@torch.no_grad()
def _maps(backbone: Any) -> tuple[dict[int, tuple[int, int]], bool]:
    """(stride -> (index, channels), whether the map before the pooling has the last one's size, whose place it takes).
    The network itself is asked, with a black picture.
    """
    side = 64
    with evaluating(backbone):
        device = next(backbone.parameters()).device
        final, maps = backbone.forward_intermediates(torch.zeros(1, 3, side, side, device=device))
    # Of several maps of one stride the deepest.
    fits = final.dim() == 4 and final.shape[-2:] == maps[-1].shape[-2:]
    maps = [*maps[:-1], final] if fits else maps
    return {side // each.shape[-1]: (index, each.shape[1]) for index, each in enumerate(maps)}, fits


def _require_levels(levels: tuple[int, ...], there: tuple[int, ...], name: str) -> None:
    if missing := [level for level in levels if level not in there]:
        raise DetectionError(
            f"{name} has no map of stride {missing[0]}, only of {_listed(there)}: choose --levels among them"
        )


def _listed(levels: Sequence[int]) -> str:
    return ",".join(map(str, levels)) or "none"
