"""What the size at which photos are stored does to the views that are cut from them, and to the loader's rate.

    python benchmarks/results/photo-size/measure.py views ROOT --json results.jsonl
    python benchmarks/results/photo-size/measure.py rates ROOT --json results.jsonl

ROOT: where the packages of README.md were unpacked. Windows of their large photos become JPEGs of ImageNet's usual
sizes; the converter stores these as they are and with short sides of 500, 384 and 256 px. Every view is cut four times,
from each of the files, with the same crop in shares of the photo. The lines are added to results.jsonl; README.md has
the tables that this prints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
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

#: Photos under usr/share/; drawings, and skies without anything in them, are left out.
SOURCES = (
    *("backgrounds/Bridge_*", "backgrounds/Dragonfly_*", "backgrounds/Kleiber_*", "backgrounds/Picture_*"),
    *("backgrounds/Wine_*", "backgrounds/free_*", "backgrounds/greentock_*", "backgrounds/seeding_*"),
    *("backgrounds/*_by_Aitzol_*", "backgrounds/mate/nature/*.jpg"),
    *(f"wallpapers/{name}/contents/images/2560x1600.jpg" for name in ("BytheWater", "ColdRipple", "EveningGlow")),
    *(f"wallpapers/{name}/contents/images/2560x1600.jpg" for name in ("FallenLeaf", "OneStandsOut", "Path")),
)
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


def make_photos(root: Path, folder: Path, windows: int, rng: np.random.Generator) -> None:
    """Write ``windows`` JPEGs of each photo, fewer of one that is not much larger than they are.

    Each is a window of the photo, scaled down by Lanczos so far that the window shows a quarter to most of its width:
    sharp to the pixel, as what photo sites hand out. Quality 95, three of four in full colour resolution.
    """
    done = 0
    for path in sorted(path for pattern in SOURCES for path in (root / "usr/share").glob(pattern)):
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


def energy(view: np.ndarray) -> float:
    """Mean square of the Laplacian of the brightness; view: (S, S, 3) uint8."""
    y = view @ np.array([0.299, 0.587, 0.114], np.float32)
    return float(np.mean((4 * y[1:-1, 1:-1] - y[:-2, 1:-1] - y[2:, 1:-1] - y[1:-1, :-2] - y[1:-1, 2:]) ** 2))


def compare_views(readers: dict[str, BetonReader]) -> dict[str, dict[str, dict[str, float]]]:
    """{file: {views: figures}}.

    ``fewer_pixels``: share of the views whose crop has fewer pixels than the view; ``enlarged``: whose crop is enlarged
    along one side at least. Against the views of the kept photos: ``sharpness``, the Laplacian energy of all views, and
    the median of the single views' ratios; ``grey_levels``, the mean absolute difference.
    """
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
                    w, h = wide * x, high * y
                    sums[file][views].append([w * h < spec.size**2, min(w, h) < spec.size, sharp, first[1], off])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for file, by_views in sums.items():
        found[file] = {}
        for views, rows in by_views.items():
            fewer, narrower, sharp, before, off = np.array(rows).T
            ratios = sharp / np.maximum(before, 1e-9)
            found[file][views] = {
                "fewer_pixels": round(float(fewer.mean()), 4),
                "enlarged": round(float(narrower.mean()), 4),
                "sharpness": round(float(sharp.sum() / before.sum()), 4),
                "sharpness_median": round(float(np.median(ratios)), 4),
                "grey_levels": round(float(off.mean()), 3),
            }
    return found


def photos_per_s(reader: BetonReader, specs: list[ViewSpec], workers: int, colour: bool, epoch: int) -> list[float]:
    """Of one epoch in batches of 64 on the CPU, from the first photo asked for to the last batch: photos a second, and
    photos a second of processor time in all threads, which other work on the machine hardly changes.
    """
    with ViewLoader(reader, specs, 64, pipeline="native", workers=workers, colour=colour) as loader:
        started, cpu = time.perf_counter(), time.process_time()
        photos = sum(len(batch.index) for batch in loader.epoch(epoch))
        return [photos / (time.perf_counter() - started), photos / (time.process_time() - cpu)]


def rates(readers: dict[str, BetonReader]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{file: {what: photos_per_s and photos_per_cpu_s: [median, least, most]}}: the files in turns, one round to warm
    up.
    """
    specs = list(load_recipe("light-moco-mobilenetv3").views)
    kinds = {"crops, 1 thread": (1, False), "crops, 2 threads": (2, False), "loader, 2 threads": (2, True)}
    seen: dict[str, dict[str, list[list[float]]]] = {file: {kind: [] for kind in kinds} for file in readers}
    for turn in range(ROUNDS + 1):
        for kind, (workers, colour) in kinds.items():
            for file, reader in readers.items():
                seen[file][kind].append(photos_per_s(reader, specs, workers, colour, turn))

    def figures(values: list[float]) -> list[float]:
        return [round(value, 1) for value in (statistics.median(values), min(values), max(values))]

    names = ("photos_per_s", "photos_per_cpu_s")
    return {
        file: {
            kind: {name: figures([run[i] for run in runs[1:]]) for i, name in enumerate(names)}
            for kind, runs in by_kind.items()
        }
        for file, by_kind in seen.items()
    }


