"""Which samples come when: pure functions of (seed, epoch, step, rank, world).

One permutation per epoch, cut into global batches; each rank takes its contiguous part of a batch. The global batch
therefore does not depend on how many processes share it, and a resumed run needs nothing but the step's number.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastssl.pipelines.plan.philox import Stream, keyed_words


def _random_keys(count: int, seed: int, stream: Stream, epoch: int, high_word: int = 0) -> NDArray[np.uint64]:
    """(count,) 64-bit sort keys, two from each Philox block; the block's item is (high_word << 32) + position // 2."""
    blocks = np.arange((count + 1) // 2, dtype=np.int64) + (high_word << 32)
    words = keyed_words(seed, stream, epoch, blocks).astype(np.uint64)
    keys: NDArray[np.uint64] = ((words[0::2] << np.uint64(32)) | words[1::2]).T.reshape(-1)[:count]
    return keys


# Two entries: the current epoch's order and the next one's, which prefetching asks for before the current one ends.
@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of samples in an epoch, position -> sample: (num_samples,) int64, shared with other callers and
    read-only. The permutation sorts one random 64-bit key per sample; equal keys keep the samples' order.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {num_samples}")
    order = np.argsort(_random_keys(num_samples, seed, Stream.ORDER, epoch), kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


def steps_per_epoch(num_samples: int, batch_size: int, world: int = 1, drop_last: bool = True) -> int:
    """Global batches in an epoch; ``batch_size`` is per rank, and ``drop_last`` leaves out a last, partial batch."""
    if batch_size < 1 or world < 1:
        raise ValueError(f"batch_size and world must be at least 1, got {batch_size} and {world}")
    total = batch_size * world
    return num_samples // total if drop_last else -(-num_samples // total)


def batch_indices(
    num_samples: int, seed: int, epoch: int, step: int, batch_size: int, rank: int = 0, world: int = 1
) -> NDArray[np.int64]:
    """The samples of one rank's part of a global batch, of ``batch_size`` per rank: (batch_size,) int64 sample indices,
    a read-only view of the epoch's order. ``ValueError``: there is no such step or rank.
    """
    steps = steps_per_epoch(num_samples, batch_size, world)
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in 0 .. {world - 1}, got {rank}")
    if not 0 <= step < steps:
        raise ValueError(
            f"step {step} is outside the epoch: {num_samples} samples make {steps} steps of {world} x {batch_size}"
        )
    start = (step * world + rank) * batch_size
    return epoch_order(num_samples, seed, epoch)[start : start + batch_size]


def last_batch(num_samples: int, seed: int, epoch: int, batch_size: int, world: int = 1) -> NDArray[np.int64]:
    """The samples of all ranks' parts of an epoch's last, partial batch; ``batch_size`` is per rank: (n,) int64.

    The epoch's first samples fill it up to a multiple of ``world``, as torch's DistributedSampler does with its order,
    and to two, because BatchNorm cannot train on one.
    """
    start = num_samples // (batch_size * world) * batch_size * world
    count = max(num_samples - start, 2)
    places = np.arange(start, start + count + -count % world)
    return epoch_order(num_samples, seed, epoch).take(places, mode="wrap")


def batch_permutation(n: int, seed: int, epoch: int, step: int, *, parts: int = 1) -> NDArray[np.int64]:
    """A permutation of the n rows of a batch, for split batch normalisation (the keys of MoCo). Returns (n,) int64.

    Args:
        parts: that n is cut into, one after the other; rows stay in their own part, each part has a permutation of its
            own.
    """
    if not 0 <= step < 2**31:
        raise ValueError(f"step must lie in 0 .. 2**31 - 1, got {step}")
    if not 0 <= n < 2**32:
        raise ValueError(f"n must lie in 0 .. 2**32 - 1, got {n}")
    keys = _random_keys(n, seed, Stream.BATCH_PERMUTATION, epoch, high_word=step).reshape(parts, -1)
    order = np.argsort(keys, axis=1, kind="stable") + np.arange(0, n, keys.shape[1] or 1)[:parts, None]
    return order.ravel().astype(np.int64, copy=False)
