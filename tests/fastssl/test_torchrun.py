"""The same command under torchrun: two processes make one run, which one process can take over, and the other way
round.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import Started, free_port, run_processes

from fastssl.config.recipe import load_recipe, parse_overrides
from fastssl.errors import FastSSLError, Interrupted
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pretrain import pretrain
from fastssl.training import trainer
from fastssl.training.setup import RunOptions, Setup

pytestmark = pytest.mark.slow

SMALL = [
    "views.global_size=32",
    "views.local_size=16",
    "views.local_count=2",
    "dino.out=32",
    "dino.projector.hidden=16",
    "dino.projector.out=16",
    "train.epochs=2",
    "train.batch_size=8",
    "train.log_every=3",
    "optim.warmup_epochs=1",
    "probe.size=32",
    "probe.every_epochs=1",
    "probe.online_samples=20",
    "probe.final_samples=24",
    "probe.reestimate_bn=16",
]
RECIPE, ARCH = "dino-mobilenetv2-sslight", "resnet10t"
ROWS = ("raw pixels (16x16)", "colour histogram", "random initialisation", "after pre-training", "its teacher")


class Silent:
    def row(self, row: dict, done: int, total: int) -> None: ...
    def message(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...


def alone(beton: Path, out: Path) -> None:
    options = RunOptions(recipe_name=RECIPE, data=beton, out=out, device="cpu", workers=1)
    pretrain(load_recipe(RECIPE, parse_overrides([f"arch={ARCH}", *SMALL])), options, Silent())


def together(beton: Path, out: Path, processes: int = 2) -> subprocess.CompletedProcess:
    command = [
        "pretrain",
        "--arch",
        ARCH,
        "--recipe",
        RECIPE,
        "--data",
        str(beton),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--workers",
        "1",
    ]
    return torchrun([*command, *(argument for item in SMALL for argument in ("--set", item))], processes)


def torchrun(command: list[str], processes: int) -> subprocess.CompletedProcess:
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        str(free_port()),
        "-m",
        "fastssl",
    ]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def test_processes_convert_a_folder_once(
    photo_tree: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they agree on the file, the batch and the epochs."""
    # Its own folder: matplotlib puts its list of fonts there.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    folder, out = tmp_path / "photos", tmp_path / "run"
    folder.mkdir()
    for number, photo in enumerate(sorted(photo_tree.rglob("*.jpg"))[:12]):
        (folder / f"{number}.jpg").write_bytes(photo.read_bytes())
    command = [
        "pretrain",
        "--arch",
        ARCH,
        "--data",
        str(folder),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--workers",
        "1",
    ]
    small = [
        "views.0.size=32",
        "train.samples=320",
        "probe.every_epochs=0",
        "simclr.projector.hidden=16",
        "simclr.projector.out=8",
    ]
    done = torchrun([*command, *(argument for item in small for argument in ("--set", item))], 2)
    assert done.returncode == 0, done.stderr
    # The first process speaks; the other one may have been the one that converted.
    assert (
        sum(done.stderr.count(words) for words in ("12 photos, no labels, now also in", "converted before, into")) == 1
    )
    assert done.stderr.count("for 12 photos: train.batch_size 64 -> 4") == 1
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["data"]["name"], config["train"]["epochs"], config["train"]["samples"]) == ("photos.beton", 5, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "photos.beton", "photos.beton.json", "run"]


