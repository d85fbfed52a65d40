"""The benchmark of the training step."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from lines import to_line

from fastssl.benchmarks.estimate import gauge
from fastssl.benchmarks.harness.roofline import Cost, Layer, forward_cost
from fastssl.benchmarks.harness.setting import RecipeSetting
from fastssl.benchmarks.harness.table import cells
from fastssl.benchmarks.harness.timing import busy_of_spans, busy_share
from fastssl.benchmarks.suites import step as bench
from fastssl.benchmarks.suites.plain_step import PlainStep
from fastssl.benchmarks.suites.step import Step, bottleneck, fit_step, random_views, run
from fastssl.config.recipe import Recipe, load_recipe
from fastssl.distributed.devices import use_amp
from fastssl.errors import FastSSLError
from fastssl.pipelines.plan.order import batch_permutation
from fastssl.training.cuda_graph import RecordedStep, StepInputs
from fastssl.training.step import TrainStep

CPU = torch.device("cpu")


def replayed(call):
    """A stand-in for a recording: the call itself, again and again."""
    result = torch.zeros(4)
    return lambda: result.copy_(call()), result


def setting(recipe: Recipe, name: str = "few-photos-moco", **options: object) -> RecipeSetting:
    return RecipeSetting(recipe=recipe, recipe_name=name, **options)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose step takes milliseconds: a backbone of two convolutions."""

    class Backbone(torch.nn.Sequential):
        num_features = 8

        def __init__(self) -> None:
            super().__init__(
                torch.nn.Conv2d(3, 8, 3, 2, 1, bias=False),
                torch.nn.BatchNorm2d(8),
                torch.nn.ReLU(),
                torch.nn.Conv2d(8, 8, 3, 2, 1),
                torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(),
            )

    monkeypatch.setattr(
        "fastssl.training.networks.create_backbone",
        lambda name, **options: Backbone().to(memory_format=torch.channels_last),
    )
    changes = {
        "views.0.size": "16",
        "moco.queue": "64",
        "moco.projector.hidden": "16",
        "moco.projector.out": "8",
        "moco.smoothing": "0.2",
    }
    return load_recipe("few-photos-moco", changes)


def test_a_step_is_the_training_loops_step(tiny: Recipe) -> None:
    """Against the same step written out by hand, on a copy."""
    step = Step(tiny, CPU, 8, amp=False)
    twin = copy.deepcopy(step.method)
    twin._student_parameters, twin._teacher_parameters = (
        list(twin.student.parameters()),
        list(twin.teacher.parameters()),
    )
    twin.set_forward_modules(twin.student, twin.teacher)
    views = random_views(tiny, 8, CPU)
    assert views[0].is_contiguous(memory_format=torch.channels_last) and views[0].shape == (16, 3, 16, 16)
    before = {name: value.clone() for name, value in step.method.named_parameters()}
    step(views)
    rate, decay = step.optimizer.param_groups[0]["lr"], [group["weight_decay"] for group in step.optimizer.param_groups]
    assert rate == pytest.approx(1e-4 * tiny.optim.peak_lr(8))

    keys = twin.targets(views, {"permutation": torch.from_numpy(batch_permutation(16, 0, 0, 0))}, {})
    twin(views, keys, {"smoothing": tiny.moco.smoothing}).loss.backward()
    twin.after_step(keys, [], {})
    assert decay == [tiny.optim.weight_decay, 0.0]
    for name, parameter in twin.student.named_parameters():
        expected = parameter - rate * (
            parameter.grad + (tiny.optim.weight_decay * parameter if parameter.ndim > 1 else 0)
        )
        torch.testing.assert_close(dict(step.method.student.named_parameters())[name], expected, rtol=1e-5, atol=1e-7)
    for name, parameter in step.method.teacher.named_parameters():
        student = dict(step.method.student.named_parameters())[name]
        expected = tiny.moco.momentum * before[f"teacher.{name}"] + (1 - tiny.moco.momentum) * student
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(step.method.queue, twin.queue) and int(step.method.queue_pointer) == 16
    assert all(parameter.grad is None for parameter in step.method.parameters())


