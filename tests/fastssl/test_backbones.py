"""Backbones: the right feature, the right size, and a checkpoint that loads strictly."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastssl
from fastssl.errors import FastSSLError
from fastssl.models import backbones
from fastssl.models.backbones import (
    SHORT_NAMES,
    create_backbone,
    feature_dim,
    load_backbone,
    of_one_size,
    plain_arch,
    read_header,
    resolve_arch,
    save_backbone,
)
from fastssl.models.initial import zero_residual_branches

#: short name -> (feature width, parameters without the classifier), as the papers count them
EXPECTED = {
    "mobilenetv3_large": (1280, 4_202_032),
    "mobilenetv3_small": (1024, 1_517_856),
    "mobilenetv4_small": (1280, 2_493_024),
    "efficientnet_b0": (1280, 4_007_548),
    "efficientnet_b1": (1280, 6_513_184),
    "mobilenetv2": (1280, 2_223_872),
    "resnet18": (512, 11_176_512),
    "resnet34": (512, 21_284_672),
    "resnet50": (2048, 23_508_032),
    "vit_tiny": (192, 5_524_416),
}


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_width_parameters_and_layout(name: str) -> None:
    width, parameters = EXPECTED[name]
    backbone = create_backbone(name).eval()
    assert feature_dim(backbone) == width
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    with torch.no_grad():
        features = backbone(torch.zeros(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert features.shape == (
        2,
        width,
    )  # for MobileNet-V3 the 1280-wide input of the classifier, not the 960 pooled channels
    for parameter in backbone.parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)


def test_timm_names_work_and_wrong_names_get_a_hint() -> None:
    assert feature_dim(create_backbone("mobilenetv3_small_075")) == 1024
    with pytest.raises(FastSSLError, match="mobilenetv3_large"):
        create_backbone("mobilnetv3_large")


#: counted by hand from the papers' tables: MobileNet-V3-Large has 15 blocks, of which 10 keep size and width
RESIDUAL_BLOCKS = {
    "mobilenetv3_large": 10,
    "mobilenetv4_conv_medium": 18,
    "mobilenetv4_hybrid_medium": 27,  # 8 of them attention; layer scale throughout
    "efficientnet_b0": 9,
    "tf_efficientnetv2_s": 35,  # 2 of them a convolution alone
    "mobilenetv2": 10,
    "resnet18": 8,
    "resnet50": 16,
}


@pytest.mark.parametrize("name", RESIDUAL_BLOCKS)
def test_zero_init_residual_makes_every_residual_block_the_identity(name: str) -> None:
    """Found without knowing timm's classes: a block is residual if its input comes out again when its branch is
    silent.
    """
    backbone = create_backbone(name, zero_init_residual=True)
    untouched = create_backbone(name)
    blocks = [(block, twin) for block, twin in zip(backbone.modules(), untouched.modules()) if _is_residual(block)]
    assert len(blocks) == RESIDUAL_BLOCKS[name]
    for block, twin in blocks:
        first = next(child for child in block.modules() if isinstance(child, torch.nn.Conv2d))
        images = torch.rand(2, first.in_channels, 12, 12)  # not negative: ResNet has a ReLU behind the sum
        with torch.no_grad():
            shortcut = block.downsample(images) if getattr(block, "downsample", None) is not None else images
            expected = shortcut.relu() if name.startswith("resnet") else shortcut
            assert torch.equal(block(images), expected)
            if not name.startswith("resnet"):  # timm does it to ResNets unasked
                assert not torch.equal(twin(images), images)


def _is_residual(block: torch.nn.Module) -> bool:
    return bool(getattr(block, "has_skip", False)) or type(block).__name__ in ("BasicBlock", "Bottleneck")


def test_zero_init_residual_makes_a_transformers_blocks_the_identity() -> None:
    with pytest.warns(UserWarning, match="class token"):  # which would be the same for every photo
        assert create_backbone("vit_tiny", zero_init_residual=True).blocks[0].mlp.fc2.weight.any()
    backbone = create_backbone("vit_tiny")
    assert zero_residual_branches(backbone) == (24, 0)
    tokens = torch.randn(2, 5, 192)
    assert len(backbone.blocks) == 12
    for block in backbone.blocks:
        assert torch.equal(block(tokens), tokens)


def test_zero_init_residual_says_where_it_does_nothing() -> None:
    with pytest.warns(UserWarning, match="zero_init_residual changes nothing: lcnet_035"):
        create_backbone("lcnet_035", zero_init_residual=True)
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_backbone("lcnet_035", zero_init_residual=True, drop_path=0.1, say=said.append)
        create_backbone("mobilenetv3_large", zero_init_residual=True, say=said.append)
    assert [line.split()[0] for line in said] == ["drop_path=0.1", "zero_init_residual"]


class Odd(nn.Module):
    """Residual blocks as no network here has them: a ReLU behind the last norm, and no norm at all."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.has_skip, self.conv, self.last = True, nn.Conv2d(4, 4, 1), last


