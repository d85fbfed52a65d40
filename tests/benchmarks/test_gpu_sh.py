"""benchmarks/gpu.sh, with a stand-in for Python that writes a record for each part instead of measuring."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastssl.benchmarks
from fastssl.pipelines.engines.registry import engine_state

ROOT = Path(fastssl.benchmarks.__path__[0]).resolve().parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

# The parts are answered here; everything else that the script asks of Python, the real one answers. Without `site` it
# knows no installed fastssl.
STAND_IN = """#!/bin/bash
export PYTHONPATH="$PYTHONPATH:{site}"
if [[ "$*" != *fastssl.cli* ]]; then exec "{python}" -S "$@"; fi
pwd >>"{log}.cwd"
echo $$ >>"{log}.pid"
echo "$*" >>"{log}"
out="${{@: -1}}"
name="$(basename "$out" .jsonl)"
echo "measuring $name" >&2
"{python}" -S -c 'import os, fastssl.pipelines, fastssl.benchmarks, fastssl.recipes as r
print(os.path.realpath(r.__path__[0]))' >>"{log}.from" || exit 9
echo "{{\\"bench\\": \\"$name\\", \\"host\\": {{}}, \\"versions\\": {{}}}}" >"$out"
case "$name" in {failing}) exit 3 ;; {hanging}) sleep 60 ;; esac
"""
PARTS = [
    "ceilings",
    "step",
    "step-graph",
    "train",
    "step-compiled",
    "loader",
    "step-recipes",
    "step-local",
    "train-local",
    "loader-local",
    "views",
    "loss",
    "train-recipes",
    "loader-recipes",
]
pytestmark = pytest.mark.engines

ENGINES = [name for name in ("dali", "ffcv") if not engine_state(name).problem]
PARTS += ["engines"] if ENGINES else []
PARTS += ["convert", "peers", "step-compiled-recipes"]


@pytest.fixture
def stand_in(tmp_path: Path):
    def make(failing: str = "-", hanging: str = "-") -> Path:
        path = tmp_path / "python"
        site = sysconfig.get_paths()["purelib"]
        path.write_text(
            STAND_IN.format(site=site, python=sys.executable, log=tmp_path / "log", failing=failing, hanging=hanging)
        )
        path.chmod(0o755)
        return path

    return make


def script(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def benches(out: Path) -> list[str]:
    return [json.loads(line)["bench"] for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_parts_run_from_any_folder_without_an_installed_package(stand_in, tmp_path: Path) -> None:
    stand_in()
    (tmp_path / "photos.beton").write_text("not read here")
    done = script("--smoke", "--python", "./python", "--out", "out", "--data", "photos.beton", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert benches(tmp_path / "out") == PARTS
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {part} " in report for part in PARTS)
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "out" / "recipes.md").is_file()
    assert "importing it from" in done.stdout
    assert set((tmp_path / "log.from").read_text().split()) == {str(ROOT / "fastssl" / "recipes")}
    # Every line carries the clock, those of the parts too; the log is what was printed.
    assert all(line.startswith("[") and " s] " in line for line in done.stdout.splitlines())
    assert "measuring step" in done.stdout
    assert (tmp_path / "out" / "log.txt").read_text() == done.stdout
    # All four recipes go through step, loader and train; real and synthetic input; both precisions; compiled and not.
    commands = (tmp_path / "log").read_text().splitlines()
    for bench in ("step", "loader", "train", "views"):
        mine = " ".join(command for command in commands if f" bench {bench} " in command)
        for recipe in ("light-moco-mobilenetv3", "light-moco-efficientnet_b0", "moco-v2-resnet50", "few-photos-moco"):
            assert f"--recipe {recipe}" in mine
        if bench != "step":
            assert "--data synthetic" in mine and f"--data {tmp_path / 'photos.beton'}" in mine
    text = "\n".join(commands)
    assert (
        "--compile --graph" in text
        and "loader --peers" in text
        and " bench convert " in text
        and "--amp bf16" in text
        and "--amp off" in text
        and text.count("--workers") == (4 if ENGINES else 2)
    )
    assert all(f"--pipeline {name}" in text for name in ENGINES)
    # Nothing is left behind: the parts ran in a folder that is gone.
    assert not Path((tmp_path / "log.cwd").read_text().split()[0]).exists()


@pytest.mark.slow
def test_a_part_that_fails_is_listed_and_the_rest_runs(stand_in, tmp_path: Path) -> None:
    done = script("--smoke", "--python", stand_in(failing="loader | views"), "--out", tmp_path / "out")
    assert done.returncode == 1
    assert benches(tmp_path / "out") == PARTS  # what a failing part had finished is kept
    failed = [line.split("] ")[1] for line in done.stdout.splitlines() if "FAILED" in line]
    assert failed == ["FAILED loader: status 3", "FAILED views: status 3"]


@pytest.mark.slow
def test_time_limits(stand_in, tmp_path: Path) -> None:
    done = script("--smoke", "--python", stand_in(hanging="step"), "--out", tmp_path / "out", "--budget", 5)
    assert done.returncode == 1
    assert "FAILED step: stopped after" in done.stdout
    assert "FAILED step-graph: not reached within 5 s" in done.stdout
    assert benches(tmp_path / "out") == ["ceilings", "step"]


def test_a_stop_keeps_what_is_finished(stand_in, tmp_path: Path) -> None:
    path = stand_in(hanging="loader")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "--smoke", "--python", str(path), "--out", str(tmp_path / "out")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that was itself started in the background hands SIGINT on as ignored, and bash cannot trap what was
        # ignored at its start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stdout:
        if "measuring loader" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    process.stdout.read()
    assert process.wait(timeout=20) == 130
    process.stdout.close()
    assert benches(tmp_path / "out")[:2] == ["ceilings", "step"]
    assert not Path((tmp_path / "log.cwd").read_text().split()[0]).exists()
    # The part went with the script.
    pid = int((tmp_path / "log.pid").read_text().split()[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nothing"], "unknown option --nothing"),
        (["--python"], "--python needs a value"),
        (["--python", "/nowhere/python"], "no such program"),
        (["--data", "/nowhere.beton"], "no such file"),
        (["--budget", "soon"], "whole number"),
        (["--only", "steps"], "the parts are ceilings, step,"),
    ],
)
def test_wrong_use(arguments: list[str], message: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_only_some_parts(stand_in, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = script("--smoke", "--only", "views,step", "--python", stand_in(failing="loader"), "--out", out)
    assert done.returncode == 0 and " step: done" in done.stdout and " views: done" in done.stdout
    assert done.stdout.count(" done in ") == 2


def test_help() -> None:
    done = script("--help")
    assert done.returncode == 0 and "--smoke" in done.stdout and "set -uo" not in done.stdout


def test_without_a_gpu_it_says_what_to_do(stand_in, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there is one, the script does not see it
    done = script("--python", stand_in(), "--out", tmp_path / "out")
    assert done.returncode == 1 and "--smoke" in done.stderr