def test_networks_alone_leaves_weights_and_queue(tiny: Recipe) -> None:
    step = Step(tiny, CPU, 8, amp=False)
    before = {name: value.clone() for name, value in step.method.named_parameters()}
    queue = step.method.queue.clone()
    step.networks_alone(random_views(tiny, 8, CPU))
    assert all(torch.equal(value, before[name]) for name, value in step.method.named_parameters())
    assert torch.equal(step.method.queue, queue)
    # Both networks did run: their BatchNorm statistics moved.
    assert all(
        int(network.backbone[1].num_batches_tracked) > 0 for network in (step.method.student, step.method.teacher)
    )


def test_step_record(tiny: Recipe) -> None:
    (record,) = run(setting(tiny, batch_size=8))
    assert record.bench == "step" and record.recipe == "few-photos-moco" and record.arch == "mobilenetv3_large_100"
    assert record.batch_size == 8 and record.view_per_s == pytest.approx(2 * record.pair_per_s)
    assert record.pair_per_s == pytest.approx(8 / record.median_s)
    assert record.fraction_of_ceiling == pytest.approx(record.view_per_s / record.ceiling)
    details = record.details
    assert (
        details["amp"] == "off"
        and details["compiled"] is False
        and details["graph"] is False
        and details["fallbacks"] == {}
    )
    assert details["peak_bytes"] > 16 * 8 * 8 * 8 * 4  # at least the first feature map
    assert details["flop_per_s"] == pytest.approx(details["flop_per_pair"] * record.pair_per_s)
    assert details["colour_of_step"] > 0 and details["no_memory_for"] == []
    assert f"colour adds {details['colour_of_step']:.1%}" in cells(record)[-1]
    assert sum(details["share"].values()) == pytest.approx(1) and min(details["share"].values()) >= 0
    to_line(record)


def test_operations_and_bytes_against_a_count_by_hand(tiny: Recipe) -> None:
    step = Step(tiny, CPU, 8, amp=False)
    cost = forward_cost(step.method.student, random_views(tiny, 8, CPU)[0], 4)
    images = 16
    first, second = images * 64 * 8 * 27, images * 16 * 8 * 72
    projector = images * (8 * 16 + 16 * 8)
    assert cost.flop == 2 * (first + second + projector)
    moved = (
        images * (3 * 256 + 8 * 64) + 8 * 27,
        images * (8 * 64 + 8 * 16) + 8 * 72,
        images * (8 + 16) + 128,
        images * (16 + 8) + 128,
    )
    assert cost.bytes == 4 * sum(moved)
    step.method.student(random_views(tiny, 8, CPU)[0])
    assert not step.method.student.backbone[0]._forward_hooks


def test_the_roofline_takes_the_longer_of_the_two_layer_by_layer() -> None:
    cost = Cost((Layer(flop=100, bytes=10), Layer(flop=10, bytes=100)), flop=130)
    # 100 / 10 and 100 / 5 for the layers, and twenty operations outside of them
    assert cost.seconds(flop_per_s=10, bytes_per_s=5) == pytest.approx(10 + 20 + 2)