def test_zero_init_residual_leaves_what_it_does_not_know_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = nn.Sequential(
        Odd(timm.layers.BatchNormAct2d(4)), Odd(nn.Identity()), Odd(nn.BatchNorm2d(4)), Odd(nn.GroupNorm(2, 4))
    )
    assert zero_residual_branches(odd) == (2, 2)
    assert [bool(odd[number].last.weight.any()) for number in (0, 2, 3)] == [True, False, False]
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: odd)
    said: list[str] = []
    create_backbone("mobilenetv4_small", zero_init_residual=True, say=said.append)
    assert len(said) == 1 and "leaves 2 of 4 residual branches of mobilenetv4_small as they are" in said[0]


def test_a_tag_of_weights_is_part_of_a_name() -> None:
    for name in ("mobilenetv3_large_100.ra_in1k", "mobilenetv3_large.ra_in1k"):
        assert resolve_arch(name) == "mobilenetv3_large_100.ra_in1k"
        assert plain_arch(name) == "mobilenetv3_large_100"
    with pytest.raises(FastSSLError, match=r"unknown tag 'ra_in2k'.*nearest: ra_in1k"):
        create_backbone("mobilenetv3_large_100.ra_in2k")
    with pytest.raises(FastSSLError, match=r"unknown network 'lcnet_050\.'"):
        resolve_arch("lcnet_050.")


def test_a_file_may_say_whose_weights_it_holds(tmp_path: Path) -> None:
    save_backbone(create_backbone("lcnet_050.ra2_in1k"), tmp_path / "theirs.safetensors", arch="lcnet_050.ra2_in1k")
    assert read_header(tmp_path / "theirs.safetensors")["arch"] == "lcnet_050.ra2_in1k"
    assert feature_dim(load_backbone(tmp_path / "theirs.safetensors")) == 1280


