"""Feature extraction: order, labels, modes; the held-out split; the raw pixel reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.errors import FastSSLError
from fastssl.evaluate import features
from fastssl.evaluate.features import (
    Features,
    ProbeError,
    check_probe_input,
    extract_features,
    shard,
    split_indices,
    wilson_interval,
)
from fastssl.evaluate.references import raw_pixel_features
from fastssl.models.backbones import create_backbone
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.ops import jpeg
from fastssl.pipelines.plan.draw import ViewSpec


def write_colours(path, colours, labels=None, side=(20, 30)):
    """One flat picture per colour, stored raw, so that every expected value is exact."""
    height, width = side
    with BetonWriter(path, len(colours), labels=labels is not None) as writer:
        for number, colour in enumerate(colours):
            pixels = np.full((height, width, 3), colour, np.uint8)
            writer.add(pixels.tobytes(), height, width, 0 if labels is None else labels[number], MODE_RAW)
    return path


class MeanColour(nn.Module):
    """A network whose output can be predicted: the mean of each normalised channel."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, images):
        assert images.is_contiguous(memory_format=torch.channels_last)
        return self.dropout(images.mean(dim=(2, 3)))


def normalised(colour):
    return (np.asarray(colour) / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])


def test_rows_are_in_stored_order_with_labels_and_partial_last_batch(tmp_path):
    colours = [(10 * i, 255 - 10 * i, 3 * i) for i in range(11)]
    path = write_colours(tmp_path / "a.beton", colours, labels=[i % 3 for i in range(11)])
    found = extract_features(MeanColour(), path, size=8, batch_size=4)
    assert found.features.shape == (11, 3) and found.features.dtype == torch.float32
    assert found.index.tolist() == list(range(11)) and found.labels.tolist() == [i % 3 for i in range(11)]
    np.testing.assert_allclose(found.features.numpy(), [normalised(c) for c in colours], atol=1e-5)


def test_indices_are_kept_in_the_order_given_and_an_open_reader_stays_open(tmp_path):
    path = write_colours(tmp_path / "a.beton", [(i, i, i) for i in range(9)])
    with BetonReader(path) as reader:
        found = extract_features(MeanColour(), reader, size=8, indices=np.array([7, 2, 5]), batch_size=2)
        assert found.index.tolist() == [7, 2, 5]
        assert found.labels.tolist() == [-1, -1, -1] and not found.labelled
        np.testing.assert_allclose(
            found.features[:, 0].numpy(), [normalised((i, i, i))[0] for i in (7, 2, 5)], atol=1e-5
        )
        assert reader.decode(0).shape == (20, 30, 3)


def test_training_flags_come_back_module_by_module_also_after_a_failure(tmp_path):
    path = write_colours(tmp_path / "a.beton", [(0, 0, 0)] * 3)
    network = MeanColour().train()
    network.frozen.eval()
    extract_features(network, path, size=8)
    assert network.training and network.dropout.training and not network.frozen.training
    with pytest.raises(FastSSLError):
        extract_features(network, path, size=8, indices=np.array([99]))
    assert network.training and network.dropout.training and not network.frozen.training


