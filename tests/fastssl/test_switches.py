"""Which switches a step tries, and the check that what they make is the eager step."""

from __future__ import annotations

import copy
import html
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import Silent, options, same, small, state
from test_step import BATCH, CPU, METHODS, all_views, multicrop, recipe, replayed, train
from torch import Tensor, nn
from torch.func import functional_call

from fastssl.config.recipe import TrainConfig
from fastssl.pretrain import pretrain
from fastssl.training import setup, switches
from fastssl.training import step as step_module
from fastssl.training.cuda_graph import RecordedStep, StepInputs
from fastssl.training.step import TrainStep
from fastssl.training.switches import COMPILE_PAYS, Trial, compare, left_out, telling


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
def test_auto_is_on_where_it_pays(
    settings: dict, device: str, processes: int, steps: int, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switches.importlib.util, "find_spec", lambda name: name)
    train = TrainConfig(**settings)
    assert left_out(train, torch.device(device), processes=processes, steps=steps) == expected


def test_without_triton_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches.importlib.util, "find_spec", lambda name: None)
    found = left_out(TrainConfig(), torch.device("cuda"), processes=1, steps=COMPILE_PAYS)
    assert found == {"compile": "Triton is not installed"}


def test_what_takes_minutes_is_told_while_it_does() -> None:
    said: list[str] = []
    with pytest.raises(KeyError), telling("compiling student", said.append, every=0.02):
        time.sleep(0.1)
        raise KeyError
    assert said[:2] == ["compiling student ...", "compiling student: 0 s so far"]
    assert said[-1] == "compiling student: 0 s" and len(said) > 3


# ---------------------------------------------------------------------- the check


def checked(*, arch: str = "mobilenetv3_small_050", amp: bool = False, check: bool = True, **changes: str) -> TrainStep:
    return TrainStep(recipe(arch, **changes), CPU, amp=amp, seed=0, record=replayed, check=check)


def same_state(one: TrainStep, other: TrainStep) -> bool:
    mine, theirs = one.state.tensors(), other.state.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(("optimizer", "amp"), [("sgd", True), ("lars", False), ("adamw", False), ("adamw", True)])
def test_a_checked_run_is_the_run_to_the_bit(optimizer: str, amp: bool) -> None:
    changes = {"train__graph": "true", "optim__name": optimizer}
    plain, step = (checked(amp=amp, check=check, **changes) for check in (False, True))
    assert train(step) == train(plain) and same_state(step, plain)
    assert step.checked["graph"].startswith("agrees: 3 steps beside the eager ones: loss apart by ")
    assert step.recorded and not step.fallbacks and not plain.checked


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS)
def test_every_method_agrees_with_itself(case: str) -> None:
    step = TrainStep(multicrop(case, train__graph="true"), CPU, amp=False, seed=0, record=replayed, check=True)
    train(step, 1, batch=lambda number: all_views(step.recipe))
    assert step.checked["graph"].startswith("agrees") and step.recorded


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
    assert step.checked["graph"].startswith("DIFFERS, and is left out: 3 steps") and not step.recorded
    assert step.fallbacks["graph"].startswith("FastSSLError: not the eager step (3 steps beside the eager ones: ")


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
    assert list(step.fallbacks) == ["compile"] and "DIFFERS" in step.checked["compile"]
    assert step.recorded and step.checked["graph"].startswith("agrees")
    assert step.switches == {"compile": f"off ({step.fallbacks['compile']})", "graph": "on"}


def test_a_compiler_that_computes_the_same_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: real(network, backend="eager", **options))
    said: list[str] = []
    step = TrainStep(recipe("test_resnet", train__compile="true"), CPU, amp=False, seed=0, check=True, say=said.append)
    with torch._dynamo.config.patch(disable=False):
        train(step, 1)
    assert step.checked["compile"].startswith("agrees") and step.switches["compile"] == "on" and not step.fallbacks
    assert said[0] == "compiling student and teacher ..." and said[-1].startswith("compiling student and teacher: ")


def test_an_eager_step_has_nothing_to_compare() -> None:
    step = checked()
    train(step, 1)
    assert step.checked == {"step": "runs eagerly, there is nothing to compare"}


def test_nan_is_no_agreement() -> None:
    good = Trial(torch.ones(1), {"student.weight": torch.ones(BATCH)})
    assert compare(good, good, amp=False)[0]
    nowhere = {"student.weight": torch.full((BATCH,), torch.nan)}
    for bad in (good._replace(losses=torch.tensor([torch.nan])), good._replace(way=nowhere)):
        assert not compare(good, bad, amp=True)[0]
        assert not compare(bad, good, amp=True)[0]


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
    assert same(*both) and summary["switches"] == {"compile": "off (auto is for NVIDIA GPUs)", "graph": "on"}
    verdict = summary["check"]["graph"]
    assert verdict.startswith("agrees: 3 steps") and said.messages.count(f"check: graph {verdict}") == 1
    page = (out / "report.html").read_text()
    assert f"graph {verdict}" in html.unescape(page) and "recorded" in page
    assert "agrees" not in (tmp_path / "False" / "report.html").read_text()


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
