"""Projector shapes and parameter counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastssl.methods.dino import DINOConfig, DINOHead
from fastssl.methods.swav import SwAVConfig, SwAVHead
from fastssl.models.heads import CosineLogits, Projector, ProjectorConfig, Prototypes


def test_light_moco_head_has_the_published_parameters() -> None:
    head = Projector(1280, ProjectorConfig())
    assert sum(p.numel() for p in head.parameters()) == 2_885_760
    assert not any(isinstance(m, nn.BatchNorm1d) for m in head)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("norm", [False, True])
def test_output_is_unit_float32_also_under_autocast(layers: int, norm: bool) -> None:
    head = Projector(24, ProjectorConfig(hidden=16, out=8, layers=layers, norm=norm, norm_out=norm))
    with torch.autocast("cpu", torch.bfloat16):
        embedding = head(torch.randn(6, 24))
    assert embedding.dtype == torch.float32 and embedding.shape == (6, 8)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(6))
    assert sum(isinstance(m, nn.Linear) for m in head) == layers
    assert sum(isinstance(m, nn.BatchNorm1d) for m in head) == layers * norm


def test_zero_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"projector\.hidden"):
        ProjectorConfig(hidden=0)


def test_norm_in_keeps_one_long_feature_from_making_all_others_alike() -> None:
    torch.manual_seed(0)
    features = torch.randn(64, 24)
    features[0] *= 1000
    spread = {}
    for norm_in in (False, True):
        torch.manual_seed(1)
        head = Projector(24, ProjectorConfig(hidden=32, out=16, norm_in=norm_in, norm=True, norm_out=True))
        spread[norm_in] = float(head(features).detach().std(dim=0).mean() * 16**0.5)
    assert spread[False] < 0.8 and spread[True] > 0.95


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_parameter_counts() -> None:
    dino = {width: count(DINOHead(width, DINOConfig())) for width in (1280, 512)}
    assert dino == {1280: 8_405_248, 512: 6_832_384}
    vit = replace(DINOConfig(), out=65536, learned_gain=True, projector=replace(DINOConfig().projector, norm=False))
    assert count(DINOHead(192, vit)) == 21_958_912
    assert count(SwAVHead(1280, SwAVConfig())) == 6_163_584
    assert count(Projector(1280, ProjectorConfig(init="truncated"))) == 2_885_760


def test_initialisation_of_the_published_heads() -> None:
    torch.manual_seed(0)
    for init, std in (("truncated", 0.02), ("normal", 0.01)):
        head = Projector(256, ProjectorConfig(hidden=512, norm=True, bias=True, init=init))
        for layer in head:
            if isinstance(layer, nn.Linear):
                assert abs(float(layer.weight.detach().std()) / std - 1) < 0.02 and not layer.bias.detach().any()


def test_cosine_logits_are_cosines_in_float32_and_their_gain_is_learned_only_if_asked() -> None:
    torch.manual_seed(0)
    layer, vectors = CosineLogits(8, 5), functional.normalize(torch.randn(4, 8), dim=1)
    expected = vectors @ functional.normalize(layer.direction.detach(), dim=1).t()
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(vectors)
        scores = Prototypes(8, 5)(vectors)
    assert logits.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(logits, expected)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["direction"]
    learned = CosineLogits(8, 5, learned_gain=True)
    assert [name for name, p in learned.named_parameters() if p.requires_grad] == ["direction", "gain"]
    with torch.no_grad():
        learned.gain.mul_(2.0)
    torch.testing.assert_close(learned(vectors).abs().amax() <= 2, torch.tensor(True))
    learned(vectors).sum().backward()
    assert learned.gain.grad.abs().sum() > 0


def test_prototypes_are_brought_back_to_unit_length_in_place() -> None:
    prototypes = Prototypes(8, 5)
    with torch.no_grad():
        prototypes.weight.mul_(3.0)
    before = prototypes.weight.data_ptr()
    prototypes.normalise_()
    assert prototypes.weight.data_ptr() == before
    torch.testing.assert_close(prototypes.weight.detach().norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(("name", "value"), [("activation", "swish"), ("init", "zeros")])
def test_unknown_names_are_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"projector\.{name} must be .* got '{value}'$"):
        ProjectorConfig(**{name: value})
