"""Projector shapes and parameter counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastssl.heads import Projector, ProjectorConfig


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
