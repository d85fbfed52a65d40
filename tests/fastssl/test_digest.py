"""One number for all that a checkpoint holds: every change of content changes it, and nothing else does."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from fastssl.utils.digest import digest

CONTENT = {
    "weights": OrderedDict(a=torch.arange(24.0).reshape(1, 2, 3, 4), b=torch.zeros((), dtype=torch.int64)),
    "state": {0: {"step": torch.tensor(3.0)}, 1: {"momentum": None}},
    "numbers": [1, 1.5, True, (2, 3)],
    "name": "run",
}


def test_layout_and_kind_of_dict_do_not_count() -> None:
    other = {**CONTENT, "weights": dict(CONTENT["weights"])}
    other["weights"]["a"] = other["weights"]["a"].to(memory_format=torch.channels_last)
    assert digest(other) == digest(CONTENT) and len(digest(CONTENT)) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"name": "run "},
        {"numbers": [1, 1.5, True, (3, 2)]},
        {"numbers": [1, 1.5, 1, (2, 3)]},
        {"numbers": [1.0, 1.5, True, (2, 3)]},
        {"numbers": [1, 1.5, True, [2, 3]]},
        {"numbers": [1, 1.5, True, 2, 3]},
        {"state": {0: {"step": torch.tensor(3.0)}, 1: {"momentum": 0}}},
        {"state": {"0": {"step": torch.tensor(3.0)}, 1: {"momentum": None}}},
        {"state": {1: {"momentum": None}, 0: {"step": torch.tensor(3.0)}}},
        {"weights": {"a": CONTENT["weights"]["a"].reshape(1, 3, 2, 4), "b": CONTENT["weights"]["b"]}},
        {"weights": {"a": CONTENT["weights"]["a"].double(), "b": CONTENT["weights"]["b"]}},
        {"weights": {"a": CONTENT["weights"]["a"], "c": CONTENT["weights"]["b"]}},
        {"more": None},
    ],
)
def test_any_change_counts(change: dict) -> None:
    assert digest({**CONTENT, **change}) != digest(CONTENT)


def test_a_single_bit_counts_also_that_of_a_nan() -> None:
    one = torch.full((3,), float("nan"))
    two = one.clone()
    two.view(torch.int32)[1] ^= 1
    assert digest(one) != digest(two) and digest(one) == digest(one.clone())
    assert digest(torch.zeros(4, dtype=torch.bfloat16)) != digest(torch.zeros(4, dtype=torch.float16))


def test_what_has_no_place_in_a_checkpoint() -> None:
    with pytest.raises(TypeError, match="a object has no place"):
        digest({"a": object()})
