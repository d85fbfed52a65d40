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


def laid_by_hand(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Between the middles of its values a mask is bilinear, and half a value outside of the box it is 0."""
    weights = []
    for low, high, side in zip(box[:2], box[2:], size[::-1]):
        places = (np.arange(side) + 0.5 - low) / (high - low) * 28 - 0.5
        weights.append(np.maximum(0, 1 - np.abs(places[:, None] - np.arange(28))))
    return weights[1] @ mask @ weights[0].T


def assert_laid(segmentation: dict[str, Any], mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> None:
    found = mask_tools.decode({**segmentation, "counts": segmentation["counts"].encode()})
    expected = laid_by_hand(mask, box, size)
    clear = np.abs(expected - 0.5) > 1e-3
    assert found.shape == size and found.any() and clear.mean() > 0.9
    assert np.array_equal(found[clear], expected[clear] > 0.5)


def test_masks_lie_in_their_boxes(data: DetectionSet) -> None:
    rows, _ = found(data)
    boxes = np.concatenate([picture.boxes for picture in data.pictures])
    for row, box in zip(rows, boxes, strict=True):
        assert_laid(row["segmentation"], np.ones((28, 28)), box, (96, 128))
    generator = np.random.default_rng(0)
    for box in ([10.3, 20.7, 33.1, 80.2], [-14, 20, 42, 132], [5.2, 5.4, 5.9, 70]):
        mask = generator.random((28, 28)).astype(np.float32)
        packed = _packed(torch.from_numpy(mask)[None], torch.tensor(box), (100, 40))
        assert_laid(packed, mask, np.array(box), (100, 40))


def test_nothing_found(data: DetectionSet, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, 28, 28),
    }
    monkeypatch.setattr(Oracle, "forward", lambda self, images, sizes: [nothing])
    assert found(data)[0] == []
