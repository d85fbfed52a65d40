"""InfoNCE against a queue of negatives, with the target smoothed towards the nearest of them.

Source of the formulas: Lin et al., "Establishing a Stronger Baseline for Lightweight Contrastive Models", arXiv
2212.07158. With l+ = q.k+ / tau, l_j = q.n_j / tau, smoothing mass a and a weighting w over ranks that sums to one:

    loss = logsumexp([l+, l_1..l_K]) - (1 - a) l+ - a sum_r w_r l_(r)
    l_(r): the r-th largest l_j, ties to the lowest j
    dloss/dq = (softmax([l+, l]) @ [k+; queue] - (1 - a) k+ - a sum_r w_r n_(r)) / tau

Both need the queue once. It is read in tiles with a running maximum, a running sum and a running softmax-weighted sum
of the queue (as attention does with keys = values = queue), so the (batch, queue) matrix of logits never exists and the
backward pass is one multiplication.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.losses.smoothed_target import SmoothedTarget, top_columns, weight_row

# Keys per block in the search for the nearest. Larger: fewer maxima to rank, more keys to look at again (8 and 16
# measured alike, 4 and 32 slower).
_BLOCK = 16
# Size of the large temporaries in elements: products in flight (batch * tile), and keys looked at again in the search
# (queries * keys * features). On a quiet CPU 2**20 to 2**23 are within 15 % of each other; on a crowded one few large
# tiles win by far. A GPU wants few launches: 64 MB, two tiles at batch 512 and queue 65536.
_CPU_ELEMENTS = (2**23, 2**22)
_GPU_ELEMENTS = (2**24, 2**24)


class SmoothedInfoNCE(SmoothedTarget):
    """Mean cross-entropy between softmax over (positive, queue) and a target smoothed towards the nearest negatives.

    Only ``query``, and ``key`` if it asks for one, receive a gradient; the queue is a constant. Values and gradients
    are exact (not sampled), in float32, or in float64 when any input is float64, whatever autocast says. Nothing here
    reads a value back to the host. Extra memory is O(batch * tile). A NaN in any input, or a logit that overflows to
    +inf, makes the loss NaN.

    Attributes:
        temperature, smoothing, weighting, neighbors: see :class:`SmoothedTarget`.
        tile: queue rows in flight; ``None`` chooses from the batch size and the device.

    Raises:
        ValueError: settings outside these ranges.

    Example::

        criterion = SmoothedInfoNCE(temperature=0.1, smoothing=0.2, weighting="stepped", neighbors=20)
        loss = criterion(query, key, queue)             # L2-normalised (B, D), (B, D), (K, D)
        loss.backward()
    """

    def __init__(
        self,
        temperature: float = 0.1,
        smoothing: float | None = None,
        weighting: str = "stepped",
        neighbors: int | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__(temperature, smoothing, weighting, neighbors)
        if tile is not None and tile < 1:
            raise ValueError(f"tile={tile}: give a positive number of queue rows, or None to let the loss choose")
        self.tile = tile

    def forward(self, query: Tensor, key: Tensor, queue: Tensor, smoothing: Tensor | float | None = None) -> Tensor:
        """Mean loss over the batch, in nats.

        Args:
            query: (B, D) floating point, L2-normalised.
            key: (B, D), the positive of each query.
            queue: (K, D) negatives, without gradient; may be of a lower precision than the query.
            smoothing: the mass a of this step, see :meth:`SmoothedTarget.mass`.

        Returns:
            Scalar tensor: float64 if any input is float64, else float32.

        Raises:
            ValueError: wrong shapes, fewer negatives than neighbours, a queue or a smoothing that requires a gradient.
        """
        mass = self.mass(smoothing)
        self._check(query, key, queue)
        loss: Tensor = StreamedLoss.apply(
            query, key, queue, mass, self.temperature, self.weights, self.tile, torch.is_grad_enabled(), None
        )
        return loss

    def _check(self, query: Tensor, key: Tensor, queue: Tensor) -> None:
        for name, tensor in (("query", query), ("key", key), ("queue", queue)):
            if tensor.dim() != 2 or not tensor.is_floating_point():
                raise ValueError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected a floating-point "
                    "matrix (rows, features)"
                )
            if tensor.device != query.device:
                raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; move them to one device")
        if query.shape != key.shape or 0 in query.shape:
            raise ValueError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)} must have one shape (B, D) with B and "
                "D at least 1"
            )
        if queue.shape[1] != query.shape[1]:
            raise ValueError(
                f"queue has {queue.shape[1]} features and query {query.shape[1]}; both come from the same "
                "projector, so they must agree"
            )
        self.require_negatives(len(queue))
        if queue.requires_grad:
            raise ValueError("queue requires a gradient, but the loss treats it as a constant: pass queue.detach()")


class StreamedLoss(torch.autograd.Function):
    """Value and gradients in one pass over the queue; the backward pass only scales what the forward pass found.

    ``mean``: (B, D), of the keys that share the mass; None: of the nearest by ``weights``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        queue: Tensor,
        mass: Tensor | float,
        temperature: float,
        weights: tuple[float, ...],
        tile: int | None,
        grad_enabled: bool,
        mean: Tensor | None,
    ) -> Tensor:
        # Inside a Function grad mode is always off and needs_input_grad ignores no_grad, hence the flag: evaluation
        # costs half.
        wants_query, wants_key = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype, queue.dtype) else torch.float32
        with torch.autocast(query.device.type, enabled=False):
            q, k = query.to(dtype), key.to(dtype)  # (B, D)
            positive = (q * k).sum(1)  # (B,)
            smoothed = isinstance(mass, Tensor) or mass > 0  # a tensor's value is not known here
            if isinstance(mass, Tensor):
                mass = mass.to(dtype)
            seen = stream(q, k, positive, queue, temperature, tile, wants_query)

            # Written as differences to the positive, which stay accurate when the loss is near zero.
            loss = (seen.maximum - positive) / temperature + seen.total.log()
            if smoothed:
                if mean is not None:
                    soft = mean.to(dtype)
                elif weights:
                    soft = _nearest_mean(q, queue, seen.peaks, weights)  # (B, D)
                else:
                    soft = queue.mean(0, keepdim=True, dtype=dtype)  # (1, D): every negative counts alike
                loss = loss + mass * (positive - (q * soft).sum(1)) / temperature
            loss = loss.mean()

            scale = 1 / (temperature * q.shape[0])
            grad_query = grad_key = None
            if wants_query:
                grad_query = seen.weighted / seen.total[:, None] - (1 - mass) * k
                if smoothed:
                    grad_query -= mass * soft
                grad_query *= scale
            if wants_key:
                probability = ((positive - seen.maximum) / temperature).exp() / seen.total
                grad_key = (probability - (1 - mass))[:, None] * q * scale
        ctx.save_for_backward(grad_query, grad_key)
        ctx.dtypes = query.dtype, key.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * grad_loss).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return (*grads, *[None] * 7)


