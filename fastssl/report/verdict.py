"""What came of a run, in words: pure functions of what ``summary.json`` and ``metrics.jsonl`` hold.

A difference counts where it is larger than the chance of the judging set: the 95 % interval of a difference of two
shares, from their Wilson intervals (Newcombe, Statistics in Medicine 17, 1998, method 10). It takes the two for
independent; here they are of the same photos, which makes it careful.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fastssl.errors import counted
from fastssl.evaluate.features import wilson_interval
from fastssl.report.run_record import AS_IT_CAME, MARKS, RANDOM, RAW, TRAINED, number, probe_rows

LEARNED, STILL_LEARNING, IN_PART = "learned", "still learning", "learned in part"
COLLAPSED, NO_BETTER, NOT_JUDGED = "collapsed", "no better than random", "not judged"
#: of a run that began with weights, whose mark they are in the place of random ones
NOTHING_ADDED = "nothing added"

#: Collapse. Random networks have an effective rank of 30 and more and a spread above 0.5; trained ones 80 and 0.7.
_LEAST_RANK, _LEAST_SPREAD, _LEAST_EMBEDDING = 2.0, 0.02, 0.1
#: Photos and steps below which these say nothing: the rank is less than the number of photos, whatever the network, and
#: BatchNorm's running statistics still hold much of what they began with.
_FEW_PHOTOS, _FEW_STEPS = 20, 50
#: Points above which the chance of the judging set hides whether anything was learned.
_TOO_WIDE = 10.0
#: A target whose entropy is that share of ln K says nothing.
_NO_TARGET = 0.99
#: What of its first value the loss may keep and still count as fallen; what must go in a quarter of the run as falling.
_UNMOVED, _FALLING = 0.98, 0.02
#: Points of kNN below which more epochs are not worth a word.
_LEAST_GAIN = 0.5
#: Share of the sampling error that differs between two online probes, which judge the same photos; of a 95 % interval.
_OWN_ERROR, _Z = 0.3, 1.96


@dataclass(frozen=True)
class Evidence:
    """What a run is judged by.

    Attributes:
        rows: ``probe.rows`` of the summary, percent; none where there are no labels, or none that can judge.
        judged: photos that they were judged on.
        epochs: that the run made.
        steps, probes: the two kinds of rows of metrics.jsonl.
        online_judged: photos that an online probe judges.
        features: ``feature_std`` and ``effective_rank`` of the trained network's features, and of how many ``photos``.
    """

    rows: Sequence[Mapping[str, Any]]
    judged: int
    epochs: int
    steps: Sequence[Mapping[str, Any]] = ()
    probes: Sequence[Mapping[str, Any]] = ()
    online_judged: int = 0
    features: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """Trained minus mark, points: as measured, and its 95 % interval."""

    points: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """``better``, ``worse``, or ``level``: no larger than chance."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "level"

    @property
    def rising(self) -> bool:
        """Of a gain: by more than its noise, and enough to matter."""
        return self.low > 0 and self.points >= _LEAST_GAIN


