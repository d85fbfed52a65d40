"""Recipes: every file of ours is valid, and every mistake is named with its key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fastssl.pipelines.errors import FastSSLError
from fastssl.recipe import build_recipe, load_recipe, parse_overrides, recipe_names, recipe_path, recipe_to_dict


@pytest.mark.parametrize("name", recipe_names())
def test_our_recipes_load_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert build_recipe(yaml.safe_load(yaml.safe_dump(recipe_to_dict(recipe))), where="again") == recipe
    header = [line for line in recipe_path(name).read_text().splitlines() if line.startswith("#")]
    assert any("fastssl pretrain" in line for line in header), "a recipe's header says the command that runs it"


def test_the_named_recipes_exist_with_the_published_numbers() -> None:
    assert {"light-moco-mobilenetv3", "light-moco-efficientnet_b0", "moco-v2-resnet50", "quickstart"} <= set(recipe_names())
    for name, arch in (("light-moco-mobilenetv3", "mobilenetv3_large"), ("light-moco-efficientnet_b0", "efficientnet_b0")):
        recipe = load_recipe(name)
        assert recipe.arch == arch
        assert (recipe.moco.temperature, recipe.moco.queue, recipe.moco.momentum) == (0.1, 65536, 0.999)
        assert (recipe.moco.projector.hidden, recipe.moco.projector.out, recipe.moco.projector.norm) == (2048, 128, False)
        assert recipe.optim.peak_lr(recipe.train.batch_size) == pytest.approx(0.12)
        (view,) = recipe.views
        assert (view.size, view.count, view.area) == (224, 2, (0.2, 1.0))
        assert (view.jitter, view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.4, 0.4, 0.4, 0.1)
        assert (view.grey, view.blur, view.blur_sigma, view.flip) == (0.2, 0.5, (0.1, 2.0), 0.5)
    plain = load_recipe("moco-v2-resnet50")
    assert (plain.moco.temperature, plain.moco.smoothing, plain.train.batch_size) == (0.2, 0.0, 256)


def test_overrides_reach_every_depth() -> None:
    recipe = load_recipe(
        "quickstart",
        parse_overrides(
            [
                "optim.lr=0.5",
                "views.0.size=48",
                "moco.projector.norm=false",
                "moco.neighbors=10",
                "views.0.area=[0.5, 1]",
                "optim.weight_decay=1e-4",
            ]
        ),
    )
    assert recipe.optim.lr == 0.5 and recipe.views[0].size == 48 and recipe.moco.projector.norm is False
    assert recipe.moco.neighbors == 10 and recipe.views[0].area == (0.5, 1.0) and recipe.optim.weight_decay == 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"no key optim\.learning_rate"),
        ("optim.warmup_epoch=1", r"nearest: warmup_epochs"),
        ("moco.temprature=1", r"nearest: temperature"),
        ("moco.projector.hiden=4", r"no key moco\.projector\.hiden \(nearest: hidden"),
        ("views.0.siz=4", r"no key views\.0\.siz"),
        ("views.3.size=4", r"not a position in a list of 1"),
        ("views.0.size=big", r"views\.0\.size must be int, got 'big'"),
        ("views.0.count=1", r"two views of one size"),
        ("views.0.area=[0.2]", r"views\.0\.area must be a list of 2"),
        ("views.0.flip=2", r"views\.0.*flip"),
        ("train.epochs=true", r"train\.epochs must be int"),
        ("train.epochs=0", r"train\.epochs"),
        ("train.amp=fp8", r"train\.amp='fp8' is not one of"),
        ("moco=3", r"moco must be a mapping"),
        ("optim.lr.x=3", r"optim\.lr is a value"),
        ("method=byol", r"method='byol' does not exist"),
        ("optim.lr=[", r"is not a value"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(FastSSLError, match=message):
        load_recipe("quickstart", parse_overrides([override]))


def test_files(tmp_path: Path) -> None:
    with pytest.raises(FastSSLError, match="nearest: quickstart"):
        load_recipe("quickstat")
    with pytest.raises(FastSSLError, match="no such recipe file"):
        load_recipe(str(tmp_path / "mine.yaml"))
    mine = tmp_path / "mine.yaml"
    mine.write_text(recipe_path("quickstart").read_text())
    assert load_recipe(str(mine)) == load_recipe("quickstart")
    mine.write_text("arch: [")
    with pytest.raises(FastSSLError, match="not a yaml file"):
        load_recipe(str(mine))
    mine.write_text("arch: resnet18\ntrain: {epochs: 2, epochs: 3}")
    with pytest.raises(FastSSLError, match=r"key .epochs. stands twice"):
        load_recipe(str(mine))
    mine.write_text("- 1")
    with pytest.raises(FastSSLError, match="a mapping"):
        load_recipe(str(mine))
    mine.write_text("method: moco")
    with pytest.raises(FastSSLError, match="arch is missing"):
        load_recipe(str(mine))
    mine.write_text("arch: !!python/object/apply:os.system ['true']")
    with pytest.raises(FastSSLError, match="not a yaml file"):
        load_recipe(str(mine))
    with pytest.raises(FastSSLError, match="write key=value"):
        parse_overrides(["optim.lr"])


def test_learning_rate_scales_with_the_batch() -> None:
    optim = load_recipe("quickstart").optim
    assert replace(optim, lr=0.1, lr_batch=256).peak_lr(512) == pytest.approx(0.2)
    assert replace(optim, lr=0.1, lr_batch=0).peak_lr(512) == pytest.approx(0.1)
