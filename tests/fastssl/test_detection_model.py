"""The detector: anchors and strides where they belong, losses for every network, and the outputs' shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastssl.evaluate.detection.annotations import DetectionError
from fastssl.evaluate.detection.model import Detector, DetectorConfig, anchor_sizes
from fastssl.models.backbones import create_backbone
from fastssl.pipelines.plan.draw import Normalisation

SMALL = {"width": 32, "head_width": 64, "proposals": 50, "box_samples": 32}


def target(*boxes: tuple[float, float, float, float], size: tuple[int, int] = (60, 120)) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[int(top) : int(bottom), int(left) : int(right)] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(1, 1 + len(boxes)),
        "masks": masks,
    }


def test_anchor_sizes() -> None:
    sizes = (32, 64, 128, 256, 512)
    assert anchor_sizes(sizes, 5) == ((32,), (64,), (128,), (256,), (512,))
    # SSLight's MobileNetV2
    assert anchor_sizes(sizes, 3) == ((32, 64, 128), (64, 128, 256), (128, 256, 512))
    assert anchor_sizes(sizes, 4) == ((32, 64), (64, 128), (128, 256), (256, 512))
    with pytest.raises(DetectionError, match=r"5 anchor sizes for 6 maps"):
        anchor_sizes(sizes, 6)


def test_the_published_configurations() -> None:
    fpn = Detector(create_backbone("lcnet_035"), 80, DetectorConfig(masks=True))
    assert fpn.rpn.anchor_generator.num_anchors_per_location() == [3] * 5
    assert fpn.rpn.post_nms_top_n() == 1000 and fpn.rpn.pre_nms_top_n() == 2000
    assert fpn.eval().rpn.post_nms_top_n() == 1000 and fpn.rpn.pre_nms_top_n() == 1000
    assert (
        fpn.heads.box_predictor.cls_score.weight.shape == (81, 1024) and fpn.heads.box_head.fc6.in_features == 256 * 49
    )
    assert fpn.heads.mask_roi_pool.output_size == (14, 14) and len(fpn.heads.mask_head) == 4
    assert fpn.heads.box_roi_pool.featmap_names == ["0", "1", "2", "3"]
    mobile = Detector(create_backbone("lcnet_035"), 80, DetectorConfig(levels=(16, 32)))
    assert mobile.rpn.anchor_generator.num_anchors_per_location() == [9] * 3 and mobile.rpn.post_nms_top_n() == 2000
    assert mobile.heads.box_roi_pool.featmap_names == ["0", "1"] and not mobile.heads.has_mask()
    # Nothing is frozen and nothing above the backbone is normalised.
    assert all(parameter.requires_grad for parameter in mobile.parameters())
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    assert not any(
        isinstance(layer, norms) for part in (fpn.pyramid.fpn, fpn.rpn, fpn.heads) for layer in part.modules()
    )


def test_pictures_are_normalised_as_the_backbone_was_trained() -> None:
    images = torch.arange(0, 256, 5, dtype=torch.uint8).expand(1, 3, 2, -1)
    usual = Detector(create_backbone("lcnet_035"), 1, DetectorConfig(**SMALL))
    assert (
        usual.mean.flatten().tolist() == torch.tensor([123.675, 116.28, 103.53]).tolist()
    )  # of Detectron2, to the bit
    assert usual.std.flatten().tolist() == torch.tensor([58.395, 57.12, 57.375]).tolist()
    own = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    detector = Detector(create_backbone("lcnet_035"), 1, DetectorConfig(normalisation=own, **SMALL))
    torch.testing.assert_close(detector.normalise(images), images.float() / 255)


@pytest.mark.parametrize("size", [(40, 50), (300, 200)])
def test_maps_are_read_at_their_own_strides(size: tuple[int, int]) -> None:
    """torchvision guesses strides from sizes, wrongly for small pictures in their padding."""
    detector = Detector(create_backbone("lcnet_035"), 3, DetectorConfig(masks=True, **SMALL)).eval()
    seen = {}
    generator = detector.rpn.anchor_generator
    generator.register_forward_hook(lambda module, inputs, anchors: seen.update(anchors=anchors[0]))
    padded = [math.ceil(side / 64) * 64 for side in size]
    with torch.no_grad():
        detector(torch.randn(1, 3, *padded), [size])
    for pool in (detector.heads.box_roi_pool, detector.heads.mask_roi_pool):
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32] and (pool.map_levels.k_min, pool.map_levels.k_max) == (
            2,
            5,
        )
    centres = (seen["anchors"][:, :2] + seen["anchors"][:, 2:]) / 2
    expected = [
        (x * stride, y * stride)
        for stride in (4, 8, 16, 32, 64)
        for y in range(padded[0] // stride)
        for x in range(padded[1] // stride)
        for _ in range(3)
    ]
    torch.testing.assert_close(centres, torch.tensor(expected).float())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "mobilenetv3_large", "efficientnet_b0", "vit_tiny"])
def test_every_network_learns_and_predicts(name: str) -> None:
    torch.manual_seed(0)
    detector = Detector(
        create_backbone(name), 3, DetectorConfig(masks=True, anchor_sizes=(8, 16, 32, 64, 128), **SMALL)
    )
    images = detector.normalise(torch.randint(0, 256, (2, 3, 64, 128), dtype=torch.uint8))
    targets = [target((10, 10, 40, 50), (60, 5, 110, 30)), target(size=(64, 100))]  # one picture without anything in it
    losses = detector(images, [(60, 120), (64, 100)], targets)
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    assert all(loss.shape == () and torch.isfinite(loss) for loss in losses.values())
    # A new classifier knows nothing: C + 1 classes with nearly the same probability.
    assert losses["loss_classifier"].item() == pytest.approx(math.log(4), abs=0.2)
    sum(losses.values()).backward()
    without = {
        key for key, each in detector.named_parameters() if each.grad is None or not torch.isfinite(each.grad).all()
    }
    assert all("conv_head" in key for key in without), without
    detector.eval()
    with torch.no_grad():
        found = detector(images, [(60, 120), (64, 100)])
    for each, (height, width) in zip(found, [(60, 120), (64, 100)]):
        boxes = each["boxes"]
        assert (
            len(boxes)
            and each["masks"].shape == (len(boxes), 1, 28, 28)
            and len(each["scores"]) == len(each["labels"]) == len(boxes)
        )
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
        assert each["labels"].min() >= 1 and each["labels"].max() <= 3


def test_normalisation_is_imagenets() -> None:
    detector = Detector(create_backbone("lcnet_035"), 1, DetectorConfig(**SMALL))
    pixels = torch.arange(3, dtype=torch.uint8).view(1, 3, 1, 1) * 100
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1),
    )
    torch.testing.assert_close(detector.normalise(pixels), (pixels / 255 - mean) / std)


def test_bfloat16_is_the_pyramids_alone() -> None:
    torch.manual_seed(0)
    detector = Detector(create_backbone("lcnet_035"), 3, DetectorConfig(**SMALL), amp=True)
    kinds = {}
    detector.pyramid.body.conv_stem.register_forward_hook(
        lambda module, inputs, output: kinds.update(body=output.dtype)
    )
    detector.heads.box_head.register_forward_hook(lambda module, inputs, output: kinds.update(head=output.dtype))
    losses = detector(torch.randn(1, 3, 64, 128), [(60, 120)], [target((10, 10, 40, 50))])
    assert kinds == {"body": torch.bfloat16, "head": torch.float32}
    assert all(loss.dtype == torch.float32 for loss in losses.values())
