"""What a hurried or clumsy user does: nothing is overwritten, mixed or found out too late."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import need_engine

from fastssl.cli import main
from fastssl.pipelines import BetonReader, BetonWriter
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions

TINY = [
    "train.epochs=1",
    "train.batch_size=8",
    "train.log_every=4",
    "moco.queue=64",
    "moco.projector.hidden=16",
    "probe.online_samples=40",
]
ARCH = "mobilenetv3_small_050"
COMMAND = [sys.executable, "-c", "from fastssl.cli import main; main()"]


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def pretrain(data: Path, out: Path, *more: object) -> int:
    overrides = [argument for item in TINY for argument in ("--set", item)]
    return cli(
        "pretrain",
        "--arch",
        ARCH,
        "--recipe",
        "few-photos-moco",
        "--device",
        "cpu",
        "--data",
        data,
        "--out",
        out,
        *overrides,
        *more,
    )


def test_the_source_is_never_overwritten(photo_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "photos.tar"
    with tarfile.open(source, "w") as tar:
        tar.add(photo_tree, "photos")
    before = source.read_bytes()
    assert cli("convert-imagenet", source, source) == 1
    assert "SRC and DST are one file" in capsys.readouterr().err and source.read_bytes() == before
    os.mkfifo(tmp_path / "pipe")
    assert cli("convert-imagenet", photo_tree, tmp_path / "pipe") == 1
    assert "not a plain file" in capsys.readouterr().err and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    "arguments", [["verify", "X", "--json", "X"], ["views", "X", "--recipe", "few-photos-moco", "--out", "X"]]
)
def test_results_are_not_written_over_the_photos(arguments: list[str], beton: Path, tmp_path: Path) -> None:
    copy = tmp_path / "x.beton"
    shutil.copy(beton, copy)
    assert cli(*[str(copy) if argument == "X" else argument for argument in arguments]) == 2
    assert copy.read_bytes() == beton.read_bytes()


def test_results_are_not_written_over_anything_else(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, content in (
        ("last.pt", b"PK\x03\x04"),
        ("new.safetensors", None),
        ("notes.txt", b"mine"),
        ("page.json", b"\x89PNG"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        assert cli("archs", "--json", path) == 2 and "something else than results" in capsys.readouterr().err
        assert path.read_bytes() == content if content else not path.exists()
    results = tmp_path / "results.json"
    results.write_text(' \n{"old": 1}\n')
    assert cli("archs", "--json", results) == 0 and "old" not in results.read_text()
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes", "--json", "/no/such/folder/x.json"], "no such folder"),
        (["recipes", "--json", ""], "is not a file"),
        (["convert-imagenet", "", "x.beton"], "path is empty"),
        (["pretrain", "--arch", ARCH, "--out", ""], "path is empty"),
        (["pretrain", "--arch", ARCH, "--seed", "-1"], "seed"),
        (["pretrain", "--arch", ARCH, "--epochs", "3", "--set", "train.epochs=4"], "say the same thing"),
        (["bench", "loader", "--seconds", "nan"], "not a number to work with"),
    ],
)
def test_wrong_usage_is_found_before_the_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli(*arguments) == 2
    assert message in capsys.readouterr().err


def test_starting_over_removes_what_the_other_run_left(beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert pretrain(beton, out) == 0
    first = torch.load(out / "checkpoints" / "last.pt", weights_only=True)["position"]
    assert first["step"] == 6
    assert (
        pretrain(
            beton, out, "--resume", "never", "--seed", 5, "--set", "optim.lr=1e30", "--set", "optim.warmup_epochs=0"
        )
        == 1
    )
    left = {path.name for path in out.rglob("*") if path.is_file()}
    kept = {"batch.safetensors", "step.json", "views.png"}  # of the step that ended this one
    assert left == {"config.yaml", "metrics.jsonl", "status.json", ".lock"} | kept


@pytest.mark.engines
def test_an_engine_that_cannot_run_touches_no_earlier_run(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    need_engine("dali")
    out = tmp_path / "run"
    assert pretrain(beton, out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert pretrain(beton, out, "--resume", "never", "--pipeline", "dali", "--set", "views.0.size=12") == 1
    assert "views of 12 px are below 16" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_two_runs_do_not_share_a_folder(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert pretrain(beton, out) == 1
    assert "another fastssl pretrain is writing here; wait for its end" in capsys.readouterr().err
    assert pretrain(beton, out) == 0


def test_resuming_asks_for_the_same_photos(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, other = tmp_path / "run", tmp_path / beton.name
    assert pretrain(beton, out) == 0
    with BetonReader(beton) as reader, BetonWriter(other, len(reader)) as writer:
        for sample in reversed(range(len(reader))):
            writer.add(
                reader.encoded(sample),
                int(reader.heights[sample]),
                int(reader.widths[sample]),
                int(reader.labels[sample]),
            )
        writer.finish()
    assert pretrain(other, out) == 1
    assert "data.tables" in capsys.readouterr().err


@pytest.mark.slow
def test_a_finished_run_without_its_metrics_is_reported_all_the_same(beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert pretrain(beton, out) == 0
    (out / "metrics.jsonl").write_bytes(b'[1]\n{}\n\xff\n{"kind": "st')
    assert pretrain(beton, out) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pair_per_s"] is None and summary["probe"]["rows"]


def test_val_must_have_classes_of_train(
    beton: Path, photo_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from fastssl.pipelines.convert.conversion import convert
    from fastssl.pipelines.convert.options import ConvertOptions

    shutil.copytree(photo_tree, tmp_path / "other")
    (tmp_path / "other" / "blue").rename(tmp_path / "other" / "violet")
    convert(tmp_path / "other", tmp_path / "other.beton", ConvertOptions(keep_size=True))
    assert pretrain(beton, tmp_path / "run", "--val", tmp_path / "other.beton") == 1
    assert "do not have the same classes (1 class of the second, of 3, not in the first: violet)" in (
        capsys.readouterr().err
    )


def test_damaged_photos_in_val_are_found_before_training(
    beton: Path, damaged: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, sample = damaged
    assert pretrain(beton, tmp_path / "run", "--val", path) == 1
    assert f"damaged are 1 of 48 photos, the first is sample {sample}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert pretrain(beton, tmp_path / "run", "--val", path, "--set", "train.on_bad=skip") == 0


def test_a_side_file_that_cannot_be_read_is_known_before_training(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And not when the report asks for the names of the classes, after the last epoch."""
    data = tmp_path / "photos.beton"
    data.write_bytes(beton.read_bytes())
    (tmp_path / "photos.beton.json").write_text("{")
    assert pretrain(data, tmp_path / "run") == 1
    assert "photos.beton.json: unreadable side file" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_photo_that_cannot_be_shown_is_named(
    damaged: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, sample = damaged
    assert cli("views", path, "--recipe", "few-photos-moco", "--out", tmp_path / "views.png", "--samples", 48) == 0
    assert f"damaged and not shown: sample {sample};" in capsys.readouterr().err


def test_a_queue_that_no_memory_holds_is_one_clear_line(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert pretrain(beton, tmp_path / "run", "--set", f"moco.queue={2**50}") == 1
    assert "no memory for the networks of moco" in capsys.readouterr().err


def test_blocks_longer_than_the_run_cost_nothing(beton: Path, tmp_path: Path) -> None:
    assert pretrain(beton, tmp_path / "run", "--set", f"train.log_every={2**50}") == 0


def test_sizes_that_the_network_cannot_take_are_found_before_training(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = [argument for item in TINY for argument in ("--set", item)]
    status = cli(
        *[
            "pretrain",
            "--arch",
            "vit_tiny",
            "--recipe",
            "few-photos-moco",
            "--device",
            "cpu",
            "--data",
            beton,
            "--out",
            tmp_path / "run",
        ],
        *[*overrides, "--set", "probe.size=30"],
    )
    assert status == 1
    assert "vit_tiny cannot take pictures of 30 px; try --set probe.size=32," in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    command = [
        "pretrain",
        "--arch",
        "vit_tiny",
        "--recipe",
        "dino-vit_tiny-sslight",
        "--device",
        "cpu",
        "--data",
        beton,
        "--out",
        tmp_path / "run",
    ]
    small = ["train.batch_size=8", "dino.out=16", "dino.projector.hidden=16", "views.local_size=30"]
    assert cli(*command, *(word for change in small for word in ("--set", change))) == 1
    assert "pictures of 30 px; try --set views.local_size=32, or" in capsys.readouterr().err


def test_one_photo_in_each_class_is_a_run_without_a_probe(
    photo_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number, photo in enumerate(sorted(photo_tree.rglob("*.jpg"))[:8]):
        (tmp_path / "photos" / str(number)).mkdir(parents=True)
        (tmp_path / "photos" / str(number) / "1.jpg").write_bytes(photo.read_bytes())
    convert(tmp_path / "photos", tmp_path / "eight.beton", ConvertOptions(keep_size=True, short_side=None))
    assert pretrain(tmp_path / "eight.beton", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["probe"]["rows"] == []
    convert(tmp_path / "photos", tmp_path / "one.beton", ConvertOptions(keep_size=True, short_side=None, limit=1))
    assert pretrain(tmp_path / "one.beton", tmp_path / "other") == 1
    assert "one.beton: 1 photo, but a batch has at least 2; add photos" in capsys.readouterr().err


def test_sigterm_ends_a_conversion_like_ctrl_c(tmp_path: Path, photo_tree: Path) -> None:
    big = tmp_path / "big"
    for number in range(40):
        shutil.copytree(photo_tree, big / f"{number:02}", dirs_exist_ok=True)
    tree = tmp_path / "flat"
    tree.mkdir()
    for number, path in enumerate(sorted(big.rglob("*.jpg"))):
        (tree / f"{number:05}.jpg").write_bytes(path.read_bytes())
    command = [
        *COMMAND,
        "convert-imagenet",
        str(tree),
        str(tmp_path / "x.beton"),
        "--no-resume",
        "--short-side",
        "20",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "x.beton.partial").exists():
        time.sleep(0.005)
    process.terminate()
    process.communicate(timeout=60)
    # The signal may come when all is done; then the file is whole. Otherwise nothing is left.
    assert process.returncode in (0, 130)
    assert (tmp_path / "x.beton").exists() == (process.returncode == 0)
    assert not (tmp_path / "x.beton.partial").exists()


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_failure() -> None:
    process = subprocess.Popen([*COMMAND, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) in (0, -signal.SIGPIPE) and error == b""


def test_ids_are_ids(beton: Path) -> None:
    from fastssl.pipelines import FastSSLError, ViewLoader, ViewSpec

    for wrong in (np.arange(48) % 2 == 0, np.array([0.5, 1.5]), np.zeros((2, 2), int)):
        with pytest.raises(FastSSLError, match="indices must be a list of sample ids"):
            ViewLoader(beton, [ViewSpec(size=16)], 1, indices=wrong)
    with pytest.raises(FastSSLError, match="drop_last=False with shuffle=False goes with one process"):
        ViewLoader(beton, [ViewSpec(size=16)], 5, drop_last=False, shuffle=False, world=2)


def test_one_epoch_at_a_time(beton: Path) -> None:
    from fastssl.pipelines import FastSSLError, ViewLoader, ViewSpec

    with ViewLoader(beton, [ViewSpec(size=16)], 8) as loader:
        first = loader.epoch(0)
        next(first)
        with pytest.raises(FastSSLError, match="still running"):
            next(loader.epoch(1))
        assert len(list(first)) == len(loader) - 1
        assert len(list(loader.epoch(1))) == len(loader)
