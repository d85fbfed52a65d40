"""The step and its switches: whatever way it runs, it is the same step."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from teachers import teacher_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.config.recipe import Recipe, load_recipe
from fastssl.errors import FastSSLError
from fastssl.models.backbones import SHORT_NAMES, create_backbone
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.ops.device_colour import DeviceColour
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.training import cuda_graph as graph_module
from fastssl.training import step as step_module
from fastssl.training.cuda_graph import RecordedStep, StepInputs
from fastssl.training.networks import Bf16Weights, channels_last_breaks, picture_sizes
from fastssl.training.step import TrainStep

CPU, BATCH, SIZE = torch.device("cpu"), 8, 32


def recipe(arch: str = "mobilenetv3_small_050", **changes: object) -> Recipe:
    small = {
        "arch": arch,
        "views.0.size": SIZE,
        "train.batch_size": BATCH,
        "moco.queue": 32,
        "moco.projector.hidden": 16,
        "moco.split_bn": 2,
        "train.compile": "false",
        "train.graph": "false",
    }
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return load_recipe(
        "few-photos-moco", {name: str(value) for name, value in {**small, "moco.weighting": "nearest", **given}.items()}
    )


def views(seed: int, size: int = SIZE) -> Tensor:
    images = torch.randn(2 * BATCH, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return images.contiguous(memory_format=torch.channels_last)


def train(step: TrainStep, steps: int = 4, **inputs: object) -> list[list[float]]:
    """The metrics of some steps whose rates change from step to step, as a schedule's do."""
    found = []
    for number in range(steps):
        batch = inputs.get("batch", lambda number: {"views": [views(number)]})(number)
        found.append(step(**batch, noise=step.noise(0, number), rates=rates(step, number)).tolist())
    return found


def rates(step: TrainStep, number: int = 0, **given: float) -> dict[str, float]:
    """Values for every rate that the step takes, others for each number."""
    values = {
        "lr": 0.05 * (number + 1),
        "momentum": 0.5 + 0.1 * number,
        "smoothing": 0.05 * number,
        "teacher_temperature": 0.04 + 0.01 * number,
        "weight_decay": 0.01 * (number + 1),
    }
    return {name: given.get(name, values.get(name, False)) for name in step.rates(0, RunLength(10, 5))}


def switches(step: TrainStep, number: int, run: RunLength) -> dict[str, bool]:
    """Those of step ``number`` of a run."""
    return {name: value for name, value in step.rates(number, run).items() if isinstance(value, bool)}