def test_a_damaged_photo_is_an_error_or_left_out(tmp_path):
    path = tmp_path / "a.beton"
    good = jpeg.encode(np.full((16, 16, 3), 90, np.uint8), 90)
    with BetonWriter(path, 5) as writer:
        for number in range(5):
            writer.add(good if number != 2 else good[: len(good) // 2], 16, 16, number)
    with pytest.raises(FastSSLError, match="sample 2"):
        extract_features(MeanColour(), path, size=8, batch_size=3)
    found = extract_features(MeanColour(), path, size=8, batch_size=3, on_bad="skip")
    assert found.index.tolist() == [0, 1, 3, 4] and found.labels.tolist() == [0, 1, 3, 4]


def test_progress_counts_photos(tmp_path):
    path = write_colours(tmp_path / "a.beton", [(0, 0, 0)] * 7)
    seen = []
    extract_features(MeanColour(), path, size=8, batch_size=3, progress=seen.append)
    assert seen == [3, 6, 7]


def test_raw_pixels_are_the_shrunken_centre_square(tmp_path):
    # 32 rows x 64 columns: the outer quarters are white and must not be seen; the centre square has four flat
    # quadrants.
    pixels = np.full((32, 64, 3), 255, np.uint8)
    pixels[:16, 16:32], pixels[:16, 32:48], pixels[16:, 16:32], pixels[16:, 32:48] = (
        (200, 0, 0),
        (0, 200, 0),
        (0, 0, 200),
        (90, 90, 90),
    )
    path = tmp_path / "a.beton"
    with BetonWriter(path, 1) as writer:
        writer.add(pixels.tobytes(), 32, 64, 4, MODE_RAW)
    found = raw_pixel_features(path, crop=1.0)
    assert found.features.shape == (1, 768) and found.labels.tolist() == [4]
    image = found.features.view(3, 16, 16)
    for colour, row, column in (
        ((200, 0, 0), 3, 3),
        ((0, 200, 0), 3, 12),
        ((0, 0, 200), 12, 3),
        ((90, 90, 90), 12, 12),
    ):
        np.testing.assert_allclose(image[:, row, column].numpy(), normalised(colour), atol=0.02)


def test_split_is_stratified_disjoint_complete_and_reproducible():
    labels = np.repeat([0, 1, 2, 7], [50, 30, 10, 1])
    np.random.default_rng(0).shuffle(labels)
    train, held = split_indices(labels, len(labels), fraction=0.2, seed=3)
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(91))
    assert [int((labels[held] == c).sum()) for c in (0, 1, 2, 7)] == [10, 6, 2, 0]  # a class of one stays in training
    again = split_indices(labels, len(labels), fraction=0.2, seed=3)
    assert np.array_equal(held, again[1]) and np.array_equal(train, again[0])
    other = split_indices(labels, len(labels), fraction=0.2, seed=4)
    assert not np.array_equal(held, other[1])


def test_split_of_unlabelled_photos_and_wrong_input():
    train, held = split_indices(None, 40, fraction=0.25)
    assert len(held) == 10 and len(train) == 30 and not np.intersect1d(train, held).size
    with pytest.raises(ProbeError, match="fraction"):
        split_indices(None, 40, fraction=1.0)
    with pytest.raises(ProbeError, match="labels"):
        split_indices(np.zeros(3), 40)


def test_wilson_interval_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for correct, total in ((0, 10), (10, 10), (7, 10), (812, 1000)):
        expected = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(
            wilson_interval(correct, total), (100 * expected.low, 100 * expected.high), atol=0.02
        )


def test_unusable_input_is_named():
    def part(features, labels):
        return Features(
            torch.as_tensor(features, dtype=torch.float32), torch.as_tensor(labels), torch.arange(len(labels))
        )

    good = part([[1.0, 2.0], [2.0, 1.0]], [0, 1])
    for train, val, message in (
        (part(np.zeros((0, 2)), torch.zeros(0, dtype=torch.int64)), good, "training part is empty"),
        (good, part([[1.0, 2.0]], [-1]), "validation part has no labels"),
        (good, part([[1.0, float("nan")]], [0]), "NaN"),
        (good, part([[1.0, 2.0, 3.0]], [0]), "width"),
    ):
        with pytest.raises(ProbeError, match=message):
            check_probe_input(train, val)


@pytest.mark.parametrize("amp", [False, True])
def test_all_maps_of_a_backbone_are_channels_last(beton, amp):
    backbone, kept = create_backbone("mobilenetv3_small_050"), []

    def look(layer, inputs, output):
        kept.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (*inputs, output))

    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(look)
    extract_features(backbone, beton, size=32, workers=1, amp=amp)
    assert len(kept) > 40 and all(kept)


def test_interpolation_is_the_views(beton):
    class Pixels(nn.Module):
        def forward(self, images):
            return images.flatten(1)

    found = [
        extract_features(Pixels(), beton, size=8, workers=1, interpolation=kind).features
        for kind in ("bilinear", "bicubic")
    ]
    spec = replace(ViewSpec.evaluation(8), interpolation="bicubic")
    with ViewLoader(beton, [spec], 48, shuffle=False, workers=1) as loader:
        expected = next(iter(loader.epoch(0))).views[0].flatten(1)
    assert torch.equal(found[1], expected) and not torch.equal(found[0], found[1])


def test_shares_are_neighbours_and_none_is_empty(monkeypatch):
    monkeypatch.setattr(features, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(features, "rank", lambda rank=rank: rank)
        parts.append(shard(np.arange(100, 110)).tolist())
    assert [row for part in parts for row in part] == list(range(100, 110)) and {len(part) for part in parts} == {3, 4}
    with pytest.raises(ProbeError, match="2 photos cannot be shared out to 3 processes"):
        shard(np.arange(2))


def test_numbers_that_are_not_finite_are_found_wherever_they_are():
    labels = torch.zeros(50, dtype=torch.int64)
    for spoilt in (torch.nan, torch.inf, -torch.inf):
        values = torch.randn(50, 7)
        values[31, 4] = spoilt
        with pytest.raises(ProbeError, match="validation part are NaN or infinite"):
            check_probe_input(Features(torch.randn(50, 7), labels, labels), Features(values, labels, labels))
