"""How close each engine's views are to torchvision's and Pillow's, operation by operation and as a whole chain.

    python -m fastssl.benchmarks.studies.parity --data photos.beton --out parity/

Every engine renders the same plan through the real loader; the references render it one view at a time
(``reference_views``). Written are ``parity.md``, ``parity.png`` and ``parity.json``. Differences are in grey levels
(1/255), before normalisation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastssl.benchmarks.harness.photos import describe_data, find_data
from fastssl.benchmarks.studies.torchvision_views import (
    pillow_colour,
    pillow_crop,
    torchvision_colour,
    torchvision_crop,
)
from fastssl.errors import FastSSLError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.registry import engine_state
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec, draw_plan, draw_plans
from fastssl.utils.versions import describe_host, describe_versions

_PLAIN = ViewSpec(size=96, area=(0.2, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0)
_NO_JITTER = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
#: MoCo-v2's augmentation.
_CHAIN = ViewSpec(size=96, area=(0.2, 1.0))


def _jitter(**strength: float) -> ViewSpec:
    return replace(_PLAIN, jitter=1.0, **{**_NO_JITTER, **strength})


@dataclass(frozen=True)
class Operation:
    """A row of the report.

    Attributes:
        name: in words.
        specs: the views that show it.
        mean, most: the bound on the difference to torchvision in grey levels, mean and largest, for every engine. DALI
            samples its filter from a table, which costs some grey levels at strong edges: ``dali_most``.
    """

    name: str
    specs: tuple[ViewSpec, ...]
    mean: float
    most: float
    dali_most: float


_DECODE = "decode, no resize"
#: Every crop ends in 8 bits, so every row has the crop's rounding of up to 1 grey level; strong colour operations
#: multiply it.
OPERATIONS = (
    Operation(_DECODE, (replace(_PLAIN, center=1.0, size=96),), 0.5, 3, 12),
    Operation("crop, reduced, bilinear", (_PLAIN,), 0.5, 3, 12),
    Operation("crop, reduced, bicubic", (replace(_PLAIN, interpolation="bicubic"),), 0.5, 3, 12),
    Operation("crop, enlarged, bilinear", (replace(_PLAIN, area=(0.01, 0.03)),), 0.5, 3, 12),
    Operation("flip", (replace(_PLAIN, flip=1.0),), 0.5, 3, 12),
    Operation("brightness 0.4", (_jitter(brightness=0.4),), 0.5, 3, 14),
    Operation("contrast 0.4", (_jitter(contrast=0.4),), 0.5, 3, 14),
    Operation("saturation 0.4", (_jitter(saturation=0.4),), 0.5, 4, 16),
    Operation("hue 0.1", (_jitter(hue=0.1),), 0.6, 16, 32),
    Operation("grey", (replace(_PLAIN, grey=1.0),), 0.5, 2, 12),
    Operation("blur, sigma 0.1 to 2", (replace(_PLAIN, blur=1.0),), 0.5, 2, 8),
    Operation("solarise", (replace(_PLAIN, solarise=1.0),), 0.5, 3, 12),
    Operation("MoCo-v2, 2 views", (replace(_CHAIN, count=2),), 1.0, 24, 40),
    Operation(
        "MoCo-v2, 2 + 6 views",
        (replace(_CHAIN, count=2), replace(_CHAIN, size=48, count=6, area=(0.05, 0.3))),
        1.0,
        24,
        40,
    ),
)
# _DECODE: see `_native_size`, which sets the size where all pictures allow it.


@dataclass(frozen=True)
class Difference:
    """One engine against one reference on one operation: mean and largest, in grey levels; ``left_out``: share on a
    solarisation's threshold.
    """

    mean: float
    most: float
    left_out: float = 0.0


@dataclass
class Row:
    """An operation's differences: (engine, reference) -> Difference; and one sample's pictures for the drawing."""

    operation: Operation
    differences: dict[tuple[str, str], Difference]
    pictures: dict[str, np.ndarray]

    def beyond(self, engine: str) -> bool:
        """Whether an engine is further from torchvision than the operation's bound allows."""
        found, operation = self.differences[engine, "torchvision"], self.operation
        return found.mean > operation.mean or found.most > (operation.dali_most if engine == "dali" else operation.most)


