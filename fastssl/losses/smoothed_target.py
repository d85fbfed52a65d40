"""The target of the smoothed losses: 1 - a on the positive, a on the nearest negatives by their rank.

Source: Lin et al., "Establishing a Stronger Baseline for Lightweight Contrastive Models", arXiv 2212.07158.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

# weighting -> number of neighbours, the default first -> last rank of each group, and the groups' shares of the mass
RANK_GROUPS: dict[str, dict[int, tuple[tuple[int, ...], tuple[float, ...]]]] = {
    "stepped": {ends[-1]: (ends, (0.5, 0.25, 0.25)) for ends in ((2, 8, 20), (1, 3, 5), (1, 4, 10), (3, 12, 30))},
    "geometric": {11: (tuple(range(1, 12)), (*(0.5 / 2**i for i in range(10)), 0.5 / 2**9))},
    "nearest": {1: ((1,), (1.0,))},
    "thirds": {20: ((2, 8, 20), (1 / 3, 1 / 3, 1 / 3))},
}

# The mass that the paper's code uses with each weighting; the names are also the allowed values of `weighting`.
DEFAULT_SMOOTHING = {
    "uniform_topk": 0.2,
    "stepped": 0.2,
    "geometric": 0.4,
    "nearest": 0.5,
    "uniform_all": 0.2,
    "thirds": 0.2,
}
WEIGHTINGS = tuple(DEFAULT_SMOOTHING)

_INT32_MAX = 2**31 - 1
# More than any queue holds; each of them has a weight.
_MOST_NEIGHBORS = 2**22


def rank_weights(weighting: str, neighbors: int | None = None) -> tuple[float, ...]:
    """Share of the smoothing mass on each rank, nearest negative first; sums to one.

    Args:
        weighting: ``uniform_topk`` (equal on ``neighbors``), ``stepped`` (1/2, 1/4, 1/4 on three rank groups),
            ``geometric`` (halving, 11 ranks), ``nearest`` (all on the first), ``thirds`` (1/3 on ranks 1-2, 3-8 and
            9-20) or ``uniform_all`` (equal on the whole queue: no ranks, an empty tuple).
        neighbors: number of ranks; ``None`` takes the weighting's own (20 for ``uniform_topk``, ``stepped`` and
            ``thirds``).

    Raises:
        ValueError: unknown weighting, or a number of neighbours that it does not define; the message lists what is
            allowed.
    """
    if weighting not in DEFAULT_SMOOTHING:
        raise ValueError(f"weighting={weighting!r} is unknown; choose one of {', '.join(WEIGHTINGS)}")
    if weighting == "uniform_all":
        if neighbors is not None:
            raise ValueError(
                f"neighbors={neighbors!r} with weighting='uniform_all': the mass goes to every negative, so "
                "leave neighbors=None"
            )
        return ()
    if weighting == "uniform_topk":
        count = 20 if neighbors is None else neighbors
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_NEIGHBORS:
            raise ValueError(
                f"neighbors={neighbors!r} with weighting='uniform_topk': give a whole number of at least 1 and at most "
                f"{_MOST_NEIGHBORS:,}"
            )
        return (1.0 / count,) * count
    groups = RANK_GROUPS[weighting]
    if (count := next(iter(groups)) if neighbors is None else neighbors) not in groups:
        allowed = ", ".join(map(str, sorted(groups)))
        only = f"its rank groups are defined for {allowed} only" if len(groups) > 1 else f"it always uses {allowed}"
        raise ValueError(f"neighbors={neighbors!r} with weighting={weighting!r}: {only}")
    ends, shares = groups[count]
    sizes = [last - before for before, last in zip((0, *ends), ends)]
    return tuple(share / size for size, share in zip(sizes, shares) for _ in range(size))


def top_columns(values: Tensor, count: int) -> Tensor:
    """Columns of the ``count`` largest values of each row, largest first, equal values by the lowest column: (B, M) ->
    (B, count) int64.
    """
    if values.dtype != torch.float32:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :count]
    # torch.topk leaves ties open and a stable sort of everything is slow, so value and column become one integer key:
    # the float's bits, made monotonic, above the reversed column. Adding zero turns -0.0, which equals 0.0 but has
    # other bits, into 0.0.
    bits = (values + 0.0).view(torch.int32)
    bits ^= (bits >> 31).bitwise_and_(_INT32_MAX)
    reversed_column = torch.arange(_INT32_MAX, _INT32_MAX - values.shape[1], -1, device=values.device)
    keys = bits.to(torch.int64).bitwise_left_shift_(32).add_(reversed_column)
    return _INT32_MAX - (keys.topk(count, 1).values & 0xFFFFFFFF)


@functools.lru_cache(maxsize=64)
def weight_row(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``weights`` as a tensor (n,), kept: making it is a copy to the device, once per run instead of once per step."""
    # An ordinary tensor also if the first call is made in inference mode: autograd refuses to save any other.
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=dtype, device=device)


