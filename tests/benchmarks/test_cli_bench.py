"""``fastssl bench``."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastssl.benchmarks.harness import timing
from fastssl.benchmarks.harness.records import Record, read_records
from fastssl.benchmarks.harness.setting import RecipeSetting, Setting
from fastssl.benchmarks.suites import loader, loss, step, train, views
from fastssl.cli import main
from fastssl.cli.bench import bench
from fastssl.errors import FastSSLError

MODULES = {"loader": loader, "views": views, "loss": loss, "step": step, "train": train}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[RecipeSetting]:
    """The benchmarks give a record without measuring; the list holds their settings."""
    made: list[RecipeSetting] = []
    for name, module in MODULES.items():

        def fake(setting: RecipeSetting, name: str = name) -> list[Record]:
            made.append(setting)
            return [Record(bench=name, recipe="from the benchmark", device="cpu", host={}, versions={}, git=None)]

        monkeypatch.setattr(module, "run", fake)
    return made


def invoke(*arguments: str) -> int:
    """Exit status of ``fastssl bench ARGUMENTS``."""
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("name", MODULES)
def test_help_has_an_example(name: str) -> None:
    result = CliRunner().invoke(bench, [name, "--help"])
    assert result.exit_code == 0
    assert f"fastssl bench {name} " in result.output and "--json FILE" in result.output


def test_settings_are_crossed_and_passed_on(calls: list[RecipeSetting], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    status = invoke(
        *(
            "loader",
            "--recipe",
            "quickstart",
            "--recipe",
            "moco-v2-resnet50",
            "--data",
            "synthetic",
            "--data",
            "x.beton",
        ),
        *("--workers", "1", "--workers", "3", "--batch-size", "16", "--seconds", "2", "--runs", "7", "--photos", "9"),
        *("--set", "views.0.size=48", "--device", "cpu", "--json", str(out)),
    )
    assert status == 0 and len(calls) == len(read_records(out)) == 8
    assert [(one.recipe_name, one.data, one.workers) for one in calls] == [
        (recipe, data, workers)
        for recipe in ("quickstart", "moco-v2-resnet50")
        for data in ("synthetic", "x.beton")
        for workers in (1, 3)
    ]
    for one in calls:
        assert one.recipe.views[0].size == 48 and one.device == torch.device("cpu")
        assert (one.batch_size, one.seconds, one.runs, one.photos, one.pipeline) == (16, 2.0, 7, 9, "native")


def test_loader_goes_through_the_engines(calls: list[RecipeSetting]) -> None:
    assert (
        invoke(
            "loader", "--device", "cpu", "--workers", "1", "--workers", "4", "--pipeline", "dali", "--pipeline", "ffcv"
        )
        == 0
    )
    assert [(one.workers, one.pipeline) for one in calls] == [(1, "dali"), (1, "ffcv"), (4, "dali"), (4, "ffcv")]
    assert invoke("loader", "--pipeline", "auto") == 2


def test_peers_take_their_time_and_say_who_is_missing(
    calls: list[RecipeSetting], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fastssl.benchmarks.suites import peers

    asked: list[Setting] = []
    monkeypatch.setattr(peers, "run", lambda setting: asked.append(setting) or [])
    monkeypatch.setattr(peers, "left_out", lambda: ["ffcv, ours and as its documentation has it (not installed)"])
    assert invoke("loader", "--peers") == 0 and invoke("loader", "--peers", "--seconds", "9") == 0
    assert [one.seconds for one in asked] == [160.0, 9.0]
    printed = capfd.readouterr()
    assert "left out: ffcv, ours and as its documentation has it (not installed)" in printed.out + printed.err
    for one in (["--pipeline", "dali"], ["--recipe", "quickstart"], ["--device", "cpu"]):
        assert invoke("loader", "--peers", *one) == 2


def test_step_and_train_take_another_network(calls: list[RecipeSetting]) -> None:
    assert invoke("step", "--arch", "resnet18", "--amp", "bf16", "--compile", "--device", "cpu") == 0
    assert invoke("train", "--arch", "resnet18", "--workers", "2", "--device", "cpu") == 0
    of_step, of_train = calls
    assert of_step.recipe.arch == of_train.recipe.arch == "resnet18"
    common = {"recipe": of_step.recipe, "recipe_name": "light-moco-mobilenetv3"}
    assert of_step == RecipeSetting(amp="bf16", compiled=True, **common)
    assert of_train == RecipeSetting(workers=2, **common)


def test_step_goes_through_both_precisions(calls: list[RecipeSetting]) -> None:
    both = ["--recipe", "quickstart", "--recipe", "moco-v2-resnet50"]
    assert invoke("step", *both, "--amp", "bf16", "--amp", "off", "--device", "cpu") == 0
    assert [(one.amp, one.recipe_name) for one in calls] == [
        (amp, name) for amp in ("bf16", "off") for name in ("quickstart", "moco-v2-resnet50")
    ]


def test_loss_takes_the_recipes_numbers(calls: list[RecipeSetting], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert (
        invoke(
            "loss",
            "--recipe",
            "light-moco-mobilenetv3",
            "--batch-size",
            "8",
            "--batch-size",
            "16",
            "--device",
            "cpu",
            "--json",
            str(out),
        )
        == 0
    )
    assert [(one.batch_size, one.recipe_name, one.runs) for one in calls] == [
        (queries, "light-moco-mobilenetv3", 5) for queries in (8, 16)
    ]
    assert len(read_records(out)) == 2


def test_json_on_standard_output_is_alone_there(calls: list[RecipeSetting], capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke("views", "--device", "cpu", "--json", "-") == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["bench"] == "views"
    assert "from the benchmark" in captured.err and captured.err.startswith("what ")


def test_one_setting_that_fails_leaves_the_others(
    calls: list[RecipeSetting], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    real = step.run

    kept: list[weakref.ref] = []

    def run(setting: RecipeSetting) -> list[Record]:
        if setting.recipe_name == "quickstart":
            tensor = torch.zeros(1)
            kept.append(weakref.ref(tensor))
            try:
                raise MemoryError
            except MemoryError:
                raise RuntimeError("the device\nis gone")  # noqa: B904 (its context holds the tensor, too)
        assert kept[0]() is None, "a failed step's memory is free for the next one"
        return real(setting)

    monkeypatch.setattr(step, "run", run)
    out = tmp_path / "out.jsonl"
    assert (
        invoke("step", "--recipe", "quickstart", "--recipe", "moco-v2-resnet50", "--device", "cpu", "--json", str(out))
        == 1
    )
    assert len(read_records(out)) == 1
    errors = capfd.readouterr().err
    assert "failed: step, quickstart, amp auto: RuntimeError: the device is gone" in errors
    assert "fastssl: step, quickstart, amp auto: RuntimeError: the device is gone (1 of 2 settings failed)" in errors


def test_a_setting_that_fails_keeps_nothing_of_its_own_alive(
    calls: list[RecipeSetting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors would lie on the GPU, where the next setting wants the memory; also what refers to itself."""
    alive: list[weakref.ref] = []

    class Step:
        def __init__(self) -> None:
            self.itself = self

    def run(setting: RecipeSetting) -> list[Record]:
        assert all(one() is None for one in alive)
        tensor, cycle = torch.zeros(8), Step()
        alive.extend([weakref.ref(tensor), weakref.ref(cycle)])
        try:
            raise KeyError("inside")
        except KeyError:
            raise RuntimeError("outside")  # noqa: B904 (an error on the way is kept, too)

    monkeypatch.setattr(step, "run", run)
    gc.disable()
    try:
        assert invoke("step", "--recipe", "quickstart", "--recipe", "moco-v2-resnet50", "--device", "cpu") == 1
    finally:
        gc.enable()
    assert len(alive) == 4


