"""--data, --recipe and --arch as ``pretrain``, ``estimate`` and ``views`` take them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import jpeg_bytes, make_photo

from fastssl.cli import main
from fastssl.cli.inputs import ON_CONSOLE
from fastssl.data import sample_set
from fastssl.distributed import devices
from fastssl.errors import FastSSLError, UsageError
from fastssl.inputs import Inputs, Wanted, choose_inputs

ARCH = "lcnet_035"
#: A network's heads and views that take no time.
SMALL = (
    "views.0.size=32",
    "probe.size=32",
    "probe.every_epochs=0",
    "simclr.projector.hidden=16",
    "simclr.projector.out=8",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def photos(folder: Path, count: int, side: int = 60, *, flat: bool = False) -> Path:
    """``count`` photos in a new folder; ``flat``: of one colour."""
    folder.mkdir(parents=True)
    for number in range(count):
        rgb = np.full((side, side, 3), 127, np.uint8) if flat else make_photo(number, side, side)
        (folder / f"{number:03}.jpg").write_bytes(jpeg_bytes(rgb))
    return folder


def chosen(**options: object) -> Inputs:
    wanted = dict.fromkeys(field.name for field in dataclasses.fields(Wanted)) | {"device": "cpu", "overrides": ()}
    return choose_inputs(Wanted(**{**wanted, "workers": 1, **options}), ON_CONSOLE)


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    return stop.value.code


def sets(*items: str) -> list[str]:
    return [argument for item in items for argument in ("--set", item)]


def test_the_network_is_the_recipes_unless_it_is_given(beton: Path, capsys: pytest.CaptureFixture) -> None:
    assert chosen(data=beton).recipe.arch == "mobilenetv3_large"
    assert chosen(data=beton, recipe_name="dino-resnet18-sslight").recipe.arch == "resnet18"
    capsys.readouterr()
    assert chosen(data=beton, recipe_name="dino-resnet18-sslight", arch="vit_tiny").recipe.arch == "vit_tiny"
    assert (
        "warning: vit_tiny is a vision transformer, and the recipe was made for a convolutional network (resnet18)"
        in capsys.readouterr().err
    )


def test_the_sample_photos_without_data(
    beton: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sample_set, "ensure_sample_set", lambda: sample_set.SampleSet(beton, beton))
    inputs = chosen()
    assert (inputs.name, inputs.data, inputs.val, inputs.recipe.arch) == (
        "quickstart",
        beton,
        beton,
        "mobilenetv3_large",
    )
    assert "recipe quickstart without --data" in capsys.readouterr().err


def test_many_photos_get_the_full_recipe_where_there_is_a_gpu(
    beton: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("fastssl.config.recipe_choice.MANY_PHOTOS", 48)
    monkeypatch.setattr("fastssl.config.recipe_choice.SMALL_SIDE", 40)
    assert chosen(data=beton).name == "few-photos" and "as there is no GPU" in capsys.readouterr().err
    monkeypatch.setattr(devices, "choose_device", lambda name: torch.device("cuda"))
    assert chosen(data=beton).name == "light-moco-mobilenetv3"
    said = capsys.readouterr().err
    assert "recipe light-moco-mobilenetv3 for 48 photos on a GPU" in said and "enlarged for views of 224 px" in said
    assert (
        chosen(data=beton, recipe_name="few-photos").name == "few-photos"
        and "--recipe light-moco" not in capsys.readouterr().err
    )


def test_softer_crops_than_the_published_ones_are_said_once(
    photo_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for options in (["--short-side", 32], ["--keep-size"]):
        assert cli("convert-imagenet", photo_tree, tmp_path / "photos.beton", *options) == 0
        capsys.readouterr()
        for name in ("light-moco-mobilenetv3", "few-photos"):
            chosen(data=tmp_path / "photos.beton", recipe_name=name)
            said = capsys.readouterr().err
            expected = name.startswith("light") and "--short-side" in options
            assert said.count("scaled down to a short side of 32 px") == expected, (name, options)


def test_val_may_be_a_folder_too(photo_tree: Path, tmp_path: Path) -> None:
    shutil.copytree(photo_tree, tmp_path / "train")
    shutil.copytree(photo_tree, tmp_path / "val")
    inputs = chosen(data=tmp_path / "train", val=tmp_path / "val")
    assert (inputs.data, inputs.val) == (tmp_path / "train.beton", tmp_path / "val.beton")


def test_mistakes_are_found_before_photos_are_converted(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 3)
    for options, message in (
        ({"arch": "mobilnetv3"}, "unknown network"),
        ({"recipe_name": "quick-start"}, "nearest: quickstart"),
        ({"overrides": ("optim.lrr=1",)}, "no key optim.lrr"),
        ({"overrides": ("arch=rsnet18",)}, "unknown network"),
        ({"overrides": ("simclr.smoothing=0.2", "simclr.weighting=foo")}, "weighting='foo' is unknown"),
        ({"val": tmp_path / "none.beton"}, "none.beton"),
    ):
        with pytest.raises(FastSSLError, match=message):
            chosen(data=folder, **options)
        assert not (tmp_path / "photos.beton").exists()
    for overrides in (("train.epochs=3",), ("train.samples=100",)):
        with pytest.raises(UsageError):
            chosen(data=folder, epochs=3, overrides=overrides)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "no photos found"),
        (1, "photos: 1 photo, but a batch has at least 2; add photos"),
        (-3, "all of 3 photos rejected"),
    ],
)
def test_folders_without_enough_photos(count: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = photos(tmp_path / "photos", abs(count))
    if count < 0:
        for path in folder.iterdir():
            path.write_bytes(b"\xff\xd8\xff damaged")
    assert cli("pretrain", "--arch", ARCH, "--data", folder, "--out", tmp_path / "run", "--device", "cpu") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fastssl: ") and message in last and not (tmp_path / "run").exists()
    assert len(list(folder.iterdir())) == abs(count)


def test_a_folder_trains_and_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Ten photos, of which one is damaged: epochs, batch and queue follow, config.yaml holds what came out."""
    folder, out = photos(tmp_path / "photos", 10), tmp_path / "run"
    (folder / "003.jpg").write_bytes(b"\xff\xd8\xff damaged")
    command = [
        "pretrain",
        "--arch",
        ARCH,
        "--data",
        folder,
        "--out",
        out,
        "--device",
        "cpu",
        "--workers",
        1,
        *sets(*SMALL, "train.samples=384"),
    ]
    assert cli(*command) == 0
    said = capsys.readouterr().err
    for words in (
        "recipe few-photos for 10 photos, which are fewer",
        "9 photos, no labels, now also in",
        "1 rejected",
        "for 9 photos: train.batch_size 64 -> 4; the learning rate follows the batch",
        "5 epochs for 9 photos",
    ):
        assert words in said
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert [config["train"][key] for key in ("epochs", "samples", "batch_size")] == [5, None, 4]
    assert json.loads((out / "summary.json").read_text())["steps"] == 10
    assert cli(*command) == 0
    said = capsys.readouterr().err
    assert "converted before, into" in said and "10 of 10 steps made already" in said


