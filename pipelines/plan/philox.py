"""Counter-based random numbers: Philox4x32-10 in vectorised NumPy.

A counter-based generator is a pure function from a counter and a key to random bits. Nothing is carried from one draw
to the next, so a value depends only on *what it is for* and never on batch size, worker, rank or restart.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the tests check the
known answers published with their Random123 library.

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

_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

# Lanes per piece: the eight 64-bit work arrays of a piece stay in the L2 cache, which is 4x faster for a whole epoch.
_PIECE = 8192


class SeedError(FastSSLError, ValueError):
    """A seed, epoch, view or slot lies outside the range that the counter has room for."""


class Stream(IntEnum):
    """What a draw is for. Each use has its own streams; the numbers are part of what a seed means and never change."""

    ORDER = 1
    PLAN = 2
    BATCH_PERMUTATION = 3
    DROP_PATH = 4
    DETECTION = 6


def philox4x32(counter: ArrayLike, key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10.

    Args:
        counter: (4, ...) unsigned 32-bit words, one block per trailing position.
        key: two 32-bit words.

    Returns:
        (4, ...) uint32, the same shape as ``counter``.
    """
    counter = np.asarray(counter, dtype=np.uint64)
    if counter.shape[:1] != (4,):
        raise ValueError(f"counter must have shape (4, ...), got {counter.shape}")
    flat = counter.reshape(4, -1)
    out = np.empty(flat.shape, dtype=np.uint32)
    for start in range(0, flat.shape[1], _PIECE):
        piece = slice(start, start + _PIECE)
        _rounds(flat[:, piece], key, out[:, piece])
    return out.reshape(counter.shape)


def _rounds(counter: NDArray[np.uint64], key: tuple[int, int], out: NDArray[np.uint32]) -> None:
    c0, c1, c2, c3 = counter
    k0, k1 = (int(word) for word in key)
    for _ in range(_ROUNDS):
        # 32 x 32 -> 64 bit products: the high half is mixed in, the low half moves one word on.
        left, right = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            (right >> _SHIFT) ^ c1 ^ np.uint64(k0),
            right & _MASK,
            (left >> _SHIFT) ^ c3 ^ np.uint64(k1),
            left & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    out[0], out[1], out[2], out[3] = c0, c1, c2, c3


def keyed_words(
    seed: int, stream: Stream, epoch: int, item: ArrayLike, view: ArrayLike = 0, slot: ArrayLike = 0
) -> NDArray[np.uint32]:
    """The four random words of each (seed, stream, epoch, item, view, slot).

    Args:
        seed: 0 <= seed < 2**64.
        stream: what the words are for.
        epoch: 0 <= epoch < 2**32.
        item: 64-bit integers (non-negative), usually the sample's id.
        view: 0 <= view < 2**16.
        slot: 0 <= slot < 2**8, which block of that view.

    Returns:
        (4, ...) uint32, where ... is the broadcast shape of item, view and slot.

    Raises:
        SeedError: a value does not fit; it would silently share another one's stream.
    """
    key, epochs = check_range("seed", seed, 64), check_range("epoch", epoch, 32)
    item, view, slot = check_range("item", item, 63), check_range("view", view, 16), check_range("slot", slot, 8)
    last = (np.uint64(stream) << np.uint64(24)) | (view << np.uint64(8)) | slot
    shape = np.broadcast_shapes(item.shape, last.shape)
    counter = np.empty((4, *shape), dtype=np.uint64)
    counter[0], counter[1], counter[2], counter[3] = item & _MASK, item >> _SHIFT, epochs, last
    return philox4x32(counter, (int(key & _MASK), int(key >> _SHIFT)))


def stream_word(stream: Stream, view: int, last_view: int) -> np.uint64:
    """The counter's last word for slot 0 of a view, when all views up to ``last_view`` will be used."""
    check_range("view", [view, last_view], 16)
    word: np.uint64 = np.uint64((int(stream) << 24) | (int(view) << 8))
    return word


def check_range(name: str, value: ArrayLike, bits: int) -> NDArray[np.uint64]:
    """``value`` as uint64. `SeedError` if it is no integer of 0 .. 2^bits - 1: it would silently share another one's
    words.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "ui":
        raise SeedError(f"{name} must be an integer, got {value!r}")
    if array.size and (int(array.min()) < 0 or int(array.max()) >> bits):
        raise SeedError(f"{name} must lie in 0 .. 2**{bits} - 1, got values from {array.min()} to {array.max()}")
    return array.astype(np.uint64)
