"""Counter-based random numbers: Philox4x32-10.

A counter-based generator is a pure function from a counter and a key to random bits, so a value depends only on *what
it is for* and never on batch size, worker, rank or restart.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the tests check the
known answers published with their Random123 library. The rounds are in compiled_draw.py.

How the 192 bits of input are used, so that no two uses ever share a block:

=========  ====================================================================
word       meaning
=========  ====================================================================
key 0, 1   seed, low and high half
counter 0  item, low half (the sample's id; the position; see each stream)
counter 1  item, high half
counter 2  epoch
counter 3  stream (8 bits) | view (16 bits) | slot (8 bits)
=========  ====================================================================
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastssl.errors import FastSSLError


class SeedError(FastSSLError, ValueError):
    """A seed, epoch, view or slot lies outside the range that the counter has room for."""


class Stream(IntEnum):
    """What a draw is for. Each use has its own streams; the numbers are part of what a seed means and never change."""

    ORDER = 1
    PLAN = 2
    BATCH_PERMUTATION = 3
    DROP_PATH = 4
    DETECTION = 6


def keyed_words(
    seed: int, stream: Stream, epoch: int, item: ArrayLike, view: ArrayLike = 0, slot: ArrayLike = 0
) -> NDArray[np.uint32]:
    """The four random words of each (seed, stream, epoch, item, view, slot): (4, ...) uint32, ... being the broadcast
    shape of item, view and slot. ``SeedError``: a value does not fit; it would silently share another one's stream.

    Args:
        seed: 0 <= seed < 2**64. epoch: 0 <= epoch < 2**32.
        item: 64-bit integers (non-negative), usually the sample's id.
        view: 0 <= view < 2**16. slot: 0 <= slot < 2**8, which block of that view.
    """
    # numba takes half a second to load, and those who only name a stream do without it.
    from fastssl.pipelines.plan.compiled_draw import philox_words

    key, epochs = check_range("seed", seed, 64)[()], check_range("epoch", epoch, 32)[()]
    last = stream_word(stream, view) | check_range("slot", slot, 8)
    items = check_range("item", item, 63)
    shape = np.broadcast_shapes(items.shape, last.shape)
    words = np.empty((4, *shape), np.uint32)
    items, last = (np.broadcast_to(array, shape).flatten() for array in (items, last))
    philox_words(items, epochs, last, key, words.reshape(4, -1))
    return words


def stream_word(stream: Stream, view: ArrayLike) -> NDArray[np.uint64]:
    """The counter's last word for slot 0 of each view."""
    word: NDArray[np.uint64] = np.uint64(stream << 24) | (check_range("view", view, 16) << np.uint64(8))
    return word


def check_range(name: str, value: ArrayLike, bits: int) -> NDArray[np.uint64]:
    """``value`` as uint64; ``SeedError`` if it is no integer of 0 .. 2^bits - 1."""
    array = np.asarray(value)
    if array.dtype.kind not in "ui":
        raise SeedError(f"{name} must be an integer, got {value!r}")
    if array.size and (int(array.min()) < 0 or int(array.max()) >> bits):
        raise SeedError(f"{name} must lie in 0 .. 2**{bits} - 1, got values from {array.min()} to {array.max()}")
    return array.astype(np.uint64)
