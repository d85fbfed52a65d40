"""A run from the command line: it writes what it promises, learns something measurable, stops cleanly and goes on
exactly.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from fastssl import pretrain as pretrain_module
from fastssl.cli import main
from fastssl.config.recipe import load_recipe, parse_overrides
from fastssl.errors import FastSSLError, Interrupted
from fastssl.pretrain import pretrain
from fastssl.training import setup, trainer
from fastssl.training.setup import RunOptions, Setup
from fastssl.training.step import TrainStep

#: the quick start, small enough for a test: a network of 0.6 M parameters, 2 epochs of 6 steps on 48 photos
SMALL = [
    "train.epochs=2",
    "train.batch_size=8",
    "train.log_every=4",
    "moco.queue=64",
    "moco.projector.hidden=16",
    "probe.online_samples=40",
    "probe.every_epochs=1",
]
ARCH = "mobilenetv3_small_050"


class Silent:
    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.messages: list[str] = []

    def row(self, row: dict, done: int, total: int) -> None:
        self.rows.append(row)

    def message(self, text: str) -> None:
        self.messages.append(text)

    note = message


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code


def options(beton: Path, out: Path, **changes: object) -> RunOptions:
    return RunOptions(
        **{"recipe_name": "few-photos-moco", "data": beton, "out": out, "device": "cpu", "workers": 1, **changes}
    )


def small(*overrides: str):
    return load_recipe("few-photos-moco", parse_overrides([f"arch={ARCH}", *SMALL, *overrides]))


@pytest.fixture(scope="module")
def finished(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    full = ("full_samples=256233400", "full_recipe=light-moco-mobilenetv3")
    overrides = [argument for item in (*SMALL, *full) for argument in ("--set", item)]
    status = cli(
        "pretrain",
        "--arch",
        ARCH,
        "--data",
        str(beton),
        "--recipe",
        "few-photos-moco",
        "--out",
        str(out),
        "--device",
        "cpu",
        *overrides,
        "--json",
        str(out.parent / "r.json"),
    )
    assert status == 0
    return out


def test_the_folder_holds_what_was_promised(finished: Path) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "views.png",
        "neighbours.png",
        "report.html",
        "checkpoints/last.pt",
        "checkpoints/last.safetensors",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert not list(finished.rglob("*.tmp"))
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["train"]["epochs"] == 2 and config["moco"]["queue"] == 64 and config["arch"] == ARCH
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [4, 6, 10, 12]
    assert all(math.isfinite(row["loss"]) and 0 <= row["data_wait"] <= 1 and row["pair_per_s"] > 0 for row in steps)
    probes = [row for row in rows if row["kind"] == "probe"]
    assert [row["epoch"] for row in probes] == [1] and 0 <= probes[0]["knn"] <= 100
    summary = json.loads((finished / "summary.json").read_text())
    assert summary == json.loads((finished.parent / "r.json").read_text())
    assert [row["name"] for row in summary["probe"]["rows"]] == [
        "raw pixels (16x16)",
        "colour histogram",
        "random initialisation",
        "after pre-training",
    ]
    assert all(0 <= row[kind] <= 100 for row in summary["probe"]["rows"] for kind in ("knn", "linear"))
    command = summary["command"]
    assert command.startswith(f"fastssl pretrain --arch {ARCH} --data photos.beton --recipe few-photos-moco --set ")
    assert command.endswith(" --out run --device cpu") and "--set moco.queue=64" in command
    verdict = summary["verdict"]
    assert verdict["text"].startswith(f"{verdict['state']}: ")
    assert set(verdict["against"]) == {"raw pixels", "colour histogram", "random initialisation"}
    assert summary["features"]["effective_rank"] > 0
    assert 0 <= summary["data_share"] <= 1 and "of the time" in summary["bottleneck"]
    assert all(0 <= row["data_share"] <= 1 for row in steps)
    assert summary["samples_seen"] == 96 and summary["steps"] == 12 and summary["share"]["percent"] < 1
    page = (finished / "report.html").read_text()
    assert "<th scope='row'>colour histogram</th>" in page and summary["command"] in page and 'class="verdict' in page
    assert "data:image/png;base64" in page and str(finished) not in page and "/root" not in page


def test_no_paths_of_this_machine_in_the_records(finished: Path, beton: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html"):
        assert str(beton.parent) not in (finished / name).read_text(), name


def test_a_finished_run_is_reported_again_not_trained_again(finished: Path, beton: Path) -> None:
    before = (finished / "checkpoints" / "last.pt").stat().st_mtime_ns
    metrics = (finished / "metrics.jsonl").read_text()
    progress = Silent()
    summary = pretrain(small(), options(beton, finished), progress)
    assert (finished / "checkpoints" / "last.pt").stat().st_mtime_ns == before
    assert (finished / "metrics.jsonl").read_text() == metrics
    assert summary["steps"] == 12 and any("resumed at step 12" in text for text in progress.messages)
    assert "12 of 12 steps made already: what is left is the report" in progress.messages
    assert not any("steps to make" in text for text in progress.messages)


def test_other_settings_in_the_same_folder_are_refused_by_name(finished: Path, beton: Path) -> None:
    with pytest.raises(FastSSLError, match=r"optim\.lr: 0\.\d+ there, 0\.5 here.*--resume never"):
        pretrain(small("optim.lr=0.5"), options(beton, finished), Silent())


@pytest.mark.slow
def test_the_same_seed_makes_the_same_run(finished: Path, beton: Path, tmp_path: Path) -> None:
    pretrain(small(), options(beton, tmp_path / "again", workers=2), Silent())
    pretrain(small(), options(beton, tmp_path / "other", seed=1), Silent())

    def weights(folder: Path) -> dict:
        return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["method"]

    first, again, other = weights(finished), weights(tmp_path / "again"), weights(tmp_path / "other")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["student.projector.1.weight"], other["student.projector.1.weight"])


@pytest.mark.slow
def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_weights(finished: Path, beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    overrides = [argument for item in SMALL for argument in ("--set", item)]
    command = [
        sys.executable,
        "-c",
        "from fastssl.cli import main; main()",
        "pretrain",
        "--arch",
        ARCH,
        "--data",
        str(beton),
        "--recipe",
        "few-photos-moco",
    ]
    command += ["--out", str(out), "--device", "cpu", *overrides]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    while process.poll() is None and not (
        out.exists() and (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=120)
    # The signal may arrive behind the last step: then the run ends as usual. Either way the next command completes it.
    assert process.returncode in (0, 130), text
    if process.returncode == 130:
        assert "everything is saved" in text and "Traceback" not in text
    pretrain(small(), options(beton, out), Silent())
    mine = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
    reference = torch.load(finished / "checkpoints" / "last.pt", weights_only=True)
    assert mine["position"]["step"] == 12
    assert all(torch.equal(mine["method"][name], reference["method"][name]) for name in reference["method"])
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"step"' in line]
    assert steps == sorted(steps)


def test_stop_mid_epoch_resumes_bit_for_bit(finished: Path, beton: Path, tmp_path: Path) -> None:
    out, original = tmp_path / "run", trainer.make_step

    def stop_after_three(run: Setup, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 2:
            run.stop.set()
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", stop_after_three)
        with pytest.raises(Interrupted, match="step 3"):
            pretrain(small(), options(beton, out), Silent())
    pretrain(small(), options(beton, out), Silent())
    mine = torch.load(out / "checkpoints" / "last.pt", weights_only=True)["method"]
    reference = torch.load(finished / "checkpoints" / "last.pt", weights_only=True)["method"]
    assert all(torch.equal(mine[name], reference[name]) for name in reference)


def test_a_loss_that_is_not_finite_stops_the_run_by_name(beton: Path, tmp_path: Path) -> None:
    with pytest.raises(FastSSLError, match="diverged"):
        pretrain(small("optim.lr=1e30", "optim.warmup_epochs=0"), options(beton, tmp_path / "run"), Silent())


def test_photos_without_labels_train_and_report(photo_tree: Path, tmp_path: Path) -> None:
    from fastssl.pipelines.convert.conversion import convert
    from fastssl.pipelines.convert.options import ConvertOptions

    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(photo_tree.rglob("*.jpg"))):
        (flat / f"{number:03}.jpg").write_bytes(path.read_bytes())
    convert(flat, tmp_path / "flat.beton", ConvertOptions(keep_size=True, short_side=None))
    summary = pretrain(small("train.epochs=1"), options(tmp_path / "flat.beton", tmp_path / "run"), Silent())
    assert summary["probe"]["rows"] == [] and "no labels" in summary["probe"]["note"]
    assert summary["verdict"]["state"] == "not judged" and summary["command"] is None
    assert (tmp_path / "run" / "neighbours.png").exists() and (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "mobilnetv3"], "unknown network"),
        (["--arch", ARCH, "--data", "missing.beton"], "missing.beton"),
        (["--arch", ARCH, "--recipe", "quick-start"], "nearest: quickstart"),
        (["--arch", ARCH, "--set", "optim.lrr=1"], "no key optim.lrr"),
        (
            [
                "--arch",
                ARCH,
                "--resume",
                "nothing.pt",
                "--data",
                "BETON",
                "--batch-size",
                "8",
                "--epochs",
                "9",
                "--set",
                "moco.queue=48",
            ],
            "no such checkpoint",
        ),
        (
            ["--arch", ARCH, "--batch-size", "4096", "--data", "BETON", "--set", "moco.queue=8192"],
            "fewer than one batch",
        ),
        (["--arch", ARCH, "--batch-size", "49", "--data", "BETON"], "the largest that would do is --batch-size 48"),
    ],
)
def test_mistakes_are_one_line_with_status_1(
    arguments: list[str], message: str, beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(beton) if a == "BETON" else a for a in arguments]
    recipe = [] if "--recipe" in arguments else ["--recipe", "few-photos-moco"]
    assert cli("pretrain", *arguments, *recipe, "--out", str(tmp_path / "run"), "--device", "cpu") == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture) -> None:
    assert cli("pretrain", "--epochs", "0") == 2
    assert cli("pretrian") == 2
    assert "nearest: pretrain" in capsys.readouterr().err
    assert cli("--help") == 0


@pytest.mark.parametrize("end", ["well", "crash", "signal"])
def test_a_recorded_step_is_gone_when_the_processes_part(
    end: str, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL waits with the end of its communicator until no CUDA graph holds its collectives, forever if need be; also
    in an abort, where tracebacks hold all.
    """

    class Graph:
        def __init__(self, call: Callable[[], Tensor]):
            self.call, self.result, self.replays = call, torch.empty(0), 0

        def replay(self) -> None:
            self.replays += 1
            if self.replays == 4 and end == "crash":
                del self  # CUDA's has no frame that a traceback could hold
                raise FastSSLError("crashed")
            values = self.call()
            self.result.resize_(values.shape).copy_(values)

    recorded: list[weakref.ref] = []
    alive: list[bool] = []

    def record(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = Graph(call)
        recorded.append(weakref.ref(graph))
        return graph.replay, graph.result

    @contextmanager
    def parting(*arguments: object, **options: object) -> Iterator[None]:
        try:
            yield
        finally:
            alive.append(recorded[0]() is not None)

    original = trainer.make_step

    def step(run: Setup, batch: object) -> object:
        if run.position.step == 3 and end == "signal":
            run.stop.set()
        return original(run, batch)

    monkeypatch.setattr(setup, "TrainStep", partial(TrainStep, record=record))
    monkeypatch.setattr(pretrain_module, "joined", parting)
    monkeypatch.setattr(trainer, "make_step", step)
    gc.disable()  # it would free what only a cycle holds, some time
    try:
        with {"well": nullcontext(), "crash": pytest.raises(FastSSLError), "signal": pytest.raises(Interrupted)}[end]:
            pretrain(small("train.graph=true", "train.epochs=1"), options(beton, tmp_path / "run"), Silent())
    finally:
        gc.enable()
    assert len(recorded) == 1 and alive == [False]


@pytest.mark.gpu
def test_a_run_on_the_gpu_has_no_host_sync_in_its_steps(beton: Path, tmp_path: Path) -> None:
    original = trainer.make_step

    def watched(run: Setup, batch: object) -> object:
        torch.cuda.set_sync_debug_mode("error" if run.position.step > 2 else "default")
        try:
            return original(run, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", watched)
        summary = pretrain(small(), options(beton, tmp_path / "run", device="cuda"), Silent())
    assert summary["device"] == "cuda"


def test_switches_that_cannot_be_used_are_said_and_change_nothing(finished: Path, beton: Path, tmp_path: Path) -> None:
    said = Silent()
    summary = pretrain(small("train.graph=true"), options(beton, tmp_path / "run"), said)
    assert "without graph: a CUDA graph needs an NVIDIA GPU, this is the cpu" in said.messages
    assert list(summary["fallbacks"]) == ["graph"]
    mine = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["method"]
    reference = torch.load(finished / "checkpoints" / "last.pt", weights_only=True)["method"]
    assert all(torch.equal(mine[name], reference[name]) for name in reference)


def test_a_setting_for_other_networks_is_a_line_and_no_warning(beton: Path, tmp_path: Path) -> None:
    """The quick start silences residual branches; whoever gives it a network without them did not ask for that."""
    said = Silent()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="zero_init_residual")
        pretrain(
            small("arch=lcnet_035", "train.epochs=1", "probe.final_samples=0"), options(beton, tmp_path / "run"), said
        )
    assert (
        said.messages.count(
            "zero_init_residual changes nothing: lcnet_035 has no residual branches that are known here"
        )
        == 1
    )
    assert "training lcnet_035: 6 of 6 steps to make, 8 photos each; 1 epoch of 6 steps" in said.messages


@pytest.mark.slow
def test_a_run_in_parts_and_bfloat16_resumes_bit_for_bit(beton: Path, tmp_path: Path) -> None:
    recipe, original = small("train.accumulate=2", "train.amp=bf16", "optim.name=lars"), trainer.make_step

    def stop_after_three(run: Setup, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 2:
            run.stop.set()
        return metrics

    whole = pretrain(recipe, options(beton, tmp_path / "whole"), Silent())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", stop_after_three)
        with pytest.raises(Interrupted):
            pretrain(recipe, options(beton, tmp_path / "cut"), Silent())
    pretrain(recipe, options(beton, tmp_path / "cut"), Silent())
    mine, reference = (
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True)["method"]
        for name in ("cut", "whole")
    )
    assert all(torch.equal(mine[name], reference[name]) for name in reference) and whole["steps"] == 12


def test_a_run_from_before_a_key_existed_goes_on(finished: Path, beton: Path, tmp_path: Path) -> None:
    state = torch.load(finished / "checkpoints" / "last.pt", weights_only=True)
    for part, key in (("optim", "trust"), ("train", "accumulate"), ("train", "graph")):
        del state["config"][part][key]
    del state["digest"], state["position"]["skipped"], state["position"]["passed_over"]
    torch.save({**state, "version": 1}, tmp_path / "last.pt")
    said = Silent()
    pretrain(small(), options(beton, tmp_path / "run", resume=str(tmp_path / "last.pt")), said)
    assert any("resumed at step 12" in message for message in said.messages)
    with pytest.raises(FastSSLError, match=r"train\.accumulate: 1 there, 2 here"):
        pretrain(
            small("train.accumulate=2"), options(beton, tmp_path / "other", resume=str(tmp_path / "last.pt")), Silent()
        )


def test_a_switch_that_was_asked_for_and_not_used_takes_nothing_from_the_clock(beton: Path, tmp_path: Path) -> None:
    """With a single step in the run, its time is all there is."""
    one = small("train.graph=true", "train.epochs=1", "train.batch_size=32")
    summary = pretrain(one, options(beton, tmp_path / "run"), Silent())
    assert summary["steps"] == 1 and 0 <= summary["data_wait"] <= 1
    assert summary["pair_per_s"] == pytest.approx(32 / summary["train_seconds"]) and summary["train_seconds"] > 0.01
