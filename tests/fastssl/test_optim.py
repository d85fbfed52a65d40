"""Optimisers: those that take all tensors together against the plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastssl.benchmarks.suites.plain_step import plain_optimizer
from fastssl.models.backbones import create_backbone
from fastssl.optim.optimizers import (
    LARS,
    OptimConfig,
    apply_decay,
    clip_gradients,
    create_optimizer,
    parameter_groups,
    set_lr,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 36, 5))


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("decay_1d", [True, False])
@pytest.mark.parametrize("name", ["sgd", "sgd nesterov", "adamw", "lars"])
@pytest.mark.parametrize("on_device", [False, True])
def test_all_tensors_together_make_the_steps_of_the_loop(name: str, decay_1d: bool, on_device: bool) -> None:
    kind, *nesterov = name.split()
    config = OptimConfig(name=kind, lr=0.3, weight_decay=0.05, decay_1d=decay_1d, nesterov=bool(nesterov))
    ours = network()
    theirs = copy.deepcopy(ours)
    fast, plain = create_optimizer(ours, config), plain_optimizer(theirs, config, 0.3)
    rate = torch.zeros(())
    for step in range(4):
        for model in (ours, theirs):
            gradients(model, step)
        rate.fill_(0.1 * (step + 1))
        set_lr(fast, rate if on_device else float(rate))
        set_lr(plain, float(rate))
        fast.step()
        plain.step()
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_each_tensor_for_itself() -> None:
    model = network()
    gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    clip_gradients(list(model.parameters()), None)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before))
    clip_gradients(list(model.parameters()), 3.0)
    scales = [min(1.0, 3.0 / (old.norm().item() + 1e-6)) for old in before]
    assert min(scales) < 1.0 == max(scales)
    for p, old, scale in zip(model.parameters(), before, scales):
        torch.testing.assert_close(p.grad, old * scale)


def test_a_lars_step_is_a_share_of_the_tensors_norm() -> None:
    weight, bias = nn.Parameter(torch.full((2, 8), 3.0)), nn.Parameter(torch.ones(4))
    optimizer = LARS([weight, bias], lr=2.0, momentum=0.9, trust=0.01)
    for length in (1e-6, 1e6):  # whatever the gradient's own length
        before = weight.detach().clone()
        weight.grad, bias.grad = torch.full_like(weight, length), torch.zeros_like(bias)
        optimizer.state.clear()
        optimizer.step()
        torch.testing.assert_close((before - weight).norm(), 2.0 * 0.01 * before.norm())
    bias.grad, weight.grad = torch.full_like(bias, 0.5), None
    optimizer.step()
    torch.testing.assert_close(bias, torch.zeros(4) + 1.0 - 2.0 * 0.5)  # one dimension: no trust ratio


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says that it is none."""

    is_cuda = True


def test_lars_takes_all_tensors_at_once_on_a_gpu_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = [torch.randn(8, 3, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(5, 7), torch.randn(4)]
    plain += [torch.zeros(3, 3)]
    gradients = [torch.randn_like(tensor) for tensor in plain]
    own, partners = torch._foreach_mul_, []

    def seen(tensors: list, others: object) -> object:
        partners.append(others)
        return own(tensors, others)

    monkeypatch.setattr(torch, "_foreach_mul_", seen)
    after = []
    for kind in (torch.Tensor, OnGpu):
        parameters = [tensor.clone().as_subclass(kind).requires_grad_() for tensor in plain]
        optimizer = LARS(parameters, lr=0.3, momentum=0.9, weight_decay=0.01)
        for _ in range(2):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient.clone().as_subclass(kind)
            optimizer.step()
        after.append([parameter.detach().as_subclass(torch.Tensor) for parameter in parameters])
    assert all(map(torch.equal, *after)) and not torch.equal(after[0][0], plain[0])
    # The kernel for many tensors wants partners of the same sizes and strides.
    on_gpu = partners[4]
    shaped = [tensor for tensor in plain if tensor.ndim > 1]
    assert [(one.shape, one.stride()) for one in on_gpu] == [(one.shape, one.stride()) for one in shaped]


def test_nesterov_by_hand_from_the_first_step() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    model = nn.Module()
    model.weight = weight
    optimizer = create_optimizer(model, OptimConfig(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.0))
    set_lr(optimizer, 0.1)
    value, buffer = 1.0, 0.0
    for gradient in (2.0, -1.0, 0.5):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        buffer = 0.9 * buffer + gradient
        value -= 0.1 * (gradient + 0.9 * buffer)
        assert weight.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("settings", [{"name": "adamw"}, {"momentum": 0.0}, {"name": "lars", "momentum": 0.0}])
def test_nesterov_needs_a_momentum(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"optim\.nesterov"):
        OptimConfig(nesterov=True, **settings)


@pytest.mark.parametrize("on_device", [False, True])
def test_clipped_lars_is_scaled_gradients_in_torchs_nesterov(on_device: bool) -> None:
    """LARC as a wrapper around torch's SGD, whose decay it takes over."""
    config = OptimConfig(
        name="lars", trust=0.01, trust_clip=True, nesterov=True, lr=0.3, weight_decay=0.05, decay_1d=False
    )
    ours = network()
    theirs = copy.deepcopy(ours)
    fast, wrapped = create_optimizer(ours, config), torch.optim.SGD(theirs.parameters(), 0.3, 0.9, nesterov=True)
    bounded = 0
    for step, rate in enumerate((0.3, 0.0003, 0.1)):
        for model in (ours, theirs):
            gradients(model, step)
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                length = float(parameter.detach().norm())
                share = 0.01 * length / (float(parameter.grad.norm()) + 0.05 * length)
                bounded += share > rate
                parameter.grad = (parameter.grad + 0.05 * parameter.detach()) * min(share / rate, 1.0)
        set_lr(fast, torch.tensor(rate) if on_device else rate)
        wrapped.param_groups[0]["lr"] = rate
        fast.step()
        wrapped.step()
    assert 0 < bounded < 6
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="trust_clip"):
        OptimConfig(trust_clip=True)


