from __future__ import annotations

import numpy as np
import pytest

from fastssl.errors import FastSSLError
from fastssl.pipelines.plan.compiled_draw import philox
from fastssl.pipelines.plan.philox import SeedError, Stream, keyed_words

# The philox4x32-10 lines of the known answers published with Random123: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    """One block in plain integers, written from the paper's figure."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    (low, high, epoch, last), (key_low, key_high) = _hex(counter), _hex(key)
    inputs = (high << 32 | low, epoch, last, key_high << 32 | key_low)
    assert list(philox(*(np.uint64(value) for value in inputs))) == _hex(answer)
    assert slow_philox(_hex(counter), _hex(key)) == _hex(answer)


def test_compiled_equals_scalar() -> None:
    rng = np.random.default_rng(0)
    items, views = rng.integers(0, 2**63, (3, 50), dtype=np.int64), rng.integers(0, 2**16, 50)
    words = keyed_words(0xFEDCBA98_12345678, Stream.PLAN, 2**31, items, views, 7)
    assert words.shape == (4, 3, 50) and words.dtype == np.uint32
    for (row, column), item in np.ndenumerate(items):
        counter = [int(item) % 2**32, int(item) >> 32, 2**31, 2 << 24 | int(views[column]) << 8 | 7]
        assert words[:, row, column].tolist() == slow_philox(counter, [0x12345678, 0xFEDCBA98])


def test_layout_of_counter_and_key() -> None:
    words = keyed_words(0x1_2345_6789, Stream.PLAN, 7, 0x9_0000_000B, view=0x102, slot=3)
    assert words.tolist() == slow_philox([0xB, 0x9, 7, (2 << 24) | (0x102 << 8) | 3], [0x23456789, 0x1])


def test_every_part_of_the_key_changes_the_words() -> None:
    base = dict(seed=1, stream=Stream.ORDER, epoch=2, item=3, view=4, slot=5)
    changed = [
        base,
        base | {"seed": 2},
        base | {"seed": 1 + 2**32},
        base | {"stream": Stream.PLAN},
        base | {"stream": Stream.BATCH_PERMUTATION},
        base | {"epoch": 3},
        base | {"item": 4},
        base | {"item": 3 + 2**32},
        base | {"view": 5},
        base | {"slot": 6},
    ]
    assert len({keyed_words(**arguments).tobytes() for arguments in changed}) == len(changed)


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", -1),
        ("seed", 2**64),
        ("epoch", -1),
        ("epoch", 2**32),
        ("item", -1),
        ("view", 2**16),
        ("slot", 256),
        ("epoch", 1.5),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, value: object) -> None:
    arguments = dict(seed=0, stream=Stream.PLAN, epoch=0, item=0, view=0, slot=0) | {name: value}
    with pytest.raises(SeedError, match=name):
        keyed_words(**arguments)
    assert issubclass(SeedError, FastSSLError)


def test_the_largest_seed_fits() -> None:
    assert keyed_words(2**64 - 1, Stream.PLAN, 2**32 - 1, 0).tolist() == slow_philox(
        [0, 0, 2**32 - 1, 2 << 24], [2**32 - 1] * 2
    )


def test_words_look_uniform() -> None:
    values = keyed_words(11, Stream.PLAN, 0, np.arange(50_000)) * 2.0**-32
    assert abs(values.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / values.size**0.5
    counts = np.bincount((values * 64).astype(int).ravel(), minlength=64)
    chi_square = ((counts - values.size / 64) ** 2 / (values.size / 64)).sum()
    assert 25 < chi_square < 120  # 63 degrees of freedom: both ends are beyond 1 in 10,000
    assert abs(np.corrcoef(values)[np.triu_indices(4, 1)]).max() < 0.02
    assert abs(np.corrcoef(values[0, :-1], values[0, 1:])[0, 1]) < 0.02