class _Seen(NamedTuple):
    """What one pass over the queue leaves behind, per query."""

    maximum: Tensor  # (B,) largest product q.k, the positive's included
    total: Tensor  # (B,) sum of exp((q.k - maximum) / temperature)
    weighted: Tensor  # (B, D) the same sum of term times key; the positive's key alone if it was not asked for
    peaks: Tensor  # (blocks, B) largest product of each block of 16 keys, over the whole queue


def stream(
    query: Tensor,
    key: Tensor,
    positive: Tensor,
    queue: Tensor,
    temperature: float,
    tile: int | None,
    wants_weighted: bool,
) -> _Seen:
    batch, rows = query.shape[0], queue.shape[0]
    if tile is None:
        tile = max(1024, (_GPU_ELEMENTS if query.is_cuda else _CPU_ELEMENTS)[0] // batch)
    tile = _round_up(min(tile, rows), _BLOCK)
    # torch's exp2 takes a third of the time of its exp on a CPU. The factor is applied to the products, not to the
    # query, so that products which tie exactly (vectors of small integers) still do when they are ranked.
    to_base_2 = math.log2(math.e) / temperature

    # Keys run down and queries across, so that a block of neighbouring keys reduces over whole contiguous rows: ten
    # times as fast on a CPU as a reduction over the 16 innermost elements, and coalesced on a GPU.
    buffer = query.new_empty(tile, batch)
    peaks = query.new_empty(_round_up(rows, _BLOCK) // _BLOCK, batch)
    maximum, total, weighted = positive, torch.ones_like(positive), key.clone()
    for start in range(0, rows, tile):
        keys = queue[start : start + tile].to(query.dtype)  # (T, D)
        filled = keys.shape[0]
        padded = _round_up(filled, _BLOCK)
        part, part_peaks = buffer[:padded], peaks[start // _BLOCK : (start + padded) // _BLOCK]
        torch.mm(keys, query.t(), out=part[:filled])
        part[filled:] = -math.inf
        torch.amax(part.view(-1, _BLOCK, batch), 1, out=part_peaks)

        new_maximum = torch.maximum(maximum, part_peaks.amax(0))
        shrink = ((maximum - new_maximum) * to_base_2).exp2_()
        part.sub_(new_maximum).mul_(to_base_2).exp2_()
        total = total.mul(shrink).add_(part.sum(0))
        if wants_weighted:
            weighted.mul_(shrink[:, None]).addmm_(part[:filled].t(), keys)
        maximum = new_maximum
    return _Seen(maximum, total, weighted, peaks)


def _nearest_mean(query: Tensor, queue: Tensor, peaks: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Weighted mean of each query's nearest negatives, (B, D): ``weights[r]`` on the one with the (r + 1)-th largest
    product, ties to the lowest row.

    The ``count`` nearest all lie in the ``count`` blocks with the largest peaks (ties to the first block): a block left
    out has ``count`` blocks before it, and each of those holds an element that comes before any of its own. So only
    their products are computed again: cheaper than to search, or to keep, those of every key.
    """
    count, rows = len(weights), queue.shape[0]
    blocks = min(count, peaks.shape[0])
    profile = weight_row(weights, query.dtype, queue.device)
    in_block = torch.arange(_BLOCK, device=queue.device)
    # The keys looked at again are a matrix per query, too much for the whole batch at once.
    chunk = max(1, (_GPU_ELEMENTS if query.is_cuda else _CPU_ELEMENTS)[1] // (blocks * _BLOCK * query.shape[1]))
    # (B, n): ascending, so that candidates follow rows
    kept = top_columns(peaks.t().contiguous(), blocks).sort(1).values
    means = []
    for queries, its_blocks in zip(query.split(chunk), kept.split(chunk)):
        index = (its_blocks[:, :, None] * _BLOCK + in_block).flatten(1)  # (b, 16 n)
        candidates = queue.index_select(0, index.clamp(max=rows - 1).flatten()).to(query.dtype)
        candidates = candidates.view(*index.shape, -1)  # (b, 16 n, D)
        products = torch.bmm(candidates, queries[:, :, None]).squeeze(2)  # (b, 16 n)
        if rows % _BLOCK:
            products.masked_fill_(index >= rows, -math.inf)
        nearest = top_columns(products, count)  # (b, count)
        share = torch.zeros_like(products).scatter_(1, nearest, profile.expand_as(nearest))
        means.append(torch.bmm(share[:, None, :], candidates).squeeze(1))
    return torch.cat(means)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
