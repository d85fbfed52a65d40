"""views.png: what the network is shown. neighbours.png: what it finds alike, before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastssl.errors import FastSSLError
from fastssl.evaluate.features import Features
from fastssl.evaluate.knn import nearest_neighbors
from fastssl.evaluate.online_probe import ProbeSplit
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.pipelines.plan.multicrop import MultiCrop
from fastssl.report.drawing import INK, MARGIN, PAPER, QUIET, choose, class_name, fitted, scaled, spread, write, written
from fastssl.report.run_record import RANDOM, TRAINED

#: Blue-green and orange-red: apart also for the colour-blind, who also have the counts in the captions.
_SAME, _OTHER, _LINE = "#0f9d76", "#e0533a", "#e4e7ec"
_MAX_VIEWS = 12


def views_picture(
    data: BetonReader | str | Path,
    views: Sequence[ViewSpec],
    out: Path | None = None,
    *,
    samples: int = 9,
    seed: int = 0,
    epoch: int = 0,
    tile: int = 112,
    pipelines: Sequence[str] = ("auto",),
    notice: Callable[[str], None] | None = None,
) -> Image.Image:
    """Draw photos as they are stored and, side by side, the very views that a run with this ``seed`` makes of them in
    this ``epoch``.

    Args:
        data: what `open_beton` takes, or an open reader.
        views: the view groups of a recipe; the first twelve views are drawn.
        out: where to write the PNG; None: only return the picture.
        samples: rows, spread evenly over the file.
        tile: side of a drawn square in pixels.
        pipelines: the engine that makes the views. Of several engines: the first view by each of them, and how far it
            stands from the first engine's, 32 times enlarged.
        notice: called with a line of text when a damaged photo was left out.
    """
    with nullcontext(data) if isinstance(data, BetonReader) else open_beton(data) as reader:
        some = reader.some()
        chosen = some[spread(len(some), samples)]
        columns: list[tuple[str, str, np.ndarray]] = []
        for pipeline in pipelines:
            with ViewLoader(
                reader, views, len(chosen), pipeline=pipeline, seed=seed, indices=chosen, shuffle=False, on_bad="skip"
            ) as loader:
                batch = next(batches := loader.epoch(epoch))
                batches.close()
            if notice is not None and loader.stats.skipped and not columns:
                names = ", ".join(map(str, loader.stats.skipped))
                notice(f"{reader.path}: damaged and not shown: sample {names}; another photo stands in its place")
            made = _named_views(views, batch.views)
            side = made[0][1]
            if len(pipelines) == 1:
                columns = [(title, f"{side.shape[1]} px", side) for title, side in made[:_MAX_VIEWS]]
            elif not columns:
                columns.append((pipeline, f"{side.shape[1]} px", side))
            else:
                apart = np.abs(side.astype(np.int16) - columns[0][2])
                columns.append((pipeline, f"mean {apart.mean():.2f} / 255", side))
                columns.append(("difference", f"x 32, max {apart.max()}", np.minimum(32 * apart, 255).astype(np.uint8)))
        return written(_draw_views(reader, batch.index.tolist(), columns, tile), out)


def _named_views(views: Sequence[ViewSpec], rendered: Sequence[Tensor]) -> list[tuple[str, np.ndarray]]:
    """Each view's name and pixels (samples, S, S, 3) uint8."""
    found: list[tuple[str, np.ndarray]] = []
    for group, (spec, pixels) in enumerate(zip(views, rendered)):
        prefix = f"group {group + 1}, " if len(views) > 1 else ""
        plain = [f"{prefix}view {number + 1}" for number in range(spec.count)]
        names = views.names[group] if isinstance(views, MultiCrop) else plain
        found += zip(names, to_pictures(pixels, spec).reshape(spec.count, -1, spec.size, spec.size, 3))
    return found


