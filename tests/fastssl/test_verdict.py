"""The verdict on a run, from figures alone."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from fastssl.report.verdict import Evidence, collapse_signs, difference, expected_gain, judge, loss_trend

NAMES = {"majority": "most frequent class", "raw": "raw pixels (16x16)", "colours": "colour histogram"}
NAMES |= {"random": "random initialisation", "trained": "after pre-training", "came": "as it came"}
HEALTHY = {"effective_rank": 90.0, "feature_std": 0.8}


def evidence(
    trained: tuple[Any, Any] = (60.0, 70.0),
    curve: tuple[float, ...] = (),
    steps: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> Evidence:
    """Of 1,000 judged photos; ``curve``: online kNN at epochs 10, 20, ...; a mark's keyword gives its figures."""
    figures = {"raw": (40.0, 45.0), "colours": (42.0, 44.0), "random": (35.0, 40.0), "trained": trained}
    figures |= {key: changes.pop(key) for key in tuple(changes) if key in NAMES}
    rows = [{"name": NAMES[key], "knn": pair[0], "linear": pair[1]} for key, pair in figures.items() if pair]
    probes = [{"kind": "probe", "epoch": 10 * (place + 1), "knn": knn} for place, knn in enumerate(curve)]
    told = {"rows": rows, "judged": 1000, "epochs": 60, "online_judged": 400, "features": HEALTHY}
    return Evidence(**{**told, "steps": losses(9.0, 5.0) if steps is None else steps, "probes": probes, **changes})


def losses(*values: float, **more: float) -> list[dict[str, Any]]:
    """Twenty rows whose loss goes evenly through ``values``."""
    rows = []
    for place in range(20):
        at = place / 19 * (len(values) - 1)
        low = min(int(at), len(values) - 2)
        loss = values[low] + (at - low) * (values[low + 1] - values[low])
        rows.append({"kind": "step", "loss": loss, "kl": loss, "alignment": 1.0, "embedding_std": 1.0, **more})
    return rows


RESTED = losses(9.0, 5.0, 5.0, 5.0, 5.0)
FLAT = (58.0, 58.2, 57.9, 58.1, 58.0)
RISING = (40.0, 47.0, 51.0, 54.0, 56.0)


def test_learned_is_above_every_mark_in_both_kinds() -> None:
    verdict = judge(evidence(curve=FLAT))
    assert verdict["state"] == "learned" and verdict["epochs"] is None and verdict["gain"] is None
    marks = "raw pixels, colour histogram and random initialisation"
    assert verdict["text"] == f"learned: better than {marks} in nearest neighbours and in the linear probe."


@pytest.mark.parametrize("mark", ["raw", "colours", "random", "majority"])
@pytest.mark.parametrize("kind", [0, 1])
def test_one_mark_that_is_no_farther_off_than_chance_is_enough_against_learned(mark: str, kind: int) -> None:
    figures = [30.0, 30.0]
    figures[kind] = (60.0, 70.0)[kind] - 2.0
    assert judge(evidence(curve=FLAT, **{mark: tuple(figures)}))["state"] == "learned in part"
    figures[kind] -= 6
    assert judge(evidence(curve=FLAT, **{mark: tuple(figures)}))["state"] == "learned"


def test_of_a_run_that_began_with_weights_these_are_the_mark() -> None:
    better = judge(evidence((60.0, 70.0), curve=FLAT, came=(50.0, 69.0)))
    assert better["state"] == "learned in part"  # level in the linear probe
    assert "better than raw pixels, colour histogram and random initialisation in" in better["text"]
    found = better["against"]["as it came"]["knn"]
    assert (
        f"Pre-training added to the weights as they came: +10.0 points in nearest neighbours ({found['low']:+.1f} to "
        f"{found['high']:+.1f}: better) and +1.0 points in the linear probe (" in better["text"]
    )
    assert "no more than chance on 1,000 photos)" in better["text"]
    assert judge(evidence((60.0, 70.0), curve=FLAT, came=(50.0, 60.0)))["state"] == "learned"
    level = judge(evidence((60.0, 70.0), curve=FLAT, came=(59.0, 71.0)))
    assert level["state"] == "nothing added" and "added nothing to the weights as they came: +1.0" in level["text"]
    worse = judge(evidence((60.0, 70.0), curve=FLAT, came=(70.0, 80.0)))
    assert worse["state"] == "nothing added" and "use them as they are, or lower optim.lr" in worse["text"]
    collapsed = judge(evidence(features={"effective_rank": 1.1, "feature_std": 0.8}, came=(50.0, 60.0)))
    assert collapsed["state"] == "collapsed"


