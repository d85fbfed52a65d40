"""Orders of an epoch for file sets that are too large to sort: prototypes, measured and counted here, used by no run.

``pipelines.order.epoch_order`` sorts one key a sample: 8 bytes kept and 32 touched for each, in every process. These two are functions of (seed, epoch, position) that
need no memory and can be asked for any position:

    feistel_order    a keyed permutation of 0 .. n - 1: every sample may come anywhere, so that every read is a random one
    windowed_order   chunks of neighbours are permuted, then the samples in each window of chunks: reads are long, and a window is what is mixed

A Feistel network over two halves of a number is a permutation whatever its round function (Luby and Rackoff 1988); a number that falls outside 0 .. n - 1 is sent
through it again until it does not (cycle walking, Black and Rogaway 2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastssl.pipelines.errors import FastSSLError
from fastssl.pipelines.rng import check_range, philox4x32

#: Rounds of the network. Of two the tests see a pattern, four random functions are the least that theory asks for (Luby and Rackoff); ours are cheap ones: twice that.
ROUNDS = 8
#: Of the counter's last word: no stream of ``pipelines.rng`` has this number.
_STREAM = 15
#: Multipliers of the round function, those of SplitMix64 (Steele, Lea, Flood 2014).
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def feistel_order(position: ArrayLike, n: int, seed: int, epoch: int, rounds: int = ROUNDS, tweak: int = 0) -> NDArray[np.int64]:
    """The samples at these positions of an epoch: a permutation of 0 .. n - 1.

    Args:
        position: integers of 0 .. n - 1, any shape.
        n: samples, 1 .. 2^62.
        seed, epoch: of the permutation; ``tweak`` numbers several of one epoch.

    Returns:
        int64 of the shape of ``position``. Elements cost the same wherever they lie, and no memory beyond a few arrays of that shape.

    Raises:
        FastSSLError: a position outside, or n out of range.
    """
    if not 1 <= n <= 1 << 62:
        raise FastSSLError(f"an order of {n} samples: give 1 to 2^62")
    value = check_range("position", position, 62)
    if value.size and int(value.max()) >= n:
        raise FastSSLError(f"position {value.max()} is outside an order of {n} samples")
    shape, value = value.shape, value.reshape(-1).copy()
    bits = max(2, (n - 1).bit_length())
    keys = _keys(seed, epoch, tweak, rounds)
    value = _permute(value, bits, keys)
    outside = np.flatnonzero(value >= np.uint64(n))
    while outside.size:  # at most half of the numbers are outside: a few turns
        value[outside] = _permute(value[outside], bits, keys)
        outside = outside[value[outside] >= np.uint64(n)]
    return value.astype(np.int64).reshape(shape)


def _keys(seed: int, epoch: int, tweak: int, rounds: int) -> NDArray[np.uint64]:
    """(rounds,) 64-bit round keys from Philox."""
    counter = np.zeros((4, rounds), np.uint64)
    counter[0] = np.arange(rounds) + ((tweak & 0xFFFFFF) << 8)
    counter[1], counter[2], counter[3] = tweak >> 24, epoch, _STREAM << 24
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.uint64)
    return (words[0] << np.uint64(32)) | words[1]


def _permute(value: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One pass over numbers of ``bits`` bits. The halves differ by a bit where ``bits`` is odd, so that no number space is more than twice as large as n."""
    low = np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64(1) << low) - np.uint64(1), (np.uint64(1) << np.uint64(bits - bits // 2)) - np.uint64(1)
    left, right = value >> low, value & low_mask
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = left ^ (_mix(right, key) & high_mask)
        else:
            right = right ^ (_mix(left, key) & low_mask)
    return (left << low) | right


def _mix(value: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A random function of (value, key): SplitMix64's finaliser, its best bits at the bottom."""
    mixed = value + key  # wraps around
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True)
class Windows:
    """How ``windowed_order`` mixes.

    Attributes:
        chunk: neighbouring samples that are read at once. chunks: of a window.
    """

    chunk: int = 256
    chunks: int = 256

    @property
    def samples(self) -> int:
        """Of a window: what has to be in memory to be mixed."""
        return self.chunk * self.chunks

    def length(self, n: int) -> int:
        """Samples of an epoch: whole windows of ``n``; the rest, other ones in every epoch, is left out."""
        return n // self.samples * self.samples


def windowed_order(position: ArrayLike, n: int, seed: int, epoch: int, windows: Windows) -> NDArray[np.int64]:
    """The samples at these positions (0 .. ``windows.length(n)`` - 1) of an epoch, int64, no two alike.

    Where chunks begin is drawn anew for every epoch, so that a sample's neighbours are not always the same, and what is left out is not either.

    Raises:
        FastSSLError: a position outside, or fewer samples than a window.
    """
    length = windows.length(n)
    if not length:
        raise FastSSLError(f"{n} samples are fewer than a window of {windows.samples}")
    place = check_range("position", position, 62).astype(np.int64)
    if place.size and int(place.max()) >= length:
        raise FastSSLError(f"position {place.max()} is outside an order of {length} samples")
    window, inside = place // windows.samples, np.empty(place.shape, np.int64)
    for number in np.unique(window).tolist():  # a batch lies in one or two
        here = window == number
        inside[here] = feistel_order(place[here] % windows.samples, windows.samples, seed, epoch, tweak=2 + number)
    slot, offset = inside // windows.chunk, inside % windows.chunk
    chunk = feistel_order(window * windows.chunks + slot, n // windows.chunk, seed, epoch, tweak=0)
    start = int(feistel_order(0, n, seed, epoch, tweak=1))
    return (start + chunk * windows.chunk + offset) % n


def neighbours(batch: int, windows: Windows) -> float:
    """Samples of a sample's own chunk that are expected in its batch: (B - 1)(c - 1)/(w c - 1), if a batch lies in one window of w chunks of c."""
    return (min(batch, windows.samples) - 1) * (windows.chunk - 1) / (windows.samples - 1)
