"""View sampling by multi-crop: two global and L local views, their sizes, areas, augmentation, and what their pairs
weigh in the loss.

One object says all of it, so that the number of views stands in one place and nothing has to be changed by hand
together with it. The areas of global and local crops meet at one threshold:

    area 0 ---- smallest ==== local ==== threshold ======== global ======== largest

Small networks want easier views (SSLight, arXiv 2210.02808): a higher threshold, larger local views, and a fixed weight
for the pairs of two global views, which otherwise are one pair in 1 + L.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastssl.errors import counted
from fastssl.pipelines.plan.draw import ViewSpec, ViewSpecError, check_integer

#: What ``augment``, ``global_1``, ``global_2`` and ``local`` may set: everything of a view but what this object decides
#: itself.
_AUGMENTATION = tuple(f.name for f in dataclasses.fields(ViewSpec) if f.name not in ("size", "count", "area", "center"))


def _preset(threshold: float, local_size: int, local_count: int, weights: list[float] | None) -> dict[str, Any]:
    return {
        "threshold": threshold,
        "area": [0.05, 1.0],
        "global_size": 224,
        "local_size": local_size,
        "local_count": local_count,
        "weights": weights,
    }


#: The designs of the published recipes by name: the usual multi-crop of SwAV and DINO, and SSLight's, for CNNs and for
#: vision transformers.
PRESETS = {
    "baseline-cnn": _preset(0.14, 96, 6, None),
    "sslight-cnn": _preset(0.3, 128, 6, [0.4, 0.6]),
    "baseline-vit": _preset(0.25, 96, 10, None),
    "sslight-vit": _preset(0.3, 128, 10, [0.4, 0.6]),
}


@dataclass(frozen=True)
class MultiCrop(Sequence[ViewSpec]):
    """A sequence of view groups: global view 1, global view 2, then the local views (one group).

    Attributes:
        threshold: area, as a share of the picture's, where local crops end and global ones begin.
        area: smallest local and largest global crop.
        global_size, local_size: pixels.
        local_count: local views L; 0: global views only.
        weights: of the mean loss of pairs of two global views and of pairs of a global and a local one; they sum to 1.
            None: by the number of pairs, 1 / (1 + L) and L / (1 + L), which makes the loss the plain mean over all
            pairs.
        augment: settings of ``ViewSpec`` for all views.
        global_1, global_2, local: settings for one kind of view, over those.

    Raises:
        ViewSpecError: a value is out of range, the weights do not sum to 1, or an augmentation has no such setting.
    """

    threshold: float = 0.3
    area: tuple[float, float] = (0.05, 1.0)
    global_size: int = 224
    local_size: int = 128
    local_count: int = 6
    weights: tuple[float, float] | None = None
    augment: dict[str, Any] = field(default_factory=dict)
    global_1: dict[str, Any] = field(default_factory=dict)
    global_2: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.area[0] <= self.threshold <= self.area[1]:
            raise ViewSpecError(f"threshold={self.threshold} must lie within area={list(self.area)}")
        check_integer("local_count", self.local_count, 0, 1022)
        if self.weights is not None:
            if not all(math.isfinite(w) and w >= 0 for w in self.weights) or abs(sum(self.weights) - 1) > 1e-6:
                raise ViewSpecError(f"weights={list(self.weights)} must be two numbers, none negative, that sum to 1")
            if not self.local_count and self.weights[1] > 0:
                raise ViewSpecError(
                    f"weights={list(self.weights)} give local pairs a weight, but local_count is 0: there are none"
                )
            if self.local_count and not self.weights[1]:
                raise ViewSpecError(
                    f"weights={list(self.weights)} give local pairs no weight: local_count=0 would save their cost"
                )
        list(self)  # each group checks its own settings

    @cached_property
    def _specs(self) -> list[ViewSpec]:
        split = (self.threshold, self.area[1])
        groups = [
            self._spec("global_1", self.global_size, 1, split),
            self._spec("global_2", self.global_size, 1, split),
        ]
        if self.local_count:
            groups.append(self._spec("local", self.local_size, self.local_count, (self.area[0], self.threshold)))
        return groups

    def _spec(self, kind: str, size: int, count: int, area: tuple[float, float]) -> ViewSpec:
        for source in ("augment", kind):
            values = getattr(self, source)
            if not isinstance(values, Mapping):
                raise ViewSpecError(f"{source} must be a mapping of settings to values, got {values!r}")
            for name in values:
                if name not in _AUGMENTATION:
                    raise ViewSpecError(f"{source}.{name}: no such setting; there are {', '.join(_AUGMENTATION)}")
        try:
            return ViewSpec(size=size, count=count, area=area, **{**self.augment, **getattr(self, kind)})
        except ViewSpecError as error:
            raise ViewSpecError(f"{kind}: {error}") from error

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
