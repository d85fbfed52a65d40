"""View sampling: what the two designs are, what is refused, and that the loader gives it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastssl.pipelines import MultiCrop, ViewLoader
from fastssl.pipelines.plan.draw import ViewSpecError
from fastssl.pipelines.plan.multicrop import PRESETS

#: specification: threshold, local pixels, local views, weights
PUBLISHED = {
    "baseline-cnn": (0.14, 96, 6, (1 / 7, 6 / 7)),
    "sslight-cnn": (0.30, 128, 6, (0.4, 0.6)),
    "baseline-vit": (0.25, 96, 10, (1 / 11, 10 / 11)),
    "sslight-vit": (0.30, 128, 10, (0.4, 0.6)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_designs(name: str) -> None:
    threshold, size, count, weights = PUBLISHED[name]
    values = dict(PRESETS[name])
    views = MultiCrop(
        **{**values, "area": tuple(values["area"]), "weights": values["weights"] and tuple(values["weights"])}
    )
    first, second, local = views
    assert first.area == second.area == (threshold, 1.0) and local.area == (0.05, threshold)
    assert (first.size, second.size, local.size) == (224, 224, size)
    assert (first.count, second.count, local.count) == (1, 1, count)
    assert views.pair_weights == pytest.approx(weights)
    assert f"{count} local views of {size} px" in views.describe()


def test_each_kind_of_view_has_its_own_augmentation_over_the_common_one() -> None:
    views = MultiCrop(
        augment={"blur": 0.5, "hue": 0.2}, global_1={"blur": 1.0}, global_2={"solarise": 0.2}, local={"hue": 0.0}
    )
    first, second, local = views
    assert (first.blur, second.blur, local.blur) == (1.0, 0.5, 0.5)
    assert (first.solarise, second.solarise, local.solarise) == (0.0, 0.2, 0.0)
    assert (first.hue, second.hue, local.hue) == (0.2, 0.2, 0.0)


def test_without_local_views_there_are_two() -> None:
    views = MultiCrop(local_count=0)
    assert [spec.count for spec in views] == [1, 1] and views.pair_weights == (1.0, 0.0)
    assert views.names == [["global 1"], ["global 2"]] and "no local views" in views.describe()


def test_changing_the_number_of_views_changes_the_weights_by_count_with_it() -> None:
    views = MultiCrop(local_count=6)
    assert views.pair_weights == pytest.approx((1 / 7, 6 / 7))
    assert dataclasses.replace(views, local_count=4).pair_weights == pytest.approx((1 / 5, 4 / 5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": (0.4, 0.5)}, "sum to 1"),
        ({"weights": (1.4, -0.4)}, "weights.1 must be at least 0, got -0.4"),
        ({"weights": (float("nan"), 0.6)}, "weights.0 must be a finite number, got nan"),
        ({"weights": (0.4, 0.6), "local_count": 0}, "there are none"),
        ({"weights": (1.0, 0.0)}, "local_count=0"),
        ({"threshold": 0.01}, "threshold=0.01"),
        ({"threshold": 1.2}, "threshold must be at most 1, got 1.2"),
        ({"local_count": -1}, "local_count"),
        ({"local_count": 2.0}, "local_count"),
        ({"local_size": 0}, "local_size must be at least 1, got 0"),
        ({"area": (0.0, 1.0)}, "area.0 must be at least 1e-06, got 0.0"),
        ({"augment": {"size": 32}}, "augment.size"),
        ({"local": {"blurr": 0.1}}, "local.blurr"),
        ({"global_2": {"solarise": 2.0}}, "global_2.solarise must be at most 1, got 2.0"),
        ({"global_1": 3}, "global_1 must be a mapping"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(ViewSpecError, match=message.replace(".", r"\.")):
        MultiCrop(**values)


def test_the_loader_takes_it_as_it_is(beton: Path) -> None:
    views = MultiCrop(global_size=24, local_size=16, local_count=3)
    with ViewLoader(beton, views, batch_size=4, workers=1) as loader:
        batch = next(loader.epoch(0))
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 24, 24), (4, 3, 24, 24), (12, 3, 16, 16)]
