"""Activations that keep less: the same bits as torch's, no copies, fewer maps kept, and nothing of it in what others
see.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
from kept import kept_bytes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.methods import base
from fastssl.methods.base import Encoder
from fastssl.models.activations import LeanReLU6, keep_less

ARCHS = ["mobilenetv2_050", "mobilenetv3_small_050", "lcnet_035", "test_efficientnet", "resnet10t"]


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def network(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(arch, num_classes=0).train().to(memory_format=torch.channels_last)


PHOTOS = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1)).contiguous(
    memory_format=torch.channels_last
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_relu6_that_keeps_its_result_gives_torchs_bits(dtype: torch.dtype) -> None:
    edges = torch.tensor([-math.inf, -1, -0.0, 0, 1e-30, 3, 6 - 1e-6, 6, 6 + 1e-6, math.inf, math.nan])
    maps = torch.cat([edges, 4 * torch.randn(500)]).to(dtype)
    gradient = torch.randn(len(maps)).to(dtype)
    results = []
    for layer in (nn.ReLU6(), LeanReLU6()):
        leaf = maps.clone().requires_grad_()
        (result := layer(leaf)).backward(gradient)
        results.append((result.detach(), leaf.grad))
    for plain, lean in zip(*results):
        assert lean.dtype == dtype and torch.equal(plain.nan_to_num(77), lean.nan_to_num(77))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_networks_give_the_same_bits_and_copy_nothing(arch: str, amp: bool) -> None:
    plain = network(arch)
    lean = copy.deepcopy(plain)
    assert (keep_less(lean) > 0) == (arch != "resnet10t"), "a ReLU keeps its result in any case"
    assert lean.state_dict().keys() == plain.state_dict().keys()
    results, calls = [], []
    for one in (plain, lean):
        with Calls() as seen, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            features = one(PHOTOS)
        calls.append(seen.names)
        features.float().square().sum().backward()
        results.append([features.detach(), *(p.grad for p in one.parameters()), *one.buffers()])
    assert all(map(torch.equal, *results))
    # What in-place activations cost, and that it would be seen here.
    assert calls[1]["clone"] == 0 and (calls[0]["clone"] > 0) == (arch != "resnet10t")
    assert torch.equal(plain.eval()(PHOTOS), lean.eval()(PHOTOS))


def test_a_relu6_network_keeps_two_maps_of_three() -> None:
    plain = network("mobilenetv2_050")
    lean = copy.deepcopy(plain)
    keep_less(lean)
    before, after = (kept_bytes(lambda one=one: one(PHOTOS), one) for one in (plain, lean))
    assert after < 0.72 * before
    keep_less(lean)
    assert kept_bytes(lambda: lean(PHOTOS), lean) == after, "again changes nothing"


@pytest.mark.parametrize("arch", ["mobilenetv2_050", "mobilenetv3_small_050"])
def test_the_student_copies_nothing_and_the_teacher_stays_in_place(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def method() -> base.Method:
        backbone = network(arch)
        return base.Method(Encoder(backbone, nn.Identity()), base.Views(2, base.PairWeights(0, 1.0, 0.0)))

    def calls(lean: base.Method) -> list[Counter[str]]:
        with Calls() as student:
            lean.encode(PHOTOS)
        with Calls() as teacher, torch.no_grad():
            lean.teach(PHOTOS)
        return [student.names, teacher.names]

    in_place = "hardtanh_" if arch == "mobilenetv2_050" else "hardswish_"
    student, teacher = calls(method())
    assert student["clone"] == student[in_place] == 0
    assert teacher["clone"] == 0 and teacher[in_place] > 0
    monkeypatch.setattr(base, "keep_less", lambda network: 0)
    assert calls(method())[0]["clone"] > 0, "this test sees what it looks for"


def test_a_compiler_sees_the_plain_operation() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    layer = nn.Sequential(nn.Conv2d(3, 4, 1), LeanReLU6())
    torch.compile(layer, backend=backend, fullgraph=True)(PHOTOS)
    assert len(graphs) == 1 and "autograd_function" not in graphs[0].code and "hardtanh" in graphs[0].code
