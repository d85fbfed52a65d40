"""Which photos are probed, and what they can judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.evaluate.features import Features
from fastssl.evaluate.online_probe import choose_split, probe_features
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter


def photos(path: Path, labels: Sequence[int] | None, count: int = 0) -> BetonReader:
    """A file of one pixel a photo, with these labels; None: ``count`` of them without labels."""
    labels = None if labels is None else list(labels)
    number = count if labels is None else len(labels)
    with BetonWriter(path, number, labels=labels is not None) as writer:
        for place in range(number):
            writer.add(bytes([place % 256, place // 256 % 256, 7]), 1, 1, labels[place] if labels else 0, mode=1)
    return BetonReader(path)


def test_a_fifth_is_held_out_and_can_judge(tmp_path: Path) -> None:
    with photos(tmp_path / "a.beton", [0, 1] * 20) as data:
        split = choose_split(data, None, 0, 0)
    assert (len(split.bank_index), len(split.query_index)) == (32, 8)
    assert split.held_out and split.seen and split.labelled and split.can_judge and split.classes == 2


@pytest.mark.parametrize(
    ("labels", "obstacle"),
    [
        (None, "the photos have no labels"),
        ([3] * 30, "the photos are all of one class"),
        ([0] * 29 + [1], "the photos to be judged are all of one class: there are too few of the others"),
        (range(30), "no class has two photos, one to learn from and one to be judged"),
        ([0, 1, -1] * 10, "some photos in a.beton have no label"),
    ],
)
def test_labels_that_judge_nothing_are_named(labels: Sequence[int] | None, obstacle: str, tmp_path: Path) -> None:
    with photos(tmp_path / "a.beton", labels, count=30) as data:
        split = choose_split(data, None, 0, 0)
        assert (split.labelled, split.can_judge) == (False, False)
        assert split.obstacle == obstacle
        assert len(split.bank_index) and len(split.query_index)


def test_of_more_classes_than_the_probe_has_photos_some_are_probed(tmp_path: Path) -> None:
    """Instead of one photo of each, of which nothing can be held out."""
    with photos(tmp_path / "a.beton", np.arange(3000) // 10) as data:
        split = choose_split(data, None, 100, 0)
        again = choose_split(data, None, 100, 0)
    bank, queries = (data.labels[index] for index in (split.bank_index, split.query_index))
    assert split.can_judge and len(bank) + len(queries) == 100 and split.classes == 20
    assert set(queries) <= set(bank) and np.array_equal(split.bank_index, again.bank_index)
    with photos(tmp_path / "b.beton", np.arange(600) // 2) as val, BetonReader(tmp_path / "a.beton") as data:
        split = choose_split(data, val, 100, 0)
    bank, queries = data.labels[split.bank_index], val.labels[split.query_index]
    assert split.can_judge and set(queries) <= set(bank) and 60 <= len(bank) + len(queries) <= 140


def test_labels_of_val_alone_judge_and_val_without_labels_does_not(tmp_path: Path) -> None:
    with photos(tmp_path / "a.beton", None, count=50) as data, photos(tmp_path / "b.beton", [0, 1] * 20) as val:
        split = choose_split(data, val, 0, 0)
        assert split.bank is split.queries is val and split.held_out and not split.seen and split.can_judge
        split = choose_split(val, data, 0, 0)
        assert split.bank is split.queries is val and split.held_out and split.seen and split.can_judge


def test_a_copy_of_the_photos_cannot_judge(tmp_path: Path) -> None:
    with photos(tmp_path / "a.beton", [0, 1] * 20) as data:
        (tmp_path / "copy.beton").write_bytes((tmp_path / "a.beton").read_bytes())
        with BetonReader(tmp_path / "copy.beton") as copy:
            assert not choose_split(data, copy, 0, 0).can_judge
        with BetonWriter(tmp_path / "turned.beton", 40, labels=True) as writer:
            for place in reversed(range(40)):
                writer.add(bytes([place, 0, 7]), 1, 1, place % 2, mode=1)
        with BetonReader(tmp_path / "turned.beton") as turned, photos(tmp_path / "bare.beton", None, count=40) as bare:
            assert not choose_split(data, turned, 0, 0).can_judge
            assert choose_split(bare, turned, 0, 0).seen, "the photos are those of training, the labels alone are new"
    # Of many photos of one size, as raw ones are, those in the same places are compared.
    with (
        photos(tmp_path / "raw.beton", [0, 1] * 50) as raw,
        BetonWriter(tmp_path / "else.beton", 100, labels=True) as writer,
    ):
        for place in range(100):
            writer.add(bytes([place, 9, 9]), 1, 1, place % 2, mode=1)
    with BetonReader(tmp_path / "else.beton") as other, BetonReader(raw.path) as data:
        assert choose_split(data, other, 0, 0).can_judge
    with photos(tmp_path / "more.beton", [1, 0] * 21) as other, BetonReader(tmp_path / "a.beton") as data:
        assert choose_split(data, other, 0, 0).can_judge


def test_all_classes_are_probed_where_the_photos_fit_and_those_of_one_photo_come_last(tmp_path: Path) -> None:
    with photos(tmp_path / "a.beton", np.arange(600) // 2) as data:
        assert choose_split(data, None, 600, 0).classes == 300
    with photos(tmp_path / "b.beton", [0] * 30 + list(range(1, 11))) as data:
        split = choose_split(data, None, 20, 0)
        assert 0 in data.labels[split.query_index]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_have_no_figures(value: float) -> None:
    labels = torch.arange(10) % 2
    good = Features(torch.randn(10, 3), labels, torch.arange(10))
    bad = Features(torch.full((10, 3), value), labels, torch.arange(10))
    assert probe_features("a", bad, good, True) == {"name": "a", "knn": None, "linear": None}
    assert probe_features("a", good, good, True)["knn"] is not None