def test_a_small_judging_set_tells_less() -> None:
    figures = {"raw": (50.0, 60.0), "colours": (50.0, 60.0), "random": (50.0, 60.0), "curve": FLAT, "steps": RESTED}
    assert judge(evidence(judged=1000, **figures))["state"] == "learned"
    few = judge(evidence(judged=40, **figures))
    assert few["state"] == "not judged" and "no farther apart than chance on 40 photos" in few["text"]
    assert few["text"].startswith("not judged: 40 judged photos are too few to tell: level with random initialisation")
    nothing = judge(evidence((50.0, 60.0), judged=1000, **{**figures, "steps": RESTED}))
    assert nothing["state"] == "no better than random"


def test_where_the_kinds_disagree_the_text_says_so() -> None:
    verdict = judge(evidence((50.0, 70.0), curve=FLAT, raw=(60.0, 60.0), colours=(60.0, 60.0), random=(51.0, 50.0)))
    assert verdict["state"] == "learned in part"
    for words in (
        "better than raw pixels and colour histogram in the linear probe, worse in nearest neighbours",
        "better than random initialisation in the linear probe, level with it in nearest neighbours",
        "good for fine-tuning, not yet for search",
    ):
        assert words in verdict["text"], words
    verdict = judge(evidence((70.0, 50.0), curve=FLAT, raw=(60.0, 60.0), colours=(50.0, 58.0)))
    assert "good for search" in verdict["text"]
    marks = {"raw": (60.0, 60.0), "colours": (60.0, 60.0), "random": (40.0, 50.0)}
    below = judge(evidence((50.0, 50.0), curve=FLAT, **marks))["text"]
    assert "worse than raw pixels and colour histogram in nearest neighbours and in the linear probe" in below
    assert "good for" not in below


def test_still_learning_says_how_many_epochs_and_what_they_may_bring() -> None:
    verdict = judge(evidence((50.0, 60.0), curve=RISING, raw=(55.0, 58.0)))
    assert verdict["state"] == "still learning" and verdict["epochs"] == 120
    gain = verdict["gain"]
    assert 0 < gain["low"] < gain["points"] < gain["high"]
    assert (
        f"Run 60 more epochs: the same command with --epochs 120 and another --out gains some "
        f"{gain['points']:.1f} points" in verdict["text"]
    )
    assert f"({gain['low']:.1f} to {gain['high']:.1f})" in verdict["text"]


def test_one_that_learned_may_rise_still_and_one_without_a_curve_is_judged_by_its_loss() -> None:
    assert judge(evidence(curve=RISING))["state"] == "learned" and judge(evidence(curve=RISING))["epochs"] == 120
    assert judge(evidence((41.0, 60.0), steps=RESTED))["state"] == "learned in part"
    falling = judge(evidence((41.0, 60.0), curve=RISING[:2]))
    assert falling["state"] == "still learning" and falling["epochs"] == 120
    assert "cannot be told from this run" in falling["text"]


def test_no_better_than_random() -> None:
    verdict = judge(evidence((36.0, 41.0), curve=FLAT, steps=losses(9.0, 9.0)))
    assert verdict["state"] == "no better than random" and verdict["epochs"] is None
    assert "level with random initialisation" in verdict["text"] and "nothing was learned yet" in verdict["text"]
    verdict = judge(evidence((25.0, 30.0)))
    assert "worse than random initialisation in nearest neighbours and in the linear probe" in verdict["text"]
    assert "still falling" in verdict["text"] and "--epochs 120" in verdict["text"]


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({"features": {"effective_rank": 1.3, "feature_std": 0.8}}, "effective rank 1.30"),
        (
            {"features": {"effective_rank": 90.0, "feature_std": 0.001}},
            "features of all photos are nearly equal (spread 0.001",
        ),
        ({"steps": losses(9.0, 2.0, embedding_std=0.03)}, "embeddings of all photos are nearly equal (spread 0.030"),
        (
            {"steps": losses(11.09, 11.08, target_entropy=0.999)},
            "stayed at that of a guess (11.09 at the start, 11.08 at the end)",
        ),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_each_sign_of_a_collapse_is_named(changes: dict[str, Any], sign: str, labelled: bool) -> None:
    verdict = judge(evidence(curve=RISING, **changes, **({} if labelled else {"rows": []})))
    assert verdict["state"] == "collapsed" and sign in verdict["text"] and len(verdict["signs"]) == 1
    assert verdict["epochs"] is None and "Run " not in verdict["text"]


