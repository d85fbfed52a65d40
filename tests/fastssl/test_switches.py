"""Which switches a step tries, and the check that what they make is the eager step."""

from __future__ import annotations

import copy
import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import Silent, options, same, small, state
from test_step import CPU, METHODS, all_views, multicrop, recipe, replayed, train
from torch import Tensor, nn
from torch.func import functional_call

from fastssl.config.recipe import TrainConfig
from fastssl.errors import FastSSLError
from fastssl.pretrain import pretrain
from fastssl.training import setup
from fastssl.training import step as step_module
from fastssl.training.cuda_graph import RecordedStep, StepInputs
from fastssl.training.step import TrainStep
from fastssl.training.switches import COMPILE_PAYS, compare, left_out


@pytest.mark.parametrize(
    ("settings", "device", "processes", "steps", "expected"),
    [
        ({}, "cuda", 1, COMPILE_PAYS, {}),
        ({}, "cuda", 1, 1, {"compile": "auto needs 5,000 steps for it to pay, this run has 1 step"}),
        ({}, "cpu", 1, COMPILE_PAYS, dict.fromkeys(("compile", "graph"), "auto is for NVIDIA GPUs")),
        ({}, "cuda", 2, COMPILE_PAYS, dict.fromkeys(("compile", "graph"), "auto leaves several processes alone")),
        (
            {"deterministic": True},
            "cuda",
            1,
            COMPILE_PAYS,
            dict.fromkeys(("compile", "graph"), "auto leaves deterministic runs alone"),
        ),
        ({"compile": True, "graph": True, "deterministic": True}, "cpu", 2, 1, {}),
        ({"compile": False}, "cuda", 1, COMPILE_PAYS, {"compile": "train.compile=false"}),
    ],
)
def test_auto_is_on_where_it_pays(settings: dict, device: str, processes: int, steps: int, expected: dict) -> None:
    train = TrainConfig(**settings)
    assert left_out(train, torch.device(device), processes=processes, steps=steps) == expected


# ---------------------------------------------------------------------- the check


def checked(*, arch: str = "mobilenetv3_small_050", amp: bool = False, check: bool = True, **changes: str) -> TrainStep:
    step = TrainStep(recipe(arch, **changes), CPU, amp=amp, seed=0, record=replayed)
    step.check = check
    return step


def same_state(one: TrainStep, other: TrainStep) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(("optimizer", "amp"), [("sgd", True), ("lars", False), ("adamw", False), ("adamw", True)])
def test_a_checked_run_is_the_run_to_the_bit(optimizer: str, amp: bool) -> None:
    changes = {"train__graph": "true", "optim__name": optimizer}
    plain, step = (checked(amp=amp, check=check, **changes) for check in (False, True))
    assert train(step) == train(plain) and same_state(step, plain)
    assert step.switches["graph"].startswith("on, and checked: 3 steps differ from eager ones by ")
    assert step.recorded and not step.fallbacks and plain.switches["graph"] == "on"


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS)
def test_every_method_agrees_with_itself(case: str) -> None:
    step = TrainStep(multicrop(case, train__graph="true"), CPU, amp=False, seed=0, record=replayed)
    step.check = True
    train(step, 1, batch=lambda number: all_views(step.recipe))
    assert step.switches["graph"].startswith("on, and checked") and step.recorded


class Stale(RecordedStep):
    """Reads what it was recorded with."""

    def __call__(self, inputs: StepInputs) -> Tensor:
        self._replay()
        return self._result


class OldRates(RecordedStep):
    """Takes its inputs, but for what the schedules say."""

    def _flat(self, inputs: StepInputs) -> list[Tensor]:
        first, *rest = super()._flat(inputs)
        self._first = getattr(self, "_first", first)
        return [self._first, *rest]


@pytest.mark.parametrize("fault", [Stale, OldRates])
@pytest.mark.parametrize(("optimizer", "amp"), [("sgd", False), ("lars", True), ("adamw", True)])
def test_a_recording_that_keeps_its_inputs_is_found(
    fault: type[RecordedStep], optimizer: str, amp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"optim__name": optimizer}
    plain, step = checked(amp=amp, **changes), checked(amp=amp, train__graph="true", **changes)
    monkeypatch.setattr(step_module, "RecordedStep", fault)
    assert train(step) == train(plain) and same_state(step, plain), "it goes on eagerly"
    found = "FastSSLError: the check found another step than the eager one: they differ by "
    assert step.switches["graph"].startswith(found) and not step.recorded
    assert step.fallbacks == {"graph": step.switches["graph"]}


