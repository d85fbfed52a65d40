"""Pictures, boxes and masks stay together through scaling and flipping; what is random depends on (seed, epoch, image
id) alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes, make_photo
from PIL import Image
from pycocotools import mask as mask_tools
from shapes import make_shapes

from fastssl.evaluate.detection.annotations import DetectionError, DetectionSet, Picture, load_coco
from fastssl.evaluate.detection.batches import (
    DetectionBatch,
    View,
    check_pictures,
    draw_mask,
    load_batches,
    load_view,
    scaled_size,
    to_device,
)
from fastssl.evaluate.detection.train import TrainingConfig, draw, training_requests
from fastssl.pipelines.plan.order import epoch_order


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    return load_coco(*make_shapes(tmp_path_factory.mktemp("shapes"), 9), masks=True)


def extent(mask: np.ndarray) -> list[int]:
    """Left, top, right, bottom of what is set."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 1000), 800, 1333, (400, 1333)),
        ((1, 9999), 800, 1333, (1, 1333)),
        ((500, 500), 800, 640, (640, 640)),
    ],
)
def test_scaled_size(size, short, long, expected) -> None:
    assert scaled_size(*size, short, long) == expected


def test_draws_depend_on_seed_epoch_and_id_alone(shapes: DetectionSet) -> None:
    sides = tuple(range(640, 801, 32))
    config = TrainingConfig(1, short_sides=sides, seed=3)
    drawn = [draw(picture, config, 5) for picture in shapes.pictures]
    for seed, epoch in ((4, 5), (3, 6)):
        other = TrainingConfig(1, short_sides=sides, seed=seed)
        assert [draw(picture, other, epoch) for picture in shapes.pictures] != drawn
    # Every side as often as any other, half of them flipped, and the two have nothing to do with each other.
    many = [dataclasses.replace(shapes.pictures[0], id=number) for number in range(6000)]
    views = [draw(picture, TrainingConfig(1, short_sides=sides), 0) for picture in many]
    counts = {(side, flip): 0 for side in sides for flip in (False, True)}
    for view in views:
        counts[view.height, view.flip] += 1
    assert all(abs(count - 500) < 5 * 500**0.5 for count in counts.values()), counts


def grouped_by_hand(pictures: list[Picture], config: TrainingConfig, rank: int, world: int) -> list[list[View]]:
    """All batches of a process, from the whole list of all pictures of all epochs."""
    stream = [(epoch, int(number)) for epoch in range(30) for number in epoch_order(len(pictures), config.seed, epoch)]
    batches, wide, high = [], [], []
    for epoch, number in stream[rank::world]:
        own = wide if pictures[number].width > pictures[number].height else high
        own.append(draw(pictures[number], config, epoch))
        if len(own) == config.batch_size / world:
            batches.append(own.copy())
            own.clear()
    return batches


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_grouped_by_aspect_ratio(shapes: DetectionSet, world: int) -> None:
    """A batch is of one kind, no picture is lost, and what comes at an iteration does not depend on where one began."""
    sizes = [(3, 4), (4, 3), (4, 4), (96, 97), (97, 96), (5, 9), (9, 5), (7, 8), (8, 9), (9, 10), (1, 2)]
    pictures = [
        dataclasses.replace(shapes.pictures[0], id=number, height=height, width=width)
        for number, (height, width) in enumerate(sizes)
    ]
    config = TrainingConfig(40, batch_size=4, short_sides=(64, 96), long_side=128, seed=1)
    for rank in range(world):
        expected = grouped_by_hand(pictures, config, rank, world)[:40]
        assert list(training_requests(pictures, range(40), config, rank, world)) == expected
        assert list(training_requests(pictures, range(13, 17), config, rank, world)) == expected[13:17]
        assert list(training_requests(pictures, range(40, 40), config, rank, world)) == []
        kinds = [{view.picture.width > view.picture.height for view in views} for views in expected]
        assert all(len(kind) == 1 for kind in kinds) and kinds.count({True}) > kinds.count({False}) > 5


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(96, 128), (60, 80), (144, 192), (120, 90)])
def test_pixels_boxes_and_masks_stay_together(shapes: DetectionSet, flip: bool, size: tuple[int, int]) -> None:
    for picture in shapes.pictures[:3]:
        pixels, target = load_view(View(picture, *size, flip), masks=True)
        # Against Pillow, on what Pillow decodes.
        expected = Image.open(picture.path).resize(size[::-1], Image.Resampling.BILINEAR)
        expected = np.asarray(expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else expected, np.int16)
        assert np.abs(pixels.numpy() - expected).max() <= (1 if size == (96, 128) else 3)
        assert target["masks"].shape == (len(picture.boxes), *size) and target["masks"].dtype == torch.uint8
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"].numpy()):
            np.testing.assert_allclose(extent(mask), box, atol=2.5)  # the tip of a triangle is narrower than a pixel
            # The shape's own colour is brightest inside it: red, green, blue for labels 1, 2, 3.
            inside = pixels.numpy()[mask.astype(bool)].mean(0)
            assert inside.argmax() == int(label) - 1


