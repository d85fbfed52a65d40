"""benchmarks/gpu.sh, with a stand-in for Python that writes a record for each part instead of measuring."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastssl.benchmarks
from fastssl.cli.bench import bench as group
from fastssl.config.recipe import load_recipe
from fastssl.pipelines.engines.registry import engine_state

ROOT = Path(fastssl.benchmarks.__path__[0]).resolve().parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

# The parts are answered here; everything else that the script asks of Python, the real one answers. Without `site` it
# knows no installed fastssl.
STAND_IN = """#!/bin/bash
export PYTHONPATH="$PYTHONPATH:{site}"
[[ "$*" != *cuda.is_available* ]] || {gpu}
if [[ "$*" != "-m fastssl bench "* || "$*" == *" report "* ]]; then exec "{python}" -S "$@"; fi
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
#: What the minutes reach even if each part takes all of its time, and what is measured as time is left.
MUST = [
    "ceilings",
    "step-graph",
    "step",
    "views",
    "train",
    "loader",
    "step-compiled",
    "step-local",
    "loss",
    "step-recipes",
]
REST = ["train-recipes", "train-local", "loader-local", "loader-recipes"]
pytestmark = pytest.mark.engines

ENGINES = [name for name in ("dali", "ffcv", "torchcodec") if not engine_state(name).problem]
REST += ["engines"] if ENGINES else []
REST += ["convert", "peers", "views-recipes", "step-compiled-recipes", "step-float32"]
PARTS = MUST + REST


@pytest.fixture
def stand_in(tmp_path: Path):
    def make(failing: str = "-", hanging: str = "-", gpu: str = "true") -> Path:
        path = tmp_path / "python"
        # An environment may stand on another one.
        site = ":".join(path for path in sys.path if path.endswith("site-packages"))
        path.write_text(
            STAND_IN.format(
                site=site, python=sys.executable, log=tmp_path / "log", failing=failing, hanging=hanging, gpu=gpu
            )
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
        timeout=300,
    )


def log(out: Path) -> str:
    return (out / "log.txt").read_text()


