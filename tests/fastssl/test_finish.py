"""What is computed behind the last step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastssl.cli import pretrain as command
from fastssl.cli.common import PlainConsole
from fastssl.evaluate.online_probe import ProbeSplit
from fastssl.report.finish import _majority, _throughput


def split(bank: list[int], queries: list[int]) -> ProbeSplit:
    first, second = (SimpleNamespace(labels_of=np.array(labels).take, path=Path("x")) for labels in (bank, queries))
    indices = np.arange(len(bank)), np.arange(len(queries))
    return ProbeSplit(first, indices[0], second, indices[1], held_out=True)


def test_a_constant_answer_has_a_row_where_a_class_is_half_as_large_again_as_the_others_or_more() -> None:
    assert _majority(split([0, 0, 1, 1, 2, 2], [0, 1, 2])) == []
    assert _majority(split([5] * 14 + [7] * 6 + [9] * 10, [7])) == []  # 14 of 30 in three classes: 1.4 times a third
    (row,) = _majority(split([5] * 15 + [7] * 5 + [9] * 10, [5, 7, 5, 9]))
    assert row == {"name": "most frequent class", "knn": 50.0, "linear": 50.0}


def metrics(share: float | None) -> list[dict]:
    """Two blocks of a second, the first one of warm-up."""
    counted = {} if share is None else {"data_share": share}
    first = {"kind": "step", "step": 4, "seconds": 1.0, "data_wait": 0.01}
    return [first, {**first, "step": 8, "seconds": 2.0, **counted}]


@pytest.mark.parametrize(
    ("device", "share", "words"),
    [
        (
            "cpu",
            0.43,
            "data (43% of the time); the network waited for photos 1.0 % of the time, decoding beside it on",
        ),
        (
            "cuda",
            0.43,
            "data (43% of the time); the network waited for photos 1.0 % of the time; photos converted with",
        ),
        (
            "cpu",
            0.02,
            "step (data costs 2% of the time); the network waited for photos 1.0 % of the time; a faster loader would",
        ),
        ("cpu", None, "step (data costs 1% of the time)"),  # rows of an older version have the wait alone
    ],
)
def test_the_sentence_about_the_bottleneck_follows_the_share(device: str, share: float | None, words: str) -> None:
    sides = np.full(4, 500)
    run = SimpleNamespace(
        rows=metrics(share),
        recipe=SimpleNamespace(views=[SimpleNamespace(size=32, count=2)], train=SimpleNamespace(batch_size=8)),
        position=SimpleNamespace(train_seconds=2.0),
        device=SimpleNamespace(type=device),
        reader=SimpleNamespace(some=lambda: range(4), take=lambda *_: np.zeros(4), shapes=lambda _: (sides, sides)),
    )
    found = _throughput(run, 3.0)
    assert found["bottleneck"].startswith(words)
    assert ("--short-side 48" in found["bottleneck"]) == (share == 0.43)
    assert found["pair_per_s"] == pytest.approx(32)
    assert found["data_share"] == pytest.approx(0.01 if share is None else share)


def test_the_verdict_stands_right_under_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    console = PlainConsole(record=True, width=100)
    monkeypatch.setattr(command, "console", console)
    rows = [
        {"name": "most frequent class", "knn": 33.0, "linear": 33.0},
        {"name": "after pre-training", "knn": 60.0, "linear": None},
    ]
    summary = {
        "arch": "lcnet_035",
        "probe": {"rows": rows, "val_samples": 9, "classes": 3, "note": "kNN of the note"},
        "share": None,
    }
    summary |= {
        "pair_per_s": 100.0,
        "view_per_s": 200.0,
        "bottleneck": "step",
        "verdict": {"text": "learned: all of it."},
    }
    command._print_summary(summary, Path("runs/mine"))
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    place = lines.index("learned: all of it.")
    assert "─" in lines[place - 1] and lines[place + 1].startswith("kNN of the note")
    assert any("most frequent class" in line and line.count("33.0 %") == 2 for line in lines)