def neighbours_picture(
    split: ProbeSplit,
    *,
    before: tuple[Features, Features],
    after: tuple[Features, Features],
    out: Path | None = None,
    queries: int = 8,
    neighbours: int = 6,
    tile: int = 70,
    first: str = RANDOM,
) -> Image.Image:
    """Draw query photos with their nearest photos (cosine) by two networks, one row each. Raises FastSSLError where
    bank or queries have no photo.

    Args:
        split: its ``bank`` and ``queries`` are the open files that the features came from.
        before, after: (bank, queries) features of the network that is called ``first`` there, and of the trained one.
            Rows are paired by sample
            id; photos that one of them lacks are left out.
        out: where to write the PNG; None: only return the picture.
        queries: number of query photos, spread over the classes (the file when there are none).
        neighbours: photos in a row.
        tile: side of a drawn neighbour in pixels.
    """
    before, after = (tuple(pair) for pair in zip(*(_paired(b, a) for b, a in zip(before, after))))
    bank, asked = after
    if not len(bank) or not len(asked):
        raise FastSSLError("a picture of neighbours needs at least one photo in the bank and one query")
    labelled = bank.labelled and asked.labelled
    rows = choose(asked.labels.numpy() if labelled else None, len(asked), queries)
    nearest = [
        nearest_neighbors(part[0].features, part[1].features[torch.from_numpy(rows)], k=neighbours)[1].tolist()
        for part in (before, after)
    ]
    frame, gap, caption, head = 3, 6, 20, 36
    cell = tile + 2 * frame
    line = caption + cell + gap
    block_width = 2 * tile + 16 + neighbours * (cell + gap)
    block_height = 2 * line + 26
    per_row = min(len(rows), 2)
    block_rows = -(-len(rows) // per_row)
    width = per_row * (block_width + 2 * MARGIN)
    picture = Image.new("RGB", (width, 2 * MARGIN + head + block_rows * block_height - 26), PAPER)
    frames = ImageDraw.Draw(picture)
    words = f"Query, and its {neighbours} nearest photos by feature similarity"
    write(picture, (MARGIN, MARGIN - 4), words, 17, INK)
    for text, colour, x in (("same class", _SAME, 274), ("another class", _OTHER, 154)) if labelled else ():
        frames.rectangle((width - x, MARGIN - 2, width - x + 12, MARGIN + 10), outline=colour, width=frame)
        write(picture, (width - x + 20, MARGIN - 3), text, 14, QUIET)
    for number, row in enumerate(rows.tolist()):
        left = MARGIN + (number % per_row) * (block_width + 2 * MARGIN)
        top = MARGIN + head + (number // per_row) * block_height
        sample, label = int(asked.index[row]), int(asked.labels[row])
        title = class_name(split.bank, label, f"class {label}") if labelled else f"photo {sample}"
        write(picture, (left, top), title, 15, INK, 2 * tile)
        picture.paste(fitted(split.queries, sample, 2 * tile), (left, top + caption))
        frames.rectangle((left, top + caption, left + 2 * tile - 1, top + caption + 2 * tile - 1), outline=_LINE)
        left += 2 * tile + 16
        for words, found, colour in zip((first, TRAINED), nearest, (QUIET, INK)):
            hits = [bool(bank.labels[i] == label) for i in found[number]]
            count = f": {sum(hits)} of {len(hits)} of the same class" if labelled else ""
            write(picture, (left, top), words + count, 14, colour)
            for place, (i, hit) in enumerate(zip(found[number], hits)):
                x, y = left + place * (cell + gap), top + caption
                picture.paste(fitted(split.bank, int(bank.index[i]), tile), (x + frame, y + frame))
                if labelled:
                    box = (x, y, x + cell - 1, y + cell - 1)
                    frames.rectangle(box, outline=_SAME if hit else _OTHER, width=frame)
            top += line
    return written(picture, out)


def to_pictures(views: Tensor, spec: ViewSpec) -> np.ndarray:
    """Undo the normalisation: (N, 3, S, S) float -> (N, S, S, 3) uint8 RGB."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    pixels = (views.detach().to("cpu", torch.float32) * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _paired(first: Features, second: Features) -> tuple[Features, Features]:
    """Both, restricted to the sample ids that they share, in the same order."""
    _, left, right = np.intersect1d(first.index.numpy(), second.index.numpy(), return_indices=True)
    return first.subset(left), second.subset(right)


def _draw_views(
    reader: BetonReader, rows: list[int], columns: list[tuple[str, str, np.ndarray]], tile: int
) -> Image.Image:
    """A block for each photo: as stored, then its views. Narrow blocks stand side by side."""
    gap, head, caption = 8, 40, 18
    block = (1 + len(columns)) * (tile + gap)  # the photo stands apart from its views
    across = next(n for n in (3, 2, 1) if n == 1 or (n * (1 + len(columns)) <= 9 and n <= len(rows)))
    down = -(-len(rows) // across)
    width = across * (block + 2 * MARGIN)
    picture = Image.new("RGB", (width, 2 * MARGIN + head + down * (tile + caption + gap) - gap), PAPER)
    for number, sample in enumerate(rows):
        top = MARGIN + head + (number // across) * (tile + caption + gap)
        one = np.array([sample])
        (label,), (height,), (width,) = (found.tolist() for found in (reader.labels_of(one), *reader.shapes(one)))
        words = f"{class_name(reader, label, f'photo {sample}')}, {width}x{height}"
        for place, (title, note, pixels) in enumerate([("as stored", "the whole photo", None), *columns]):
            left = MARGIN + (number % across) * (block + 2 * MARGIN) + place * (tile + gap) + gap * (place > 0)
            if number < across:
                write(picture, (left, MARGIN), title, 13, INK, tile)
                write(picture, (left, MARGIN + 17), note, 11, QUIET, tile)
            if pixels is None:
                picture.paste(fitted(reader, sample, tile), (left, top))
                write(picture, (left, top + tile + 3), words, 11, QUIET, tile)
            else:
                picture.paste(scaled(Image.fromarray(pixels[number]), tile), (left, top))
    return picture