class SmoothedTarget(nn.Module):
    """Settings of a loss with such a target, checked, and the target's entropy.

    Attributes:
        temperature: tau, positive.
        smoothing: mass a on the negatives, in [0, 1). ``None`` takes the published value: 0.4 for ``geometric``, 0.5
            for ``nearest``, 0.2 otherwise. Exactly 0.0 skips the search for the nearest.
        weighting, neighbors: see :func:`rank_weights`.
        weights: share of the smoothing mass on each rank; empty for ``uniform_all``.

    Raises:
        ValueError: settings outside these ranges.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        smoothing: float | None = None,
        weighting: str = "stepped",
        neighbors: int | None = None,
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(
                f"temperature={temperature}: give a positive number (0.1 in the paper's code, 0.2 in MoCo-v2)"
            )
        self.weights = rank_weights(weighting, neighbors)
        self.temperature = float(temperature)
        self.smoothing: Tensor | float = self.mass(DEFAULT_SMOOTHING[weighting] if smoothing is None else smoothing)
        self.weighting = weighting
        self.neighbors = len(self.weights) if self.weights else None

    def mass(self, smoothing: Tensor | float | None) -> Tensor | float:
        """The mass a of a step: a number, or a tensor with one element on the device, which a schedule can change
        without a host sync (its range is not checked); None: the module's.

        Raises:
            ValueError: a number outside [0, 1), a tensor of several elements or one that requires a gradient.
        """
        if smoothing is None:
            return self.smoothing
        if isinstance(smoothing, Tensor):
            if smoothing.numel() != 1 or not smoothing.is_floating_point() or smoothing.requires_grad:
                raise ValueError(
                    f"smoothing is a {smoothing.dtype} tensor of shape {tuple(smoothing.shape)}, requires_grad="
                    f"{smoothing.requires_grad}; expected one floating-point element without gradient"
                )
            return smoothing.reshape(())
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: give a mass in [0, 1); the positive keeps the rest")
        return float(smoothing)

    def require_negatives(self, available: int, smoothed: bool = True) -> None:
        """Raise ValueError where there are fewer negatives than neighbours that share the smoothing, or none."""
        needed = max(1, len(self.weights) if smoothed else 1)
        if available < needed:
            raise ValueError(
                f"there are {available} negatives, and weighting={self.weighting!r} needs at least {needed}: enlarge "
                "the batch or the queue, or lower neighbors"
            )

    def target_entropy(self, smoothing: Tensor | float | None = None, negatives: int | None = None) -> Tensor | float:
        """Entropy of the target in nats: the least value that the loss can reach, so that ``loss - entropy`` is the KL
        divergence.

        Args:
            smoothing: see ``mass``; a tensor gives a tensor on its device, without host sync.
            negatives: how many there are; needed (and used) by ``uniform_all`` only.

        Raises:
            ValueError: ``uniform_all`` without the number of negatives.
        """
        mass = self.mass(smoothing)
        if self.weights:
            spread = -sum(w * math.log(w) for w in self.weights)
        elif negatives:
            spread = math.log(negatives)
        else:
            raise ValueError("negatives is missing: with weighting='uniform_all' the entropy depends on their number")
        # H = h(1 - a) + h(a) + a * H(w): the choice between positive and negatives first, then the one among the
        # negatives.
        if isinstance(mass, Tensor):
            mass = mass.detach() if mass.dtype == torch.float64 else mass.detach().float()
            entropy: Tensor = torch.special.entr(1 - mass) + torch.special.entr(mass) + mass * spread
            return entropy
        return mass * spread - sum(p * math.log(p) for p in (1 - mass, mass) if p > 0)