def test_run_lengths_and_polygons_draw_the_same(shapes: DetectionSet) -> None:
    tools, picture = mask_tools, shapes.pictures[0]
    polygons = picture.segmentations[0]
    packed = tools.merge(tools.frPyObjects(polygons, 96, 128))
    text = {"size": [96, 128], "counts": packed["counts"].decode()}
    flat = tools.decode(packed).T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    plain = {"size": [96, 128], "counts": np.diff([0, *edges, flat.size]).tolist()}
    for flip in (False, True):
        view = View(picture, 96, 128, flip)
        expected = draw_mask(polygons, view)
        for stored in (text, plain):
            np.testing.assert_array_equal(draw_mask(stored, view), expected)
    # Scaled they differ along the outline only.
    view = View(picture, 192, 256, True)
    assert (draw_mask(text, view) != draw_mask(polygons, view)).mean() < 0.01


def test_batches_are_padded_and_come_in_order(shapes: DetectionSet) -> None:
    requests = [
        [View(shapes.pictures[0], 60, 80), View(shapes.pictures[1], 96, 72)],
        [View(shapes.pictures[2], 30, 40)],
    ] * 4
    batches = list(load_batches(requests, divisible=32, masks=True, workers=3))
    assert [batch.views for batch in batches] == requests
    assert [tuple(batch.images.shape) for batch in batches[:2]] == [(2, 96, 96, 3), (1, 32, 64, 3)]
    for batch in batches[:2]:
        for image, view, target in zip(batch.images, batch.views, batch.targets):
            pixels, expected = load_view(view, masks=True)
            assert torch.equal(image[: view.height, : view.width], pixels)
            assert target.keys() == expected.keys() and all(torch.equal(target[key], expected[key]) for key in target)


def test_padding_is_zero_behind_the_normalisation() -> None:
    picture = Picture(1, Path("x.jpg"), 3, 5, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    batch = DetectionBatch(
        [View(picture, 3, 5), View(picture, 4, 2)], torch.full((2, 4, 6, 3), 7, dtype=torch.uint8), [{}, {}]
    )
    images, _ = to_device(batch, torch.device("cpu"), lambda pixels: pixels.float() - 1)
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = torch.zeros(2, 3, 4, 6)
    expected[0, :, :3, :5] = expected[1, :, :4, :2] = 6
    assert torch.equal(images, expected)


def picture_of(path: Path, height: int, width: int) -> Picture:
    return Picture(1, path, height, width, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


def test_other_formats_and_turned_photos(tmp_path: Path) -> None:
    rgb = make_photo(5, 40, 60)
    Image.fromarray(rgb).save(tmp_path / "x.png")
    pixels, target = load_view(View(picture_of(tmp_path / "x.png", 40, 60), 40, 60))
    np.testing.assert_array_equal(pixels.numpy(), rgb)
    assert target["boxes"].shape == (0, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "turned.jpg").write_bytes(jpeg_bytes(rgb, quality=95, exif=exif))
    pixels, _ = load_view(View(picture_of(tmp_path / "turned.jpg", 60, 40), 60, 40))
    assert np.abs(pixels.numpy().astype(int) - np.rot90(rgb, -1)).mean() < 4
    with pytest.raises(DetectionError, match=r"turned.jpg: has 60x40 pixels \(upright\), its annotation says 40x60"):
        load_view(View(picture_of(tmp_path / "turned.jpg", 40, 60), 40, 60))


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    whole = jpeg_bytes(make_photo(5, 40, 60))
    (tmp_path / "x.jpg").write_bytes(whole[: len(whole) // 2])
    picture = picture_of(tmp_path / "x.jpg", 40, 60)
    with pytest.raises(DetectionError, match=r"x.jpg: cannot decode the picture: .*"):
        list(load_batches([[View(picture, 40, 60)]], divisible=32, workers=1))
    with pytest.raises(DetectionError, match=r"x.jpg: cannot decode the picture"):
        check_pictures([picture], workers=1)
    (tmp_path / "x.jpg").write_bytes(whole)
    done: list[int] = []
    check_pictures([picture] * 300, workers=1, progress=done.append)
    assert done == list(range(1, 301))