def test_saved_backbone_loads_as_a_timm_module(tmp_path: Path) -> None:
    backbone = create_backbone("mobilenetv3_large")
    backbone(torch.randn(4, 3, 32, 32))  # moves the BatchNorm statistics, which must be stored too
    save_backbone(backbone, tmp_path / "last.safetensors", arch="mobilenetv3_large")
    images = torch.randn(2, 3, 32, 32)
    loaded = fastssl.load_backbone(tmp_path / "last.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), backbone.eval()(images))
    assert not (tmp_path / "last.safetensors.tmp").exists()


def test_a_wrong_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    with pytest.raises(FastSSLError, match="no such checkpoint"):
        backbones.load_backbone(path)
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(FastSSLError, match=r"not a whole safetensors file.*comes in by `fastssl import`"):
        backbones.load_backbone(path)
    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(FastSSLError, match="no fastssl header"):
        backbones.load_backbone(path)
    for header in ('{"arch": 5}', '["resnet18"]', "{", "{}", "[" * 100_000):
        save_file({"a": torch.zeros(1)}, str(path), metadata={"fastssl": header})
        with pytest.raises(FastSSLError, match="does not name a network"):
            backbones.load_backbone(path)
    save_backbone(create_backbone("resnet18"), path, arch="resnet18")
    tensors = load_file(str(path))
    tensors.pop("conv1.weight")
    save_file(tensors, str(path), metadata={"format": "pt", "fastssl": '{"arch": "resnet18"}'})
    with pytest.raises(FastSSLError, match=r"conv1\.weight") as error:
        backbones.load_backbone(path)
    assert "\n" not in str(error.value)


def test_tensors_of_another_kind_are_not_cast(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_backbone(create_backbone("lcnet_035"), path, arch="lcnet_035")
    tensors = load_file(str(path))
    header = {"fastssl": '{"arch": "lcnet_035"}'}
    save_file({**tensors, "conv_stem.weight": tensors["conv_stem.weight"].to(torch.int8)}, str(path), header)
    with pytest.raises(FastSSLError, match=r"conv_stem\.weight int8 for float32"):
        fastssl.load_backbone(path)
    save_file({**tensors, "conv_stem.weight": tensors["conv_stem.weight"].half()}, str(path), header)
    assert fastssl.load_backbone(path).conv_stem.weight.dtype == torch.float32


@pytest.mark.parametrize(("size", "tokens"), [(96, 36), (128, 64), (224, 196)])
def test_the_position_embedding_of_a_vit_follows_the_size(size: int, tokens: int) -> None:
    backbone, seen = create_backbone("vit_tiny").eval(), []
    backbone.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        backbone.patch_embed.proj.weight.zero_()
        backbone.patch_embed.proj.bias.zero_()
        features = backbone(torch.zeros(1, 3, size, size))
    assert features.shape == (1, 192) and seen[0].shape == (1, tokens + 1, 192)
    # With empty patches the tokens are the embedding: bicubic from the 14 x 14 of 224 px.
    side = size // 16
    grid = backbone.pos_embed[:, 1:].detach().reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    resized = (
        torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", antialias=True) if side != 14 else grid
    )
    torch.testing.assert_close(seen[0][:, 1:].transpose(1, 2), resized.flatten(2), rtol=1e-4, atol=1e-5)


def test_kaiming_initialisation_is_torchvisions() -> None:
    """ResNet-18: the very distribution, and no silent residual branch; depth-wise filters: fan-out over all output
    channels.
    """
    torch.manual_seed(0)
    ours = create_backbone("resnet18", init="kaiming")
    assert all(
        bool((m.weight == 1).all()) and not m.bias.any() for m in ours.modules() if isinstance(m, nn.BatchNorm2d)
    )
    assert any(not m.weight.any() for m in create_backbone("resnet18").modules() if isinstance(m, nn.BatchNorm2d)), (
        "timm silences some"
    )
    conv = ours.layer3[1].conv2  # 256 -> 256, 3x3
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    depthwise = create_backbone("mobilenetv2", init="kaiming").blocks[5][0].conv_dw  # 576 channels, 3x3
    assert float(depthwise.weight.detach().std()) == pytest.approx((2 / (576 * 9)) ** 0.5, rel=0.05)


def test_a_network_that_knows_no_drop_path_says_so() -> None:
    with pytest.raises(FastSSLError, match=r"vgg11 has no drop path: drop_path=0\.1 must be 0"):
        create_backbone("vgg11", drop_path=0.1)


def test_drop_path_without_a_layer_that_reads_it_is_said() -> None:
    with pytest.warns(UserWarning, match=r"drop_path=0\.1 changes nothing: lcnet_035 has no drop path"):
        create_backbone("lcnet_035", drop_path=0.1)


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path: Path) -> None:
    """safetensors itself would load it without a word."""
    path = tmp_path / "last.safetensors"
    save_backbone(create_backbone("lcnet_035"), path, arch="lcnet_035")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(FastSSLError, match="damaged: its tensors are not what was written"):
        load_backbone(path)
    assert read_header(path)["arch"] == "lcnet_035"


def test_a_header_that_names_no_network_is_one_short_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"fastssl": '{"arch": "' + "x" * 100_000 + '"}'})
    with pytest.raises(FastSSLError, match=r"unknown network 'xxx.*\.\.\.") as error:
        load_backbone(path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("size", [96, 224])
def test_a_vision_transformer_for_one_size_gives_the_same_features(size: int) -> None:
    network, pictures = create_backbone("vit_tiny").eval(), torch.randn(2, 3, size, size)
    fixed = of_one_size(network, size)
    assert not fixed.training and not fixed.dynamic_img_size and network.dynamic_img_size
    with torch.no_grad():
        torch.testing.assert_close(fixed(pictures), network(pictures), rtol=0, atol=1e-5)
        with pytest.raises(AssertionError):
            fixed(torch.randn(1, 3, size + 16, size + 16))
        with pytest.raises(AssertionError, match="divisible"):
            of_one_size(network, size + 2)
    assert of_one_size(plain := create_backbone("resnet10t"), size) is plain