def judge(evidence: Evidence) -> dict[str, Any]:
    """The verdict: ``state``; ``text``, some sentences; ``epochs`` that a longer run should have (None: nothing speaks
    for one) and its expected ``gain``; ``signs`` of a collapse; ``against``: mark -> kind -> the difference from the
    trained network.
    """
    signs, gain = collapse_signs(evidence), expected_gain(evidence)
    against = compare(evidence.rows, evidence.judged)
    began = against.get(AS_IT_CAME, {})
    falling = loss_trend(evidence.steps).get("falling", False)
    rising = gain.rising if gain else falling
    if signs:
        state = COLLAPSED
        text = f"{'; '.join(signs)}. Lower optim.lr or lengthen optim.warmup_epochs; more epochs do not help"
    elif not against.get(RANDOM):
        state, rising = NOT_JUDGED, falling
        text = _without_labels(evidence)
    elif began and not any(found.word == "better" for found in began.values()):
        state, text = NOT_JUDGED if _unknown(began) else NOTHING_ADDED, _added(began, evidence.judged)
    elif not any(found.word == "better" for found in against[RANDOM].values()):
        unknown = _unknown(against[RANDOM])
        state, rising = NOT_JUDGED if unknown else NO_BETTER, falling
        few = f"{counted(evidence.judged, 'judged photo')} are too few to tell: " if unknown else ""
        text = f"{few}{_in_words(against, (RANDOM,), evidence.judged)}. {_of_the_loss(evidence.steps)}"
    else:
        passed = all(found.word == "better" for kinds in against.values() for found in kinds.values())
        complete = RAW in against and all(len(kinds) == 2 for kinds in against.values())
        state = LEARNED if passed and complete else STILL_LEARNING if rising else IN_PART
        text = _in_words(against, tuple(mark for mark in against if mark != AS_IT_CAME), evidence.judged)
        text += f". {_added(began, evidence.judged)}" if began else ""
    more = 2 * evidence.epochs if rising and state != COLLAPSED else None
    text = f"{state}: {text.rstrip('. ')}." + (f" {_more_epochs(evidence.epochs, more, gain)}" if more else "")
    return {
        "state": state,
        "text": text,
        "epochs": more,
        "gain": asdict(gain) if more and gain else None,
        "signs": signs,
        "against": {mark: {kind: asdict(found) for kind, found in kinds.items()} for mark, kinds in against.items()},
    }


def difference(trained: float, mark: float, judged: int) -> Difference:
    """Of two accuracies (percent) on ``judged`` photos."""
    ours, theirs = (wilson_interval(round(value * judged / 100), judged) for value in (trained, mark))
    below = math.hypot(trained - ours[0], theirs[1] - mark)
    above = math.hypot(ours[1] - trained, mark - theirs[0])
    return Difference(trained - mark, trained - mark - below, trained - mark + above)


def compare(rows: Sequence[Mapping[str, Any]], judged: int) -> dict[str, dict[str, Difference]]:
    """mark -> ``knn`` and ``linear`` -> difference, of what was measured."""
    found, against = probe_rows(rows)[0], {}
    for mark in MARKS if judged else ():
        kinds = {}
        for kind in ("knn", "linear"):
            ours, theirs = (number(found.get(name, {}).get(kind)) for name in (TRAINED, mark))
            if ours is not None and theirs is not None:
                kinds[kind] = difference(ours, theirs, judged)
        if kinds:
            against[mark] = kinds
    return against


def expected_gain(evidence: Evidence) -> Difference | None:
    """Points of online kNN that as many epochs again would bring; None: fewer than three probes.

    The share of wrong answers is taken to fall as a power of the epoch, fitted to the second half of the run. Its
    noise is that of the residuals, but no less than what photos that are judged again and again leave.
    """
    rows = ((number(row.get("epoch")), number(row.get("knn"))) for row in evidence.probes)
    points = [(epoch, knn) for epoch, knn in rows if epoch and knn is not None and epoch > 0]
    recent = [point for point in points if 2 * point[0] >= points[-1][0]]
    recent = recent if len(recent) >= 3 else points[-3:]
    if len(recent) < 3 or not evidence.online_judged:
        return None
    least = 50 / evidence.online_judged  # half a photo: the logarithm of nothing
    across, wrong = np.log([(epoch, max(100 - knn, least)) for epoch, knn in recent]).T
    middle, height = across.mean(), wrong.mean()
    if not (spread := ((across - middle) ** 2).sum()):
        return None
    slope = ((across - middle) * (wrong - height)).sum() / spread
    residual = math.sqrt(((wrong - height - slope * (across - middle)) ** 2).sum() / (len(recent) - 2))
    share = math.exp(height) / 100
    floor = _OWN_ERROR * math.sqrt((1 - share) / (share * evidence.online_judged))  # of the logarithm of the share
    error = _Z * max(residual, floor) / math.sqrt(spread)
    now = min(math.exp(height + slope * (math.log(evidence.epochs) - middle)), 100.0)
    slopes = (slope, slope + error, slope - error)
    return Difference(*(float(now * (1 - 2 ** min(exponent, 0.5))) for exponent in slopes))


