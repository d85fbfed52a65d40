"""The detector: anchors and strides where they belong, losses for every network, and the outputs' shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from fastssl.evaluate.detection.annotations import DetectionError
from fastssl.evaluate.detection.heads import Anchors, RoIPool
from fastssl.evaluate.detection.model import Detector, DetectorConfig, anchor_sizes
from fastssl.models.backbones import create_backbone
from fastssl.pipelines.plan.draw import Normalisation

SMALL = {"width": 32, "head_width": 64, "proposals": 50, "box_samples": 32}
SIZES = (8, 16, 32, 64, 128)


class Watched:
    """A sampler that remembers what it drew."""

    def __init__(self, sampler: object):
        self.sampler, self.batch_size_per_image = sampler, sampler.batch_size_per_image

    def __call__(self, labels: list[Tensor]) -> object:
        self.drawn = self.sampler(labels)
        return self.drawn


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
    assert fpn.rpn.head.cls_logits.out_channels == 3 and len(fpn.rpn.anchor_generator.sizes) == 5
    assert fpn.rpn.post_nms_top_n() == 1000 and fpn.rpn.pre_nms_top_n() == 2000
    assert fpn.eval().rpn.post_nms_top_n() == 1000 and fpn.rpn.pre_nms_top_n() == 1000
    assert (
        fpn.heads.box_predictor.cls_score.weight.shape == (81, 1024) and fpn.heads.box_head.fc6.in_features == 256 * 49
    )
    assert fpn.heads.mask_roi_pool.size == 14 and len(fpn.heads.mask_head) == 4
    assert fpn.heads.box_roi_pool.strides == (4, 8, 16, 32) and fpn.heads.box_roi_pool.size == 7
    sampling = fpn.rpn.fg_bg_sampler, fpn.heads.fg_bg_sampler
    assert [(each.batch_size_per_image, each.positive_fraction) for each in sampling] == [(256, 0.5), (512, 0.25)]
    matching = fpn.rpn.proposal_matcher, fpn.heads.proposal_matcher
    thresholds = [(each.low_threshold, each.high_threshold, each.allow_low_quality_matches) for each in matching]
    assert thresholds == [(0.3, 0.7, True), (0.5, 0.5, False)]
    assert fpn.rpn.nms_thresh == 0.7 and fpn.rpn.box_coder.weights == (1, 1, 1, 1)
    assert fpn.heads.box_coder.weights == (10, 10, 5, 5) and fpn.heads.nms_thresh == 0.5
    assert fpn.heads.score_thresh == 0.05 and fpn.heads.detections_per_img == 100
    mobile = Detector(create_backbone("lcnet_035"), 80, DetectorConfig(levels=(16, 32)))
    assert mobile.rpn.head.cls_logits.out_channels == 9 and mobile.rpn.post_nms_top_n() == 2000
    assert mobile.heads.box_roi_pool.strides == (16, 32) and not mobile.heads.has_mask()
    # Nothing is frozen and nothing above the backbone is normalised.
    assert all(parameter.requires_grad for parameter in mobile.parameters())
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    assert not any(
        isinstance(layer, norms) for part in (fpn.pyramid.fpn, fpn.rpn, fpn.heads) for layer in part.modules()
    )


def test_first_weights_are_detectron2s() -> None:
    """Of every new layer, at its published width; the backbone keeps what was loaded."""
    torch.manual_seed(0)
    backbone = create_backbone("lcnet_035")
    loaded = {name: value.clone() for name, value in backbone.state_dict().items()}
    detector = Detector(backbone, 80, DetectorConfig(masks=True))
    assert all(torch.equal(loaded[name], value) for name, value in detector.pyramid.body.state_dict().items())
    widths = [block[0].in_channels for block in detector.pyramid.fpn.inner_blocks]
    expected = {
        "rpn.head.conv.0.0": 0.01,
        "rpn.head.cls_logits": 0.01,
        "rpn.head.bbox_pred": 0.01,
        "heads.box_head.fc6": 0.0089286,  # 1 / sqrt(256 * 7 * 7)
        "heads.box_head.fc7": 0.03125,  # 1 / sqrt(1024)
        "heads.box_predictor.cls_score": 0.01,
        "heads.box_predictor.bbox_pred": 0.001,
        **{f"heads.mask_head.{number}.0": math.sqrt(2 / (256 * 9)) for number in range(4)},
        "heads.mask_predictor.conv5_mask": math.sqrt(2 / (256 * 4)),
        "heads.mask_predictor.mask_fcn_logits": 0.001,
        **{f"pyramid.fpn.inner_blocks.{level}.0": 1 / math.sqrt(width) for level, width in enumerate(widths)},
        **{f"pyramid.fpn.layer_blocks.{level}.0": 1 / math.sqrt(256 * 9) for level in range(4)},
    }
    uniform = ("heads.box_head", "pyramid.fpn")
    layers = {name: layer for name, layer in detector.named_modules() if name in expected}
    assert layers.keys() == expected.keys()
    new = {name for name, _ in detector.named_parameters() if not name.startswith("pyramid.body")}
    assert new == {f"{name}.{part}" for name in expected for part in ("weight", "bias")}
    for name, std in expected.items():
        weight = layers[name].weight.detach()
        assert weight.std().item() == pytest.approx(std, rel=0.1), name
        assert (weight.abs().max() <= 1.001 * math.sqrt(3) * std) == name.startswith(uniform), name
        assert not layers[name].bias.any(), name


def test_anchors_are_not_rounded() -> None:
    anchors = Anchors(((32,), (64, 128)), (8, 16))
    maps = [torch.zeros(2, 1, 3, 5), torch.zeros(2, 1, 2, 3)]
    found = anchors(ImageList(torch.zeros(2, 3, 24, 40), [(20, 30), (24, 40)]), maps)
    assert len(found) == 2 and torch.equal(*found)
    expected = [
        (x - width / 2, y - size * size / width / 2, x + width / 2, y + size * size / width / 2)
        for rows, columns, stride, sizes in ((3, 5, 8, (32,)), (2, 3, 16, (64, 128)))
        for y in range(0, rows * stride, stride)
        for x in range(0, columns * stride, stride)
        for size in sizes
        for width in (size * 2**0.5, size, size / 2**0.5)
    ]
    torch.testing.assert_close(found[0], torch.tensor(expected).float())
    # 45.25 x 22.63 pixels, around the picture's first corner
    torch.testing.assert_close(found[0][0], torch.tensor([-22.6274, -11.3137, 22.6274, 11.3137]))


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
    """Also where the coarsest map, at twice the stride that is padded to, is no whole part of the picture."""
    detector = Detector(create_backbone("lcnet_035"), 3, DetectorConfig(masks=True, **SMALL)).eval()
    seen = {}
    generator = detector.rpn.anchor_generator
    generator.register_forward_hook(lambda module, inputs, anchors: seen.update(anchors=anchors[0]))
    assert detector.pyramid.divisible == 32
    padded = [math.ceil(side / 32) * 32 for side in size]
    with torch.no_grad():
        detector(torch.randn(1, 3, *padded), [size])
    centres = (seen["anchors"][:, :2] + seen["anchors"][:, 2:]) / 2
    expected = [
        (x * stride, y * stride)
        for stride in (4, 8, 16, 32, 64)
        for y in range(math.ceil(padded[0] / stride))
        for x in range(math.ceil(padded[1] / stride))
        for _ in range(3)
    ]
    torch.testing.assert_close(centres, torch.tensor(expected).float(), rtol=0, atol=1e-4)


def test_boxes_are_pooled_from_the_map_of_their_size() -> None:
    """Of a plane that rises by a pixel a pixel, each bin is the place of its middle: no shift, whatever the size."""
    strides, sides = (4, 8, 16, 32), (512, 1024)
    maps = {}
    for number, stride in enumerate(strides):
        y, x = torch.meshgrid(*(stride * (torch.arange(side // stride) + 0.5) for side in sides), indexing="ij")
        maps[str(number)] = torch.stack([x, y, torch.full_like(x, stride)]).repeat(2, 1, 1, 1)
        maps[str(number)][1] += 5000  # the second picture
    boxes = [
        torch.tensor([[100.0, 80, 211, 191], [100, 80, 212, 192], [50.5, 60.25, 273, 284], [50, 60, 274, 284]]),
        torch.tensor([[40.0, 40, 487, 487], [40, 40, 488, 488], [33, 35, 40, 43]]),
    ]
    found = RoIPool(strides, 7)(maps, boxes, [sides, sides])
    assert found.shape == (7, 3, 7, 7)
    for bins, box, picture, stride in zip(found, torch.cat(boxes), [0] * 4 + [1] * 3, (4, 8, 8, 16, 16, 32, 4)):
        middles = (torch.arange(7) + 0.5) / 7
        width, height = box[2:] - box[:2]
        expected = torch.empty(3, 7, 7)
        expected[0], expected[1], expected[2] = box[0] + middles * width, box[1] + middles[:, None] * height, stride
        torch.testing.assert_close(bins - 5000 * picture, expected, rtol=0, atol=2e-3)


def test_losses_are_l1_over_what_was_to_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, from what the network says of the proposals that were drawn."""
    torch.manual_seed(3)
    config = DetectorConfig(masks=True, anchor_sizes=SIZES, **{**SMALL, "proposals": 1000})
    detector = Detector(create_backbone("lcnet_035"), 3, config)
    for layer in (detector.heads.box_predictor.bbox_pred, detector.rpn.head.bbox_pred):
        nn.init.normal_(layer.weight, std=0.05)  # offsets on both sides of smooth L1's bend
    seen: dict[str, tuple] = {}

    def watch(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def watched(*given: object) -> object:
            seen[name] = given, real(*given)
            return seen[name][1]

        monkeypatch.setattr(owner, name, watched)

    watch(detector.heads, "select_training_samples")
    watch(detector.rpn, "compute_loss")
    detector.rpn.fg_bg_sampler.batch_size_per_image = 4096  # more than there are
    detector.rpn.fg_bg_sampler = sampler = Watched(detector.rpn.fg_bg_sampler)
    for name in ("box_predictor", "mask_predictor"):
        layer = getattr(detector.heads, name)
        layer.register_forward_hook(lambda module, given, output, name=name: seen.update({name: output}))
    targets = [target((10, 10, 40, 50), (60, 5, 110, 30)), target((3, 3, 90, 55))]
    losses = detector(torch.randn(2, 3, 64, 128), [(60, 120), (60, 120)], targets)

    boxes, matched, labels, wanted = seen["select_training_samples"][1]
    scores, offsets = seen["box_predictor"]
    rows = [(picture, place) for picture in range(2) for place in range(len(labels[picture]))]
    entropy = moved = 0.0
    pairs = []
    for row, (picture, place) in enumerate(rows):
        label = int(labels[picture][place])
        entropy -= scores[row].log_softmax(0)[label].item()
        if label:
            own = offsets[row, 4 * label : 4 * label + 4]
            moved += (own - wanted[picture][place]).abs().sum().item()
            mask = targets[picture]["masks"][int(matched[picture][place])][None, None].float()
            region = torch.cat([torch.zeros(1), boxes[picture][place]])[None]
            cut = roi_align(mask, region, 28, aligned=True)[0, 0] >= 0.5
            pairs.append((seen["mask_predictor"][len(pairs), label], cut.float()))
    assert len(pairs) > 5
    assert losses["loss_classifier"].item() == pytest.approx(entropy / len(rows), rel=1e-4)
    assert losses["loss_box_reg"].item() == pytest.approx(moved / len(rows), rel=1e-4)
    logits, cuts = (torch.stack(each) for each in zip(*pairs))
    expected = functional.binary_cross_entropy_with_logits(logits, cuts)
    torch.testing.assert_close(losses["loss_mask"], expected)

    (objectness, offsets, labels, wanted), _ = seen["compute_loss"]
    positive, negative = (torch.cat(masks).bool() for masks in sampler.drawn)
    assert 0 < positive.sum() < negative.sum() < 4096
    errors = (offsets[positive] - torch.cat(wanted)[positive]).abs().sum()
    torch.testing.assert_close(losses["loss_rpn_box_reg"], errors / 8192)
    likely = objectness.flatten().sigmoid()
    expected = -(likely[positive].log().sum() + (1 - likely[negative]).log().sum()) / 8192
    torch.testing.assert_close(losses["loss_objectness"], expected)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "mobilenetv3_large", "efficientnet_b0", "vit_tiny"])
def test_every_network_learns_and_predicts(name: str) -> None:
    torch.manual_seed(0)
    detector = Detector(create_backbone(name), 3, DetectorConfig(masks=True, anchor_sizes=SIZES, **SMALL))
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