def available() -> list[tuple[str, dict[str, str]]]:
    """The ways to make views that can run here: (name in the report, options of ``ViewLoader``)."""
    ways = [("native", {"crops": "host"}), ("native on device", {"crops": "device"})]
    return ways + [(name, {"pipeline": name}) for name in ("dali", "ffcv") if not engine_state(name).problem]


def measure(
    data: Path,
    *,
    samples: int = 48,
    seed: int = 0,
    device: str = "cpu",
    operations: Sequence[Operation] = OPERATIONS,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Compare all engines that can run here on ``samples`` photos, spread over the file. ``say`` is told of each
    operation as it is done.
    """
    rows = []
    with BetonReader(data) as reader:
        chosen = np.unique(np.linspace(0, len(reader) - 1, min(samples, len(reader))).astype(np.int64))
        photos = [reader.decode(int(sample)) for sample in chosen]
        for number, operation in enumerate(operations):
            if operation.name == _DECODE and len({min(photo.shape[:2]) for photo in photos}) > 1:
                operation = replace(operation, name="whole photo, reduced")  # no single size holds them all unresized
            specs = [_native_size(spec, photos) if operation.name == _DECODE else spec for spec in operation.specs]
            references = _references(photos, chosen, specs, seed)
            differences, pictures = {}, {"torchvision": references["torchvision"][0][0]}
            for name, options in available():
                views = _render(reader, chosen, specs, seed, device, options)
                pictures[name] = views[0][0]
                for reference in ("torchvision", "pillow"):
                    differences[name, reference] = _difference(views, references[reference], references["margin"])
            rows.append(Row(operation, differences, pictures))
            say(f"{number + 1} of {len(operations)}: {operation.name}")
    return rows


def _native_size(spec: ViewSpec, photos: list[np.ndarray]) -> ViewSpec:
    """The centred square at its stored size, where all photos have one short side."""
    sides = {min(photo.shape[:2]) for photo in photos}
    return replace(spec, size=sides.pop()) if len(sides) == 1 else spec


def _render(
    reader: BetonReader, chosen: np.ndarray, specs: list[ViewSpec], seed: int, device: str, options: dict[str, str]
) -> list[np.ndarray]:
    """Views in grey levels, one (count * n, S, S, 3) float32 a group."""
    specs = [replace(spec, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3) for spec in specs]
    with ViewLoader(reader, specs, len(chosen), device, seed=seed, indices=chosen, shuffle=False, **options) as loader:
        (batch,) = loader.epoch(0)
        return [view.float().cpu().permute(0, 2, 3, 1).numpy() for view in batch.views]


def _references(
    photos: list[np.ndarray], chosen: np.ndarray, specs: list[ViewSpec], seed: int
) -> dict[str, list[np.ndarray]]:
    """The same views by torchvision and by Pillow, and their values' distance to the threshold, shaped like
    ``_render``'s.
    """
    heights, widths = (np.array([photo.shape[axis] for photo in photos]) for axis in (0, 1))
    made: dict[str, list[np.ndarray]] = {"torchvision": [], "pillow": [], "margin": []}
    for spec, plan in zip(specs, draw_plans(specs, seed, 0, chosen, heights, widths)):
        group: dict[str, list[np.ndarray]] = {key: [] for key in made}
        for view in plan:
            for photo, record in zip(photos, view):
                picture, margin = torchvision_colour(torchvision_crop(photo, record, spec), record, spec)
                group["torchvision"].append(255 * picture.permute(1, 2, 0).numpy())
                group["margin"].append(255 * margin.permute(1, 2, 0).numpy())
                group["pillow"].append(
                    np.asarray(pillow_colour(pillow_crop(photo, record, spec), record, spec), np.float32)
                )
        for key, views in group.items():
            made[key].append(np.stack(views))
    return made


def _difference(views: list[np.ndarray], reference: list[np.ndarray], margin: list[np.ndarray]) -> Difference:
    # A value nearer to the threshold than the roundings before it falls on either side by chance, 255 levels apart.
    clear = [near > 12 for near in margin]
    apart = np.concatenate([np.abs(a - b)[keep] for a, b, keep in zip(views, reference, clear)])
    left_out = 1 - apart.size / sum(view.size for view in views)
    return Difference(float(apart.mean()), float(apart.max()), left_out)


def crop_statistics(draws: int = 20000) -> list[dict[str, float | str]]:
    """Distance between our crop boxes and torchvision's: Kolmogorov-Smirnov, beside the distance that chance gives to
    95 % of equal samples.
    """
    from torchvision.transforms import RandomResizedCrop

    found: list[dict[str, float | str]] = []
    for height, width in ((375, 500), (500, 375), (128, 171)):
        for area in ((0.2, 1.0), (0.05, 0.14)):
            spec, side = ViewSpec(area=area), np.full(draws, 1)
            ids = np.arange(draws)
            plan = draw_plan(
                spec, first_view=0, seed=1, epoch=0, sample_ids=ids, heights=height * side, widths=width * side
            )[0]
            torch.manual_seed(1)
            picture = torch.empty(1, height, width)
            theirs = np.array(
                [RandomResizedCrop.get_params(picture, list(area), [3 / 4, 4 / 3]) for _ in range(draws)], float
            )
            ours = np.stack([plan[name] for name in ("top", "left", "height", "width")], axis=1).astype(float)
            row: dict[str, float | str] = {"photo": f"{height}x{width}", "scale": f"{area[0]:g} to {area[1]:g}"}
            for name, of in _BOX_STATISTICS.items():
                row[name] = _ks_distance(of(ours, height, width), of(theirs, height, width))
            row["chance"] = 1.358 * (2 / draws) ** 0.5
            found.append(row)
    return found


_BOX_STATISTICS = {
    "area": lambda box, height, width: box[:, 2] * box[:, 3],
    "ratio": lambda box, height, width: box[:, 3] / box[:, 2],
    "top": lambda box, height, width: box[:, 0] / np.maximum(height - box[:, 2], 1),
    "left": lambda box, height, width: box[:, 1] / np.maximum(width - box[:, 3], 1),
}


def _ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest gap between the two empirical distribution functions."""
    points = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


# ---------------------------------------------------------------------- written


def to_markdown(rows: list[Row], boxes: list[dict[str, float | str]], about: dict) -> str:
    """The report as markdown."""
    engines = list(dict.fromkeys(engine for engine, _ in rows[0].differences))
    lines = [
        "# Parity: every engine against torchvision and Pillow",
        "",
        f"`{about['command']}` on {about['host']['cpu']}, {about['host'].get('gpu', 'no GPU')}; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "",
        f"{about['samples']} photos of {about['data']['name']}. Mean / largest difference in grey levels "
        "(1/255); to torchvision v2 (antialiased, float colour), "
        "in brackets to Pillow (8 bits behind every operation; its blur is made of box blurs). The bound is on "
        "the difference to torchvision; **bold** is beyond it. "
        "DALI repeats a crop's border pixels, where the others weigh only what is inside: its largest "
        "differences stand there.",
        "",
        "| operation | bound (dali) | " + " | ".join(engines) + " |",
        "| --- | --- |" + " --- |" * len(engines),
    ]
    for row in rows:
        cells = []
        for engine in engines:
            mine, pillow = row.differences[engine, "torchvision"], row.differences[engine, "pillow"]
            text = f"{mine.mean:.2f} / {mine.most:.1f} ({pillow.mean:.2f} / {pillow.most:.0f})"
            cells.append(f"**{text}**" if row.beyond(engine) else text)
        left_out = max(d.left_out for d in row.differences.values())
        note = f" ({left_out:.0%} of the values, near the threshold, left out)" if left_out else ""
        bound = f"{row.operation.mean:g} / {row.operation.most:g} ({row.operation.dali_most:g})"
        lines.append(f"| {row.operation.name}{note} | {bound} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Crop boxes",
        "",
        "Kolmogorov-Smirnov distance between our boxes and torchvision's `RandomResizedCrop` (0: the same "
        "distribution); equal distributions stay below `chance` 95 times in 100.",
        "",
        "| photo | scale | " + " | ".join(_BOX_STATISTICS) + " | chance |",
        "| --- | --- |" + " --- |" * (len(_BOX_STATISTICS) + 1),
        *("| " + " | ".join(v if isinstance(v, str) else f"{v:.4f}" for v in box.values()) + " |" for box in boxes),
        "",
        "![one view of each operation, by every engine, with the difference to torchvision](parity.png)",
        "",
    ]
    return "\n".join(lines)


#: Of the picture, in pixels: a view, what is free beside it, the column of the operations' names.
TILE, GAP, NAMES = 88, 8, 190


def draw(rows: list[Row], enlarge: int = 32) -> Image.Image:
    """One view of each operation: torchvision's, then each engine's difference to it, ``enlarge`` times."""
    engines = [name for name in rows[0].pictures if name != "torchvision"]
    tile, gap, left, top = TILE, GAP, NAMES, 62
    width, height = left + (1 + 2 * len(engines)) * (tile + gap) + 16, top + len(rows) * (tile + gap) + 8
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text(
        (16, 12),
        f"torchvision, then each engine and its difference x {enlarge}",
        fill="#1c2430",
        font=ImageFont.load_default(15),
    )
    titles = ["torchvision", *(title for name in engines for title in (name, "difference"))]
    for place, title in enumerate(titles):
        pen.text((left + place * (tile + gap), 42), title[:16], fill="#667085", font=ImageFont.load_default(11))
    for number, row in enumerate(rows):
        y = top + number * (tile + gap)
        pen.text((16, y + tile // 2 - 8), row.operation.name, fill="#1c2430", font=ImageFont.load_default(12))
        reference = row.pictures["torchvision"]
        tiles = [reference]
        for name in engines:
            tiles += [row.pictures[name], np.abs(row.pictures[name] - reference) * enlarge]
        for place, pixels in enumerate(tiles):
            picture = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)).resize(
                (tile, tile), Image.Resampling.NEAREST
            )
            canvas.paste(picture, (left + place * (tile + gap), y))
    return canvas


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastssl.benchmarks.studies.parity", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--data", default="synthetic", help="a .beton file; default: synthetic photos of 500x375 px")
    parser.add_argument("--out", type=Path, default=Path("parity"), help="folder to write to; default: parity/")
    parser.add_argument("--samples", type=int, default=48, help="photos, spread evenly over the file; default: 48")
    parser.add_argument("--device", default="cpu", help="where the engines render: cpu, cuda; default: cpu")
    options = parser.parse_args(arguments)
    try:
        path, name = find_data(options.data)
        rows = measure(path, samples=options.samples, device=options.device, say=lambda line: print(line, flush=True))
        with BetonReader(path) as reader:
            data = describe_data(reader, name)
    except FastSSLError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 1
    shown = (
        f"python -m fastssl.benchmarks.studies.parity --data {name} --samples {options.samples} --device "
        f"{options.device}"
    )
    about = {
        "command": shown,
        "host": describe_host(),
        "versions": describe_versions(),
        "samples": options.samples,
        "data": data,
    }
    boxes = crop_statistics()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "parity.md").write_text(to_markdown(rows, boxes, about))
    draw(rows).save(options.out / "parity.png", optimize=True)
    figures = [
        {
            "operation": row.operation.name,
            "engine": engine,
            "reference": reference,
            "mean": d.mean,
            "max": d.most,
            "left_out": d.left_out,
        }
        for row in rows
        for (engine, reference), d in row.differences.items()
    ]
    (options.out / "parity.json").write_text(
        json.dumps({**about, "differences": figures, "crop_boxes": boxes}, indent=1) + "\n"
    )
    print(f"{options.out / 'parity.md'}")
    beyond = [f"{row.operation.name} ({engine})" for row in rows for engine, _ in available() if row.beyond(engine)]
    if beyond:
        print(f"parity: further from torchvision than the bound: {', '.join(beyond)}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    raise SystemExit(main())