def unmoved(network: nn.Module) -> nn.Module:
    """Its own weights, which nothing trains."""
    return copy.deepcopy(network)


def still(network: nn.Module) -> Callable[..., Tensor]:
    """Statistics that do not move."""

    def call(*inputs: Tensor, **groups: int) -> Tensor:
        buffers = {name: value.clone() for name, value in network.named_buffers()}
        return functional_call(network, buffers, inputs, groups)

    return call


def weak(network: nn.Module) -> Callable[..., Tensor]:
    """Half of the gradient."""

    def call(*inputs: Tensor, **groups: int) -> Tensor:
        output = network(*inputs, **groups)
        return output.detach() + 0.5 * (output - output.detach())

    return call


@pytest.mark.parametrize("fault", [unmoved, still, weak])
@pytest.mark.parametrize("amp", [False, True])
def test_a_wrong_compiler_is_found_and_the_rest_goes_on(
    fault: Callable, amp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **options: fault(network))
    plain = checked(amp=amp, train__graph="true")
    step = checked(amp=amp, train__graph="true", train__compile="true")
    with torch._dynamo.config.patch(disable=False):
        assert train(step) == train(plain) and same_state(step, plain)
    assert list(step.fallbacks) == ["compile"] and "another step than the eager one" in step.switches["compile"]
    assert step.recorded and step.switches["graph"].startswith("on, and checked")


def test_a_compiler_that_computes_the_same_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: real(network, backend="eager", **options))
    said: list[str] = []
    step = checked(arch="test_resnet", train__compile="true")
    step.say = said.append
    with torch._dynamo.config.patch(disable=False):
        train(step, 1)
    assert step.switches["compile"].startswith("on, and checked") and not step.fallbacks
    assert said == ["compiling student and teacher, which may take minutes"]


def test_nan_is_no_agreement() -> None:
    good = torch.ones(1), {"student.weight": torch.ones(3), "queue": torch.zeros(2)}
    assert compare(good, good, amp=False).startswith("on, and checked: 1 step differ")
    bad_loss, bad_way = (
        (torch.tensor([torch.nan]), good[1]),
        (good[0], {**good[1], "queue": torch.full((2,), torch.nan)}),
    )
    for pair in ((good, bad_loss), (bad_loss, good), (good, bad_way), (bad_way, good)):
        with pytest.raises(FastSSLError, match="another step"):
            compare(*pair, amp=True)
    with pytest.raises(FastSSLError, match="inf of the way of the queue"):
        compare(good, (good[0], {**good[1], "queue": torch.ones(2)}), amp=True)


def test_a_check_is_in_the_report_and_changes_no_bit(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded(*args: object, **changes: object) -> TrainStep:
        return TrainStep(*args, **changes, record=replayed)

    monkeypatch.setattr(setup, "TrainStep", recorded)
    said, both = Silent(), []
    for check in (False, True):
        out = tmp_path / str(check)
        summary = pretrain(small("train.graph=true", "train.epochs=1"), options(beton, out, check=check), said)
        both.append(state(out))
    assert same(*both) and summary["switches"]["compile"] == "auto is for NVIDIA GPUs"
    verdict = summary["switches"]["graph"]
    assert verdict.startswith("on, and checked: 3 steps differ")
    (line,) = (text for text in said.messages if verdict in text)
    assert re.fullmatch(f"compile auto is for NVIDIA GPUs; graph {re.escape(verdict)}; ready after [0-9]+ s", line)
    assert verdict in html.unescape((out / "report.html").read_text())
    assert "checked" not in (tmp_path / "False" / "report.html").read_text()


# ---------------------------------------------------------------------- memory


def test_memory_that_runs_out_ends_what_was_asked_for_and_not_what_was_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    step = TrainStep(recipe(train__graph="true"), CPU, amp=False, seed=0, record=full)
    with pytest.raises(torch.OutOfMemoryError):
        train(step, 1)
    monkeypatch.setattr(step_module, "left_out", lambda *args, **options: {"compile": "off"})
    step = TrainStep(recipe(train__graph="auto"), CPU, amp=False, seed=0, record=full)
    train(step, 1)
    assert step.fallbacks == {"graph": "OutOfMemoryError: CUDA out of memory"}
