"""View sampling by multi-crop: two global and L local views, their sizes, areas, augmentation, and what their pairs
weigh in the loss, all in one object. The areas of global and local crops meet at one threshold:

    area 0 ---- smallest ==== local ==== threshold ======== global ======== largest

Small networks want easier views (SSLight, arXiv 2210.02808): a higher threshold, larger local views, and a fixed weight
for the pairs of two global views, which otherwise are one pair in 1 + L.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field, replace
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from fastssl.errors import counted
from fastssl.pipelines.plan.draw import AreaRange, Pixels, ViewSpec, ViewSpecError
from fastssl.utils.settings import NotNegative, Share, Whole, settings

#: What ``augment``, ``global_1``, ``global_2`` and ``local`` may set: everything of a view but what this object decides
#: itself.
AUGMENTATION = tuple(f.name for f in dataclasses.fields(ViewSpec) if f.name not in ("size", "count", "area", "center"))


def _design(threshold: float, local_size: int, local_count: int, weights: list[float] | None) -> dict[str, Any]:
    sizes = {"global_size": 224, "local_size": local_size, "local_count": local_count}
    return {"threshold": threshold, "area": [0.05, 1.0], **sizes, "weights": weights}


#: The designs of the published recipes by name: the usual multi-crop of SwAV and DINO, and SSLight's, for CNNs and for
#: vision transformers.
PRESETS: dict[str, dict[str, Any]] = {
    "baseline-cnn": _design(0.14, 96, 6, None),
    "sslight-cnn": _design(0.3, 128, 6, [0.4, 0.6]),
    "baseline-vit": _design(0.25, 96, 10, None),
    "sslight-vit": _design(0.3, 128, 10, [0.4, 0.6]),
}


@settings(error=ViewSpecError)
class MultiCrop(Sequence[ViewSpec]):
    """A sequence of view groups: global view 1, global view 2, then the local views (one group). ``ViewSpecError``: a
    value is out of range, or there is no such setting.

    Attributes:
        threshold: area, as a share of the picture's, where local crops end and global ones begin.
        area: smallest local and largest global crop. global_size, local_size: pixels.
        local_count: local views L; 0: global views only.
        weights: of the mean loss of pairs of two global views and of pairs of a global and a local one; they sum to 1.
            None: by the number of pairs, 1 / (1 + L) and L / (1 + L), which makes the loss the plain mean over all
            pairs.
        augment: settings of ``ViewSpec`` for all views.
        global_1, global_2, local: settings for one kind of view, over those.
    """

    threshold: Share = 0.3
    area: AreaRange = (0.05, 1.0)
    global_size: Pixels = 224
    local_size: Pixels = 128
    local_count: Annotated[Whole, Field(ge=0, le=1022)] = 6
    weights: tuple[NotNegative, NotNegative] | None = None
    augment: dict[str, Any] = field(default_factory=dict)
    global_1: dict[str, Any] = field(default_factory=dict)
    global_2: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        smallest, largest = self.area
        if not smallest <= self.threshold <= largest:
            raise ViewSpecError(f"threshold={self.threshold} must lie within area={[smallest, largest]}")
        if self.weights is not None:
            weights = f"weights={list(self.weights)}"
            if abs(sum(self.weights) - 1) > 1e-6:
                raise ViewSpecError(f"{weights} must be two numbers that sum to 1")
            if not self.local_count and self.weights[1]:
                raise ViewSpecError(f"{weights} give local pairs a weight, but local_count is 0: there are none")
            if self.local_count and not self.weights[1]:
                raise ViewSpecError(f"{weights} give local pairs no weight: local_count=0 would save their cost")
        _ = self._specs  # what is wrong with a view is said at once

    @cached_property
    def _specs(self) -> tuple[ViewSpec, ...]:
        smallest, largest = self.area
        specs = [self._spec(kind, self.global_size, 1, (self.threshold, largest)) for kind in ("global_1", "global_2")]
        if self.local_count:
            specs.append(self._spec("local", self.local_size, self.local_count, (smallest, self.threshold)))
        return tuple(specs)

    def _spec(self, kind: str, size: int, count: int, area: tuple[float, float]) -> ViewSpec:
        for source in ("augment", kind):
            for name in getattr(self, source):
                if name not in AUGMENTATION:
                    raise ViewSpecError(f"{source}.{name}: no such setting; there are {', '.join(AUGMENTATION)}")
        try:
            return ViewSpec(size=size, count=count, area=area, **{**self.augment, **getattr(self, kind)})
        except ViewSpecError as error:
            raise ViewSpecError(f"{kind}.{error}") from error

    def __len__(self) -> int:
        return len(self._specs)

    def __getitem__(self, index: int) -> ViewSpec:  # type: ignore[override]  # no slices
        return self._specs[index]

    @property
    def names(self) -> list[list[str]]:
        """What the views of each group are called."""
        locals_ = [f"local {number + 1}" for number in range(self.local_count)]
        return [["global 1"], ["global 2"], *([locals_] if locals_ else [])]

    @property
    def pair_weights(self) -> tuple[float, float]:
        """(global-global, global-local), as the loss uses them."""
        if self.weights is not None:
            return self.weights
        return 1 / (1 + self.local_count), self.local_count / (1 + self.local_count)

    def describe(self) -> str:
        """One line for people."""
        gg, gl = self.pair_weights
        globals_ = f"2 global views of {self.global_size} px, area {self.threshold:g} .. {self.area[1]:g}"
        if not self.local_count:
            return f"{globals_}; no local views"
        views = counted(self.local_count, "local view")
        local = f"{views} of {self.local_size} px, area {self.area[0]:g} .. {self.threshold:g}"
        by = "" if self.weights else " (by the number of pairs)"
        return f"{globals_}; {local}; pairs weigh {gg:.3g} global-global, {gl:.3g} global-local{by}"


def smaller(views: list[ViewSpec] | MultiCrop, share: float) -> list[ViewSpec] | MultiCrop:
    """The same views with sides of ``share`` of theirs, to the nearest 8 pixels; the blur shrinks with them. Sides that
    would not be smaller stay as they are.
    """

    def side(size: int) -> int:
        return min(size, max(8, 8 * round(size * share / 8)))

    def sharper(sigma: Sequence[float]) -> tuple[float, float]:
        return sigma[0], max(sigma[0], sigma[1] * share)

    if not isinstance(views, MultiCrop):
        return [replace(spec, size=side(spec.size), blur_sigma=sharper(spec.blur_sigma)) for spec in views]
    kinds: dict[str, Any] = {kind: dict(getattr(views, kind)) for kind in ("augment", "global_1", "global_2", "local")}
    kinds["augment"].setdefault("blur_sigma", ViewSpec.blur_sigma)
    for given in kinds.values():
        if "blur_sigma" in given:
            given["blur_sigma"] = sharper(given["blur_sigma"])
    return replace(views, global_size=side(views.global_size), local_size=side(views.local_size), **kinds)
