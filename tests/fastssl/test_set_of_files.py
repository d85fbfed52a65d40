"""Runs and commands on 64 files that are read as one: what comes out is what comes out of one file of these photos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import need_engine
from processes import run_processes
from small_run import Silent, options, rows, same, small, state

from fastssl.cli import main
from fastssl.data.photo_source import is_source, look_at
from fastssl.errors import FastSSLError
from fastssl.evaluate.online_probe import ProbeSplit, choose_split
from fastssl.evaluate.photos import listed_labels, open_split
from fastssl.models.backbones import create_backbone, save_backbone
from fastssl.pipelines.beton import reader as reader_module
from fastssl.pipelines.beton.dataset import BetonSet, beton_files
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.pretrain import pretrain
from fastssl.training import trainer

PHOTOS, SHARDS = 128, 64


@pytest.fixture(scope="module")
def folder(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole.beton``, and ``shards/``: the same photos in 64 files."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "shards").mkdir()
    with BetonReader(beton) as reader:

        def write(path: Path, numbers: range) -> None:
            with BetonWriter(path, len(numbers)) as writer:
                for i in (37 * number % 48 for number in numbers):
                    writer.add(reader.encoded(i), *map(int, (reader.heights[i], reader.widths[i], reader.labels[i])))

        write(folder / "whole.beton", range(PHOTOS))
        for k in range(SHARDS):
            write(folder / f"shards/train-{k:05}-of-{SHARDS:05}.beton", range(2 * k, 2 * k + 2))
    return folder


def run_to(step: int, data: Path, out: Path, *changes: str) -> Silent:
    """A run of 16 steps, which ends behind ``step`` as a killed one does; called in one process or more."""

    class Crash(Exception):
        pass

    original, said = trainer.make_step, Silent()

    def make_step(run: object, batch: object) -> object:
        if run.position.step == step:
            raise Crash
        return original(run, batch)

    trainer.make_step = make_step
    always = ("train.batch_size=16", "train.checkpoint_minutes=0", "moco.split_bn=2", "probe.every_epochs=0")
    try:
        pretrain(small(*always, *changes), options(data, out), said)
    except Crash:
        assert step < 16
    finally:
        trainer.make_step = original
    return said


@pytest.mark.slow
def test_a_run_on_64_files_is_the_run_on_one(folder: Path, tmp_path: Path) -> None:
    """Begun by one process, gone on with by two, in the middle of an epoch, and ended by one."""
    for name in ("whole.beton", "shards"):
        out = tmp_path / name
        run_processes(run_to, 1, 3, folder / name, out, join=False)
        run_processes(run_to, 2, 11, folder / name, out, join=False)
        run_processes(run_to, 1, 16, folder / name, out, join=False)
        assert state(out)["position"]["step"] == 16
    assert same(state(tmp_path / "shards"), state(tmp_path / "whole.beton"))
    mine, theirs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("shards", "whole.beton"))
    assert mine["probe"] == theirs["probe"] and mine["data"]["name"] == "shards"


@pytest.mark.slow
def test_windows_of_files_are_part_of_the_run(folder: Path, tmp_path: Path) -> None:
    """Gone on with in the middle of an epoch, and only with the same groups of files."""
    shards, window = folder / "shards", "train.window=24"
    run_to(16, shards, tmp_path / "whole", window)
    run_to(3, shards, tmp_path / "run", window)
    with pytest.raises(FastSSLError, match=r"train\.window: 24 there, 25 here"):
        run_to(16, shards, tmp_path / "run", "train.window=25")
    run_to(11, shards, tmp_path / "run", window)
    run_to(16, shards, tmp_path / "run", window)
    assert same(state(tmp_path / "run"), state(tmp_path / "whole"))
    run_to(16, shards, tmp_path / "other")
    assert not same(state(tmp_path / "other"), state(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("data", "files", "window"), [("whole.beton", "1 file", 1), ("shards", "64 files", 64), ("shards", None, 63)]
)
def test_a_window_of_all_files_is_told(folder: Path, tmp_path: Path, data: str, files: str | None, window: int) -> None:
    told = run_to(0, folder / data, tmp_path / "run", f"train.window={window}").messages
    line = f"train.window={window} has no effect: the photos are in {files}"
    assert [text for text in told if "train.window" in text] == [line] * (files is not None)


@pytest.mark.slow
def test_a_run_knows_its_set(folder: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(folder / "shards", shards)
    run_to(2, shards / "train-*.beton", out)
    said = Silent()
    first, second = beton_files(shards)[0][:2]
    first.rename(tmp_path / "x"), second.rename(first), (tmp_path / "x").rename(second)
    with pytest.raises(FastSSLError, match=r"data\.tables"):
        pretrain(small("train.batch_size=16", "moco.split_bn=2"), options(shards / "train-*.beton", out), said)
    first.rename(tmp_path / "x"), second.rename(first), (tmp_path / "x").rename(second)
    run_to(16, shards / "train-*.beton", out)
    assert [row["step"] for row in rows(out) if row["kind"] == "step"][-1] == 16


def test_damage_in_a_file_to_judge_on_is_found_first(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(folder / "shards", shards)
    path = beton_files(shards)[0][7]
    with BetonReader(path) as reader:
        start, size = int(reader.offsets[1]), int(reader.sizes[1])
    content = bytearray(path.read_bytes())
    content[start + size // 2 : start + size] = bytes(size - size // 2)
    path.write_bytes(content)
    with pytest.raises(FastSSLError, match=r"train-00007-of-00064.beton: damaged are 1 of 2 photos, the first is sam"):
        pretrain(small(), options(folder / "whole.beton", tmp_path / "run", val=shards), Silent())


# ---- probes


def parts(split: ProbeSplit) -> list[list[int]]:
    return [split.bank_index.tolist(), split.query_index.tolist(), [split.classes, split.can_judge, split.held_out]]


def test_probes_choose_the_same_photos(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = beton_files(folder / "shards")[0]
    with BetonReader(folder / "whole.beton") as one, BetonSet(files) as many, BetonSet(files, lazy=True) as lazy:
        for limit in (0, 20, 500):
            wanted = parts(choose_split(one, None, limit, seed=1))
            assert parts(choose_split(many, None, limit, seed=1)) == wanted
            assert parts(choose_split(lazy, None, limit, seed=1)) == wanted
        assert not choose_split(one, many, 20, seed=1).can_judge  # the same photos
        assert not choose_split(lazy, many, 20, seed=1).can_judge and lazy.lazy
        monkeypatch.setattr(reader_module, "_SOME", 60)
        few = choose_split(lazy, None, 20, seed=1)
        chosen, some = {*few.bank_index.tolist(), *few.query_index.tolist()}, set(lazy.some().tolist())
        assert len(some) == 60 and max(some) > 120 and chosen <= some and len(chosen) == pytest.approx(20, abs=2)


def test_both_parts_of_an_evaluation(folder: Path, tmp_path: Path) -> None:
    pattern = folder / "shards/train-*.beton"
    with open_split(pattern, None) as mine, open_split(folder / "whole.beton", None) as theirs:
        assert mine.train_index.tolist() == theirs.train_index.tolist()
        assert mine.record()["data"] == "train-*.beton" and mine.scaled() == theirs.scaled()
        named = tmp_path / "list.txt"
        named.write_text("127\n5\n")
        assert listed_labels(named, mine.train).tolist() == [5, 127]
        named.write_text("a.jpg\n")
        with pytest.raises(FastSSLError, match=r"names photos of one folder, .*train-\*.beton is several files"):
            listed_labels(named, mine.train)
    with pytest.warns(UserWarning, match="is --data itself"), open_split(pattern, folder / "shards"):
        pass


# ---- commands


def command(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_a_folder_of_files_is_no_folder_of_photos(folder: Path, tmp_path: Path) -> None:
    assert not is_source(folder / "shards") and is_source(folder)  # there is a folder in it
    found = look_at(folder / "shards")
    assert (found.photos, found.fingerprint) == (PHOTOS, None)
    assert found.short_side == look_at(folder / "whole.beton").short_side
    shutil.copy(folder / "whole.beton", tmp_path)
    assert not is_source(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_source(tmp_path)
    with pytest.raises(FastSSLError, match=r"it holds 1 \.beton file: give those themselves, as in '.*/\*\.beton'"):
        look_at(tmp_path)
    (tmp_path / "runs").rmdir()
    (tmp_path / "a.JPG").touch()
    assert is_source(tmp_path)


@pytest.mark.engines
@pytest.mark.parametrize("lazy", [False, True])
def test_dali_reads_sets(folder: Path, tmp_path: Path, lazy: bool) -> None:
    need_engine("dali")
    files = []
    for path in beton_files(folder / "shards")[0][:8]:
        files.append(shutil.copy(path, tmp_path))
    views, found = [ViewSpec(size=24, count=2)], []
    with BetonReader(files[5]) as one:
        start, size = int(one.offsets[1]), int(one.sizes[1])
    content = bytearray(Path(files[5]).read_bytes())
    content[start + size // 2 : start + size] = bytes(size - size // 2)
    Path(files[5]).write_bytes(content)
    for engine in ("dali", "native"):
        with (
            BetonSet(files, lazy=lazy) as many,
            ViewLoader(many, views, 8, pipeline=engine, workers=1, on_bad="skip") as loader,
        ):
            batches = list(loader.epoch(0))
            assert loader.stats.skipped == [11]
            found.append((torch.cat([batch.index for batch in batches]), torch.cat([one.views[0] for one in batches])))
    assert torch.equal(found[0][0], found[1][0])
    assert float((found[0][1] - found[1][1]).abs().mean()) < 0.05


def test_verify_checks_every_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(folder / "shards", shards)
    status, out, err = command(capsys, "verify", shards / "*.beton", folder / "whole.beton", "--json", "-")
    assert status == 0 and err.count(" 2 samples, tables in order") == SHARDS and "128 samples" in err
    records = [json.loads(line) for line in out.splitlines()] if out[0] == "{" else json.loads(out)
    assert [record["samples"] for record in records] == [*[2] * SHARDS, PHOTOS]
    files = beton_files(shards)[0]
    files[3].write_bytes(b"no beton at all")
    status, out, err = command(capsys, "verify", shards, "--json", "-")
    assert status == 1 and "00003-of-00064.beton: only 15 bytes" in err and err.count("tables in order") == SHARDS - 1
    files[5].write_bytes(b"")
    status, out, err = command(capsys, "verify", shards)
    assert status == 1 and "2 of 64 files are damaged; the first: " in err
    files[9].unlink()
    status, out, err = command(capsys, "verify", shards)
    assert status == 1 and "train-00009-of-00064.beton: is missing" in err


@pytest.mark.slow
def test_commands_take_a_pattern(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pattern, weights = folder / "shards/train-*.beton", tmp_path / "last.safetensors"
    torch.manual_seed(0)
    save_backbone(create_backbone("lcnet_035"), weights, arch="lcnet_035")
    how = ("--size", 32, "--device", "cpu", "--workers", 1, "--json", "-")
    results = []
    for data in (pattern, folder / "whole.beton"):
        status, out, _ = command(capsys, "evaluate", "knn", weights, "--data", data, "--k", 3, *how)
        assert status == 0
        results.append(json.loads(out)["accuracy"])
    assert results[0] == results[1]
    small = [word for one in ("views.0.size=32", "probe.size=32") for word in ("--set", one)]
    out = tmp_path / "views.png"
    assert command(capsys, "views", pattern, "--recipe", "few-photos", *small, "--out", out)[0] == 0 and out.exists()
    status, out, _ = command(capsys, "data", folder / "shards")
    assert status == 0 and "128" in out
    status, out, _ = command(
        capsys, "bench", "loader", "--data", pattern, "--seconds", 0.2, "--batch-size", 8, "--workers", 1, "--json", "-"
    )
    assert status == 0 and '"samples": 128' in out


def test_names_that_the_shell_has_filled_in(folder: Path, capsys: pytest.CaptureFixture) -> None:
    files = beton_files(folder / "shards")[0][:3]
    status, _, err = command(capsys, "pretrain", "--data", *files)
    assert status == 2 and "a pattern in quotes: --data 'train-*.beton'" in err
    status, _, err = command(capsys, "pretrain", "--data", files[0], "more")
    assert status == 2 and "in quotes" not in err