def benches(out: Path) -> list[str]:
    return [json.loads(line)["bench"] for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_parts_run_from_any_folder_without_an_installed_package(stand_in, tmp_path: Path) -> None:
    stand_in()
    done = script("--smoke", "--python", "./python", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert benches(tmp_path / "out") == PARTS
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {part} " in report for part in PARTS)
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "out" / "recipes.md").is_file()
    assert set((tmp_path / "log.from").read_text().split()) == {str(ROOT / "fastssl" / "recipes")}
    # Every line carries the clock, those of the parts too; the log is what was printed.
    assert all(line.startswith("[") and " s] " in line for line in done.stdout.splitlines())
    assert "measuring step" in done.stdout
    assert (tmp_path / "out" / "log.txt").read_text() == done.stdout
    # What a part leaves of its time the next one has: 25 and 70 s, doubled for a smoke test.
    assert 140 < int(re.search(r"step-graph: at most (\d+) s", done.stdout)[1]) <= 190
    # All four recipes go through step, loader and train; real and synthetic input; both precisions; compiled and not.
    commands = (tmp_path / "log").read_text().splitlines()
    for bench in ("step", "loader", "train", "views"):
        mine = " ".join(command for command in commands if f" bench {bench} " in command)
        for recipe in ("light-moco-mobilenetv3", "light-moco-efficientnet_b0", "moco-v2-resnet50", "few-photos-moco"):
            assert f"--recipe {recipe}" in mine
        if bench != "step":
            assert "--data synthetic" in mine and "--data samples" in mine
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
    # By its name a part is measured again.
    again = script("--smoke", "--only", "views", "--python", "./python", "--out", "out", cwd=tmp_path)
    assert again.returncode == 0 and benches(tmp_path / "out") == [*PARTS, "views"]
    # Nothing is left behind: the parts ran in a folder that is gone.
    assert not Path((tmp_path / "log.cwd").read_text().split()[0]).exists()


@pytest.mark.slow
def test_the_commands_for_a_gpu_are_ones_that_there_are(stand_in, tmp_path: Path) -> None:
    """They never ran where this test does: each option and value is one that its command takes."""
    done = script("--python", stand_in(gpu="exit 0"), "--out", tmp_path / "out")
    assert done.returncode == 0 and benches(tmp_path / "out") == PARTS
    for command in (tmp_path / "log").read_text().splitlines():
        _, _, _, name, *arguments = shlex.split(command.split(" --json")[0])
        context = group.get_command(None, name).make_context(name, arguments)
        recipes = [load_recipe(recipe) for recipe in context.params.get("recipes", ())]
        assert all(
            recipe.settings.allows(context.params.get("batch_size") or recipe.train.batch_size) for recipe in recipes
        )


def test_what_must_be_reached_fits_into_the_minutes() -> None:
    """The limits of the first parts, in their order, and the seconds that are kept for the report, come to eight
    minutes; in float32 it is measured last."""
    text = SCRIPT.read_text()
    must, rest = text.split("# What eight minutes must reach")[1].split("# As time is left.")
    limits = dict(re.findall(r"^part ([a-z-]+) (\d+) ", must, re.MULTILINE))
    assert list(limits) == MUST and sum(map(int, limits.values())) + 15 == 8 * 60
    assert "MINUTES=8\n" in text and "60 * $MINUTES - 15" in text
    assert re.findall(r"^ *part ([a-z0-9-]+) ", rest, re.MULTILINE)[-1] == "step-float32"


@pytest.mark.slow
def test_a_part_that_fails_is_listed_and_the_rest_runs(stand_in, tmp_path: Path) -> None:
    done = script("--smoke", "--python", stand_in(failing="loader | views"), "--out", tmp_path / "out")
    assert done.returncode == 1
    assert benches(tmp_path / "out") == PARTS  # what a failing part had finished is kept
    failed = [line.split("] ")[1].split(" after")[0] for line in done.stdout.splitlines() if "FAILED" in line]
    assert failed == ["FAILED views: status 3", "FAILED loader: status 3"]


@pytest.mark.slow
def test_time_limits(stand_in, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = script("--smoke", "--python", stand_in(hanging="step"), "--out", out, "--minutes", 0.4)
    assert done.returncode == 1
    assert "FAILED step: status 124 after" in done.stdout
    assert "FAILED views: not reached within 0.4 min" in done.stdout
    assert benches(out) == MUST[:3] and (out / "report.html").is_file()
    # Where it was cut off it goes on, in the same files.
    again = script("--smoke", "--python", stand_in(failing="loss"), "--out", out)
    assert again.returncode == 1 and benches(out) == [*MUST[:3], *PARTS[2:]] and log(out).endswith(again.stdout)
    assert re.findall(r"\] ([a-z-]+): done before", again.stdout) == MUST[:2]
    # What failed is tried again, and so is what was asked for in another way.
    (out / "log.txt").write_text(log(out).replace("ceilings --device cpu", "ceilings --device cuda"))
    last = script("--smoke", "--python", stand_in(), "--out", out)
    assert last.returncode == 0 and re.findall(r"\] (\S+): done: ", last.stdout) == ["ceilings", "loss"]


def test_a_stop_keeps_what_is_finished(stand_in, tmp_path: Path) -> None:
    path = stand_in(hanging="views")
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
        if "measuring views" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    process.stdout.read()
    assert process.wait(timeout=20) == 130
    process.stdout.close()
    assert benches(tmp_path / "out")[:3] == MUST[:3]
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
        (["--minutes", "soon"], "give a number"),
        (["--only", "steps"], "the parts are ceilings, step-graph,"),
    ],
)
def test_wrong_use(arguments: list[str], message: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_only_some_parts(stand_in, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = script("--smoke", "--only", "views,step", "--python", stand_in(failing="loader"), "--out", out)
    assert done.returncode == 0 and " step: done: fastssl bench step" in done.stdout
    assert done.stdout.count(": done: ") == 2 and benches(out) == ["step", "views"]


def test_help() -> None:
    done = script("--help")
    assert done.returncode == 0 and "--smoke" in done.stdout and "set -uo" not in done.stdout


def test_without_a_gpu_it_says_what_to_do(stand_in, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there is one, the script does not see it
    done = script("--python", stand_in(), "--out", tmp_path / "out")
    assert done.returncode == 1 and "--smoke" in done.stderr