def replayed(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What a CUDA graph does, on the CPU: every replay runs the call again and fills the same result."""
    result = torch.empty(0)

    def replay() -> None:
        values = call()
        result.resize_(values.shape).copy_(values)

    return replay, result


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("amp", [False, True])
def test_a_recorded_step_makes_the_same_steps(optimizer: str, amp: bool) -> None:
    eager = TrainStep(recipe(optim__name=optimizer), CPU, amp=amp, seed=0)
    graphed = TrainStep(recipe(optim__name=optimizer, train__graph="true"), CPU, amp=amp, seed=0, record=replayed)
    assert graphed.takes_crops and not eager.takes_crops
    expected, found = train(eager), train(graphed)
    assert not graphed.fallbacks
    # A schedule's value reaches the recorded step in float32, where the eager one has it in float64; bfloat16 makes
    # more of that. Adam makes a whole step of a gradient that is rounding noise.
    np.testing.assert_allclose(found, expected, rtol=2e-2 if amp else 5e-3 if optimizer == "adamw" else 1e-3, atol=1e-3)
    assert len({tuple(row) for row in found}) == len(found)
    if not amp and optimizer != "adamw":  # Adam makes a whole step of a gradient that is rounding noise
        for name, value in eager.method.state_dict().items():
            torch.testing.assert_close(graphed.method.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_recording_takes_what_changes_from_its_inputs() -> None:
    """Rates that were baked in would give the first step again and again."""
    graphed = TrainStep(recipe(train__graph="true"), CPU, amp=False, seed=0, record=replayed)
    batch, noise = [views(0)], graphed.noise(0, 0)
    graphed(batch, noise, rates(graphed, lr=0.0, momentum=1.0, smoothing=0.2))
    before = {name: value.clone() for name, value in graphed.method.state_dict().items() if name.endswith("weight")}
    graphed(batch, noise, rates(graphed, lr=0.0, momentum=1.0, smoothing=0.2))
    assert all(torch.equal(graphed.method.state_dict()[name], value) for name, value in before.items())
    graphed(batch, noise, rates(graphed, lr=0.1, momentum=0.5, smoothing=0.2))
    for network in ("student", "teacher"):
        assert not torch.equal(
            graphed.method.state_dict()[f"{network}.backbone.conv_stem.weight"],
            before[f"{network}.backbone.conv_stem.weight"],
        )


def test_a_step_that_cannot_be_recorded_runs_without_and_says_why() -> None:
    def refuse(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        call()
        raise RuntimeError("operation not permitted when stream is capturing")

    plain = TrainStep(recipe(), CPU, amp=False, seed=0)
    refused = TrainStep(recipe(train__graph="true"), CPU, amp=False, seed=0, record=refuse)
    assert train(refused) == train(plain)
    assert "stream is capturing" in refused.fallbacks["graph"]
    here = TrainStep(recipe(train__graph="true"), CPU, amp=False, seed=0)
    assert "needs an NVIDIA GPU" in here.fallbacks["graph"] and not here.takes_crops


def test_a_network_that_cannot_be_compiled_runs_without_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def forward(self, images: Tensor, first: int = 0, **groups: int) -> Tensor:
            self.network(images, first, **groups)  # moves the BatchNorms' statistics, which must not stay moved
            raise RuntimeError("no compiler\nfound: g++ /tmp/of_somebody/a.cpp")

    plain = TrainStep(recipe(), CPU, amp=False, seed=0)
    monkeypatch.setattr(torch, "compile", lambda network, **options: Broken(network))
    broken = TrainStep(recipe(train__compile="true"), CPU, amp=False, seed=0)
    with torch._dynamo.config.patch(disable=False):
        assert train(broken) == train(plain)
    assert broken.fallbacks == {"compile": "RuntimeError: no compiler found: g++ a.cpp"}, "a report names no folders"


def test_compiled_networks_are_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: compiled.append(network) or network)
    plain, step = (
        TrainStep(recipe(), CPU, amp=False, seed=0),
        TrainStep(recipe(train__compile="true"), CPU, amp=False, seed=0),
    )
    # The trial of the compiled form leaves no trace: the same steps follow.
    with torch._dynamo.config.patch(disable=False):
        assert train(step) == train(plain)
    assert compiled == [step.method.student, step.method.teacher] and not step.fallbacks
    off = TrainStep(recipe(train__compile="true"), CPU, amp=False, seed=0)
    with torch._dynamo.config.patch(disable=True):
        train(off, 1)
    assert "TORCH_COMPILE_DISABLE" in off.fallbacks["compile"]


GROUPS = {"moco__split_bn_queries": 2, "moco__bn_by_view": "true"}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("groups", [{}, GROUPS], ids=["", "groups"])
@pytest.mark.parametrize("switch", [None, "graph", "compile"])
def test_a_dropped_step_is_freed_without_the_collector(
    amp: bool, groups: dict, switch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it would keep its graph's memory, up to all of it, from the next one."""
    real = torch.compile  # below Inductor; the "eager" backend keeps what an autograd.Function saved in every pass
    monkeypatch.setattr(torch, "compile", lambda one, options, **how: real(one, backend="aot_eager", **how))

    def record(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """As CUDA, which keeps nothing of the call."""
        result = call()
        return lambda: None, result

    changes = {f"train__{switch}": "true"} if switch else {}
    gc.collect()
    gc.disable()
    try:
        with torch._dynamo.config.patch(disable=False):
            step = TrainStep(recipe("test_resnet", **changes, **groups), CPU, amp=amp, seed=0, record=record)
            step.check = True
            train(step, 2)
        assert not step.fallbacks or switch == "graph"  # a replay that does nothing is not the eager step
        kept = [weakref.ref(it) for it in (step, step.method, step.optimizer, next(step.method.parameters()))]
        del step
        assert [reference() for reference in kept] == [None] * 4
    finally:
        gc.enable()


# ---------------------------------------------------------------------- precision


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mobilenetv3_small_050", "resnet10t", "vit_tiny_patch16_224"])
def test_weights_cast_once_a_step_give_what_autocast_gives(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = TrainStep(recipe(arch), CPU, amp=True, seed=0)
    autocast = TrainStep(recipe(arch), CPU, amp=True, seed=0)
    autocast.bf16_weights = []
    autocast.method.set_forward_modules(*autocast.method.networks)
    assert train(ours, 3) == train(autocast, 3)
    for name, value in autocast.method.state_dict().items():
        assert torch.equal(ours.method.state_dict()[name], value), name
    assert all(p.dtype == torch.float32 for p in ours.method.parameters())


def test_no_weight_is_cast_inside_the_passes() -> None:
    """Counted: autocast casts each weight in every pass of the teacher, the copies hold theirs ready."""

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") in (
                torch.bfloat16,
                torch.float32,
            ):
                self.count += 1
            return function(*args, **(kwargs or {}))

    def casts(half: bool) -> int:
        step = TrainStep(recipe(moco__split_bn=4), CPU, amp=True, seed=0)
        if not half:
            step.bf16_weights = []
            step.method.set_forward_modules(*step.method.networks)
        images = views(0).to(torch.bfloat16)
        step([images], step.noise(0, 0), rates(step))
        with Casts() as counter:
            step([images], step.noise(0, 1), rates(step))
        return counter.count

    layers = sum(
        isinstance(m, (nn.Conv2d, nn.Linear))
        for m in TrainStep(recipe(), CPU, amp=False, seed=0).method.student.modules()
    )
    assert casts(False) - casts(True) >= 3 * layers  # the student's, there and back, and the teacher's


def test_a_restored_checkpoint_reaches_the_bfloat16_weights() -> None:
    trained, fresh = TrainStep(recipe(), CPU, amp=True, seed=0), TrainStep(recipe(), CPU, amp=True, seed=1)
    train(trained, 2)
    fresh.method.load_state_dict(trained.method.state_dict())
    fresh.optimizer.load_state_dict(trained.optimizer.state_dict())
    # The order of the keys comes from the seed: the same one for both.
    given = {"permutation": torch.arange(2 * BATCH)}, rates(fresh)
    assert torch.equal(trained([views(7)], *given), fresh([views(7)], *given))


def test_a_half_copy_shares_all_but_the_cast_weights() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    half = Bf16Weights(network)
    assert half.network[1].weight is network[1].weight and half.network[1].running_mean is network[1].running_mean
    assert half.network[0].weight.dtype == half.network[3].bias.dtype == torch.bfloat16
    assert network[0].weight.dtype == torch.float32
    half.network[0].weight.grad = torch.ones_like(half.network[0].weight)
    half.collect_gradients()
    half.network[0].weight.grad = torch.ones_like(half.network[0].weight)
    half.collect_gradients()
    assert (
        torch.equal(network[0].weight.grad, torch.full_like(network[0].weight, 2.0))
        and half.network[0].weight.grad is None
    )
    assert network[3].weight.grad is None


def test_layers_that_work_on_their_weights_are_left_to_autocast() -> None:
    class StandardisedConv(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std(
                (1, 2, 3), keepdim=True
            )
            return self._conv_forward(images, weight, self.bias)

    network = nn.Sequential(StandardisedConv(3, 4, 3), nn.Conv2d(4, 4, 3))
    half = Bf16Weights(network)
    assert half.network[0].weight is network[0].weight and half.network[1].weight.dtype == torch.bfloat16
    images = torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half.network(images), network(images))


# ---------------------------------------------------------------------- accumulation


def test_accumulation_keeps_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without BatchNorm in the query network, any number of parts makes the very same step."""

    class Backbone(nn.Sequential):
        num_features = 8

        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setattr("fastssl.training.networks.create_backbone", lambda name, **options: Backbone())
    plain = {"moco__projector__norm": "false", "moco__projector__norm_out": "false"}
    whole, parts = (TrainStep(recipe(train__accumulate=n, **plain), CPU, amp=False, seed=0) for n in (1, 4))
    expected, found = np.array(train(whole)), np.array(train(parts))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for name, value in whole.method.state_dict().items():
        torch.testing.assert_close(parts.method.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_parts_hold_whole_groups_of_queries_and_change_nothing() -> None:
    """With BatchNorm by view and group a batch cut into parts is the batch: no group is cut."""
    groups = {"moco__bn_by_view": "true", "moco__split_bn_queries": 4}
    torch.set_default_dtype(torch.float64)  # groups of two photos let rounding grow
    try:
        whole, cut = (TrainStep(recipe(**groups, train__accumulate=parts), CPU, amp=False, seed=0) for parts in (1, 2))
        found, expected = (np.array(train(step, 1)) for step in (cut, whole))
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name, value in cut.method.state_dict().items():
        torch.testing.assert_close(value, whole.method.state_dict()[name], rtol=1e-6, atol=1e-6, msg=name)
    with pytest.raises(FastSSLError, match=r"train\.accumulate=4 must divide the 2 BatchNorm groups"):
        TrainStep(recipe(**{**groups, "moco__split_bn_queries": 2}, train__accumulate=4), CPU, amp=False, seed=0)


def test_accumulation_bounds_the_pass_with_gradient() -> None:
    step, seen = TrainStep(recipe(train__accumulate=4), CPU, amp=False, seed=0), []
    step.method.student.register_forward_pre_hook(lambda module, inputs: seen.append(sum(map(len, inputs[0]))))
    train(step, 1)
    assert seen == [2 * BATCH // 4] * 4
    assert int(step.method.queue_pointer) == 2 * BATCH  # all keys of the batch, once


@pytest.mark.parametrize("parts", [3, 8, 0])
def test_parts_that_do_not_divide_the_batch_are_refused(parts: int) -> None:
    with pytest.raises(Exception, match=r"train\.accumulate"):
        recipe(train__accumulate=parts)


# ---------------------------------------------------------------------- layout, host


@pytest.mark.parametrize("arch", [name for name in SHORT_NAMES if name != "efficientnet_b1"])
def test_networks_keep_channels_last_to_the_end(arch: str) -> None:
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert channels_last_breaks(create_backbone(arch), images) == []


def test_a_break_in_the_layout_is_found_by_name() -> None:
    class Contiguous(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.contiguous()

    network = (
        nn.Sequential(nn.Conv2d(3, 8, 3), Contiguous(), nn.Conv2d(8, 8, 3))
        .to(memory_format=torch.channels_last)
        .train()
    )
    assert channels_last_breaks(network, torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)) == ["1"]
    assert network.training and network[0].training


def test_views_in_another_layout_or_number_are_refused() -> None:
    step = TrainStep(recipe(), CPU, amp=False, seed=0)
    given = step.noise(0, 0), rates(step)
    with pytest.raises(ValueError, match="channels-last"):
        step([views(0).contiguous()], *given)
    with pytest.raises(ValueError, match="a batch of 8 has 16"):
        step([views(0)[:6]], *given)


class NoReading(TorchDispatchMode):
    """What would make the host wait for a GPU, and break a capture: any tensor turned into a number."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read back"
        assert function is not torch.ops.aten.nonzero.default, "a shape depends on a value"
        return function(*args, **(kwargs or {}))


def watched(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """As ``replayed``, and no replay may read a value back."""

    def strict() -> Tensor:
        with NoReading():
            return call()

    return replayed(strict)


def test_no_value_is_read_back_in_a_recorded_step() -> None:
    # SGD's fused kernel reads the rate on a CPU alone; LARS is ours throughout.
    step = TrainStep(
        recipe(train__graph="true", optim__name="lars", moco__weighting="stepped", moco__queue=64),
        CPU,
        amp=True,
        seed=0,
        record=watched,
    )
    train(step, 2)
    assert not step.fallbacks


@pytest.mark.parametrize("crops_on", ["host", "device"])
def test_crops_with_their_tables_are_the_coloured_views(beton, crops_on: str) -> None:
    (spec,) = recipe().views
    with (
        ViewLoader(beton, [spec], BATCH, seed=3, crops=crops_on) as coloured,
        ViewLoader(beton, [spec], BATCH, seed=3, colour=False, crops=crops_on) as crops,
    ):
        expected, raw = next(iter(coloured.epoch(0))), next(iter(crops.epoch(0)))
    assert raw.views[0].dtype == torch.uint8 and raw.tables[0].shape == (2 * BATCH, 23) and not expected.tables
    steps = [
        TrainStep(recipe(**change), CPU, amp=False, seed=0, record=replayed)
        for change in ({}, {"train__graph": "true"})
    ]
    given = {"permutation": torch.arange(2 * BATCH)}, rates(steps[0], 1)
    first = steps[0](expected.views, *given)
    second = steps[1](raw.views, *given, tables=raw.tables)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_colour_that_cannot_be_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    step = TrainStep(recipe(), CPU, amp=False, seed=0)
    crops = torch.zeros(2 * BATCH, 3, SIZE, SIZE, dtype=torch.uint8)
    assert len(step.coloured([crops], [torch.zeros(2 * BATCH, 23)])) == 1 and not step.fallbacks

    def without_compiler(spec: ViewSpec, dtype: torch.dtype, device: torch.device) -> DeviceColour:
        colour = DeviceColour(spec, dtype)
        colour._stages[1].reason = "TritonMissing: no Triton"
        return colour

    monkeypatch.setattr(step_module, "device_colour", without_compiler)
    step.coloured([crops], [torch.zeros(2 * BATCH, 23)])
    assert step.fallbacks == {"compiled colour": "TritonMissing: no Triton"}


def inputs(*views: Tensor) -> StepInputs:
    return StepInputs(views, {}, {}, [])


def test_a_recorded_step_takes_one_shape() -> None:
    step = RecordedStep(lambda given: given.views[0] * 2, inputs(torch.ones(4)), undo=lambda: None, record=replayed)
    assert step(inputs(torch.full((4,), 3.0))).tolist() == [6.0] * 4
    with pytest.raises(ValueError, match="one shape"):
        step(inputs(torch.ones(5)))
    with pytest.raises(ValueError, match="longer"):
        step(inputs(torch.ones(4), torch.ones(4)))


@pytest.mark.parametrize("waits", [False, True])
def test_the_last_run_before_a_recording_may_not_wait_for_the_device(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording that fails at it leaves torch's allocator in the midst of a capture, in which it frees little."""
    modes, calls = [0], []

    def call(given: StepInputs) -> Tensor:
        calls.append(modes[-1])
        if waits and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return given.views[0] * 2

    def set_mode(mode: object) -> None:
        if len(modes) == 1:
            warnings.warn("a prototype feature", stacklevel=1)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(graph_module, "_side_stream", lambda tensors: nullcontext())
    monkeypatch.setattr(graph_module, "_on_gpu", lambda tensors: True)
    undone: list[bool] = []
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="synchronizing") if waits else nullcontext():
        warnings.simplefilter("error")
        RecordedStep(call, inputs(torch.ones(4)), undo=lambda: undone.append(True), record=replayed)
    assert calls == [0, 0, "error"] and modes == [0, "error", 0] and undone == [True]


# ---------------------------------------------------------------------- on a GPU

CUDA = torch.device("cuda")


@pytest.mark.gpu
def test_a_call_that_waits_for_the_gpu_is_found_before_it_is_recorded() -> None:
    def record(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise AssertionError("recorded")

    with pytest.raises(RuntimeError, match="synchronizing"):
        RecordedStep(
            lambda given: given.views[0] * given.views[0].sum().item(),
            inputs(torch.ones(4, device=CUDA)),
            undo=lambda: None,
            record=record,
        )
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_on_the_gpu(value: float) -> None:
    step = TrainStep(recipe(optim__name="adamw"), CUDA, amp=True, seed=0)
    train_on_gpu(step, 1)
    assert step.is_finite()
    state, moments = step.method.state_dict(), next(iter(step.optimizer.state.values()))
    for tensor in (state["queue"], state["student.backbone.conv_stem.weight"], moments["exp_avg"]):
        undo = step.snapshot()
        tensor[(-1,) * tensor.dim()] = value
        assert not step.is_finite()
        undo()
        assert step.is_finite()


def train_on_gpu(step: TrainStep, steps: int = 6) -> list[list[float]]:
    return train(step, steps, batch=lambda number: {"views": [views(number).to(CUDA)]})


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("amp", [False, True])
def test_a_cuda_graph_makes_the_same_steps(optimizer: str, amp: bool) -> None:
    eager = TrainStep(recipe(optim__name=optimizer), CUDA, amp=amp, seed=0)
    graphed = TrainStep(recipe(optim__name=optimizer, train__graph="true"), CUDA, amp=amp, seed=0)
    expected, found = train_on_gpu(eager), train_on_gpu(graphed)
    assert graphed.fallbacks == {}
    np.testing.assert_allclose(found, expected, rtol=3e-2 if amp else 5e-3, atol=5e-3)


@pytest.mark.gpu
def test_compiled_and_recorded_makes_the_same_steps() -> None:
    eager = TrainStep(recipe(), CUDA, amp=True, seed=0)
    both = TrainStep(recipe(train__compile="true", train__graph="true"), CUDA, amp=True, seed=0)
    expected, found = train_on_gpu(eager), train_on_gpu(both)
    assert both.fallbacks == {}
    np.testing.assert_allclose(found, expected, rtol=5e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_recorded_step_colours_the_crops_it_is_given(beton) -> None:
    step = TrainStep(recipe(train__graph="true"), CUDA, amp=True, seed=0)
    spec = step.recipe.views
    with ViewLoader(beton, spec, BATCH, device="cuda", seed=3, dtype=torch.bfloat16) as coloured:
        expected = TrainStep(recipe(), CUDA, amp=True, seed=0)
        first = [train(expected, 1, batch=lambda n, one=one: {"views": one.views}) for one in coloured.epoch(0)]
    with ViewLoader(beton, spec, BATCH, device="cuda", seed=3, colour=False) as crops:
        second = [
            train(step, 1, batch=lambda n, one=one: {"views": one.views, "tables": one.tables})
            for one in crops.epoch(0)
        ]
    assert step.fallbacks == {}
    np.testing.assert_allclose(second, first, rtol=5e-2, atol=1e-2)


# ---------------------------------------------------------------------- every method

METHODS = {
    "moco, one-sided": ("moco-mobilenetv2-sslight", {"moco.queue": 32, "moco.projector.hidden": 16}),
    "dino": ("dino-mobilenetv2-sslight", {"dino.out": 32, "dino.projector.hidden": 16, "dino.projector.out": 16}),
    "dino, sinkhorn": (
        "dino-mobilenetv2-sslight",
        {"dino.out": 32, "dino.projector.hidden": 16, "dino.projector.out": 16, "dino.centering": "sinkhorn"},
    ),
    "dino, koleo": (
        "dino-mobilenetv2-sslight",
        {"dino.out": 32, "dino.projector.hidden": 16, "dino.projector.out": 16, "dino.koleo": 0.1},
    ),
    "dino, ViT": (
        "dino-vit_tiny-sslight",
        {
            "arch": "vit_tiny_patch16_224",
            "dino.out": 32,
            "dino.projector.hidden": 16,
            "dino.projector.out": 16,
            "optim.lr": 0.001,
        },
    ),
    "swav": (
        "swav-mobilenetv2-sslight",
        {
            "swav.prototypes": 16,
            "swav.queue": 16,
            "swav.queue_epoch": 0,
            "swav.projector.hidden": 16,
            "swav.projector.out": 16,
        },
    ),
    "simclr, local views": (
        "simclr-mobilenetv3",
        {"views.preset": "sslight-cnn", "simclr.neighbors": 5, "simclr.projector.hidden": 16},
    ),
    "resa, local views": (
        "resa-mobilenetv3",
        {"views.preset": "sslight-cnn", "resa.projector.hidden": 16, "resa.projector.out": 16},
    ),
    "empssl, local views": (
        "empssl-resnet18",
        {
            "empssl.projector.hidden": 16,
            "empssl.projector.out": 16,
            "empssl.similarity": 2.0,
            "optim.trust_clip": "false",
        },
    ),
    "distill, local views": (
        "distill-mobilenetv3",
        {
            "views.preset": "sslight-cnn",
            "distill.teacher": teacher_file(),
            "distill.teacher_size": 48,
            "distill.queue": 32,
            "distill.head.hidden": 16,
            "distill.standardise": "true",
        },
    ),
}


def multicrop(case: str, **changes: object) -> Recipe:
    name, own = METHODS[case]
    small = {
        "arch": "resnet10t",
        **own,
        "views.global_size": SIZE,
        "views.local_size": 16,
        "views.local_count": 2,
        "train.batch_size": BATCH,
        "train.compile": "false",
        "train.graph": "false",
    }
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe(name, {key: str(value) for key, value in {**small, **given}.items()})


def all_views(recipe: Recipe, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(spec.count * BATCH, 3, spec.size, spec.size) for spec in recipe.views]
    images = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return {"views": [view.contiguous(memory_format=torch.channels_last) for view in images]}


def run_phases(step: TrainStep, steps: int = 6) -> list[list[float]]:
    """Steps through all phases of the method: an epoch of two steps, the first of them frozen."""
    run, found = RunLength(20, 2), []
    batch = all_views(step.recipe)
    for number in range(steps):
        given = {**rates(step, number, lr=0.02), **switches(step, number, run)}
        found.append(step(**batch, noise=step.noise(number // 2, number % 2), rates=given).tolist())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS)
def test_a_recorded_step_of_any_method_is_recorded_again_for_each_phase(case: str) -> None:
    eager = TrainStep(multicrop(case), CPU, amp=False, seed=0)
    graphed = TrainStep(multicrop(case, train__graph="true"), CPU, amp=False, seed=0, record=replayed)
    expected, found = run_phases(eager), run_phases(graphed)
    assert graphed.recorded and not graphed.fallbacks
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS)
def test_no_method_reads_a_value_back(case: str) -> None:
    # torch's fused kernels read the rate on a CPU alone; LARS is ours throughout.
    step = TrainStep(multicrop(case, train__graph="true", optim__name="lars"), CPU, amp=True, seed=0, record=watched)
    run_phases(step)
    assert step.recorded and not step.fallbacks


@pytest.mark.parametrize("case", METHODS)
def test_bfloat16_changes_the_loss_by_little(case: str) -> None:
    """Everything behind the networks is float32; what is left is the networks' own rounding."""
    exact, half = (TrainStep(multicrop(case), CPU, amp=amp, seed=0) for amp in (False, True))
    losses = [
        step(**all_views(step.recipe, step.view_dtype), noise=step.noise(0, 0), rates=rates(step, 1)).tolist()[0]
        for step in (exact, half)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert all(p.dtype == torch.float32 for p in half.method.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("case", ["dino", "swav"])
def test_a_frozen_layer_stands_still_and_then_moves(case: str, optimizer: str) -> None:
    step, run = TrainStep(multicrop(case, optim__name=optimizer), CPU, amp=False, seed=0), RunLength(20, 1)
    head = step.method.student.projector
    (frozen, *_) = (head.last if case == "dino" else head.prototypes).parameters()
    before = frozen.detach().clone()
    for number in range(2):
        given = {**rates(step, 0, lr=1.0), **switches(step, number, run)}
        step(**all_views(step.recipe), noise=step.noise(0, number), rates=given)
        assert given["frozen"] == (number == 0)
        assert torch.allclose(frozen, before, atol=1e-6) == (number == 0)


def test_drop_path_is_of_the_student_alone_and_follows_the_samples() -> None:
    step = TrainStep(multicrop("dino, ViT", drop_path=0.5), CPU, amp=False, seed=0)
    assert step.noise(0, 0)["drop_path"].shape == (22, 4 * BATCH)
    assert step.method.teacher.drop is None and not any(
        "PlannedDropPath" in type(m).__name__ for m in step.method.teacher.modules()
    )
    batch = all_views(step.recipe)
    with torch.no_grad():
        embeddings = []
        for epoch in (0, 0, 1):
            step.method.student.drop.uniforms = step.noise(epoch, 0)["drop_path"]
            embeddings.append(step.method.encode(step.method.images(batch["views"])))
    assert torch.equal(embeddings[0], embeddings[1]) and not torch.allclose(embeddings[0], embeddings[2], atol=1e-3)


@pytest.mark.parametrize("name", ["dino", "moco, one-sided", "moco, symmetric"])
def test_parts_toss_the_coins_of_their_own_samples(name: str) -> None:
    """A ViT has no BatchNorm: with drop path, too, four parts make the step of the whole."""
    vit = {"arch": "vit_tiny_patch16_224", "drop_path": 0.5, "optim.name": "sgd"}
    if name == "dino":
        changes = {**vit, "dino.projector.norm": "false"}
        recipes = [multicrop("dino", **changes, **{"train.accumulate": parts}) for parts in (1, 4)]
    else:
        symmetric = {"moco.symmetric": name.endswith("symmetric"), "moco.queue": 32}
        recipes = [multicrop("moco, one-sided", **vit, **symmetric, **{"train.accumulate": parts}) for parts in (1, 4)]
    losses = []
    for chosen in recipes:
        step = TrainStep(chosen, CPU, amp=False, seed=0)
        losses.append(
            [
                step(**all_views(chosen), noise=step.noise(0, n), rates=rates(step, n, lr=0.05)).tolist()[0]
                for n in range(3)
            ]
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("amp", [False, True])
def test_a_cuda_graph_of_any_method_makes_the_same_steps(case: str, amp: bool) -> None:
    def on_gpu(step: TrainStep) -> list[list[float]]:
        run, batch = RunLength(20, 2), {"views": [view.to(CUDA) for view in all_views(step.recipe)["views"]]}
        return [
            step(
                **batch,
                noise=step.noise(n // 2, n % 2),
                rates={**rates(step, n, lr=0.02), **switches(step, n, run)},
            ).tolist()
            for n in range(6)
        ]

    eager = TrainStep(multicrop(case), CUDA, amp=amp, seed=0)
    graphed = TrainStep(multicrop(case, train__graph="true"), CUDA, amp=amp, seed=0)
    expected, found = on_gpu(eager), on_gpu(graphed)
    assert graphed.recorded and graphed.fallbacks == {}
    np.testing.assert_allclose(found, expected, rtol=5e-2 if amp else 1e-2, atol=1e-2)


def test_local_views_that_are_not_made_are_no_size_that_the_network_sees() -> None:
    name, sizes = "dino-mobilenetv2-sslight", {"views.global_size": "48", "views.local_size": "16"}
    assert picture_sizes(load_recipe(name, sizes)) == {
        "views.global_size": 48,
        "views.local_size": 16,
        "probe.size": 224,
    }
    without = {**sizes, "views.local_count": "0", "views.weights": "null"}
    assert picture_sizes(load_recipe(name, without)) == {"views.global_size": 48, "probe.size": 224}