@pytest.mark.parametrize("kind", ["one colour", "a class of one photo"])
def test_odd_photos_run_to_the_end(kind: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "run"
    if kind == "one colour":
        photos(folder, 6, flat=True)
    else:
        photos(folder / "many", 7)
        photos(folder / "one", 1)
    command = [
        "pretrain",
        "--arch",
        ARCH,
        "--data",
        folder,
        "--out",
        out,
        "--device",
        "cpu",
        "--workers",
        1,
        "--epochs",
        1,
    ]
    assert cli(*command, *sets(*SMALL)) == 0
    assert (out / "report.html").is_file()
    verdict = json.loads((out / "summary.json").read_text())["verdict"]
    assert kind == "one colour" or "not judged" in verdict["text"]


def test_views_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = photos(tmp_path / "photos", 3)
    assert cli("views", folder, "--recipe", "quickstart", "--out", tmp_path / "views.png", "--samples", 2) == 0
    assert (tmp_path / "views.png").is_file() and (tmp_path / "photos.beton").is_file()
    assert "3 photos, no labels, now also in" in capsys.readouterr().err


def test_a_folder_of_splits_is_learned_from_and_judged_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split, number in (("train", 12), ("val", 4), ("test", 3)):
        photos(tmp_path / "set" / split, number)
    inputs = chosen(data=tmp_path / "set")
    assert (inputs.data.name, inputs.val and inputs.val.name) == ("set-train.beton", "set-val.beton")
    said = capsys.readouterr().err
    assert "holds train (12 photos) and val (4 photos) and test (3 photos): train is taken" in said
    assert "and test (3 photos): val is taken" in said
    other = photos(tmp_path / "other", 5)
    inputs = chosen(data=tmp_path / "set", val=other)
    assert (inputs.data.name, inputs.val and inputs.val.name) == ("set-train.beton", "other.beton")
