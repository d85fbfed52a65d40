"""Recipes: every file of ours is valid, and every mistake is named with its key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fastssl.config.recipe import build_recipe, load_recipe, parse_overrides, recipe_names, recipe_path, recipe_to_dict
from fastssl.errors import FastSSLError
from fastssl.optim.schedules import RunLength


@pytest.mark.parametrize("name", recipe_names())
def test_our_recipes_load_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert build_recipe(yaml.safe_load(yaml.safe_dump(recipe_to_dict(recipe))), where="again") == recipe
    header = [line for line in recipe_path(name).read_text().splitlines() if line.startswith("#")]
    assert any("fastssl pretrain" in line for line in header), "a recipe's header says the command that runs it"
    if "ImageNet-1k" in header[0]:  # the published runs crop from photos of full size
        assert "#   fastssl convert-imagenet ILSVRC2012_img_train.tar train.beton --keep-size" in header


def test_the_named_recipes_exist_with_the_published_numbers() -> None:
    assert {"light-moco-mobilenetv3", "light-moco-efficientnet_b0", "moco-v2-resnet50", "quickstart"} <= set(
        recipe_names()
    )
    for name, arch in (
        ("light-moco-mobilenetv3", "mobilenetv3_large"),
        ("light-moco-efficientnet_b0", "efficientnet_b0"),
    ):
        recipe = load_recipe(name)
        assert recipe.arch == arch
        assert (recipe.moco.temperature, recipe.moco.queue, recipe.moco.momentum) == (0.1, 65536, 0.999)
        assert (recipe.moco.projector.hidden, recipe.moco.projector.out, recipe.moco.projector.norm) == (
            2048,
            128,
            False,
        )
        assert recipe.optim.peak_lr(recipe.train.batch_size) == pytest.approx(0.12)
        (view,) = recipe.views
        assert (view.size, view.count, view.area) == (224, 2, (0.2, 1.0))
        assert (view.jitter, view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.4, 0.4, 0.4, 0.1)
        assert (view.grey, view.blur, view.blur_sigma, view.flip) == (0.2, 0.5, (0.1, 2.0), 0.5)
    plain = load_recipe("moco-v2-resnet50")
    assert (plain.moco.temperature, plain.moco.smoothing, plain.train.batch_size) == (0.2, 0.0, 256)
    # One-sided at the published rate, with torchvision's first weights.
    assert (plain.moco.symmetric, plain.optim.peak_lr(256), plain.optim.weight_decay) == (False, 0.03, 1e-4)
    assert plain.init == "kaiming"
    published = [load_recipe(f"light-moco-{name}") for name in ("mobilenetv3", "efficientnet_b0", "resnet50")]
    for recipe in (*published, plain):  # eight GPUs, each view a pass of its own; the rate of an epoch
        assert (recipe.moco.bn_by_view, recipe.moco.split_bn, recipe.moco.split_bn_queries) == (True, 8, 8)
        assert recipe.optim.per_epoch


def test_overrides_reach_every_depth() -> None:
    recipe = load_recipe(
        "few-photos-moco",
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
        ("optim.learning_rate=1", r"no key optim\.learning_rate; did you mean optim\.lr\?$"),
        ("lr=0.1", r"no key lr; did you mean optim\.lr\?$"),
        ("optimizer.lr=0.1", r"no key optimizer\.lr; did you mean optim\.lr\?$"),
        ("optim.wd=0.1", r"no key optim\.wd; did you mean optim\.weight_decay\?$"),
        ("batch_size=64", r"no key batch_size; did you mean train\.batch_size\?$"),
        ("moco.temp=0.1", r"no key moco\.temp; did you mean moco\.temperature\?$"),
        ("temp=0.1", r"no key temp; did you mean moco\.temperature\?$"),
        ("size=64", r"no key size; did you mean views\.0\.size or progressive\.size or probe\.size\?$"),
        ("momentum=0.9", r"no key momentum; did you mean moco\.momentum or optim\.momentum\?$"),
        ("xyzzy=1", r"no key xyzzy$"),
        ("grad_clip=3", r"no key grad_clip; did you mean optim\.clip_grad\?$"),
        ("gradient_clipping=3", r"no key gradient_clipping; did you mean optim\.clip_grad\?$"),
        ("mean=[0.5, 0.5, 0.5]", r"no key mean; did you mean views\.0\.mean\?$"),
        ("optim.warmup_epoch=1", r"did you mean optim\.warmup_epochs\?$"),
        ("moco.temprature=1", r"did you mean moco\.temperature\?$"),
        ("moco.projector.hiden=4", r"no key moco\.projector\.hiden; did you mean moco\.projector\.hidden\?$"),
        ("views.0.siz=4", r"no key views\.0\.siz; did you mean views\.0\.size\?$"),
        ("views.3.size=4", r"not a position in a list of 1"),
        ("views.0.size=big", r"views\.0\.size must be a whole number, got 'big'$"),
        ("views.0.count=1", r"two views of one size"),
        ("views.0.area=[0.2]", r"views\.0\.area\.1 is missing$"),
        ("views.0.area=[0.2, 0.3, 0.4]", r"views\.0\.area must be a list of 2 values, got \[0\.2, 0\.3, 0\.4\]$"),
        (
            "views.0.area=[0.4, 0.3]",
            r"views\.0\.area: the lower end must not exceed the upper one, got \[0\.4, 0\.3\]$",
        ),
        ("views.0.flip=2", r"views\.0\.flip must be at most 1, got 2$"),
        ("train.epochs=true", r"train\.epochs must be a whole number, got True$"),
        ("train.epochs=2.0", r"train\.epochs must be a whole number, got 2\.0$"),
        ("train.epochs='2'", r"train\.epochs must be a whole number, got '2'$"),
        ("train.epochs=0", r"train\.epochs must be at least 1, got 0$"),
        ("train.compile=1", r"train\.compile must be 'auto', True or False, got '1'$"),
        ("train.accumulate=3", r"train\.accumulate=3 must divide the batch of 128 into equal parts"),
        ("train.accumulate=some", r"train\.accumulate must be 'auto', got 'some'$"),
        ("train.accumulate=0", r"train\.accumulate must be at least 1, got 0$"),
        ("optim.lr=true", r"optim\.lr must be a finite number, got True$"),
        ("optim.lr=fast", r"optim\.lr must be a finite number, got 'fast'$"),
        ("arch=3", r"arch must be text, got 3$"),
        ("views=3", r"views must be a mapping of keys to values, got 3$"),
        ("views=[3]", r"views\.0 must be a mapping of keys to values, got 3$"),
        ("train.amp=fp8", r"train\.amp must be 'auto', 'bf16' or 'off', got 'fp8'$"),
        ("moco=3", r"moco must be a mapping"),
        ("optim.lr.x=3", r"optim\.lr is a value"),
        ("method=byol", r"method must be 'moco', 'dino', 'swav', 'simclr', 'resa', 'empssl' or 'distill', got 'byol'$"),
        ("optim.lr=[", r"is not a value"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(FastSSLError, match=message):
        load_recipe("few-photos-moco", parse_overrides([override]))


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
    optim = load_recipe("few-photos-moco").optim
    assert replace(optim, lr=0.1, lr_batch=256).peak_lr(512) == pytest.approx(0.2)
    assert replace(optim, lr=0.1, lr_batch=0).peak_lr(512) == pytest.approx(0.1)


#: recipe -> (threshold, local pixels, local views, weights): the specification's table of the two designs
VIEWS = {
    "baseline": (0.14, 96, 6, (1 / 7, 6 / 7)),
    "sslight": (0.30, 128, 6, (0.4, 0.6)),
    "vit baseline": (0.25, 96, 10, (1 / 11, 10 / 11)),
    "vit sslight": (0.30, 128, 10, (0.4, 0.6)),
}
PUBLISHED = {
    "dino": ("mobilenetv2", "resnet18", "resnet34", "vit_tiny"),
    "swav": ("mobilenetv2",),
    "moco": ("mobilenetv2",),
}


@pytest.mark.parametrize("design", ["baseline", "sslight"])
@pytest.mark.parametrize(("method", "arch"), [(method, arch) for method, archs in PUBLISHED.items() for arch in archs])
def test_sslight_recipes_hold_the_published_numbers(method: str, arch: str, design: str) -> None:
    recipe = load_recipe(f"{method}-{arch}-{design}")
    vit = arch.startswith("vit")
    threshold, size, count, weights = VIEWS[f"vit {design}" if vit else design]
    assert (recipe.arch, recipe.method, recipe.train.epochs, recipe.train.batch_size) == (arch, method, 200, 1024)
    first, second, local = recipe.views
    assert (first.area, local.area, local.size, local.count) == ((threshold, 1.0), (0.05, threshold), size, count)
    assert (recipe.pair_weights.gg, recipe.pair_weights.gl) == pytest.approx(weights)
    blurs = {"swav": (0.5, 0.5, 0.5)}.get(method, (1.0, 0.1, 0.5))
    assert (first.blur, second.blur, local.blur) == blurs and second.solarise == (0.0 if method == "swav" else 0.2)
    assert first.interpolation == "bicubic" and first.hue == (0.2 if method == "swav" else 0.1)
    optim = recipe.optim
    if vit:
        assert (optim.name, optim.peak_lr(1024), optim.final_lr) == ("adamw", 0.002, 1e-5)
        assert (optim.weight_decay, optim.final_weight_decay, recipe.drop_path) == (0.04, 0.4, 0.1)
        assert (recipe.dino.out, recipe.dino.warmup_teacher_epochs, recipe.dino.learned_gain) == (65536, 30, True)
        assert not recipe.dino.projector.norm
    else:
        assert (optim.name, optim.peak_lr(1024), optim.final_lr) == ("lars", {"swav": 1.2}.get(method, 1.92), 0.0048)
        assert (
            optim.warmup_lr == {"swav": 0.075}.get(method, 0.0)
            and optim.weight_decay == 1e-6
            and recipe.init == "kaiming"
        )
        assert not optim.decay_depthwise
    assert optim.warmup_epochs == 10 and not optim.decay_1d
    if method == "dino" and not vit:
        assert (recipe.dino.out, recipe.dino.warmup_teacher_epochs, recipe.dino.momentum) == (4096, 50, 0.996)
    if method == "swav":
        assert (recipe.swav.prototypes, recipe.swav.queue, recipe.swav.queue_epoch) == (3000, 3840, 15)
    if method == "moco":
        assert (recipe.moco.temperature, recipe.moco.symmetric, recipe.moco.queue, recipe.moco.smoothing) == (
            0.2,
            False,
            65536,
            0.0,
        )


def test_baseline_and_sslight_differ_in_the_views_alone() -> None:
    for method, archs in PUBLISHED.items():
        for arch in archs:
            one, other = (
                recipe_to_dict(load_recipe(f"{method}-{arch}-{design}")) for design in ("baseline", "sslight")
            )
            different = {
                f"{key}.{name}"
                for key in one
                if one[key] != other[key]
                for name in one[key]
                if one[key][name] != other[key][name]
            }
            assert different == {"views.threshold", "views.local_size", "views.weights"}


def test_view_sampling_is_swept_from_the_command_line() -> None:
    name = "dino-mobilenetv2-sslight"
    assert load_recipe(name, {"views.threshold": "0.2"}).views[2].area == (0.05, 0.2)
    assert load_recipe(name, {"views.local_count": "4"}).pair_weights.local_views == 4
    by_count = load_recipe(name, {"views.local_count": "4", "views.weights": "null"}).pair_weights
    assert (by_count.gg, by_count.gl) == pytest.approx((0.2, 0.8))
    baseline = load_recipe(name, {"views.preset": "baseline-cnn"})
    assert baseline.views == load_recipe("dino-mobilenetv2-baseline").views
    # On a recipe of two views a preset brings the multi-crop, and the recipe's own augmentation stays.
    crossed = load_recipe("light-moco-mobilenetv3", {"views.preset": "sslight-cnn"})
    assert (
        [spec.count for spec in crossed.views] == [1, 1, 6]
        and crossed.views[2].blur == 0.5
        and crossed.views[0].hue == 0.1
    )
    assert crossed.views == load_recipe("light-moco-mobilenetv3-sslight").views
    assert load_recipe(name, {"views": "sslight-vit"}).views.local_count == 10
    assert load_recipe(name, {"views": "sslight-vit", "views.local_count": "3"}).views.local_count == 3
    # A number behind the preset is a change of it.
    assert load_recipe(name, {"views.preset": "baseline-cnn", "views.local_size": "112"}).views[2].size == 112


def test_a_preset_comes_before_single_numbers_wherever_it_stands() -> None:
    name = "dino-mobilenetv2-sslight"
    for changes in (
        {"views.threshold": "0.2", "views.preset": "sslight-cnn"},
        {"views.preset": "sslight-cnn", "views.threshold": "0.2"},
    ):
        assert load_recipe(name, changes).views.threshold == 0.2
    assert load_recipe(name, {"views.local_count": "3", "views": "sslight-vit"}).views.local_count == 3


def test_two_different_views_keep_their_own_augmentation_under_a_preset(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "arch: mobilenetv2\nviews:\n- {size: 32, count: 1, blur: 1.0, hue: 0.2}\n- {size: 32, count: 1, blur: "
        "0.1, solarise: 0.2}\n"
    )
    before = load_recipe(str(mine)).views
    first, second, local = load_recipe(str(mine), {"views.preset": "sslight-cnn"}).views
    assert [(v.blur, v.solarise, v.hue) for v in (first, second, local)] == [
        (1.0, 0.0, 0.2),
        (0.1, 0.2, 0.1),
        (1.0, 0.0, 0.2),
    ]
    assert (before[0].hue, before[1].hue) == (first.hue, second.hue)


def test_a_preset_by_name_in_a_file_takes_changes_and_another_preset(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("arch: mobilenetv2\nmethod: dino\nviews: sslight-cnn\ntrain: {amp: off}\n")
    assert load_recipe(str(mine)).train.amp == "off"
    assert load_recipe(str(mine), {"views.preset": "baseline-cnn"}).views.threshold == 0.14
    assert load_recipe(str(mine), {"views.local.blur": "0.0"}).views[2].blur == 0.0
    assert load_recipe(str(mine), {"train.amp": "off"}).train.amp == "off"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=[]", r"method must be 'moco', 'dino', 'swav', 'simclr', 'resa', 'empssl' or 'distill', got \[\]$"),
        ("views.preset=[]", r"no preset \[\]"),
        (f"optim.lr=1{'0' * 400}", r"optim\.lr must be a finite number"),
        ("views.weights=[0.5, 0.6]", r"views\.weights=\[0\.5, 0\.6\] must be two numbers that sum to 1$"),
        ("views.weights=[0.5]", r"views\.weights\.1 is missing$"),
        ("views.treshold=0.3", r"no key views\.treshold; did you mean views\.threshold\?$"),
        ("views.mean=[0.5, 0.5, 0.5]", r"no key views\.mean; did you mean views\.augment\.mean\?$"),
        ("views.local.blurr=0.3", r"views\.local\.blurr: no such setting"),
        ("views.preset=sslight", r"no preset 'sslight' \(nearest: sslight-"),
        ("views=sslight-cn", r"no preset 'sslight-cn' \(nearest: sslight-cnn"),
        ("views.augment=3", r"views\.augment must be a mapping"),
        ("moco.temperature=0.2", r"moco\.\* has no effect with method: dino"),
        ("dino.outt=3", r"no key dino\.outt; did you mean dino\.out\?$"),
        ("temp=0.1", r"did you mean dino\.student_temperature or dino\.teacher_temperature or "),
        ("hidden=4", r"no key hidden; did you mean dino\.projector\.hidden\?$"),
        ("init=xavier", r"init must be 'timm' or 'kaiming', got 'xavier'$"),
        ("drop_path=1.0", r"drop_path must be below 1, got 1\.0$"),
        ("probe.reestimate_bn=1", r"probe\.reestimate_bn"),
    ],
)
def test_mistakes_in_a_multi_crop_recipe_are_named(override: str, message: str) -> None:
    with pytest.raises(FastSSLError, match=message):
        load_recipe("dino-mobilenetv2-sslight", parse_overrides([override]))


def test_a_threshold_for_a_list_of_views_is_refused() -> None:
    with pytest.raises(FastSSLError, match=r"lists its two views.*views\.preset=sslight-cnn"):
        load_recipe("few-photos-moco", {"views.threshold": "0.2"})


def test_only_the_methods_own_section_is_in_the_resolved_recipe() -> None:
    resolved = recipe_to_dict(load_recipe("swav-mobilenetv2-sslight"))
    assert "swav" in resolved and not {"moco", "dino", "simclr"} & set(resolved)


def _rates(name: str, **changes: object) -> tuple[float, float, float]:
    """(rate of the first step, highest, last one but a hair) of a run of 100,000 photos, as training asks for them."""
    recipe = load_recipe(name, {key.replace("__", "."): str(value) for key, value in changes.items()})
    optim, batch = recipe.optim, recipe.train.batch_size
    steps = 100_000 // batch
    run = RunLength(steps * recipe.train.epochs, steps)
    rates = [optim.rate(step, run, batch) for step in (0, round(optim.warmup_epochs * steps), run.total_steps)]
    return rates[0], max(rates), rates[-1]


@pytest.mark.parametrize(
    "name",
    [
        "swav-mobilenetv2-sslight",
        "dino-mobilenetv2-sslight",
        "dino-vit_tiny-sslight",
        "moco-mobilenetv2-sslight",
        "light-moco-mobilenetv3",
    ],
)
def test_with_another_batch_the_whole_schedule_follows(name: str) -> None:
    own = load_recipe(name)
    published = _rates(name)
    assert _rates(name, train__batch_size=own.train.batch_size) == published  # exactly as it was
    for batch in (32, 64, 2048):
        factor = batch / own.train.batch_size
        first, peak, last = _rates(name, train__batch_size=batch)
        assert peak == pytest.approx(factor * published[1]) and last == pytest.approx(factor * published[2])
        if (
            own.optim.warmup_lr is not None
        ):  # without it the first step has a share of the peak that depends on the number of steps
            assert first == pytest.approx(factor * published[0])
        assert first < peak  # SwAV's published 0.075 is twice the peak at batch 32


def test_rates_that_were_asked_for_or_do_not_scale_stay(tmp_path: Path) -> None:
    swav = "swav-mobilenetv2-sslight"
    optim = load_recipe(swav, {"train.batch_size": "512", "optim.warmup_lr": "0.02"}).optim
    assert (optim.warmup_lr, optim.final_lr) == (0.02, 0.0024)
    fixed = load_recipe(swav, {"train.batch_size": "512", "optim.lr_batch": "0"}).optim
    assert (fixed.warmup_lr, fixed.final_lr, fixed.peak_lr(512)) == (0.075, 0.0048, 0.3)
    none = load_recipe(swav, {"train.batch_size": "512", "optim.warmup_lr": "null"}).optim
    assert none.warmup_lr is None
    # A file that does not name its batch means the default one.
    (tmp_path / "mine.yaml").write_text("arch: resnet18\nviews: [{count: 2, size: 32}]\noptim: {final_lr: 0.1}\n")
    assert load_recipe(str(tmp_path / "mine.yaml"), {"train.batch_size": "256"}).optim.final_lr == pytest.approx(0.05)
    assert load_recipe(str(tmp_path / "mine.yaml")).optim.final_lr == 0.1