def test_optimiser_and_average_beside_the_loops(tiny: Recipe) -> None:
    *_, record = run(setting(tiny, batch_size=8, peers=True))
    assert record.details["part"] == "update" and record.runs >= 5 and record.ratio_to_peer > 0
    parameters = (
        8 * 27 + 2 * 8 + 8 * 72 + 8 + 8 * 16 + 16 + 2 * 16 + 16 * 8
    )  # BatchNorm in the projector: a shift, but no bias before it
    assert abs(record.details["parameters"] - parameters) < 64
    assert record.ceiling and record.fraction_of_ceiling == pytest.approx(2 * record.pair_per_s / record.ceiling)


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_batch(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = bench.random_views, []

    def limited(recipe: Recipe, batch_size: int, device: torch.device) -> list[torch.Tensor]:
        tried.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(recipe, batch_size, device)

    monkeypatch.setattr(bench, "random_views", limited)
    (record,) = run(setting(tiny, batch_size=16))
    assert tried == [16, 8, 4]
    assert record.batch_size == 4 and record.details["asked_batch_size"] == 16
    monkeypatch.setattr(bench, "random_views", lambda *args: limited(tiny, 99, CPU))
    with pytest.raises(FastSSLError, match="out of memory even with 2 pictures"):
        fit_step(setting(tiny, batch_size=16))


def test_all_contenders_get_the_same_views(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step too, which in training takes crops, and so would do the peers' work and the colours' beside."""
    monkeypatch.setattr(bench, "TrainStep", partial(TrainStep, record=replayed))
    given: dict[str, list[torch.Tensor]] = {"peer": [], "step": []}
    monkeypatch.setattr(PlainStep, "__call__", lambda self, *views: given["peer"].append(torch.cat(views)))
    real = RecordedStep.__call__

    def spy(self: RecordedStep, inputs: StepInputs) -> torch.Tensor:
        assert not inputs.tables
        given["step"] += inputs.views
        return real(self, inputs)

    monkeypatch.setattr(RecordedStep, "__call__", spy)
    step, peer, _ = run(setting(tiny, batch_size=4, graph=True, peers=True))
    assert step.details["graph"] and peer.ratio_to_peer > 0 and step.details["share"] is None
    assert given["peer"] and all(torch.equal(given["step"][0], views) for one in given.values() for views in one)


@pytest.mark.parametrize("short", ["plain MoCo step, NCHW, float32", "networks", "colour"])
def test_memory_that_runs_out_beside_the_step_costs_no_record(
    short: str, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PlainStep, "__call__", fails if "plain" in short else lambda *args: None)
    if short == "networks":
        monkeypatch.setattr(Step, "networks_alone", fails)
    elif short == "colour":
        monkeypatch.setattr(bench, "colouring", lambda *args: fails)
    records = run(setting(tiny, batch_size=4, peers=True))
    ours = records[0]
    assert (
        ours.pair_per_s > 0 and ours.details["no_memory_for"] == [short] and f"no memory for {short}" in cells(ours)[-1]
    )
    assert len(records) == (2 if "plain" in short else 3) and records[-1].details["part"] == "update"
    assert (ours.details["share"] is None) == (ours.details["networks_fraction"] is None) == (short == "networks")
    assert (ours.details["colour_of_step"] is None) == (short == "colour")


def test_switches_that_cannot_be_used_are_reported(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", broken)
    with torch._dynamo.config.patch(disable=False):
        (record,) = run(setting(tiny, batch_size=4, compiled=True, graph=True))
    assert record.details["compiled"] is False and record.details["graph"] is False
    assert record.details["fallbacks"]["compile"] == "RuntimeError: no C++ compiler found"
    assert "NVIDIA GPU" in record.details["fallbacks"]["graph"]
    assert record.pair_per_s > 0


def test_a_compiled_step_says_so_and_how_long_the_first_call_took(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(module) or module)
    with torch._dynamo.config.patch(disable=False):
        fitted = fit_step(setting(tiny, batch_size=4, compiled=True))
    assert fitted.details["compiled"] and not fitted.details["fallbacks"] and fitted.details["first_s"] > 0
    assert compiled == [fitted.step.method.student, fitted.step.method.teacher]


def test_a_batch_that_does_not_fit_the_queue_is_an_error_of_words(tiny: Recipe) -> None:
    with pytest.raises(FastSSLError, match=r"multiple of twice the batch size .*--batch-size"):
        Step(tiny, CPU, 7, amp=False)


def test_amp() -> None:
    assert use_amp("bf16", CPU) and not use_amp("off", torch.device("cuda"))
    assert use_amp("auto", torch.device("cuda")) and not use_amp("auto", CPU)


def test_autocast_reaches_the_networks(tiny: Recipe) -> None:
    dtypes = []
    step = Step(tiny, CPU, 4, amp=True)
    step.inner.networks[0].backbone.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    step(random_views(tiny, 4, CPU))
    assert dtypes == [torch.bfloat16]


def test_busy_time_counts_overlap_once() -> None:
    assert busy_of_spans([(0, 1), (2, 3)]) == pytest.approx(2 / 3)
    assert busy_of_spans([(0, 4), (1, 2), (3, 5)]) == pytest.approx(1.0)
    assert busy_share(lambda: None, CPU) is None


def test_bottlenecks_in_words() -> None:
    assert bottleneck(0.9, (0.5, 1234)) == "launches: the GPU waits for the host 50% of the step (1,234 kernels)"
    assert bottleneck(0.6, (0.95, 10)).startswith("arithmetic")
    assert bottleneck(0.1, None).startswith("memory traffic")


@pytest.mark.gpu
def test_busy_share_of_a_long_product() -> None:
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)

    def products() -> None:
        for _ in range(20):
            a @ a

    products()
    share, kernels = busy_share(products, device)
    assert share > 0.9 and kernels >= 20


@pytest.mark.gpu
def test_optimiser_and_average_are_three_times_as_fast_as_the_loops() -> None:
    recipe = load_recipe("light-moco-mobilenetv3", {"moco.queue": "4096"})
    updates = bench._measure_updates(Step(recipe, torch.device("cuda"), 32, amp=True), 21, peers=True)
    assert updates["ours"].times_faster_than(updates["loops"]) >= 3


LOCAL = {"views.global_size": "32", "views.local_size": "16", "views.local_count": "3"}
WITH_LOCAL_VIEWS = {
    "dino-mobilenetv2-sslight": {"dino.out": "32", "dino.projector.hidden": "16"},
    "dino-vit_tiny-sslight": {"dino.out": "32", "dino.projector.hidden": "16"},
    "swav-mobilenetv2-sslight": {"swav.prototypes": "32", "swav.projector.hidden": "16"},
    "moco-mobilenetv2-sslight": {"moco.queue": "64", "moco.projector.hidden": "16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_LOCAL_VIEWS)
def test_recipes_with_local_views_are_measured(name: str) -> None:
    recipe = load_recipe(name, {**LOCAL, **WITH_LOCAL_VIEWS[name]})
    (record,) = run(setting(recipe, name, batch_size=4))
    assert record.view_per_s == pytest.approx(5 * record.pair_per_s) and record.batch_size == 4
    assert 0 < record.fraction_of_ceiling < 1.5 and not record.details["fallbacks"]
    with pytest.raises(FastSSLError, match="the peers are steps of MoCo with two views of one kind"):
        run(setting(recipe, name, batch_size=4, peers=True))


def test_the_work_of_a_step_counts_each_network_over_what_it_sees(tiny: Recipe) -> None:
    """One-sided MoCo: the student sees three views of 32 px and none of the key's, the teacher one of 48 px."""
    views = {"views": "sslight-cnn", "views.global_size": "48", "views.local_size": "32", "views.local_count": "2"}
    changes = {"moco.queue": "64", "moco.projector.hidden": "16", "moco.projector.out": "8", "method": "moco", **views}
    step = Step(load_recipe("moco-mobilenetv2-sslight", changes), CPU, 8, amp=False)
    cost = step.cost(random_views(step.recipe, 8, CPU))
    one_global, one_local = (
        forward_cost(
            step.method.student.backbone, torch.randn(8, 3, size, size).contiguous(memory_format=torch.channels_last), 4
        ).flop
        for size in (48, 32)
    )
    head = 8 * 2 * (8 * 16 + 16 * 8)
    assert cost.flop == 3 * (one_global + 2 * one_local + 3 * head) + one_global + head


def test_a_batch_that_a_recipe_does_not_take_is_scaled_for_the_estimate() -> None:
    for name, settings in (
        ("swav-mobilenetv2-sslight", "swav"),
        ("simclr-mobilenetv3", "simclr"),
        ("moco-mobilenetv2-sslight", "moco"),
    ):
        recipe = load_recipe(name)
        scaled = gauge.scaled(recipe, 6)
        assert getattr(scaled, settings).allows(6) and scaled.train.batch_size == 6
