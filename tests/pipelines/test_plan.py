from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision.transforms import RandomResizedCrop

from fastssl.pipelines.plan.compiled_draw import portable_exp
from fastssl.pipelines.plan.draw import VIEW_DTYPE, ViewSpec, ViewSpecError, draw_plan, factor_range, log_ratio_range
from fastssl.pipelines.plan.philox import Stream, keyed_words

FULL = ViewSpec(
    size=96, count=3, area=(0.05, 0.9), jitter=0.8, brightness=0.4, contrast=0.8, saturation=1.2, hue=0.2, solarise=0.3
)


def plan_of(
    spec: ViewSpec, n: int, size: tuple[int, int] = (375, 500), seed: int = 0, epoch: int = 0, first_view: int = 0
) -> np.ndarray:
    return draw_plan(
        spec,
        first_view=first_view,
        seed=seed,
        epoch=epoch,
        sample_ids=np.arange(n),
        heights=np.full(n, size[0]),
        widths=np.full(n, size[1]),
    )


def slow_view(spec: ViewSpec, seed: int, epoch: int, sample: int, view: int, height: int, width: int) -> np.void:
    """The draws of one view, one at a time, in Python numbers: the obviously right twin of draw_plan."""

    def block(slot: int) -> list[int]:
        return [int(word) for word in keyed_words(seed, Stream.PLAN, epoch, sample, view, slot)]

    def unit(word: int) -> float:
        return word / 2**32

    record = np.zeros((), dtype=VIEW_DTYPE)
    low, span = log_ratio_range(spec)
    for attempt in range(10):
        words = block(attempt)
        area = height * width * (spec.area[0] + unit(words[0]) * (spec.area[1] - spec.area[0]))
        ratio = portable_exp.py_func(low + unit(words[1]) * span)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = words[2] * (height - h + 1) // 2**32, words[3] * (width - w + 1) // 2**32
            break
    else:
        h, w = height, width
        if width / height < spec.ratio[0]:
            h = round(width / spec.ratio[0])
        elif width / height > spec.ratio[1]:
            w = round(height * spec.ratio[1])
        h, w = min(max(h, 1), height), min(max(w, 1), width)
        top, left = (height - h) // 2, (width - w) // 2
    record["top"], record["left"], record["height"], record["width"] = top, left, h, w

    words = block(10)
    record["flip"], record["jitter"], record["grey"] = (
        unit(words[0]) < spec.flip,
        unit(words[1]) < spec.jitter,
        unit(words[3]) < spec.grey,
    )
    remaining, place, order = [0, 1, 2, 3], words[2] * 24 // 2**32 if record["jitter"] else 0, []
    for left_to_place in (6, 2, 1, 1):  # the place-th permutation in lexicographic order
        order.append(remaining.pop(place // left_to_place))
        place %= left_to_place
    record["order"] = order
    for name, word in zip(("brightness", "contrast", "saturation", "hue"), block(11)):
        low, high, neutral = factor_range(spec, name)
        record[name] = low + unit(word) * (high - low) if record["jitter"] else neutral
    words = block(12)
    if unit(words[0]) < spec.blur:
        record["blur_sigma"] = spec.blur_sigma[0] + unit(words[1]) * (spec.blur_sigma[1] - spec.blur_sigma[0])
    record["solarise"] = unit(words[2]) < spec.solarise
    return record


@pytest.mark.parametrize(
    "spec", [FULL, ViewSpec(), ViewSpec(count=2, area=(0.9, 1.0), ratio=(1.0, 1.0), flip=1.0, jitter=0.0, blur=1.0)]
)
def test_compiled_equals_the_scalar_twin_bit_for_bit(spec: ViewSpec) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2**62, 40)
    heights, widths = rng.integers(1, 600, 40), rng.integers(1, 600, 40)
    heights[:6], widths[:6] = (1, 1, 3, 500, 20, 2), (1, 40, 1, 20, 500, 3)
    plan = draw_plan(spec, first_view=5, seed=2**63 + 9, epoch=77, sample_ids=ids, heights=heights, widths=widths)
    assert plan.shape == (spec.count, 40) and plan.dtype == VIEW_DTYPE
    for view in range(spec.count):
        for b in range(40):
            assert plan[view, b] == slow_view(
                spec, 2**63 + 9, 77, int(ids[b]), 5 + view, int(heights[b]), int(widths[b])
            )


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 99])
def test_identical_bytes_for_any_batch(batch: int) -> None:
    rng = np.random.default_rng(1)
    ids, heights, widths = rng.permutation(10_000)[:99], rng.integers(8, 400, 99), rng.integers(8, 400, 99)
    arguments = dict(first_view=2, seed=3, epoch=4)
    whole = draw_plan(FULL, sample_ids=ids, heights=heights, widths=widths, **arguments)
    for start in range(0, 99, batch):
        cut = slice(start, start + batch)
        part = draw_plan(FULL, sample_ids=ids[cut], heights=heights[cut], widths=widths[cut], **arguments)
        assert part.tobytes() == whole[:, cut].tobytes()


