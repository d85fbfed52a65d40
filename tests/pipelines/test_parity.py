"""Every engine renders the views that torchvision makes of the same plan, operation by operation and as a whole chain.

Differences are in grey levels (1/255), before normalisation; the figures on real photos are in
benchmarks/results/parity.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import need_engine
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandomResizedCrop
from torchvision_views import torchvision_colour, torchvision_crop

from fastssl.pipelines import BetonReader, BetonWriter
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.ops import jpeg
from fastssl.pipelines.plan.draw import ViewSpec, draw_plan

pytestmark = pytest.mark.engines

ENGINES = {
    "native": {"crops": "host"},
    "native on device": {"crops": "device"},
    "dali": {"pipeline": "dali"},
    "ffcv": {"pipeline": "ffcv"},
    "torchcodec": {"pipeline": "torchcodec"},
}
_PLAIN = ViewSpec(size=96, area=(0.2, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0)
_STILL = replace(_PLAIN, jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
#: MoCo-v2's augmentation.
_CHAIN = ViewSpec(size=96, area=(0.2, 1.0), count=2)
#: Operation -> views, and the bound on the mean and on the largest difference, and on DALI's largest. Every crop ends
#: in 8 bits, so every row has the crop's rounding of up to 1 level; strong colour operations multiply it. DALI samples
#: its filter from a table, and repeats the border's pixels.
OPERATIONS: dict[str, tuple[list[ViewSpec], float, float, float]] = {
    "decode, no resize": ([replace(_PLAIN, center=1.0, size=120)], 0.5, 1e-3, 1e-3),
    "crop, reduced, bilinear": ([_PLAIN], 0.5, 3, 12),
    "crop, reduced, bicubic": ([replace(_PLAIN, interpolation="bicubic")], 0.5, 3, 12),
    "crop, enlarged, bilinear": ([replace(_PLAIN, area=(0.01, 0.03))], 0.5, 3, 12),
    "flip": ([replace(_PLAIN, flip=1.0)], 0.5, 3, 12),
    "brightness 0.4": ([replace(_STILL, brightness=0.4)], 0.5, 3, 14),
    "contrast 0.4": ([replace(_STILL, contrast=0.4)], 0.5, 3, 14),
    "saturation 0.4": ([replace(_STILL, saturation=0.4)], 0.5, 4, 16),
    "hue 0.1": ([replace(_STILL, hue=0.1)], 0.6, 16, 32),
    "grey": ([replace(_PLAIN, grey=1.0)], 0.5, 2, 12),
    "blur, sigma 0.1 to 2": ([replace(_PLAIN, blur=1.0)], 0.5, 2, 8),
    "solarise": ([replace(_PLAIN, solarise=1.0)], 0.5, 3, 12),
    "MoCo-v2, 2 views": ([_CHAIN], 1.0, 24, 40),
    "MoCo-v2, 2 + 6 views": ([_CHAIN, replace(_CHAIN, size=48, count=6, area=(0.05, 0.3))], 1.0, 24, 40),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of two real photographs, all with one short side, as a .beton."""
    path = tmp_path_factory.mktemp("parity") / "photos.beton"
    rng = np.random.default_rng(0)
    with BetonWriter(path, 10, labels=False) as writer:
        for k in range(10):
            height, width = ((120, 160), (160, 120))[k % 2]
            top, left = rng.integers(0, 427 - height), rng.integers(0, 640 - width)
            piece = np.ascontiguousarray(load_sample_images().images[k % 2][top : top + height, left : left + width])
            writer.add(jpeg.encode(piece, 92), height, width)
    return path


def rendered(reader: BetonReader, specs: list[ViewSpec], options: dict[str, str]) -> np.ndarray:
    """All views' values in grey levels, in the order of ``references``."""
    specs = [replace(spec, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3) for spec in specs]
    with ViewLoader(reader, specs, len(reader), "cpu", seed=0, shuffle=False, **options) as loader:
        (batch,) = loader.epoch(0)
        return np.concatenate([view.float().numpy().ravel() for view in batch.views])


def references(reader: BetonReader, specs: list[ViewSpec]) -> tuple[np.ndarray, np.ndarray]:
    """The same by torchvision, and each value's distance to a solarisation's threshold."""
    values, margins, first_view = [], [], 0
    for spec in specs:
        drawn = {"seed": 0, "epoch": 0, "heights": reader.heights, "widths": reader.widths}
        for view in draw_plan(spec, first_view=first_view, sample_ids=np.arange(len(reader)), **drawn):
            for sample, record in enumerate(view):
                crop = torchvision_crop(reader.decode(sample), record, spec)
                for found, picture in zip((values, margins), torchvision_colour(crop, record, spec)):
                    found.append(255 * picture.numpy().ravel())
        first_view += spec.count
    return np.concatenate(values), np.concatenate(margins)


def differences(views: np.ndarray, reference: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Absolute differences. A value nearer to the threshold than the roundings before it falls on either side by
    chance, 255 levels apart, and is left out.
    """
    clear = margin > 12
    assert clear.mean() > 0.75
    return np.abs(views - reference)[clear]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_operation_keeps_its_bound(engine: str, photos: Path) -> None:
    if "pipeline" in ENGINES[engine]:
        need_engine(engine)
    with BetonReader(photos) as reader:
        for name, (specs, mean, most, dali_most) in OPERATIONS.items():
            apart = differences(rendered(reader, specs, ENGINES[engine]), *references(reader, specs))
            bound = dali_most if engine == "dali" else most
            assert apart.mean() <= mean and apart.max() <= bound, (name, apart.mean(), apart.max())


def test_an_engine_that_is_off_by_a_pixel_would_be_seen(photos: Path) -> None:
    specs, mean, most, dali_most = OPERATIONS["crop, reduced, bilinear"]
    with BetonReader(photos) as reader:
        shifted = np.roll(rendered(reader, specs, ENGINES["native"]).reshape(-1, 96), 1, axis=1).ravel()
        apart = differences(shifted, *references(reader, specs))
    assert apart.mean() > mean and apart.max() > max(most, dali_most)


@pytest.mark.parametrize("area", [(0.2, 1.0), (0.05, 0.14)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (128, 171)])
def test_crop_boxes_are_torchvisions(height: int, width: int, area: tuple[float, float]) -> None:
    """Kolmogorov-Smirnov distance below what chance gives to equal distributions."""
    draws = 4000
    side = np.full(draws, 1)
    drawn = {"seed": 1, "epoch": 0, "heights": height * side, "widths": width * side}
    plan = draw_plan(ViewSpec(area=area), first_view=0, sample_ids=np.arange(draws), **drawn)[0]
    ours = np.stack([plan[name] for name in ("top", "left", "height", "width")]).astype(float)
    torch.manual_seed(1)
    picture = torch.empty(1, height, width)
    drawn = [RandomResizedCrop.get_params(picture, list(area), [3 / 4, 4 / 3]) for _ in range(draws)]
    for name in ("area", "ratio", "top", "left"):
        one, other = (
            {
                "area": boxes[2] * boxes[3],
                "ratio": boxes[3] / boxes[2],
                "top": boxes[0] / np.maximum(height - boxes[2], 1),
                "left": boxes[1] / np.maximum(width - boxes[3], 1),
            }[name]
            for boxes in (ours, np.array(drawn, float).T)
        )
        points = np.concatenate([one, other])
        below = [np.searchsorted(np.sort(sample), points, side="right") / draws for sample in (one, other)]
        assert np.abs(below[0] - below[1]).max() < 1.6 * 1.358 * (2 / draws) ** 0.5, name
