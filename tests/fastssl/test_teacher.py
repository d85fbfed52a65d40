"""The teacher of a run: who may be one, and what it said, kept beside the photos: checked, and found again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_processes
from small_run import Silent, options, rows, state
from teachers import teacher_file
from test_resume import crash_behind

from fastssl.config.recipe import Recipe, load_recipe
from fastssl.errors import FastSSLError
from fastssl.methods.distill import FrozenTeacher
from fastssl.pretrain import pretrain
from fastssl.training.setup import Setup, prepare
from fastssl.training.step import TrainStep
from fastssl.training.teacher import TeacherCache, _record, load_teacher

SMALL = {
    "arch": "lcnet_035",
    "views.0.size": "32",
    "distill.teacher_size": "48",
    "train.samples": "null",
    "train.epochs": "3",
    "train.batch_size": "8",
    "train.log_every": "1",
    "probe.size": "32",
    "probe.online_samples": "40",
    "probe.final_samples": "40",
}

CACHED = {"distill__cache_epochs": 2, "distill__loss": "similarity", "distill__queue": 64}


def small(**changes: object) -> Recipe:
    given = {key.replace("__", "."): str(value) for key, value in changes.items()}
    return load_recipe("distill-few-photos", {**SMALL, "distill.teacher": str(teacher_file()), **given})


@pytest.fixture
def photos(beton: Path, tmp_path: Path) -> Path:
    """A copy, as the features are kept beside the photos."""
    return Path(shutil.copy(beton, tmp_path / "photos.beton"))


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out) if row["kind"] == "step"]


def kept(photos: Path) -> list[Path]:
    return sorted(photos.with_name("photos.beton.teacher").iterdir())


# ---------------------------------------------------------------------- who may be one


def test_a_teacher_of_other_width_size_and_normalisation() -> None:
    teacher = load_teacher(small())
    assert teacher.width == 512 and teacher.size == 48 and teacher.change
    assert teacher.about["arch"] == "resnet10t" and teacher.about["name"].endswith("resnet10t.safetensors")
    prints = [load_teacher(small(distill__teacher_size=size)).about["fingerprint"] for size in (48, 48, 64)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"distill__teacher": "null"}, r"distill\.teacher is missing: --set distill\.teacher=\.\.\. names a run's"),
        ({"distill__teacher": "nowhere.safetensors"}, r"^distill\.teacher: nowhere\.safetensors: no such"),
        (
            {"distill__teacher": teacher_file("vit_tiny_patch16_224")},
            r"cannot take pictures of 40 px; try --set distill\.teacher_size=48",
        ),
        ({"distill__teacher": teacher_file(broken=True)}, r"resnet10t-broken\.safetensors: its features are NaN"),
    ],
)
def test_what_can_be_no_teacher_is_refused_in_one_line(changes: dict, line: str) -> None:
    with pytest.raises(FastSSLError, match=line) as refused:
        TrainStep(small(distill__teacher_size=40, **changes), torch.device("cpu"), amp=False, seed=0)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------- what it said


def test_cached_is_live(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses, with the same cycle of views, where the teacher is asked at every step: to the bit on a CPU,
    where what it says of a picture does not depend on the others of a batch.
    """
    recipe = small(**CACHED)
    pretrain(recipe, options(photos, tmp_path / "cached"), Silent())
    files = kept(photos)
    assert [path.name[-14:] for path in files] == ["-0000.features", "-0001.features"]
    with monkeypatch.context() as patch:
        patch.setattr("fastssl.training.setup.open_cache", lambda run: None)
        pretrain(recipe, options(photos, tmp_path / "live"), Silent())
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")
    assert len(losses(tmp_path / "live")) == 18
    # No step asks the teacher, and a second run finds all there; its config names no folder.
    calls = []
    monkeypatch.setattr(FrozenTeacher, "forward", lambda *given: calls.append(given))
    monkeypatch.setattr("fastssl.training.networks.load_teacher", load_without_a_look)
    before = [path.stat().st_mtime_ns for path in files]
    pretrain(recipe, options(photos, tmp_path / "again"), Silent())
    assert losses(tmp_path / "again") == losses(tmp_path / "cached") and not calls
    assert [path.stat().st_mtime_ns for path in kept(photos)] == before
    text = (tmp_path / "again" / "config.yaml").read_text()
    assert "fingerprint" in text and str(teacher_file().parent.parent) not in text


