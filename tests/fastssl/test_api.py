"""fastssl from Python: the functions do what the commands do, and break nothing of the process they are called in."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_cli_inputs import ARCH, SMALL, cli, photos, sets

import fastssl
from fastssl.models.backbones import read_header
from fastssl.utils.json_text import to_json

RECIPE = dict(pair.split("=") for pair in SMALL)


def run(data: Path, out: Path, **more: Any) -> fastssl.RunResult:
    how: dict[str, Any] = {"arch": ARCH, "recipe": "few-photos", "epochs": 2, "batch_size": 8, "workers": 1, **RECIPE}
    return fastssl.pretrain(data, out=out, **{**how, **more})


@pytest.fixture(scope="module")
def trained(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> fastssl.RunResult:
    return run(beton, tmp_path_factory.mktemp("api") / "run")


def test_a_name_costs_nothing_before_it_is_used() -> None:
    code = (
        "import sys, fastssl; assert 'torch' not in sys.modules and 'pretrain' in dir(fastssl); "
        "import fastssl.evaluate.knn; assert callable(fastssl.evaluate) and fastssl.evaluate.knn; "
        "from fastssl import pretrain; assert callable(pretrain) and pretrain.RunOptions"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(inspect.signature(fastssl.evaluate).parameters)[:3] == ["weights", "kind", "data"]


def test_a_run_is_that_of_the_command(
    beton: Path, trained: fastssl.RunResult, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    told: list[dict[str, Any]] = []
    again = run(beton, tmp_path / "python", progress=told.append, **{"train.log_every": 2, "views.0.size": 32})
    assert capfd.readouterr() == ("", ""), "quiet"
    assert told[-1]["done"] == told[-1]["total"] and told[-1]["loss"] > 0
    args = ["--arch", ARCH, "--data", beton, "--recipe", "few-photos", "--epochs", 2, "--batch-size", 8, "--workers", 1]
    assert cli("pretrain", *args, "--out", tmp_path / "command", *sets(*SMALL)) == 0
    config = yaml.safe_load((tmp_path / "command" / "config.yaml").read_text())
    weights = "checkpoints/last.safetensors"
    for result in (trained, again):
        mine = yaml.safe_load((result.out / "config.yaml").read_text())
        same = ("recipe", "arch", "data", "val", "views", "optim", "simclr", "probe")
        assert {key: mine[key] for key in same} == {key: config[key] for key in same}
        assert read_header(result.out / weights)["digest"] == read_header(tmp_path / "command" / weights)["digest"]
        assert result.summary == json.loads((result.out / "summary.json").read_text()) and result.report.is_file()
        assert "after pre-training" in {row["name"] for row in result.rows} and result.verdict
    theirs = json.loads((tmp_path / "command" / "summary.json").read_text())
    assert theirs["probe"] == again.summary["probe"]


def test_what_is_left_out_is_chosen_as_the_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr("fastssl.api.make_run", lambda *all: seen.append(all))
    changes, folder = {"simclr.temperature": 0.5, "views.0.size": 64}, photos(tmp_path / "photos", 20, 40)
    with caplog.at_level("INFO", "fastssl"), pytest.warns(UserWarning, match="shorter side of 40 px"):
        result = fastssl.pretrain(str(folder), **changes)
    (recipe, options, *_), said = seen[0], "\n".join(caplog.messages)
    assert result.out == options.out == Path("runs") / f"few-photos-{recipe.arch}" and result.rows == []
    assert options.data == tmp_path / "photos.beton" and recipe.simclr.temperature == 0.5
    assert "recipe few-photos for 20 photos" in said and "now also in" in said


def test_the_same_call_goes_on_where_ctrl_c_stopped_it(beton: Path, trained: fastssl.RunResult, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def press(row: dict[str, Any]) -> None:
        if row["done"] < row["total"]:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(fastssl.Interrupted, match="everything is saved"):
        run(beton, tmp_path, progress=press, **{"train.log_every": 2})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert run(beton, tmp_path).summary["probe"] == trained.summary["probe"]


def test_a_thread_can_train(beton: Path, trained: fastssl.RunResult, tmp_path: Path) -> None:
    ends: list[object] = []
    thread = threading.Thread(target=lambda: ends.append(run(beton, tmp_path).summary["probe"]))
    thread.start()
    thread.join()
    assert ends == [trained.summary["probe"]]


def test_a_run_may_begin_with_another_one(beton: Path, trained: fastssl.RunResult, tmp_path: Path) -> None:
    result = run(beton, tmp_path, init_from=trained, epochs=1)
    assert "as it came" in {row["name"] for row in result.rows}
    with pytest.raises(fastssl.FastSSLError, match="nolog"):
        run(beton, tmp_path, log=["nolog"])


def test_a_run_is_judged_read_and_exported(beton: Path, trained: fastssl.RunResult, tmp_path: Path) -> None:
    for kind in ("knn", "linear"):
        assert cli("evaluate", kind, trained.out, "--data", beton, "--json", tmp_path / f"{kind}.json") == 0
        record = json.loads((tmp_path / f"{kind}.json").read_text())
        mine = fastssl.evaluate(trained, kind, data=beton)
        assert {**json.loads(to_json(mine)), "seconds": 0} == {**record, "seconds": 0}
    assert fastssl.evaluate(trained, data=beton, k=3)["k"] == 3
    assert fastssl.embed(trained, beton, tmp_path / "features.npy")["photos"] == len(np.load(tmp_path / "features.npy"))
    with pytest.raises(fastssl.FastSSLError, match="photo"):  # too few of them for int8
        fastssl.export(trained, tmp_path / "mine.onnx", "onnx", data=beton)
    backbone = fastssl.load_backbone(trained)
    for one in (fastssl.load_backbone(trained.out / "checkpoints" / "last.safetensors"), trained.backbone()):
        assert torch.equal(next(one.parameters()), next(backbone.parameters())) and not one.training
    with pytest.raises(fastssl.FastSSLError, match="no teacher"):
        trained.teacher()
    assert fastssl.export(trained, tmp_path / "mine.safetensors").tensors == len(backbone.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run, data: fastssl.pretrain(data, recipe="quick-start"), "nearest: quickstart"),
        (lambda run, data: fastssl.pretrain(data, epochs=3, **{"train.epochs": 4}), "epochs and train.epochs say"),
        (lambda run, data: fastssl.pretrain(data, device="gpu"), "device"),
        (lambda run, data: fastssl.pretrain(data, learning_rate=1), "no key learning_rate"),
        (lambda run, data: fastssl.pretrain(""), "the path is empty"),
        (lambda run, data: fastssl.pretrain(data, out=""), "the path is empty"),
        (lambda run, data: fastssl.pretrain(data, pipeline="gpu"), "pipeline='gpu': there are auto, "),
        (lambda run, data: fastssl.pretrain(data, log="mlflow,wandbe"), "'wandbe' is no logger"),
        (lambda run, data: fastssl.evaluate(run, data=data, protocol="mine"), "protocol='mine': there are dino, "),
        (lambda run, data: fastssl.evaluate(run, data=data, k=0), "k >= 1"),
        (lambda run, data: fastssl.evaluate(run, data=data, which="best"), "which='best': there are student and te"),
        (lambda run, data: fastssl.export(run, "x.onnx", "onnx", input="bgr"), "input='bgr': there are raw, norm"),
        (lambda run, data: fastssl.transform(run, size=0), "size must be at least"),
        (lambda run, data: fastssl.evaluate(run, "semi", data=data), "knn or linear"),
        (lambda run, data: fastssl.evaluate(run, data=data, ks=3), "ks: no such option of knn; there are protocol,"),
        (lambda run, data: fastssl.evaluate(run, "linear", data=data, lr=[1.0]), "--lr belongs to a protocol"),
        (lambda run, data: fastssl.evaluate(run, "linear", data=data, protocol="mine"), "mine"),
        (lambda run, data: fastssl.export(run, "x.onnx", "onnyx"), "onnyx"),
        (lambda run, data: fastssl.evaluate("nowhere", data=data), "nowhere"),
        (lambda run, data: fastssl.load_backbone("nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    call: Any, message: str, beton: Path, trained: fastssl.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastssl.FastSSLError, match=message) as error:
        call(trained, beton)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
