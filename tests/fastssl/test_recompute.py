"""Blocks that are computed again in the backward pass: the same bits, statistics that move once, less memory."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from kept import kept_bytes
from test_step import CPU, METHODS, multicrop, recipe, replayed, run_phases, train
from tiny import TinyBackbone
from torch import Tensor, nn

from fastssl.methods.base import Encoder
from fastssl.models import recompute
from fastssl.models.activations import keep_less
from fastssl.models.backbones import create_backbone
from fastssl.models.drop_path import DropTable
from fastssl.models.recompute import blocks_of, recompute_blocks
from fastssl.training.step import TrainStep

#: network: its blocks
BLOCKS = {
    "mobilenetv2_050": 17,
    "mobilenetv3_small_050": 12,
    "test_efficientnet": 5,
    "resnet10t": 4,
    "regnety_002": 13,
    "convnext_atto": 15,
    "test_vit": 6,
}


def networks(arch: str) -> tuple[nn.Module, nn.Module, DropTable | None, Tensor]:
    """One network twice, the second with blocks that are computed again; their drop path, and photos for it."""
    torch.manual_seed(0)
    plain = create_backbone(arch, drop_path=0.3, say=lambda text: None).train()
    keep_less(plain)
    size = plain.pretrained_cfg["input_size"][-1] if "vit" in arch else 64
    if table := DropTable.install(plain):
        table.uniforms = torch.rand(table.layers, 8)
    again = copy.deepcopy(plain)
    assert recompute_blocks(again) == ""
    return plain, again, table, torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last)


def results(network: nn.Module, table: DropTable | None, photos: Tensor, amp: bool = False) -> list[Tensor]:
    """Of a step with two passes, each with its own rows of drop path: features, gradients, statistics."""
    features = []
    for number in range(2):
        if table:
            table.first = 4 * number
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            features.append(network(photos + number).float())
    if table:
        table.first = 2  # of another pass, by now
    sum(one.square().sum() for one in features).backward()
    assert table is None or table.first == 2
    return [*features, *(p.grad for p in network.parameters()), *network.buffers()]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("arch", BLOCKS)
def test_the_same_bits_and_statistics_that_move_once(arch: str, amp: bool) -> None:
    plain, again, table, photos = networks(arch)
    assert len(blocks_of(again)) == BLOCKS[arch] and again.state_dict().keys() == plain.state_dict().keys()
    assert all(map(torch.equal, *(results(one, table, photos, amp) for one in (plain, again))))
    assert torch.equal(plain.eval()(photos), again.eval()(photos))


def test_these_tests_see_a_second_pass_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_second_pass", lambda block: nullcontext())
    plain, again, table, photos = networks("mobilenetv2_050")
    first, second = (results(one, table, photos) for one in (plain, again))
    count = len(list(plain.parameters()))
    assert not all(map(torch.equal, first[2 : 2 + count], second[2 : 2 + count])), "drop path draws other rows"
    assert not all(map(torch.equal, first[2 + count :], second[2 + count :])), "statistics move twice"


@pytest.mark.parametrize("arch", ["mobilenetv2_050", "mobilenetv3_small_050", "test_vit"])
def test_it_keeps_a_fraction(arch: str) -> None:
    plain, again, _, photos = networks(arch)
    whole, less = (kept_bytes(lambda one=one: one(photos), one) for one in (plain, again))
    assert 0 < less < 0.35 * whole
    with torch.no_grad():
        assert kept_bytes(lambda: again(photos), again) == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mobilenetv2_050", "test_vit"])
def test_compiled_it_is_one_graph_and_the_same(arch: str) -> None:
    plain, again, _, photos = networks(arch)
    torch._dynamo.reset()
    found = []
    for network in (Encoder(plain, nn.Identity()), Encoder(again, nn.Identity())):
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
        features = compiled([photos, photos[..., :32, :32]] if arch != "test_vit" else photos)
        features.square().sum().backward()
        found.append([features.detach(), *(p.grad for p in network.parameters()), *network.buffers()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))
    whole, less = (
        kept_bytes(lambda one=one: torch.compile(one, backend="aot_eager")(photos), one) for one in (plain, again)
    )
    assert 0 < less < 0.35 * whole


def test_where_it_cannot_be_the_reason_is_said() -> None:
    assert recompute_blocks(TinyBackbone()) == "timm names no blocks of this network"
    network = timm.create_model("test_vit", num_classes=0, proj_drop_rate=0.1)
    assert recompute_blocks(network) == "its dropout would draw other numbers the second time"
    assert type(network.blocks[0]).__name__ == "Block"


# ---------------------------------------------------------------------- the switch


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("case", ["dino", *(pytest.param(each, marks=pytest.mark.slow) for each in METHODS)])
def test_a_step_is_the_same_with_and_without(case: str, amp: bool) -> None:
    changes = {"drop_path": 0.3, "views.global_size": 64, "views.local_size": 32}
    changes |= {} if "ViT" in case else {"arch": "mobilenetv2_035"}
    chosen = [multicrop(case, **changes, train__checkpoint=switch) for switch in ("false", "true")]
    steps = [TrainStep(one, CPU, amp=amp, seed=0) for one in chosen]
    assert run_phases(steps[0], 3) == run_phases(steps[1], 3) and not steps[1].fallbacks
    assert all(map(torch.equal, *(step.method.state_dict().values() for step in steps)))


@pytest.mark.parametrize(
    "switch", ["train__graph", "train__accumulate", pytest.param("train__compile", marks=pytest.mark.slow)]
)
def test_it_goes_with_the_other_switches(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, options, **how: compile(network, backend="aot_eager", **how))
    other = {switch: 2 if switch == "train__accumulate" else "true"}
    torch._dynamo.reset()
    plain, again = (
        TrainStep(recipe(**other, train__checkpoint=which), CPU, amp=False, seed=0, record=replayed)
        for which in ("false", "true")
    )
    np.testing.assert_allclose(train(again), train(plain), rtol=1e-4, atol=1e-5)
    assert not plain.fallbacks and not again.fallbacks


def test_batchnorm_groups_of_the_queries_are_the_same_in_the_second_pass() -> None:
    groups = {"moco__bn_by_view": "true", "moco__split_bn_queries": 2, "moco__split_bn": 2}
    steps = [
        TrainStep(recipe(**groups, train__checkpoint=which), CPU, amp=False, seed=0) for which in ("false", "true")
    ]
    assert train(steps[0]) == train(steps[1]) and not steps[1].fallbacks
    assert all(map(torch.equal, *(step.method.state_dict().values() for step in steps)))


def test_a_network_without_blocks_trains_without_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "blocks_of", lambda backbone: [])
    step = TrainStep(recipe(train__checkpoint="true"), CPU, amp=False, seed=0)
    train(step, 1)
    assert step.fallbacks == {"checkpoint": "timm names no blocks of this network"}