def test_views_do_not_depend_on_how_they_are_grouped() -> None:
    both = plan_of(replace(FULL, count=5), 20)
    assert plan_of(replace(FULL, count=2), 20).tobytes() == both[:2].tobytes()
    assert plan_of(replace(FULL, count=3), 20, first_view=2).tobytes() == both[2:].tobytes()


def test_global_random_state_plays_no_part() -> None:
    np.random.seed(0), torch.manual_seed(0)
    before = (np.random.get_state()[1].tobytes(), torch.get_rng_state())
    first = plan_of(FULL, 10)
    assert np.random.get_state()[1].tobytes() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    np.random.seed(1), torch.manual_seed(1)
    assert plan_of(FULL, 10).tobytes() == first.tobytes()


def test_seeds_epochs_views_and_samples_draw_apart() -> None:
    plans = [plan_of(FULL, 50), plan_of(FULL, 50, seed=1), plan_of(FULL, 50, epoch=1), plan_of(FULL, 50, first_view=3)]
    names = ["top", "left", "height", "width"]
    boxes = np.concatenate([np.stack([plan[name].ravel() for name in names], axis=1) for plan in plans])
    assert len(boxes) == 4 * 150 and len(np.unique(boxes, axis=0)) == len(boxes)


@pytest.mark.parametrize("size", [(375, 500), (224, 224), (60, 500), (500, 130), (40, 30), (11, 300)])
@pytest.mark.parametrize("area", [(0.2, 1.0), (0.05, 0.14)])
def test_crop_boxes_follow_torchvision(size: tuple[int, int], area: tuple[float, float]) -> None:
    """Two-sample Kolmogorov-Smirnov tests on what a box is; the sizes include ones that mostly or always end in the
    fallback.
    """
    n = 3000
    plan = plan_of(ViewSpec(area=area), n, size)[0]
    torch.manual_seed(0)
    picture = torch.empty(1, *size)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, list(area), [3 / 4, 4 / 3]) for _ in range(n)]
    )  # top, left, height, width
    ours = np.stack([plan[name] for name in ("top", "left", "height", "width")], axis=1).astype(float)
    assert (ours[:, 0] + ours[:, 2]).max() <= size[0] and (ours[:, 1] + ours[:, 3]).max() <= size[1]
    assert ours[:, :2].min() >= 0 and ours[:, 2:].min() >= 1

    def statistics(box: np.ndarray) -> dict[str, np.ndarray]:
        top, left, height, width = box.T.astype(float)
        free_y, free_x = np.maximum(size[0] - height, 1), np.maximum(size[1] - width, 1)
        return {
            "area": height * width,
            "ratio": width / height,
            "top": top / free_y,
            "left": left / free_x,
            "height": height,
            "width": width,
        }

    mine, reference = statistics(ours), statistics(theirs)
    for name in mine:
        assert ks_2samp(mine[name], reference[name], method="asymp").pvalue > 1e-4, name


def test_the_fallback_is_torchvisions_centred_crop() -> None:
    # No box of this ratio and at least this area fits, so ten tries always fail.
    for size, spec in [
        ((10, 400), ViewSpec(area=(0.5, 1.0))),
        ((400, 10), ViewSpec(area=(0.5, 1.0))),
        ((7, 401), ViewSpec(area=(0.9, 1.0))),
    ]:
        expected = RandomResizedCrop.get_params(torch.empty(1, *size), list(spec.area), list(spec.ratio))
        plan = plan_of(spec, 50, size)
        assert {tuple(int(record[name]) for name in ("top", "left", "height", "width")) for record in plan[0]} == {
            tuple(expected)
        }


def test_fallback_within_the_ratio_takes_the_whole_picture() -> None:
    # Area 1 with ratio 1.1 in a square picture: never fits, and the picture's own ratio lies outside; then inside.
    assert [
        int(plan_of(ViewSpec(area=(1.0, 1.0), ratio=(1.1, 1.2)), 1, (110, 110))[0, 0][name])
        for name in ("height", "width")
    ] == [
        100,
        110,
    ]
    box = plan_of(ViewSpec(area=(1.0, 1.0), ratio=(1e-3, 1e3)), 300, (50, 50))[0]
    assert (box["height"] * box["width"] >= 2400).all()


def test_factors_are_uniform_in_their_ranges() -> None:
    plan = plan_of(replace(FULL, jitter=1.0, count=2), 2000).ravel()
    for name, low, high in [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.2, 1.8),
        ("saturation", 0.0, 2.2),
        ("hue", -0.2, 0.2),
    ]:
        assert kstest(plan[name], "uniform", args=(low, high - low)).pvalue > 1e-4, name
    sigmas = plan["blur_sigma"][plan["blur_sigma"] > 0]
    assert kstest(sigmas, "uniform", args=(0.1, 1.9)).pvalue > 1e-4