def table(records: list[dict[str, Any]]) -> str:
    """The files side by side, in markdown."""
    lines = ["| | " + " | ".join(str(record["file"]) for record in records) + " |", "| --- |" + " --: |" * len(records)]

    def row(name: str, values: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(values) + " |")

    row("photos scaled down", [f"{record['scaled'] / record['photos']:.0%}" for record in records])
    row("median short side, px", [f"{record['short_side']:.0f}" for record in records])
    row("kB a photo", [f"{record['bytes_per_photo'] / 1e3:.1f}" for record in records])
    for views in records[0].get("views", ()):
        found = [record["views"][views] for record in records]
        row(f"{views}: enlarged", [f"{one['enlarged']:.0%}" for one in found])
        row(f"{views}: of fewer pixels", [f"{one['fewer_pixels']:.0%}" for one in found])
        row(f"{views}: Laplacian energy", [f"{one['sharpness']:.0%}" for one in found])
        row(f"{views}: grey levels off", [f"{one['grey_levels']:.1f}" for one in found])
    for kind in records[0].get("rates", ()):
        for name, unit in (("photos_per_s", "photos/s"), ("photos_per_cpu_s", "photos a CPU second")):
            cells = [record["rates"][kind][name][0] for record in records]
            row(f"{kind}, {unit}", [f"{cell:,.0f} ({cell / cells[0]:.2f}x)" for cell in cells])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["views", "rates"])
    parser.add_argument("root", type=Path)
    parser.add_argument("--windows", type=int, default=8, help="of each photo")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
        photos = Path(folder, "photos")
        photos.mkdir()
        make_photos(given.root, photos, given.windows, np.random.default_rng(0))
        load, readers, records = os.getloadavg()[0], {}, []
        for file, options in FILES.items():
            done = convert(photos, Path(folder, f"{file}.beton"), options)
            reader = readers[file] = files.enter_context(BetonReader(done.path))
            record: dict[str, Any] = {"file": file, "photos": done.written, "scaled": done.scaled}
            record["bytes_per_photo"] = round(done.bytes / done.written)
            record["short_side"] = float(np.median(np.minimum(reader.heights, reader.widths)))
            records.append(record | {"long_side": float(np.median(np.maximum(reader.heights, reader.widths)))})
        found = (compare_views if given.part == "views" else rates)(readers)
        records = [record | {given.part: found[record["file"]]} for record in records]
    how = f"{given.part} ROOT --windows {given.windows} --json {given.json.name}"
    about = {
        "command": f"python benchmarks/results/photo-size/measure.py {how}",
        "host": describe_host(),
        "versions": describe_versions(),
        "git": describe_git(),
        "load_before": round(load, 2),
        "rounds": ROUNDS,
        "spread": SPREAD,
    }
    with given.json.open("a") as out:
        out.writelines(json.dumps(record) + "\n" for record in [about, *records])
    print(table(records))


if __name__ == "__main__":
    main()
