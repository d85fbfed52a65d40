"""tests/gpu_first.sh, with a stand-in for Python that notes what it was asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = TESTS / "gpu_first.sh"
STEPS = ["versions", "copies", "first-tests", "bench", "other-tests", "learn"]

# What the steps run is answered here, and so are the parts of gpu.sh; its own questions the real Python answers.
STAND_IN = """#!/bin/bash
name=""
case "$*" in
    *"fastssl doctor") name=versions ;;
    *copy_limit*) name=copies ;;
    *"-m pytest "*" -k "*) name=first-tests ;;
    *"-m pytest "*) name=other-tests ;;
    *pretrain*) name=learn ;;
    *"fastssl bench report "*) ;;
    *"fastssl bench "*) name=part ;;
esac
[[ -n "$name" ]] || exec "{python}" "$@"
echo "$name" >>"{log}"
last="${{@: -1}}"
case "$name" in
    part) echo '{{"bench": "loss", "host": {{}}, "versions": {{}}}}' >"$last" ;;
    learn)
        out="$(grep -oP -- "--out \\K\\S+" <<<"$*")"
        mkdir -p "$out" && touch "$last" "$out/report.html" "$out/metrics.jsonl"
        ;;
esac
case "$name" in {failing}) echo "failing"; exit 3 ;; {hanging}) sleep 60 ;; esac
"""


def script(
    folder: Path, *arguments: object, failing: str = "-", hanging: str = "-"
) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(STAND_IN.format(python=sys.executable, log=folder / "log", failing=failing, hanging=hanging))
    python.chmod(0o755)
    command = ["bash", str(SCRIPT), str(folder / "out"), "--python", str(python), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def asked(folder: Path) -> list[str]:
    """What the stand-in was asked for since this was last called."""
    found = (folder / "log").read_text().split()
    (folder / "log").write_text("")
    return ["bench" if name == "part" else name for name in found]


@pytest.mark.slow
def test_all_steps_run_whatever_fails(tmp_path: Path) -> None:
    done = script(tmp_path, "--smoke", failing="versions | first-tests")
    assert done.returncode == 1 and asked(tmp_path) == STEPS, done.stdout + done.stderr
    assert re.findall(r"FAILED (\S+): status (\d)", done.stdout) == [("versions", "3"), ("first-tests", "3")]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    learned = ["learned.html", "learned.json", "learned.jsonl"]
    assert files == ["first.txt", *learned, "log.txt", "report.html", "results.jsonl"] and len(files) <= 8
    assert (tmp_path / "out" / "first.txt").read_text() == done.stdout
    # All of it ended: nothing is left for a second time.
    again = script(tmp_path, "--smoke")
    assert again.returncode == 0 and asked(tmp_path) == [] and again.stdout.count("done before") == len(STEPS)


@pytest.mark.slow
def test_a_step_that_was_cut_off_runs_again(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ended = [f"== [ 10 s] {name} ended with status 1\n" for name in STEPS if name != "copies"]
    (tmp_path / "out" / "first.txt").write_text("".join(ended))
    done = script(tmp_path, "--smoke", hanging="copies")
    assert done.returncode == 1 and "copies was cut off" in done.stdout and asked(tmp_path) == ["copies"]
    again = script(tmp_path, "--smoke")
    assert again.returncode == 0 and "copies ended well" in again.stdout and asked(tmp_path) == ["copies"]


def test_without_a_gpu_nothing_counts_as_done(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = script(tmp_path, "--minutes", "08")
    assert done.returncode == 1 and done.stderr.startswith("gpu_first.sh: torch sees no NVIDIA GPU here"), done.stderr
    assert not (tmp_path / "log").exists() and not (tmp_path / "out" / "first.txt").read_text()


@pytest.mark.parametrize("arguments", [["--minutes"], ["--minutes", "soon"], ["--nothing"], ["another"]])
def test_wrong_use(arguments: list[str], tmp_path: Path) -> None:
    done = script(tmp_path, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("gpu_first.sh: ") and done.stderr.count("\n") == 1


def test_help_is_no_wrong_use(tmp_path: Path) -> None:
    done = script(tmp_path, "--help")
    assert done.returncode == 0 and "tests/gpu_first.sh OUT" in done.stdout and not done.stderr


def test_the_tests_that_come_first_are_there() -> None:
    """Of the files and words that the script chooses by, each finds a test for a GPU."""
    text = SCRIPT.read_text()
    names = re.search(r"FIRST=\((pipelines[^)]*)\)", text)[1].split() + re.findall(r"FIRST\+=\((.*)\)", text)
    found = {
        f"{name}::{test}"
        for name in names
        for test in re.findall(r"mark\.gpu\n(?:@.*\n)*def (\w+)", (TESTS / name).read_text())
    }
    words = re.search(r'CHOSEN="(augment.*)"', text)[1].split(" or ")
    assert {name.split("::")[0] for name in found} == {*names}
    assert all(any(word in name for name in found) for word in words)
