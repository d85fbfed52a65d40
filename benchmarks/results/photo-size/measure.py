"""What the size at which photos are stored does to the views that are cut from them, and to the loader's rate.

    python benchmarks/results/photo-size/measure.py SOURCES --json results.jsonl

SOURCES: a folder of large photos. Windows of them become JPEGs of ImageNet's usual sizes; the converter stores these as
they are and with short sides of 256, 384 and 500 px. Every view is cut four times, from each of the files, with the
same crop in shares of the photo. README.md says where the photos came from, and has the table that this prints.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastssl.config.recipe import load_recipe
from fastssl.pipelines import ViewLoader, ViewSpec
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.plan.draw import draw_plans
from fastssl.utils.versions import describe_git, describe_host, describe_versions

#: Share of the photos and the range of their longer side in pixels. ImageNet's median is 500 x 375; how far the others
#: spread is assumed.
SPREAD = ((0.70, 500, 500), (0.15, 320, 480), (0.15, 640, 1280))
FILES = {
    "kept": ConvertOptions(keep_size=True),
    "500": ConvertOptions(short_side=500),
    "384": ConvertOptions(short_side=384),
    "256": ConvertOptions(short_side=256),
}
#: Recipe and number of the view group.
VIEWS = {
    "light-moco": ("light-moco-mobilenetv3", 0),
    "SSLight global": ("dino-mobilenetv2-sslight", 0),
    "SSLight local": ("dino-mobilenetv2-sslight", 2),
    "baseline local": ("dino-mobilenetv2-baseline", 2),
}
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
ROUNDS = 5


def make_photos(sources: Path, folder: Path, windows: int, rng: np.random.Generator) -> int:
    """Write ``windows`` JPEGs of each photo of ``sources``; how many there are.

    Each is a window of the photo, scaled down by Lanczos so far that the window shows a quarter to most of its width:
    sharp to the pixel, as what photo sites hand out. Quality 95, three of four in full colour resolution.
    """
    done = 0
    for path in sorted(sources.rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png") or not path.is_file():
            continue
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        for _ in range(windows):
            _, low, high = SPREAD[rng.choice(len(SPREAD), p=[share for share, *_ in SPREAD])]
            long = int(rng.integers(low, high + 1))
            size = (long, round(long * (3 / 4 if rng.random() < 0.7 else 2 / 3)))
            size = size if rng.random() < 0.75 else size[::-1]
            fits = max(size[0] / photo.width, size[1] / photo.height)  # scale at which the window is all of it
            if fits > 1:
                continue
            scale = fits * min(1 / fits, np.exp(rng.uniform(np.log(1.1), np.log(4))))
            large = (max(size[0], round(photo.width * scale)), max(size[1], round(photo.height * scale)))
            left, top = (int(rng.integers(0, a - b + 1)) for a, b in zip(large, size))
            # The window in pixels of the photo: only that much of it is scaled.
            box = tuple(edge / scale for edge in (left, top, left + size[0], top + size[1]))
            box = (box[0], box[1], min(box[2], photo.width), min(box[3], photo.height))
            picture = photo.resize(size, Image.Resampling.LANCZOS, box=box)
            sampling = 2 if rng.random() < 0.25 else 0
            picture.save(folder / f"{done:04}.jpg", quality=95, subsampling=sampling)
            done += 1
    return done


def energy(view: np.ndarray) -> float:
    """Mean square of the Laplacian of the brightness; view: (S, S, 3) uint8."""
    y = view @ np.array([0.299, 0.587, 0.114], np.float32)
    return float(np.mean((4 * y[1:-1, 1:-1] - y[:-2, 1:-1] - y[2:, 1:-1] - y[1:-1, :-2] - y[1:-1, 2:]) ** 2))


def compare_views(readers: dict[str, BetonReader]) -> dict[str, dict[str, dict[str, float]]]:
    """{file: {views: enlarged, sharpness, sharpness_median, grey_levels}}; the last three against the kept photos."""
    kept, count = readers["kept"], len(readers["kept"])
    ids = np.arange(count)
    sums: dict[str, dict[str, list[list[float]]]] = {file: {views: [] for views in VIEWS} for file in readers}
    plans = {}
    for views, (recipe, group) in VIEWS.items():
        specs = list(load_recipe(recipe).views)
        plans[views] = specs[group], draw_plans(specs, 0, 0, ids, kept.heights, kept.widths)[group]
    for i in range(count):
        pictures = {file: Image.fromarray(reader.decode(i)) for file, reader in readers.items()}
        for views, (spec, plan) in plans.items():
            for record in plan[:, i]:
                first: tuple[np.ndarray, float] | None = None
                for file, picture in pictures.items():  # the kept one first
                    x, y = picture.width / int(kept.widths[i]), picture.height / int(kept.heights[i])
                    left, top, wide, high = (int(record[name]) for name in ("left", "top", "width", "height"))
                    box = (left * x, top * y, (left + wide) * x, (top + high) * y)
                    shown = picture.resize((spec.size, spec.size), FILTERS[spec.interpolation], box=box)
                    view = np.asarray(shown)
                    sharp = energy(view)
                    first = first or (view, sharp)
                    off = np.abs(view.astype(np.int16) - first[0]).mean()
                    sums[file][views].append([wide * x * high * y < spec.size**2, sharp, first[1], off])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for file, by_views in sums.items():
        found[file] = {}
        for views, rows in by_views.items():
            enlarged, sharp, before, off = np.array(rows).T
            ratios = sharp / np.maximum(before, 1e-9)
            found[file][views] = {
                "enlarged": round(float(enlarged.mean()), 4),
                "sharpness": round(float(sharp.sum() / before.sum()), 4),
                "sharpness_median": round(float(np.median(ratios)), 4),
                "grey_levels": round(float(off.mean()), 3),
            }
    return found


def photos_per_s(reader: BetonReader, specs: list[ViewSpec], workers: int, colour: bool, epoch: int) -> float:
    """Of one epoch in batches of 64 on the CPU, behind a first batch that starts the threads."""
    with ViewLoader(reader, specs, 64, pipeline="native", workers=workers, colour=colour) as loader:
        batches = loader.epoch(epoch)
        next(batches)
        started, photos = time.perf_counter(), 0
        for batch in batches:
            photos += len(batch.index)
        return photos / (time.perf_counter() - started)


def rates(readers: dict[str, BetonReader]) -> dict[str, dict[str, dict[str, float]]]:
    """{file: {what: median, least, most}} in photos/s: the files in turns, one round to warm up."""
    specs = list(load_recipe("light-moco-mobilenetv3").views)
    kinds = {"crops, 1 thread": (1, False), "crops, 2 threads": (2, False), "loader, 2 threads": (2, True)}
    seen: dict[str, dict[str, list[float]]] = {file: {kind: [] for kind in kinds} for file in readers}
    for turn in range(ROUNDS + 1):
        for kind, (workers, colour) in kinds.items():
            for file, reader in readers.items():
                seen[file][kind].append(photos_per_s(reader, specs, workers, colour, turn))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for file, by_kind in seen.items():
        found[file] = {}
        for kind, values in by_kind.items():
            runs = sorted(values[1:])
            figures = {"median": statistics.median(runs), "least": runs[0], "most": runs[-1]}
            found[file][kind] = {name: round(value, 1) for name, value in figures.items()}
    return found


def table(records: list[dict[str, Any]]) -> str:
    """The files side by side, in markdown."""
    lines = ["| | " + " | ".join(str(record["file"]) for record in records) + " |", "| --- |" + " --: |" * len(records)]

    def row(name: str, values: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(values) + " |")

    row("photos scaled down", [f"{record['scaled'] / record['photos']:.0%}" for record in records])
    row("median short side, px", [f"{record['short_side']:.0f}" for record in records])
    row("kB a photo", [f"{record['bytes_per_photo'] / 1e3:.1f}" for record in records])
    for views in VIEWS:
        row(f"{views}: enlarged", [f"{record['views'][views]['enlarged']:.0%}" for record in records])
        row(f"{views}: Laplacian energy", [f"{record['views'][views]['sharpness']:.0%}" for record in records])
        row(f"{views}: grey levels off", [f"{record['views'][views]['grey_levels']:.1f}" for record in records])
    for kind in records[0]["photos_per_s"]:
        first = records[0]["photos_per_s"][kind]["median"]
        cells = [record["photos_per_s"][kind]["median"] for record in records]
        row(f"{kind}, photos/s", [f"{cell:,.0f} ({cell / first:.2f}x)" for cell in cells])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--windows", type=int, default=12, help="of each photo")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        count = make_photos(given.sources, photos, given.windows, np.random.default_rng(0))
        print(f"{count} photos", file=sys.stderr)
        records = []
        for file, options in FILES.items():
            done = convert(photos, Path(folder, f"{file}.beton"), options)
            records.append({"file": file, "photos": done.written, "bytes_per_photo": round(done.bytes / done.written)})
        readers = {file: BetonReader(Path(folder, f"{file}.beton")) for file in FILES}
        load = os.getloadavg()[0]
        by_file, by_rate = compare_views(readers), rates(readers)
        kept = readers["kept"]
        for record, (file, reader) in zip(records, readers.items()):
            short = np.minimum(reader.heights, reader.widths)
            record["scaled"] = int((short != np.minimum(kept.heights, kept.widths)).sum())
            record |= {
                "short_side": float(np.median(short)),
                "long_side": float(np.median(np.maximum(reader.heights, reader.widths))),
            }
            record |= {"views": by_file[file], "photos_per_s": by_rate[file]}
            reader.close()
    command = shlex.join(["python", "benchmarks/results/photo-size/measure.py", "SOURCES", *sys.argv[2:]])
    about = {"command": command, "host": describe_host(), "versions": describe_versions(), "git": describe_git()}
    about |= {"load_before": round(load, 2), "rounds": ROUNDS, "spread": SPREAD}
    given.json.write_text("".join(json.dumps(record) + "\n" for record in [about, *records]))
    print(table(records))


if __name__ == "__main__":
    main()
