"""What a checkpoint with a fitting digest may not do to a run: everybody can compute a digest."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import Silent, options, same, small, state
from torch import nn

from fastssl.errors import FastSSLError
from fastssl.optim.optimizers import OptimConfig, create_optimizer
from fastssl.pretrain import pretrain
from fastssl.runs.checkpoint import write_state
from fastssl.runs.restore import Unfit, load_network, load_optimizer

STEM = "student.backbone.conv_stem.weight"


@pytest.fixture(scope="module")
def whole(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(small("probe.every_epochs=0"), options(beton, out), Silent())
    return out


def at(**changes: object) -> Callable[[dict], None]:
    return lambda state: state["position"].update(changes)


def tensor(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[dict], None]:
    return lambda state: state["method"].update({name: change(state["method"][name])})


def momentum(change: Callable[[torch.Tensor], object]) -> Callable[[dict], None]:
    kept = lambda state: state["optimizer"]["state"][0]  # noqa: E731
    return lambda state: kept(state).update(momentum_buffer=change(kept(state)["momentum_buffer"]))


def infinite(value: torch.Tensor) -> torch.Tensor:
    return value.clone().fill_(float("inf"))


HOSTILE: dict[str, tuple[Callable[[dict], None], str]] = {
    "a step before the first": (at(step=-1), r"position\.step is no number"),
    "a step of another epoch": (at(step=5), r"position\.step is 5, but step 0 of epoch 2 is step 12"),
    "a step of 400 digits": (at(step=10**400), r"position\.step is no number"),
    "a step that is true": (at(step=True), r"position\.step is no number"),
    "behind the epoch": (at(step=13, epoch=1, step_in_epoch=7), r"step 7 of epoch 1; the run has 2 epochs of 6 steps"),
    "behind the run": (at(step=18, epoch=3), r"step 0 of epoch 3; the run has 2 epochs of 6 steps"),
    "an infinite time": (at(train_seconds=float("inf")), r"position\.train_seconds is no number"),
    "more seconds than a float has": (at(train_seconds=10**400), r"position\.train_seconds is no number"),
    "words as samples": (at(skipped=["x"]), r"position\.skipped is no list"),
    "samples that are not there": (at(skipped=[47, 48]), r"position\.skipped names sample 48; there are 48"),
    "steps that there are not": (at(passed_over=[12, 13]), r"position\.passed_over names step 13; the run has 12"),
    "something else": (at(steps=1), r"unexpected keyword"),
    "a queue of another size": (
        tensor("queue", lambda queue: queue[:5]),
        r"queue is \(5, 8\) float32, not \(64, 8\) float32",
    ),
    "a queue of another type": (tensor("queue", torch.Tensor.double), r"queue is \(64, 8\) float64, not"),
    "a queue of words": (tensor("queue", lambda _: "x"), r"queue is a str"),
    "a queue that is not finite": (tensor("queue", infinite), r"queue holds numbers that are not finite"),
    "a pointer that is a list": (
        tensor("queue_pointer", lambda pointer: pointer.expand(3)),
        r"queue_pointer is \(3,\) int64, not \(\) int64",
    ),
    "weights of whole numbers": (tensor(STEM, torch.Tensor.int), r"conv_stem\.weight is .* int32, not .* float32"),
    "weights of another shape": (tensor(STEM, lambda weight: weight[:1]), r"conv_stem\.weight is \(1, 3, 3, 3\)"),
    "a tensor too few": (lambda state: state["method"].pop(STEM), r"conv_stem\.weight' is missing"),
    "a tensor too many": (lambda state: state["method"].update(x=torch.zeros(1)), r"'x' is unknown"),
    "no optimiser": (lambda state: state.pop("optimizer"), r"no state of an optimiser"),
    "momentum of another shape": (
        momentum(lambda value: value[:1]),
        r"momentum_buffer of parameter 0 is \(1, 3, 3, 3\)",
    ),
    "momentum of another type": (momentum(torch.Tensor.double), r"momentum_buffer of parameter 0 is .* float64"),
    "momentum that is not finite": (
        momentum(infinite),
        r"momentum_buffer of parameter 0 holds numbers that are not finite",
    ),
    "momentum of nothing": (lambda state: state["optimizer"]["state"].pop(3), r"nothing of parameter 3"),
    "momentum of what is not there": (
        lambda state: state["optimizer"]["state"].update({10**6: {}}),
        r"has a parameter 1000000; there are",
    ),
    "another optimiser's": (
        lambda state: state["optimizer"]["state"].update({0: {"exp_avg": torch.zeros(1)}}),
        "does not keep momentum_buffer of parameter 0",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_value_is_one_line_and_costs_the_folder_nothing(
    case: str, whole: Path, beton: Path, tmp_path: Path
) -> None:
    change, words = HOSTILE[case]
    found = state(whole)
    change(found)
    write_state(tmp_path / "hostile.pt", found)
    before = {path: path.stat() for path in (whole / "checkpoints").iterdir()} | {
        whole / "summary.json": (whole / "summary.json").stat()
    }
    with pytest.raises(FastSSLError, match=words) as error:
        pretrain(small("probe.every_epochs=0"), options(beton, whole, resume=str(tmp_path / "hostile.pt")), Silent())
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    for path, about in before.items():
        now = path.stat()
        assert (now.st_ino, now.st_mtime_ns, now.st_nlink) == (about.st_ino, about.st_mtime_ns, about.st_nlink), path


def test_settings_of_the_optimiser_are_the_recipes(whole: Path, beton: Path, tmp_path: Path) -> None:
    """A file that says otherwise makes no other step."""
    found = state(whole)
    for group in found["optimizer"]["param_groups"]:
        group.update(weight_decay=1e9, maximize=True, momentum="much", lr=[], params="none")
    write_state(tmp_path / "hostile.pt", found)
    out = tmp_path / "run"
    pretrain(small("probe.every_epochs=0"), options(beton, out, resume=str(tmp_path / "hostile.pt")), Silent())
    assert same(state(out), state(whole))
    assert state(out)["optimizer"]["param_groups"][0]["momentum"] == 0.9


def test_a_file_cannot_put_its_tensors_in_the_place_of_parameters(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    weight, found = network.weight, OrderedDict((name, value.clone()) for name, value in network.state_dict().items())
    found._metadata = {"": {"assign_to_params_buffers": True}}
    torch.save(found, tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found._metadata, "this is what reaches load_state_dict"
    load_network(network, found)
    assert network.weight is weight


def test_momentum_is_copied_into_the_parameters_layout() -> None:
    """The fused kernels take any buffer for one of the parameter's shape and layout: of four stored bytes they would
    read and write thousands.
    """
    parameter = nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    rows = torch.arange(48.0).view(4, 3, 2, 2)
    for buffer in (rows, torch.ones(1).expand(4, 3, 2, 2)):
        optimizer = create_optimizer(nn.ParameterList([parameter]), OptimConfig(lr=1.0, momentum=0.5, weight_decay=0.0))
        load_optimizer(optimizer, {"state": {0: {"momentum_buffer": buffer}}}, steps=1)
        kept = optimizer.state[parameter]["momentum_buffer"]
        assert kept.stride() == parameter.stride() and torch.equal(kept, buffer)
        with torch.no_grad():
            parameter.zero_()
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(parameter.detach(), -0.5 * buffer)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (-1.0, "step of parameter 0 is -1 behind 4 steps"),
        (5.0, "is 5 behind 4"),
        (0.5, "is 0.5"),
        (float("nan"), "not finite"),
    ],
)
def test_adamw_counts_no_steps_that_were_not_made(step: float, words: str) -> None:
    model = nn.Linear(2, 2)
    optimizer, other = (create_optimizer(model, OptimConfig(name="adamw")) for _ in range(2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = optimizer.state_dict()
    load_optimizer(other, found, steps=4)
    assert all(
        torch.equal(other.state[p][name], optimizer.state[p][name])
        for p in model.parameters()
        for name in optimizer.state[p]
    )
    found["state"][0]["step"] = torch.tensor(step)
    with pytest.raises(Unfit, match=re.escape(words)):
        load_optimizer(other, found, steps=4)
    del found["state"][0]["step"]
    with pytest.raises(Unfit, match="does not keep exp_avg and exp_avg_sq and step of parameter 0"):
        load_optimizer(other, found, steps=4)