def test_order_of_the_jitter_is_uniform() -> None:
    orders = plan_of(replace(FULL, jitter=1.0), 4000)["order"].reshape(-1, 4)
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and chisquare(counts).pvalue > 1e-4


def test_probabilities() -> None:
    n = 12_000
    plan = plan_of(replace(FULL, flip=0.5, jitter=0.8, grey=0.2, blur=0.1, solarise=0.3, count=1), n)[0]
    drawn = {
        "flip": plan["flip"],
        "jitter": plan["jitter"],
        "grey": plan["grey"],
        "blur": plan["blur_sigma"] > 0,
        "solarise": plan["solarise"],
    }
    for (name, hits), p in zip(drawn.items(), (0.5, 0.8, 0.2, 0.1, 0.3)):
        assert abs(hits.mean() - p) < 4 * math.sqrt(p * (1 - p) / n), name
    assert abs(np.corrcoef(np.stack(list(drawn.values())))[np.triu_indices(5, 1)]).max() < 0.04


def test_probabilities_zero_and_one_are_certain() -> None:
    never = plan_of(replace(FULL, flip=0, jitter=0, grey=0, blur=0, solarise=0), 200)
    for name in ("flip", "jitter", "grey", "solarise", "blur_sigma"):
        assert not never[name].any()
    always = plan_of(replace(FULL, flip=1, jitter=1, grey=1, blur=1, solarise=1), 200)
    for name in ("flip", "jitter", "grey", "solarise", "blur_sigma"):
        assert always[name].all()


def test_without_jitter_the_factors_are_neutral() -> None:
    plan = plan_of(FULL, 500)
    idle = plan[~plan["jitter"]]
    assert len(idle) > 100
    assert (
        (idle["brightness"] == 1).all()
        and (idle["contrast"] == 1).all()
        and (idle["saturation"] == 1).all()
        and (idle["hue"] == 0).all()
    )
    assert (idle["order"] == np.arange(4)).all()


def test_evaluation_view() -> None:
    spec = ViewSpec.evaluation(224)
    plan = plan_of(spec, 3, (256, 341))
    for record in plan[0]:
        assert [int(record[name]) for name in ("top", "left", "height", "width")] == [16, 58, 224, 224]
        assert not (record["flip"] or record["jitter"] or record["grey"] or record["solarise"] or record["blur_sigma"])
    assert plan.tobytes() == plan_of(spec, 3, (256, 341), seed=9, epoch=4).tobytes()
    assert [
        int(plan_of(ViewSpec.evaluation(8, crop=0.1), 1, (1, 3))[0, 0][name])
        for name in ("top", "left", "height", "width")
    ] == [
        0,
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    "field, value",
    [
        ("size", 0),
        ("size", 32.5),
        ("size", True),
        ("count", 0),
        ("area", (0.0, 1.0)),
        ("area", (0.5, 0.2)),
        ("area", (0.5, 1.5)),
        ("area", 0.5),
        ("area", (0.1, 0.2, 0.3)),
        ("ratio", (0, 1)),
        ("ratio", (2.0, 1.0)),
        ("interpolation", "nearest"),
        ("flip", 1.5),
        ("flip", -0.1),
        ("flip", "yes"),
        ("jitter", 2),
        ("brightness", -1),
        ("contrast", -0.1),
        ("saturation", float("nan")),
        ("hue", 0.6),
        ("grey", -1),
        ("blur", 1.01),
        ("blur_sigma", (0.0, 1.0)),
        ("blur_sigma", (2.0, 0.1)),
        ("solarise", 3),
        ("solarise_threshold", 300),
        ("solarise_threshold", 1.5),
        ("mean", (0.5, 0.5)),
        ("std", (0.1, 0.0, 0.1)),
        ("center", 0.0),
        ("center", 1.2),
    ],
)
def test_errors_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ViewSpecError, match=field):
        ViewSpec(**{field: value})


def test_lists_from_a_recipe_become_tuples() -> None:
    spec = ViewSpec(area=[0.3, 1], mean=[0, 0, 0])
    assert spec.area == (0.3, 1.0) and hash(spec) == hash(ViewSpec(area=(0.3, 1.0), mean=(0.0, 0.0, 0.0)))


def test_batches_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        draw_plan(FULL, first_view=0, seed=0, epoch=0, sample_ids=[1, 2], heights=[3], widths=[4, 5])
    with pytest.raises(ValueError, match="sample 7 has an empty picture"):
        draw_plan(FULL, first_view=0, seed=0, epoch=0, sample_ids=[1, 7], heights=[3, 0], widths=[4, 5])
    assert plan_of(FULL, 0).shape == (3, 0)