def workers(launcher: int) -> dict[int, int]:
    """The launcher's processes: their numbers by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found.update({int(item[5:]): int(child) for item in environ if item.startswith(b"RANK=")})
    return found


def steps(out: Path) -> list[dict]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "step"]


@pytest.fixture(scope="module")
def one(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    alone(beton, out)
    return out


def test_two_processes_write_one_run(one: Path, beton: Path, tmp_path: Path) -> None:
    found = together(beton, tmp_path / "run")
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("probed on") == 1, "one process speaks for all"
    mine, theirs = steps(tmp_path / "run"), steps(one)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == [3, 6, 9, 12]
    # Rounding grows from step to step; the first blocks show that these are the same photos, views, weights and rates.
    assert mine[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-4)
    assert mine[1]["loss"] == pytest.approx(theirs[1]["loss"], rel=1e-2)
    assert [row["lr"] for row in mine] == [row["lr"] for row in theirs]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples_seen"] == 96 and tuple(row["name"] for row in summary["probe"]["rows"][:5]) == ROWS
    assert len(summary["probe"]["rows"]) == 7  # student and teacher, and both with statistics of centre crops


def test_one_process_takes_over_from_two_and_two_from_one(one: Path, beton: Path, tmp_path: Path) -> None:
    original = trainer.make_step

    def stop(run: Setup, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 3:
            run.stop.set()
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", stop)
        with pytest.raises(Interrupted, match="step 4"):
            alone(beton, tmp_path / "run")
    found = together(beton, tmp_path / "run")
    assert found.returncode == 0 and "resumed at step 4" in found.stderr, found.stderr
    before = (tmp_path / "run" / "checkpoints" / "last.pt").stat().st_mtime_ns
    alone(beton, tmp_path / "run")  # finished: reported again, not trained again
    assert (tmp_path / "run" / "checkpoints" / "last.pt").stat().st_mtime_ns == before
    assert steps(tmp_path / "run")[0]["loss"] == steps(one)[0]["loss"]
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["position"]["step"] == 12


def test_the_first_process_speaks_for_all_when_they_end_together(beton: Path, tmp_path: Path) -> None:
    """A signal to one of them, then a folder that is refused."""
    out, arguments = (
        tmp_path / "run",
        [argument for item in [*SMALL, "train.epochs=500", "train.log_every=1"] for argument in ("--set", item)],
    )
    command = [
        "-m",
        "fastssl",
        "pretrain",
        "--arch",
        ARCH,
        "--recipe",
        RECIPE,
        "--data",
        str(beton),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    with Started([[*command, "--workers", "1", *arguments]] * 2, tmp_path) as started:
        started.wait_until_said(0, "steps to make", timeout=200)
        deadline = time.monotonic() + 100
        while not (out / "metrics.jsonl").is_file() or not steps(out):
            assert time.monotonic() < deadline, started.said(0)
            time.sleep(0.1)
        os.kill(started.processes[1].pid, signal.SIGTERM)
        assert started.ended([0, 1], timeout=120) == [130, 130]
        first, second = started.said(0), started.said(1)
    assert first.startswith("2 processes start") and first.index("2 processes meet at") < first.index(
        "all 2 are here after"
    ), first
    assert first.count("fastssl: stopped at step") == 1 and "everything is saved" in first and second == "", (
        first,
        second,
    )
    with Started([[*command, "--workers", "1", *arguments, "--set", "optim.lr=0.5"]] * 2, tmp_path) as started:
        assert started.ended([0, 1], timeout=200) == [1, 1]
        first, second = started.said(0), started.said(1)
    assert first.count("belongs to a run with other settings") == 1 and second == "", (first, second)


def started_apart(beton: str, out: str) -> str:
    """A run of which process 1 was told another number of epochs; what it says."""
    from fastssl.distributed.world import world_from_environment

    world = world_from_environment()
    overrides = [f"arch={ARCH}", *SMALL, *(["train.epochs=3"] if world.rank else [])]
    options = RunOptions(recipe_name=RECIPE, data=Path(beton), out=Path(out), device="cpu", workers=1)
    with pytest.raises(FastSSLError) as error:
        pretrain(load_recipe(RECIPE, parse_overrides(overrides)), options, Silent())
    return str(error.value)


def test_processes_with_different_settings_say_so_instead_of_waiting(beton: Path, tmp_path: Path) -> None:
    first, second = run_processes(started_apart, 2, str(beton), str(tmp_path / "run"), join=False)
    assert "different settings" in first and "another one says which" in first
    assert "this is process 1: train.epochs: 2 there, 3 here" in second
    assert not (tmp_path / "run").exists()


def test_what_cannot_work_ends_all_processes_with_one_reason(beton: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    found = together(beton, tmp_path / "run", processes=3)  # 8 samples a step are not shared out over 3
    assert found.returncode != 0 and time.monotonic() - started < 120
    assert (
        found.stderr.count("fastssl: train.accumulate=1 and 3 processes must divide the batch of 8 into equal parts")
        == found.stderr.count("fastssl: ")
        == 1
    )


@pytest.mark.parametrize("missing", ["run", "photos"])
def test_what_an_evaluation_lacks_is_said_once(missing: str, one: Path, beton: Path, tmp_path: Path) -> None:
    found = torchrun(
        [
            "evaluate",
            "knn",
            str(tmp_path if missing == "run" else one),
            "--data",
            str(tmp_path / "no.beton" if missing == "photos" else beton),
            "--device",
            "cpu",
        ],
        processes=2,
    )
    said = f"fastssl: {tmp_path}{'' if missing == 'run' else '/no.beton'}: "
    assert found.returncode != 0 and found.stderr.count(said) == found.stderr.count("fastssl: ") == 1, found.stderr


def skipping(data: str, out: str) -> int | None:
    """A run over damaged photos that passes them over; how many it says it has left out."""
    overrides = [f"arch={ARCH}", *SMALL, "train.on_bad=skip"]
    options = RunOptions(recipe_name=RECIPE, data=Path(data), out=Path(out), device="cpu", workers=1)
    summary = pretrain(load_recipe(RECIPE, parse_overrides(overrides)), options, Silent())
    return summary and summary["skipped"]


def test_damaged_photos_of_all_processes_are_counted(beton: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "damaged.beton", bytearray(beton.read_bytes())
    with BetonReader(beton) as reader:
        for sample in range(0, 48, 4):
            start, size = int(reader.offsets[sample]), int(reader.sizes[sample])
            content[start : start + size] = bytes(size)
    path.write_bytes(content)
    assert skipping(str(path), str(tmp_path / "one")) == 12
    assert run_processes(skipping, 2, str(path), str(tmp_path / "two"), join=False) == [12, None]