def test_records_are_on_disk_before_the_next_setting_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, lines = tmp_path / "out.jsonl", []

    def run(setting: RecipeSetting) -> list[Record]:
        lines.append(len(read_records(out)))
        return [Record(bench="step", host={}, versions={}, git=None)] * 2

    monkeypatch.setattr(step, "run", run)
    assert (
        invoke("step", "--recipe", "quickstart", "--recipe", "quickstart", "--device", "cpu", "--json", str(out)) == 0
    )
    assert lines == [0, 2]


def test_a_json_file_is_one_document_at_every_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, found = tmp_path / "out.json", []

    def run(setting: RecipeSetting) -> list[Record]:
        found.append(json.loads(out.read_text()))
        return [Record(bench="step", median_s=float("nan"), host={}, versions={}, git=None)]

    monkeypatch.setattr(step, "run", run)
    again = ["--recipe", "quickstart"] * 3
    assert invoke("step", *again, "--device", "cpu", "--json", str(out)) == 0
    assert [len(one) if isinstance(one, list) else one["bench"] for one in found] == [0, "step", 2]
    assert [record.median_s for record in read_records(out)] == [None] * 3 and len(json.loads(out.read_text())) == 3


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["loader", "--runs", "4"], 2),  # a median of four runs says little
        (["loader", "--seconds", "0"], 2),
        (["nothing"], 2),
        (["step", "--arch", "mobilenetv3_lagre"], 1),
        (["step", "--recipe", "nothing"], 1),
        (["views", "--data", "absent.beton", "--device", "cpu"], 1),
    ],
)
def test_wrong_use(arguments: list[str], status: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke(*arguments) == status
    errors = capfd.readouterr().err
    assert "Traceback" not in errors and errors.strip()


def test_debug_shows_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(setting: RecipeSetting) -> list[Record]:
        raise ZeroDivisionError("here")

    monkeypatch.setattr(step, "run", run)
    with pytest.raises(FastSSLError, match="ZeroDivisionError: here") as failure:
        main(["bench", "step", "--device", "cpu", "--debug"])
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


def test_a_whole_measurement(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.LIMITS, "cpu", (2**20, 64))
    out = tmp_path / "out.jsonl"
    assert (
        invoke(
            "views",
            "--recipe",
            "quickstart",
            "--data",
            str(beton),
            "--batch-size",
            "4",
            "--device",
            "cpu",
            "--json",
            str(out),
        )
        == 0
    )
    records = read_records(out)
    assert [record.details["stage"] for record in records] == ["crop", "colour", "whole"]
    assert {record.recipe for record in records} == {"quickstart"} and records[0].details["data"]["name"] == beton.name
