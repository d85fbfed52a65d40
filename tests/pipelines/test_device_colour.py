"""Colour compiled or not: the same pictures, one whole graph without constants, and a reason where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_augment import STRONG, draw, photos
from torch import Tensor, fx

from fastssl.config.recipe import load_recipe, recipe_names
from fastssl.pipelines.ops import augment as augment_module
from fastssl.pipelines.ops.augment import augment
from fastssl.pipelines.ops.device_colour import DeviceColour, device_colour, parameter_table
from fastssl.pipelines.plan.draw import ViewSpec

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPEC = replace(STRONG, size=24)
QUICK = replace(SPEC, jitter=0.0)  # traced in a moment


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


def crops(spec: ViewSpec, count: int = 12) -> tuple[Tensor, np.ndarray, Tensor]:
    plan = draw(spec, count)
    return photos(count, spec.size), plan, torch.from_numpy(parameter_table(plan))


def every_kind() -> dict[ViewSpec, str]:
    """The view groups of all recipes that differ in their colours, at 24 px, with a recipe that has it."""
    cut = {"size": 24, "count": 1, **{name: getattr(ViewSpec(), name) for name in ("area", "ratio", "interpolation")}}
    every = ((name, spec) for name in recipe_names() for spec in load_recipe(name).views)
    return {replace(spec, **cut): name for name, spec in every if spec.jitter}


def grey_levels(one: Tensor, other: Tensor, spec: ViewSpec) -> float:
    """The largest difference, in 0 .. 255."""
    return float(((one - other) * torch.tensor(spec.std).view(3, 1, 1)).abs().max() * 255)


@pytest.mark.parametrize("spec", [*every_kind(), SPEC, replace(SPEC, hue=0.0), replace(SPEC, blur=0.0)])
def test_what_is_compiled_equals_the_host_for_every_recipe(spec: ViewSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contrast's mean is taken another way there: once, in a second pass. No compiler changes anything here."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    views, plan, table = crops(spec, 40)
    colour = DeviceColour(spec, torch.float32)
    result = colour(views, table)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert grey_levels(result, augment(views, plan, spec), spec) < 0.01
    without = plan.copy()
    without["contrast"] = 1.0
    assert grey_levels(colour(views, torch.from_numpy(parameter_table(without))), result, spec) > 1, "no contrast drawn"
    monkeypatch.undo()
    assert grey_levels(result, colour(views, table), spec) < 0.01


@pytest.mark.slow
def test_inductor_makes_the_same_pictures_with_few_kernels() -> None:
    """A compiler for a CPU, for want of a GPU: the same scheduler decides what is fused."""
    from torch._inductor import metrics

    views, plan, table = crops(SPEC, 40)
    metrics.reset()
    colour = DeviceColour(SPEC, torch.float32, "inductor")
    result = colour(views, table)
    assert not colour.fallback and 0 < metrics.generated_kernel_count <= 16
    assert grey_levels(result, augment(views, plan, SPEC), SPEC) < 0.01


def only_from_inputs(graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
    """A backend that refuses constants: what a graph makes from nothing or moves is made and moved at every call, on a
    GPU as a copy from the host, which cannot be captured.
    """
    for node in graph.graph.nodes:
        made = node.op in ("call_function", "call_method") and not node.all_input_nodes
        moved = any(isinstance(value, torch.device) for value in (*node.args, *node.kwargs.values()))
        if made or moved or node.op == "get_attr":
            raise RuntimeError(f"constant: {node.format_node()}")
    return graph.forward


def test_nothing_is_made_or_moved_inside() -> None:
    views, _, table = crops(SPEC)
    colour = DeviceColour(SPEC, torch.float32, only_from_inputs)
    assert torch.equal(colour(views, table), DeviceColour(SPEC, torch.float32, "eager")(views, table))
    assert not colour.fallback
    for fault in (lambda x: x + torch.arange(3), lambda x: x.to(CPU) + 1, lambda x: x * torch.tensor(2.0)):
        with pytest.raises(Exception, match="constant: "):
            torch.compile(fault, backend=only_from_inputs)(torch.ones(3))


def test_many_groups_and_batch_sizes_stay_compiled() -> None:
    """torch gives a piece of code up after eight compilations (here two), and bench goes through all recipes."""
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    views, _, table = crops(QUICK)
    with torch._dynamo.config.patch(cache_size_limit=2):
        for number in (1, 2, 3):
            colour = DeviceColour(replace(QUICK, grey=number / 10), torch.float32, backend)
            colour(views, table)
            assert not colour.fallback and len(graphs) == 2 * number
        for count in (7, 5, 4):
            colour(views[:count], table[:count])
    assert not colour.fallback and len(graphs) == 8, "from its second size on any number of views is one graph"


def test_what_cannot_be_compiled_runs_without_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        tried.append(graph)
        raise RuntimeError("no compiler\nfound: g++ /tmp/of_somebody/a.cpp")

    views, plan, table = crops(QUICK)
    colour, expected = DeviceColour(QUICK, torch.float32, broken), DeviceColour(QUICK, torch.float32)(views, table)
    assert torch.equal(colour(views, table), expected) and torch.equal(colour(views, table), expected)
    assert len(tried) == 2 and "no compiler found: g++ a.cpp" in colour.fallback

    monkeypatch.setattr(augment_module, "device_colour", lambda *_: colour)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.warns(UserWarning, match=r"^colour operations are not compiled: .*no compiler found"):
        augment(views, plan, QUICK)
    monkeypatch.setattr(augment_module, "device_colour", lambda *_: DeviceColour(QUICK, torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augment(views, plan, QUICK)


def test_memory_that_runs_out_is_no_fallback() -> None:
    def hungry(graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        def run(*inputs: Tensor) -> object:
            raise torch.OutOfMemoryError("out of memory")

        return run

    views, _, table = crops(QUICK)
    colour = DeviceColour(QUICK, torch.float32, hungry)
    with pytest.raises(torch.OutOfMemoryError):
        colour(views, table)
    assert not colour.fallback


def test_compiled_is_what_a_gpu_has_something_to_fuse_for() -> None:
    def is_compiled(colour: DeviceColour) -> bool:
        return colour.backend is not None

    wanted = device_colour(SPEC, torch.float32, CUDA)
    assert is_compiled(wanted) and device_colour(replace(SPEC), torch.float32, CUDA) is wanted
    assert not is_compiled(device_colour(SPEC, torch.float32, CPU))
    assert not is_compiled(device_colour(ViewSpec.evaluation(24), torch.float32, CUDA))
    torch.use_deterministic_algorithms(True)
    try:
        assert not is_compiled(device_colour(SPEC, torch.float32, CUDA))
    finally:
        torch.use_deterministic_algorithms(False)
    with torch._dynamo.config.patch(disable=True):
        off = DeviceColour(SPEC, torch.float32, "inductor")
    assert "TORCH_COMPILE_DISABLE" in off.fallback