def test_features_that_are_not_finite_are_a_sign_and_the_rank_of_a_few_photos_is_none() -> None:
    broken = judge(
        evidence((None, None), features={"effective_rank": math.nan, "feature_std": math.nan, "photos": 400})
    )
    assert broken["state"] == "collapsed" and broken["signs"] == ["features of the trained network are NaN or infinite"]
    two = {"effective_rank": 1.0, "feature_std": 0.8}
    assert judge(evidence(rows=[], features={**two, "photos": 2}))["state"] == "not judged"
    assert "has not collapsed" not in judge(evidence(rows=[], features={**two, "photos": 2}))["text"]
    assert judge(evidence(rows=[], features={**two, "photos": 20}))["state"] == "collapsed"
    begun = [{**row, "step": place} for place, row in enumerate(losses(9.0, 8.0))]
    assert judge(evidence(rows=[], features={**two, "photos": 20}, steps=begun))["state"] == "not judged"


def test_what_only_looks_like_a_collapse() -> None:
    # The student's output of DINO and SwAV is no embedding on a sphere, and a target that says little is no fault
    # while the loss falls.
    assert collapse_signs(evidence(steps=losses(9.0, 5.0, target_entropy=0.5, embedding_std=0.05))) == []
    assert collapse_signs(evidence(steps=losses(11.0, 9.0, target_entropy=0.995))) == []
    assert collapse_signs(evidence(steps=losses(9.0, 9.0))) == []


def test_without_labels_nothing_is_called_learned() -> None:
    verdict = judge(evidence(rows=[], judged=0))
    assert verdict["state"] == "not judged" and verdict["against"] == {} and verdict["epochs"] == 120
    for text in (
        "has not collapsed (effective rank 90, spread 0.80)",
        "fell from 8.89 to",
        "still falling",
        "neighbours.png",
    ):
        assert text in verdict["text"], text
    assert judge(evidence(rows=[], steps=RESTED))["epochs"] is None
    assert "has come to rest" in judge(evidence(rows=[], steps=RESTED))["text"]
    assert judge(evidence((None, math.nan)))["state"] == "not judged"


def test_the_gain_is_that_of_a_power_law_when_the_curve_is_one() -> None:
    curve = tuple(100 - 80 * (10.0 * place) ** -0.3 for place in range(1, 7))
    gain = expected_gain(evidence(curve=curve))
    assert gain.points == pytest.approx(80 * (60**-0.3 - 120**-0.3))
    assert expected_gain(evidence(curve=curve[:2])) is None
    assert expected_gain(evidence(curve=curve, online_judged=0)) is None
    assert not expected_gain(evidence(curve=FLAT)).rising
    assert not expected_gain(evidence(curve=(60.0, 55.0, 50.0))).rising
    assert expected_gain(evidence(curve=(98.0, 99.0, 100.0))).points < 2, "what is left to gain is the limit"
    few, many = (expected_gain(evidence(curve=curve, online_judged=count)) for count in (50, 5000))
    assert few.high - few.low > 3 * (many.high - many.low)


def test_a_difference_covers_the_truth_as_often_as_it_says() -> None:
    rng, inside = random.Random(0), 0
    for _ in range(400):
        first, second = (100 * sum(rng.random() < share for _ in range(150)) / 150 for share in (0.6, 0.5))
        found = difference(first, second, 150)
        assert found.low <= found.points <= found.high
        inside += found.low <= 10 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_trends_of_the_loss() -> None:
    assert loss_trend(losses(9.0, 5.0)[:3]) == {}
    assert loss_trend(losses(9.0, 5.0))["falling"]
    assert not loss_trend(RESTED)["falling"] and loss_trend(RESTED)["fallen"]
    broken = losses(9.0, 5.0)
    broken[3]["kl"] = math.nan
    assert loss_trend(broken)["falling"]


def test_damaged_records_are_judged_too() -> None:
    odd = [{}, {"name": None, "knn": "x"}, {"name": "after pre-training", "knn": True, "linear": "7"}]
    probes = [{}, {"epoch": 0, "knn": 5}, {"epoch": "a"}]
    verdict = judge(Evidence(odd, 10, 1, steps=[{}, {"loss": "x"}], probes=probes))
    assert verdict["state"] == "not judged"
    json.dumps(verdict)