def loss_trend(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of what the loss has above its target's entropy, where that is known: ``first`` and ``last`` value, ``fallen``,
    and ``fall`` over the last quarter of the run as a share, ``falling``. {}: fewer than four rows."""
    logged = {key for row in steps for key in row}
    key = "kl" if "kl" in logged and "target_entropy" not in logged else "loss"
    values = _values(steps, key)
    if len(values) < 4:
        return {}
    tenth, quarter = max(1, len(values) // 10), len(values) // 4
    parts = (values[:tenth], values[-quarter:], values[-2 * quarter : -quarter])
    first, last, before = (sum(part) / len(part) for part in parts)
    fall = (before - last) / before if before > 0 else 0.0
    falling = last < first and fall > _FALLING
    return {"first": first, "last": last, "fallen": last < _UNMOVED * first, "fall": fall, "falling": falling}


def collapse_signs(evidence: Evidence) -> list[str]:
    """What says that the network has collapsed, in words; []: nothing does."""
    signs = []
    if "effective_rank" in evidence.features and number(evidence.features["effective_rank"]) is None:
        signs.append("features of the trained network are NaN or infinite")
    rank, spread = _telling(evidence)
    entropy, embedding = (_last(evidence.steps, name) for name in ("target_entropy", "embedding_std"))
    trend = loss_trend(evidence.steps)
    if rank is not None and rank < _LEAST_RANK:
        signs.append(f"the features use hardly more than one direction (effective rank {rank:.2f})")
    if spread is not None and spread < _LEAST_SPREAD:
        signs.append(f"the features of all photos are nearly equal (spread {spread:.3f}; 1: even over the sphere)")
    if entropy is None and embedding is not None and embedding < _LEAST_EMBEDDING:
        signs.append(f"the embeddings of all photos are nearly equal (spread {embedding:.3f}; 1: even over the sphere)")
    if entropy is not None and entropy > _NO_TARGET and trend and not trend["fallen"]:
        signs.append(f"the loss has stayed at that of a guess ({_ends(trend)})")
    return signs


def _telling(evidence: Evidence) -> tuple[float | None, float | None]:
    """Effective rank and spread of the features, where photos and steps are enough for them to tell anything."""
    steps = max(_values(evidence.steps, "step"), default=_FEW_STEPS)
    if evidence.features.get("photos", _FEW_PHOTOS) < _FEW_PHOTOS or steps < _FEW_STEPS:
        return None, None
    return number(evidence.features.get("effective_rank")), number(evidence.features.get("feature_std"))


def _in_words(against: Mapping[str, Mapping[str, Difference]], marks: Sequence[str], judged: int) -> str:
    """What the trained network is better than, level with, worse than; marks with the same outcome share a phrase."""
    groups: dict[tuple[str | None, str | None], list[str]] = {}
    for mark in marks:
        words = [against[mark][kind].word if kind in against[mark] else None for kind in ("knn", "linear")]
        groups.setdefault((words[0], words[1]), []).append(mark)
    text = "; ".join(_phrase(knn, linear, names) for (knn, linear), names in groups.items())
    knn, linear = ({pair[place] for pair in groups} - {None} for place in (0, 1))
    if linear == {"better"} and knn - {"better"}:
        text += ": good for fine-tuning, not yet for search"
    elif knn == {"better"} and linear - {"better"}:
        text += ": good for search, not yet for a classifier on top"
    if any("level" in words for words in groups):
        text += f" (level: no farther apart than chance on {counted(judged, 'photo')})"
    return text


def _unknown(kinds: Mapping[str, Difference]) -> bool:
    """Whether the judged photos are too few to tell."""
    return all(found.word == "level" and found.high > _TOO_WIDE for found in kinds.values())


def _added(began: Mapping[str, Difference], judged: int) -> str:
    """What pre-training has made of the weights that the run began with: the measure of whether it was worth it."""
    names, level = {"knn": "nearest neighbours", "linear": "the linear probe"}, f"chance on {counted(judged, 'photo')}"
    parts = []
    for kind, found in began.items():
        word = f"no more than {level}" if found.word == "level" else found.word
        parts.append(f"{found.points:+.1f} points in {names[kind]} ({found.low:+.1f} to {found.high:+.1f}: {word})")
    words = {found.word for found in began.values()}
    whole = "added to the weights as they came" if "better" in words else "added nothing to the weights as they came"
    harmed = "; use them as they are, or lower optim.lr and optim.backbone_lr" if words == {"worse"} else ""
    few = f"{counted(judged, 'judged photo')} are too few to tell what was added to the weights as they came"
    return f"{few if _unknown(began) else f'Pre-training {whole}'}: {' and '.join(parts)}{harmed}"


def _phrase(knn: str | None, linear: str | None, names: Sequence[str]) -> str:
    listed, it = (f"{', '.join(names[:-1])} and {names[-1]}", "them") if len(names) > 1 else (names[0], "it")
    than = f"{linear or knn} {'with' if (linear or knn) == 'level' else 'than'} {listed}"
    if linear is None or knn == linear:
        return f"{than} in nearest neighbours{' and in the linear probe' if linear else ''}"
    then = "" if knn is None else f", {f'level with {it}' if knn == 'level' else knn} in nearest neighbours"
    return f"{than} in the linear probe{then}"


def _without_labels(evidence: Evidence) -> str:
    """What can be said where labels cannot judge."""
    parts = ["without labels that can judge, nobody knows what the features are worth"]
    rank, spread = _telling(evidence)
    if rank is not None and spread is not None:
        parts.append(f"The network has not collapsed (effective rank {rank:.0f}, spread {spread:.2f})")
    if evidence.steps:
        parts.append(_of_the_loss(evidence.steps))
    if alignment := _values(evidence.steps, "alignment"):
        ends = f"{alignment[-1]:.2f} apart ({alignment[0]:.2f} at the start; 0: equal, 2: unrelated)"
        parts.append(f"Two views of a photo lie {ends}")
    return ". ".join([*parts, "neighbours.png shows which photos it finds alike"])


def _of_the_loss(steps: Sequence[Mapping[str, Any]]) -> str:
    trend = loss_trend(steps)
    if not trend:
        return "The run made too few steps to say how its loss went: without --epochs the recipe chooses how many"
    if not trend["fallen"]:
        return f"The loss has not fallen ({_ends(trend)}): nothing was learned yet"
    falling = f"is still falling ({trend['fall']:.0%} in the last quarter of the run)"
    ends = f"from {trend['first']:.2f} to {trend['last']:.2f}"
    return f"The loss fell {ends} and {falling if trend['falling'] else 'has come to rest'}"


def _ends(trend: Mapping[str, Any]) -> str:
    return f"{trend['first']:.2f} at the start, {trend['last']:.2f} at the end"


def _more_epochs(epochs: int, more: int, gain: Difference | None) -> str:
    run = f"Run {counted(more - epochs, 'more epoch')}: the same command with --epochs {more} and another --out"
    if gain is None or not gain.rising:
        return f"{run}; how much that brings cannot be told from this run."
    return (
        f"The kNN curve is still rising. {run} gains some {gain.points:.1f} points "
        f"({gain.low:.1f} to {gain.high:.1f}) if the curve goes on as it did, which curves seldom do for long: "
        "the end of a run rises by itself, as its learning rate falls."
    )


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for row in rows if (value := number(row.get(key))) is not None]


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Mean of the last tenth of what was logged under ``key``."""
    values = _values(rows, key)
    recent = values[-max(1, len(values) // 10) :]
    return sum(recent) / len(recent) if recent else None
