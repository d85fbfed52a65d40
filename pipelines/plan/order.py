"""Which samples come when: pure functions of (seed, epoch, step, rank, world).

One permutation per epoch, cut into global batches; each rank takes its contiguous part of a batch. The global batch
therefore does not depend on how many processes share it, and a resumed run needs nothing but the step's number.

Up to ``SORTED`` samples the permutation sorts one random 64-bit key per sample (32 bytes each while it is made). Above,
it is a keyed one (permutation.py), which is asked for the places that are needed and takes no memory; so are the
groups of files that windows.py draws.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastssl.pipelines.plan.philox import Stream, keyed_words
from fastssl.pipelines.plan.windows import FileWindows

#: Samples up to which an epoch's order is sorted. Part of what a seed means: it never changes.
SORTED = 1 << 24


def _random_keys(count: int, seed: int, stream: Stream, epoch: int, high_word: int = 0) -> NDArray[np.uint64]:
    """(count,) 64-bit sort keys, two from each Philox block; the block's item is (high_word << 32) + position // 2."""
    blocks = np.arange((count + 1) // 2, dtype=np.int64) + (high_word << 32)
    words = keyed_words(seed, stream, epoch, blocks).astype(np.uint64)
    keys: NDArray[np.uint64] = ((words[0::2] << np.uint64(32)) | words[1::2]).T.reshape(-1)[:count]
    return keys


# Two entries: the current epoch's order and the next one's, which prefetching asks for before the current one ends.
@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The whole order of samples in an epoch, position -> sample: (num_samples,) int64, shared with other callers and
    read-only. Of a set that may be large ask for the positions that are needed: `samples_at`.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {num_samples}")
    if num_samples > SORTED:
        order = samples_at(np.arange(num_samples), num_samples, seed, epoch)
    else:  # equal keys keep the samples' order
        order = np.argsort(_random_keys(num_samples, seed, Stream.ORDER, epoch), kind="stable")
        order = order.astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


def samples_at(
    positions: NDArray[np.int64], num_samples: int, seed: int, epoch: int, windows: FileWindows | None = None
) -> NDArray[np.int64]:
    """The samples at these positions of an epoch's order: (k,) int64, of (k,) positions in 0 .. num_samples - 1.

    Args:
        windows: of these samples; the order is then theirs, unless one window holds all files.
    """
    if windows is not None and windows.window < len(windows.starts) - 1:
        return windows.samples_at(positions, seed, epoch)
    if num_samples <= SORTED:
        return epoch_order(num_samples, seed, epoch)[positions]
    # numba, which comes with it, takes half a second to load.
    from fastssl.pipelines.plan.permutation import permuted, random_keys

    return permuted(positions, num_samples, random_keys(seed, Stream.ORDER, epoch, view=1))


def steps_per_epoch(num_samples: int, batch_size: int, world: int = 1, drop_last: bool = True) -> int:
    """Global batches in an epoch; ``batch_size`` is per rank, and ``drop_last`` leaves out a last, partial batch."""
    if batch_size < 1 or world < 1:
        raise ValueError(f"batch_size and world must be at least 1, got {batch_size} and {world}")
    total = batch_size * world
    return num_samples // total if drop_last else -(-num_samples // total)


def batch_indices(
    num_samples: int,
    seed: int,
    epoch: int,
    step: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    windows: FileWindows | None = None,
) -> NDArray[np.int64]:
    """The samples of one rank's part of a global batch, of ``batch_size`` per rank: (batch_size,) int64 sample indices;
    ``windows`` as in `samples_at`. ``ValueError``: there is no such step or rank.
    """
    steps = steps_per_epoch(num_samples, batch_size, world)
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in 0 .. {world - 1}, got {rank}")
    if not 0 <= step < steps:
        raise ValueError(
            f"step {step} is outside the epoch: {num_samples} samples make {steps} steps of {world} x {batch_size}"
        )
    start = (step * world + rank) * batch_size
    return samples_at(np.arange(start, start + batch_size), num_samples, seed, epoch, windows)


def last_batch(
    num_samples: int, seed: int, epoch: int, batch_size: int, world: int = 1, windows: FileWindows | None = None
) -> NDArray[np.int64]:
    """The samples of all ranks' parts of an epoch's last, partial batch; ``batch_size`` is per rank: (n,) int64.

    The epoch's first samples fill it up to a multiple of ``world``, as torch's DistributedSampler does with its order,
    and to two, because BatchNorm cannot train on one.
    """
    start = num_samples // (batch_size * world) * batch_size * world
    count = max(num_samples - start, 2)
    places = np.arange(start, start + count + -count % world)
    return samples_at(places % num_samples, num_samples, seed, epoch, windows)


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
