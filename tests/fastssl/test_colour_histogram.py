"""The colour histogram against counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastssl.evaluate.features import collect
from fastssl.evaluate.knn import knn_accuracy
from fastssl.evaluate.references import BINS, COLOUR_SIZE, colour_histogram_features, histograms
from fastssl.pipelines.plan.draw import ViewSpec


def slow(pictures: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 -> the features, one pixel after the other."""
    rows = np.zeros((len(pictures), BINS**3))
    for row, picture in zip(rows, pictures):
        for red, green, blue in picture.reshape(-1, 3).tolist():
            row[(red // 32) * 64 + (green // 32) * 8 + blue // 32] += 1
        row[:] = np.sqrt(row / picture[..., 0].size)
    return rows


def test_it_is_what_counting_gives() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 7, 7, 3), dtype=np.uint8)
    edges = np.array([0, 31, 32, 63, 64, 127, 128, 223, 224, 255], np.uint8)  # of the bins
    pictures[0, :, :, :] = np.resize(edges, (7, 7, 3))
    found = histograms(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
    np.testing.assert_allclose(found.numpy(), slow(pictures), atol=1e-6)
    np.testing.assert_allclose(found.square().sum(dim=1).numpy(), 1, atol=1e-5)


def test_of_a_file_it_counts_the_pixels_of_the_evaluation_view(beton: Path) -> None:
    def pixels(views: torch.Tensor) -> torch.Tensor:
        return views.flatten(1)

    chosen = np.array([40, 2, 17])
    spec = ViewSpec.evaluation(COLOUR_SIZE, crop=1.0)
    seen = collect(pixels, beton, spec, indices=chosen, batch_size=2, workers=1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    pictures = ((seen.features.view(-1, 3, COLOUR_SIZE, COLOUR_SIZE) * std + mean) * 255).round().to(torch.uint8)
    found = colour_histogram_features(beton, indices=chosen, batch_size=2, workers=1, crop=1.0)
    np.testing.assert_allclose(found.features.numpy(), slow(pictures.permute(0, 2, 3, 1).numpy()), atol=1e-6)
    assert found.index.tolist() == chosen.tolist() and found.labels.tolist() == seen.labels.tolist()


def test_classes_that_differ_in_colour_are_told_apart(beton: Path) -> None:
    bank = colour_histogram_features(beton, indices=np.arange(0, 48, 2), workers=1)
    asked = colour_histogram_features(beton, indices=np.arange(1, 48, 2), workers=1)
    assert knn_accuracy(bank, asked, k=5).accuracy > 90
