"""views.png and neighbours.png: what stands where, checked by colour."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.errors import FastSSLError
from fastssl.evaluate.features import Features
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.ops import jpeg
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.report.drawing import choose, scaled, spread, write
from fastssl.report.pictures import neighbours_picture, to_pictures, views_picture

PLAIN = ViewSpec(size=32, count=2, area=(0.9, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0)


def contains(picture, colour, tolerance=8):
    """Share of the picture's pixels within ``tolerance`` of ``colour``."""
    pixels = np.asarray(picture, np.int16)
    return float((np.abs(pixels - np.array(colour)).max(axis=2) <= tolerance).mean())


@pytest.fixture
def flat_beton(tmp_path):
    """Eight photos of one colour each; classes 0, 1, 0, 1, ..."""
    colours = [(200, 30 * i, 10) for i in range(8)]
    path = tmp_path / "flat.beton"
    with BetonWriter(path, 8) as writer:
        for number, colour in enumerate(colours):
            writer.add(np.full((40, 28, 3), colour, np.uint8).tobytes(), 40, 28, number % 2, 1)
    return path, colours


def test_to_pictures_undoes_the_normalisation(beton):
    spec = ViewSpec.evaluation(24)
    with ViewLoader(beton, [spec], 4, shuffle=False) as loader:
        batch = next(loader.epoch(0))
    rgb = to_pictures(batch.views[0], spec)
    assert rgb.shape == (4, 24, 24, 3) and rgb.dtype == np.uint8
    again = (torch.from_numpy(rgb).permute(0, 3, 1, 2) / 255 - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(
        spec.std
    ).view(3, 1, 1)
    torch.testing.assert_close(again, batch.views[0], atol=0.5 / 255 / 0.22 + 1e-4, rtol=0)


def test_views_picture_shows_every_photo_and_all_its_views(flat_beton, tmp_path):
    path, colours = flat_beton
    out = tmp_path / "views.png"
    views_picture(
        path, [PLAIN, ViewSpec(size=16, count=1, flip=0.0, jitter=0.0, grey=0.0, blur=0.0)], out, samples=8, tile=40
    )
    picture = Image.open(out)
    area = picture.width * picture.height
    for colour in colours:
        # A stored photo of 40x28 fitted into 40x40, and three views of 40x40.
        assert contains(picture, colour) * area == pytest.approx(40 * 28 + 3 * 40 * 40, rel=0.02)


def test_views_picture_is_reproducible_and_follows_seed_and_epoch(beton):
    def draw(**options):
        return np.asarray(views_picture(beton, [ViewSpec(size=24, count=2)], samples=3, tile=40, **options))

    first = draw(seed=1, epoch=2)
    assert np.array_equal(first, draw(seed=1, epoch=2))
    assert not np.array_equal(first, draw(seed=2, epoch=2)) and not np.array_equal(first, draw(seed=1, epoch=3))


def test_views_picture_of_one_photo_of_damaged_photos_and_of_many_views(tmp_path):
    good = jpeg.encode(np.full((16, 16, 3), 90, np.uint8), 90)
    path = tmp_path / "a.beton"
    with BetonWriter(path, 4, labels=False) as writer:
        for number in range(4):
            writer.add(good if number else good[: len(good) // 2], 16, 16)
    with BetonReader(path) as reader:
        assert views_picture(reader, [PLAIN], samples=20).width > 300
        assert len(reader) == 4 and reader.encoded(0).size  # still open
    wide = views_picture(path, [ViewSpec(size=16, count=40)], samples=1, tile=40)
    assert wide.width < 12 * 48 + 100


def test_spread_is_even_and_complete():
    assert spread(100, 4).tolist() == [12, 37, 62, 87]
    assert spread(3, 10).tolist() == [0, 1, 2]
    assert spread(1, 1).tolist() == [0]


def test_queries_cover_the_classes():
    labels = np.repeat([0, 1, 2], [10, 4, 1])
    chosen = choose(labels, 15, 8)
    assert len(np.unique(chosen)) == len(chosen) and set(labels[chosen]) == {0, 1, 2}
    many = choose(np.repeat(np.arange(50), 3), 150, 5)
    assert len(np.unique(np.repeat(np.arange(50), 3)[many])) == 5
    assert choose(None, 15, 5).tolist() == [1, 4, 7, 10, 13]


def features(rows, labels, index=None):
    index = torch.arange(len(labels)) if index is None else torch.tensor(index)
    return Features(torch.as_tensor(rows, dtype=torch.float32), torch.as_tensor(labels), index)


def test_neighbours_frames_follow_the_labels(flat_beton, tmp_path):
    path, _ = flat_beton
    labels = [0, 1] * 4
    by_class = torch.eye(2)[labels] + 0.01 * torch.arange(8)[:, None]
    against_class = torch.eye(2)[[1 - label for label in labels]]
    with BetonReader(path) as reader:
        split = SimpleNamespace(bank=reader, queries=reader)
        right, wrong = features(by_class, labels), features(against_class, labels)
        asked = features(by_class, labels)

        def draw(before, after):
            return neighbours_picture(
                split, before=(before, asked), after=(after, asked), out=None, queries=2, neighbours=4, tile=30
            )

        same, other = (15, 157, 118), (224, 83, 58)
        learned = draw(wrong, right)
        legend = contains(draw(right, right), other)  # what the legend alone takes
        # As many green frames (after) as red ones (before), on top of the legend.
        assert contains(learned, same) == pytest.approx(contains(learned, other), rel=1e-6)
        assert contains(learned, other) > 5 * legend
        assert contains(draw(wrong, wrong), same) == pytest.approx(legend, rel=1e-6)


def test_neighbours_without_labels_have_no_frames(flat_beton, tmp_path):
    path, colours = flat_beton
    with BetonReader(path) as reader:
        split = SimpleNamespace(bank=reader, queries=reader)
        part = features(torch.eye(8), [-1] * 8)
        out = tmp_path / "neighbours.png"
        picture = neighbours_picture(
            split, before=(part, part), after=(part, part), out=out, queries=1, neighbours=2, tile=30
        )
    assert Image.open(out).size == picture.size
    assert contains(picture, (15, 157, 118)) == 0 and contains(picture, (224, 83, 58)) == 0
    assert contains(picture, colours[4]) > 0  # the query from the middle of the file, its own nearest neighbour


def test_neighbours_pair_photos_by_id_and_refuse_nothing(flat_beton):
    path, _ = flat_beton
    with BetonReader(path) as reader:
        split = SimpleNamespace(bank=reader, queries=reader)
        whole = features(torch.eye(8), [0, 1] * 4)
        # The other network's features lack a damaged photo and come in another order: fewer than asked for is fine.
        partial = features(torch.eye(8)[:3], [1, 0, 1], index=[5, 2, 1])
        picture = neighbours_picture(split, before=(whole, whole), after=(partial, whole), queries=3, neighbours=6)
        assert picture.width > 0
        nothing = features(
            torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), index=torch.zeros(0, dtype=torch.int64).tolist()
        )
        with pytest.raises(FastSSLError, match="at least one"):
            neighbours_picture(split, before=(whole, whole), after=(nothing, whole))


def test_small_photos_are_enlarged_with_sharp_blocks():
    checker = Image.fromarray(
        np.kron(np.indices((4, 4)).sum(axis=0) % 2, np.ones((1, 1))).astype(np.uint8) * 255
    ).convert("RGB")
    large = np.asarray(scaled(checker, 80))[..., 0]
    assert large.shape == (80, 80)
    # Twenty pixels a block: their middles are pure black or white, which a plain Lanczos enlargement would not give.
    assert set(np.unique(large[10::20, 10::20])) == {0, 255}
    assert scaled(Image.new("RGB", (400, 200)), 100).size == (100, 50)


@pytest.mark.parametrize("letters", ["ÄÖ", "ДЖ", "λω", "žř"])
def test_letters_beyond_ascii_are_drawn(letters):
    """And not the box that stands for all that a font lacks."""

    def drawn(text):
        picture = Image.new("RGB", (60, 40), "white")
        write(picture, (0, 0), text, 28, "black")
        return np.asarray(picture)

    assert not np.array_equal(drawn(letters[0]), drawn(letters[1]))
