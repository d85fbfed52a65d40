"""Predictions: in the original picture's pixels, and masks where the boxes are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_tools
from shapes import make_shapes
from torch import Tensor, nn

from fastssl.evaluate.detection.annotations import DetectionSet, load_coco
from fastssl.evaluate.detection.protocol import _packed, average_precision, of_kind, predict

SCALE = 2.5


class Oracle(nn.Module):
    """Knows all answers, in pixels of the scaled picture, as a detector gives them; sees the pictures one at a time, in
    their order.
    """

    class pyramid:
        divisible = 64

    mean = torch.zeros(1)  # says where it runs

    def __init__(self, data: DetectionSet):
        super().__init__()
        self.data, self.seen = data, []

    def normalise(self, images: Tensor) -> Tensor:
        return images.float()

    def forward(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        assert not self.training and len(images) == 1
        picture = self.data.pictures[len(self.seen)]
        self.seen.append(sizes[0])
        count = len(picture.boxes)
        return [
            {
                "boxes": torch.from_numpy(picture.boxes) * SCALE,
                "labels": torch.from_numpy(picture.labels),
                "scores": torch.linspace(0.9, 0.6, count),
                "masks": torch.ones(count, 1, 28, 28),
            }
        ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    return load_coco(*make_shapes(tmp_path_factory.mktemp("shapes"), 4), masks=True)


def found(data: DetectionSet) -> tuple[list[dict[str, Any]], Oracle]:
    oracle = Oracle(data).train()
    done: list[int] = []
    rows = predict(oracle, data, short_side=240, long_side=400, workers=1, progress=done.append)
    assert done == [1, 2, 3, 4] and oracle.training
    return rows, oracle


def test_whoever_knows_the_answers_gets_full_marks(data: DetectionSet) -> None:
    rows, oracle = found(data)
    assert oracle.seen == [(240, 320)] * 4
    figures = average_precision(data.document, of_kind(rows, "bbox"), "bbox")
    assert figures["ap"] == pytest.approx(100)
    expected = [(picture.id, list(data.categories)[label - 1]) for picture in data.pictures for label in picture.labels]
    assert [(row["image_id"], row["category_id"]) for row in rows] == expected
    stored = np.concatenate([picture.boxes for picture in data.pictures])
    boxes = np.array([row["bbox"] for row in rows])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(boxes, stored, atol=2e-3)


def test_masks_cover_the_pixels_whose_middles_lie_in_their_boxes(data: DetectionSet) -> None:
    rows, _ = found(data)
    x, y = np.arange(128) + 0.5, np.arange(96)[:, None] + 0.5
    for row in rows:
        mask = mask_tools.decode({**row["segmentation"], "counts": row["segmentation"]["counts"].encode()})
        left, top, width, height = row["bbox"]
        sides = np.abs(x - left - width / 2) - width / 2, np.abs(y - top - height / 2) - height / 2
        clear = (np.abs(sides[0]) > 0.01) & (np.abs(sides[1]) > 0.01)  # the box is written to a thousandth
        assert mask.shape == (96, 128) and mask.any()
        assert np.array_equal((mask > 0)[clear], ((sides[0] < 0) & (sides[1] < 0))[clear])


def test_a_mask_is_laid_where_its_values_are() -> None:
    """A half on the left and a quarter at the bottom, in a box that reaches out of the picture."""
    mask = torch.zeros(1, 28, 28)
    mask[:, :, :14] = mask[:, 21:] = 1
    packed = _packed(mask, torch.tensor([-14.0, 20, 42, 132]), (100, 40))
    laid = mask_tools.decode({**packed, "counts": packed["counts"].encode()})
    expected = np.zeros((100, 40), np.uint8)
    expected[20:, :14] = 1  # a value is 2 x 4 pixels large; the row 20 + 4 * 21 = 104 lies below
    assert np.array_equal(laid, expected)


def test_nothing_found(data: DetectionSet, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, 28, 28),
    }
    monkeypatch.setattr(Oracle, "forward", lambda self, images, sizes: [nothing])
    assert found(data)[0] == []
