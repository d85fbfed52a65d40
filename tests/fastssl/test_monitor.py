"""Collapse monitors on features whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from fastssl.evaluate import collapse as monitor


def gaussian(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_feature_std_is_one_on_the_sphere_and_zero_when_collapsed():
    assert monitor.feature_std(gaussian(4000, 64)) == pytest.approx(1.0, abs=0.02)
    assert monitor.feature_std(torch.ones(100, 64) * 3) == pytest.approx(0.0, abs=1e-5)
    # A common offset that outweighs the differences 10 to 1 leaves about a tenth.
    assert monitor.feature_std(gaussian(4000, 64) + 10) == pytest.approx(0.1, abs=0.01)


def test_feature_std_ignores_scale_and_width():
    features = gaussian(500, 32)
    assert monitor.feature_std(features * 1000) == pytest.approx(float(monitor.feature_std(features)), rel=1e-5)
    assert monitor.feature_std(gaussian(4000, 512)) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_effective_rank_of_equal_directions_is_their_number(rank):
    basis = torch.linalg.qr(gaussian(40, 40)).Q[:, :rank]  # (40, rank), orthonormal
    # +e and -e along each direction: centred, equal singular values.
    features = torch.cat([basis.T, -basis.T]) * 5 + 100.0
    assert monitor.effective_rank(features) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_formula_ignores_the_offset():
    singular = torch.tensor([4.0, 2.0, 1.0])
    left = torch.linalg.qr(gaussian(50, 3) - gaussian(50, 3).mean(dim=0)).Q
    features = left * singular  # columns have mean 0 and norms 4, 2, 1
    share = singular / singular.sum()
    expected = float((-(share * share.log()).sum()).exp())
    assert monitor.effective_rank(features) == pytest.approx(expected, rel=1e-4)
    assert monitor.effective_rank(features + 7) == pytest.approx(expected, rel=1e-3)


def test_effective_rank_of_isotropic_and_of_collapsed_features():
    assert monitor.effective_rank(gaussian(5000, 32)) > 31.5
    # Equal rows leave rounding noise, which looks isotropic but is nothing.
    assert monitor.effective_rank(torch.full((300, 32), 0.1234567)) == 0
    assert monitor.effective_rank(gaussian(1, 32).expand(300, 32) * 1e3) == 0


def test_effective_rank_reports_divergence_instead_of_raising():
    features = gaussian(20, 4)
    features[3, 2] = torch.nan
    assert math.isnan(monitor.effective_rank(features))


def test_uniformity_equals_the_mean_over_pairs():
    features = gaussian(30, 5)
    unit = torch.nn.functional.normalize(features, dim=1).double()
    pairs = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(30) for j in range(i)]
    assert monitor.uniformity(features) == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-5)


def test_uniformity_ends():
    assert monitor.uniformity(torch.ones(50, 8)) == pytest.approx(0.0, abs=1e-5)
    assert monitor.uniformity(gaussian(1000, 512)) == pytest.approx(-4.0, abs=0.05)


def test_monitors_take_half_precision_and_give_no_gradient():
    features = gaussian(64, 16).to(torch.bfloat16).requires_grad_()
    for value in (
        monitor.feature_std(features),
        monitor.effective_rank(features),
        monitor.uniformity(features),
    ):
        assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad
