"""A keyed permutation of 0 .. n - 1 that needs no memory: any place can be asked for, at some 60 ns.

A Feistel network over two halves of a number is a permutation whatever its round function (Luby and Rackoff 1988). The
halves are digits in base a, the root of n rounded up (Black and Rogaway 2002), so that nearly every number of the
network lies below n; one that does not is sent through again until it does.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastssl.pipelines.plan.philox import Stream, keyed_words
from fastssl.utils.jit import exact

#: Four rounds of random functions are the least that theory asks for; ours are cheap functions: twice that.
ROUNDS = 8
#: SplitMix64's finaliser (Steele, Lea, Flood 2014).
_MIX_0, _MIX_1 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_0, _SHIFT_1, _SHIFT_2, _HALF = (np.uint64(bits) for bits in (30, 27, 31, 32))


@lru_cache(maxsize=8)  # of two epochs' orders, and of the groups of files that their batches lie in
def random_keys(seed: int, stream: Stream, epoch: int, item: int = 0, view: int = 0) -> NDArray[np.uint64]:
    """(ROUNDS,) 64-bit words, the key of one permutation; shared with other callers and read-only."""
    words = keyed_words(seed, stream, epoch, item, view, np.arange(ROUNDS // 2)).astype(np.uint64)
    keys: NDArray[np.uint64] = ((words[0::2] << _HALF) | words[1::2]).T.reshape(-1)
    keys.setflags(write=False)
    return keys


def permuted(places: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """What stands at ``places``, (k,), of the permutation of 0 .. n - 1 with these ``keys``, (ROUNDS,) random words:
    (k,) int64. n up to 2^62. ``ValueError``: a place outside.
    """
    if len(places) and not 0 <= places.min() <= places.max() < n:
        raise ValueError(f"places {places.min()} to {places.max()} do not all lie in 0 .. {n - 1}")
    found = np.empty(len(places), np.int64)
    _permute(places.astype(np.uint64), np.uint64(n), np.uint64(math.isqrt(max(n, 1) - 1) + 1), keys, found)
    return found


@exact
def _permute(places: np.ndarray, n: int, base: int, keys: np.ndarray, found: np.ndarray) -> None:
    """``places``, ``n``, ``base`` and ``keys`` are uint64: of one and a signed number numba makes a float."""
    for i in range(len(places)):
        place = places[i]
        while True:
            left, right = place // base, place % base
            for k in range(len(keys)):
                mixed = right + keys[k]
                mixed = (mixed ^ (mixed >> _SHIFT_0)) * _MIX_0
                mixed = (mixed ^ (mixed >> _SHIFT_1)) * _MIX_1
                # The high half of a product: a number below the base, without a division.
                total = left + ((((mixed ^ (mixed >> _SHIFT_2)) >> _HALF) * base) >> _HALF)
                left, right = right, total - base if total >= base else total
            place = left * base + right
            if place < n:
                break
        found[i] = place