def test_a_zero_tensor_and_a_zero_gradient_leave_lars_finite() -> None:
    zero, still = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = LARS([zero, still], lr=1.0, momentum=0.0)
    zero.grad, still.grad = torch.ones_like(zero), torch.zeros_like(still)
    optimizer.step()
    assert torch.equal(zero, -torch.ones(3, 3)) and torch.equal(still, torch.ones(3, 3))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"optim\.name must be 'sgd', 'adamw' or 'lars', got 'lamb'"):
        OptimConfig(name="lamb")
    with pytest.raises(ValueError, match="trust"):
        OptimConfig(name="lars", trust=0)


def names_by_decay(model: nn.Module, config: OptimConfig) -> tuple[set[str], set[str]]:
    """Names of the parameters that decay and of those that do not."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: tuple[set[str], set[str]] = (set(), set())
    for group in parameter_groups(model, config):
        found[0 if group["decays"] else 1].update(names[id(p)] for p in group["params"])
    return found


def test_depthwise_filters_and_one_dimensional_tensors_do_not_decay() -> None:
    backbone = create_backbone("mobilenetv2")
    decayed, spared = names_by_decay(backbone, OptimConfig(name="lars", decay_1d=False, decay_depthwise=False))
    shapes = {name: tuple(p.shape) for name, p in backbone.named_parameters()}
    assert decayed | spared == set(shapes) and not decayed & spared
    depthwise = {name for name in shapes if name.endswith("conv_dw.weight")}
    assert len(depthwise) == 17 and depthwise <= spared
    assert all(len(shapes[name]) == 1 for name in spared - depthwise) and all(
        len(shapes[name]) == 4 for name in decayed
    )
    again, only_1d = names_by_decay(backbone, OptimConfig(decay_1d=False))
    assert again == decayed | depthwise and only_1d == spared - depthwise
    # Position embedding and class token of a vision transformer count as matrices, and decay.
    decayed, spared = names_by_decay(create_backbone("vit_tiny"), OptimConfig(name="adamw", decay_1d=False))
    assert {"pos_embed", "cls_token"} <= decayed and "norm.weight" in spared


def test_depthwise_filters_keep_their_trust_ratio() -> None:
    weight = nn.Parameter(torch.full((6, 1, 3, 3), 2.0))
    model = nn.ParameterDict({"filter": weight})
    optimizer = create_optimizer(
        model, OptimConfig(name="lars", lr=1.0, weight_decay=0.5, decay_1d=False, decay_depthwise=False)
    )
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer.step()
    torch.testing.assert_close((before - weight).norm(), 0.001 * before.norm())


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_scheduled_decay_makes_the_steps_of_an_optimiser_that_was_given_it(name: str, on_device: bool) -> None:
    config = OptimConfig(name=name, lr=0.3, weight_decay=0.04, final_weight_decay=0.4, decay_1d=False)
    ours = network()
    theirs = copy.deepcopy(ours)
    fast, plain = create_optimizer(ours, config), plain_optimizer(theirs, config, 0.3)
    rate, mass = torch.zeros(()), torch.zeros(())
    for step in range(4):
        for model in (ours, theirs):
            gradients(model, step)
        if step == 2:  # a frozen layer neither moves nor decays
            ours[3].weight.grad = theirs[3].weight.grad = None
        rate.fill_(0.1 * (step + 1))
        mass.fill_(0.04 + 0.1 * step)
        for group in plain.param_groups:
            group["weight_decay"] = float(mass) if group["decays"] else 0.0
        apply_decay(fast, *((rate, mass) if on_device else (float(rate), float(mass))))
        set_lr(fast, rate if on_device else float(rate))
        set_lr(plain, float(rate))
        fast.step()
        plain.step()
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_a_warm_up_rate_without_a_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_lr needs warmup_epochs"):
        OptimConfig(warmup_lr=0.0)
    with pytest.raises(ValueError, match="final_weight_decay"):
        OptimConfig(final_weight_decay=-1.0)
