"""From the losses of pairs of views to one loss: global-global and global-local pairs, each kind with its weight.

Source: SSLight, arXiv 2210.02808. With two global views and L local ones, and gg and gl the means over the pairs of
each kind,

    loss = weight_gg * gg + weight_gl * gl            weight_gg + weight_gl = 1

SSLight takes 0.4 and 0.6. ``PairWeights.by_count`` gives what DINO, SwAV and MoCo do without it: the plain mean over
all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GLOBAL_VIEWS = 2


@dataclass(frozen=True)
class PairWeights:
    """How much each kind of pair counts.

    Attributes:
        local_views: number L of local views of a sample; may be 0.
        gg: weight of the mean over pairs of two global views.
        gl: weight of the mean over pairs of a global and a local view; 0 if there are no local views.

    Raises:
        ValueError: weights that are negative or not finite, that do not sum to one (within 1e-6), or that go to pairs
            which do not exist.
    """

    local_views: int
    gg: float
    gl: float

    def __post_init__(self) -> None:
        if self.local_views < 0:
            raise ValueError(f"local_views={self.local_views}: give the number of local views, 0 for none")
        for name, weight in (("global-global", self.gg), ("global-local", self.gl)):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"views.weights: the {name} weight is {weight}; give a finite number of at least 0")
        if abs(self.gg + self.gl - 1) > 1e-6:
            raise ValueError(
                f"views.weights: {self.gg} (global-global) and {self.gl} (global-local) sum to "
                f"{self.gg + self.gl:.6g}; give two numbers that sum to 1"
            )
        if not self.local_views and self.gl:
            raise ValueError(
                f"views.weights: {self.gl} goes to global-local pairs, but there are no local views; set the "
                "weights to 1 and 0, or add local views"
            )

    @classmethod
    def by_count(cls, local_views: int) -> PairWeights:
        """Weights with which every pair counts alike: 1 / (1 + L) and L / (1 + L).

        They hold for two targets (DINO, SwAV: 2 + 2L pairs) and for one (asymmetric MoCo: 1 + L pairs).
        """
        return cls(local_views, 1 / (1 + local_views), local_views / (1 + local_views))


def reduce_pairs(gg: Tensor, gl: Tensor | None, weights: PairWeights) -> Tensor:
    """Weighted sum of the two kinds' means.

    Args:
        gg: mean over the global-global pairs, a scalar.
        gl: mean over the global-local pairs, a scalar; ``None`` if, and only if, there are no local views.
        weights: of the two kinds.

    Returns:
        Scalar tensor; ``gg`` itself where the weight of the local pairs is 0.

    Raises:
        ValueError: ``gl`` is missing, or there although there are no local views.
    """
    if (gl is None) != (weights.local_views == 0):
        given = "None" if gl is None else "given"
        raise ValueError(
            f"gl is {given} with {weights.local_views} local views; it is None if, and only if, there are none"
        )
    if gl is None or weights.gl == 0:
        return gg
    return weights.gg * gg + weights.gl * gl


def split_pairs(pairs: Tensor, targets: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Means over the two kinds of pairs in a matrix of pair losses. A view against itself does not count.

    Args:
        pairs: (T, V) floating point. Row t: global view ``targets[t]`` as the target. Column v: view v, of which 0 and
            1 are the global ones.
        targets: the global view (0 or 1) of each row, each at most once: ``(0, 1)``, or ``(0,)`` if only the first view
            is a target.

    Returns:
        Mean over the T global-global pairs and mean over the T * (V - 2) global-local pairs, scalars; ``None`` for the
        latter if V is 2.

    Raises:
        ValueError: a matrix or targets of another form.
    """
    if pairs.dim() != 2 or pairs.shape[0] != len(targets) or pairs.shape[1] < GLOBAL_VIEWS:
        raise ValueError(
            f"pairs has shape {tuple(pairs.shape)}; expected ({len(targets)} targets, at least {GLOBAL_VIEWS} views)"
        )
    if not targets or len(set(targets)) != len(targets) or not set(targets) <= {0, 1}:
        raise ValueError(
            f"targets={tuple(targets)}: give the global views that are targets, each once: (0, 1), (0,) or (1,)"
        )
    gg = torch.stack([row[1 - target] for row, target in zip(pairs, targets)]).mean()
    gl = pairs[:, GLOBAL_VIEWS:].mean() if pairs.shape[1] > GLOBAL_VIEWS else None
    return gg, gl