def load_without_a_look(recipe: Recipe) -> FrozenTeacher:
    """``load_teacher``, whose look at one picture is no step's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenTeacher, "forward", lambda *given: torch.zeros(1))
        return load_teacher(recipe)


def test_the_command_line_caches_and_refuses_it_of_other_methods(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastssl.cli import main

    def run(recipe: str, *changes: str) -> int:
        sets = [part for change in changes for part in ("--set", change)]
        where = ["--data", str(photos), "--out", str(tmp_path / recipe), "--device", "cpu", "--workers", "1"]
        with pytest.raises(SystemExit) as ended:
            main(["pretrain", "--recipe", recipe, *where, "--cache-teacher", "1", *sets])
        return ended.value.code

    pairs = {**SMALL, "train.epochs": "1", "distill.teacher": str(teacher_file())}
    pairs.pop("train.samples")
    assert run("distill-few-photos", *(f"{key}={value}" for key, value in pairs.items())) == 0
    assert len(kept(photos)) == 1
    assert "first the teacher sees the views of 1 epoch, and fills 0.00 GB" in " ".join(capsys.readouterr().err.split())
    assert run("few-photos") == 1
    assert "distill.* has no effect with method: simclr" in capsys.readouterr().err
    assert run("distill-few-photos", "distill.cache_epochs=3") == 2
    assert "--cache-teacher and distill.cache_epochs say the same" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_crashed_goes_on_to_the_same_weights_and_refuses_another_teacher(
    photos: Path, tmp_path: Path
) -> None:
    often = {**CACHED, "train__checkpoint_minutes": 0}
    recipe = small(**often)
    pretrain(recipe, options(photos, tmp_path / "whole"), Silent())
    crash_behind(9, recipe, options(photos, tmp_path / "run"))
    other = small(**often, distill__teacher_size=64)
    with pytest.raises(
        FastSSLError, match=r"other settings \(distill\.teacher_size: 48 there, 64 here; teacher\.finge"
    ):
        pretrain(other, options(photos, tmp_path / "run"), Silent())
    moved = Path(shutil.copy(teacher_file(), tmp_path / "moved.safetensors"))  # the same weights by another name
    pretrain(small(**{**often, "distill__teacher": moved}), options(photos, tmp_path / "run"), Silent())
    whole, found = (state(tmp_path / name)["method"] for name in ("whole", "run"))
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert not any("frozen" in name for name in whole) and "queue" in whole


def test_damage_is_noticed_and_what_is_deleted_is_made_again(photos: Path, tmp_path: Path) -> None:
    recipe = small(**CACHED)
    pretrain(recipe, options(photos, tmp_path / "first"), Silent())
    first, second = kept(photos)
    whole = second.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    with pytest.raises(FastSSLError, match=r"-0001\.features: damaged at sample 2\d; delete it"):
        pretrain(recipe, options(photos, tmp_path / "second"), Silent())
    second.write_bytes(whole[:-1])
    with pytest.raises(FastSSLError, match=r"-0001\.features: damaged \(its size\); delete it"):
        pretrain(recipe, options(photos, tmp_path / "third"), Silent())
    second.unlink()
    before = first.stat().st_mtime_ns
    pretrain(recipe, options(photos, tmp_path / "fourth"), Silent())
    assert second.read_bytes() == whole and first.stat().st_mtime_ns == before
    assert losses(tmp_path / "fourth") == losses(tmp_path / "first")


@pytest.mark.parametrize("changes", [{"seed": 1}, {"distill__teacher_size": 40}, {"views__0__area": "[0.4, 1.0]"}])
def test_what_was_said_of_other_views_is_not_taken(photos: Path, tmp_path: Path, changes: dict) -> None:
    seeds, changes = {"seed": changes.pop("seed", 0)}, {key.replace("__0__", ".0."): v for key, v in changes.items()}
    for recipe, given in ((small(distill__cache_epochs=1), {}), (small(distill__cache_epochs=1, **changes), seeds)):
        run = ready(recipe, photos, tmp_path / str(len(given)), **given)
        run.close()
    assert len(kept(photos)) == 2


def test_no_more_epochs_are_filled_than_the_run_has(photos: Path, tmp_path: Path) -> None:
    ready(small(distill__cache_epochs=10**12, train__epochs=1), photos, tmp_path / "run").close()
    assert len(kept(photos)) == 1


def ready(recipe: Recipe, data: Path, out: Path, **given: object) -> Setup:
    """A run before its first step."""
    from fastssl.config.recipe_choice import follow_samples
    from fastssl.distributed.world import world_from_environment
    from fastssl.pipelines.beton.dataset import open_beton

    reader = open_beton(data)
    chosen, world = options(data, out, **given), world_from_environment()
    return prepare(follow_samples(recipe, len(reader)), chosen, reader, None, Silent(), world, torch.device("cpu"))


def fill(recipe: Recipe, data: Path, out: Path) -> np.ndarray:
    run = ready(recipe, data, out)
    found = run.step.known(5, np.array([0, 20, 47, 3]))
    run.close()
    return found


def test_two_processes_write_the_file_that_one_writes(photos: Path, tmp_path: Path) -> None:
    recipe = small(distill__cache_epochs=2)
    one = fill(recipe, photos, tmp_path / "one")
    files = {path.name: path.read_bytes() for path in kept(photos)}
    shutil.rmtree(photos.with_name("photos.beton.teacher"))
    two = run_processes(fill, 2, recipe, photos, tmp_path / "two")
    assert {path.name: path.read_bytes() for path in kept(photos)} == files and len(files) == 2
    assert all(np.array_equal(found, one) for found in two)
    assert np.linalg.norm(one, axis=1) == pytest.approx(np.ones(8), abs=1e-6) and one.shape == (8, 512)


def test_where_the_photos_cannot_be_written_beside_the_features_are_in_the_runs_folder(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *given: False)
    ready(small(distill__cache_epochs=1), photos, tmp_path / "run").close()
    assert len(list((tmp_path / "run" / "teacher").glob("*-0000.features"))) == 1
    assert not photos.with_name("photos.beton.teacher").exists()
    photos.with_name("photos.beton.teacher").mkdir()  # made by somebody who could
    ready(small(distill__cache_epochs=1), photos, tmp_path / "other").close()
    assert len(kept(photos)) == 1


def test_a_disk_that_takes_nothing_ends_the_run_in_one_line(photos: Path, tmp_path: Path) -> None:
    photos.with_name("photos.beton.teacher").write_text("in the way")
    with pytest.raises(FastSSLError, match=r"-0000\.features: cannot be written \(File exists\)"):
        ready(small(distill__cache_epochs=1), photos, tmp_path / "run")


def test_a_damaged_photo_that_is_passed_over_is_never_asked_for(damaged: tuple[Path, int], tmp_path: Path) -> None:
    path, sample = damaged
    recipe = small(**CACHED, train__on_bad="skip")
    pretrain(recipe, options(path, tmp_path / "run"), Silent())
    assert len(losses(tmp_path / "run")) == 18 and state(tmp_path / "run")["position"]["skipped"] == [sample]


def test_a_file_that_not_all_hosts_see_is_named(tmp_path: Path) -> None:
    with pytest.raises(FastSSLError, match=r"nowhere: not there; all processes need the photos \(or --out\) on one"):
        TeacherCache([tmp_path / "nowhere"], 3, _record(4, half=False))
