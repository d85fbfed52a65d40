"""What the pictures of a report are made of, and the contact sheet: without torch, which takes seconds to load."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastssl.data.contents import Photos
from fastssl.errors import JpegError, counted, printable
from fastssl.report.document import Heading, Picture, to_html
from fastssl.utils.atomic_files import write_atomically

PAPER, INK, QUIET = "#ffffff", "#1c2430", "#667085"
MARGIN = 24
#: Photos at whose classes a contact sheet looks, to choose some.
_LOOKED_AT = 100_000


def contact_sheet(sets: Sequence[Photos], out: Path | None = None, *, photos: int = 30) -> Image.Image:
    """Draw photos of each set with their classes' names: 1,400 px wide, with names that are read on a phone, too.

    Args:
        sets: open ``.beton`` files, folders or tars.
        out: where to write the PNG; None: only return the picture.
        photos: of each set, spread evenly over its classes, or over the set where there are none.
    """
    blocks = []
    for one in sets:
        some = spread(len(one), _LOOKED_AT)
        labels = None if one.labels is None else one.labels[some]
        chosen = some if len(some) <= photos else some[choose(labels, len(some), photos)]
        classes = f", {counted(len(one.classes), 'class')}" if one.classes else ""
        words = [f"photo {i}" for i in chosen]
        if one.labels is not None:
            words = [class_name(one, k, f"class {k}") for k in one.labels[chosen].tolist()]
        cells = list(zip([one] * len(words), chosen.tolist(), words))
        blocks.append((f"{one.path.name}: {counted(len(one), 'photo')}{classes}", cells))
    return sheet(blocks, out)


def sheet(blocks: Sequence[tuple[str, Sequence[tuple[Photos, int, str]]]], out: Path | None = None) -> Image.Image:
    """Draw photos, (where one is, its number there, words), below the title of each block; ``out`` as above."""
    across, tile, gap, head, caption = 5, 256, 18, 76, 40
    heights = [head + -(-len(cells) // across) * (tile + caption + gap) for _, cells in blocks]
    width = 2 * MARGIN + across * (tile + gap) - gap
    picture, top = Image.new("RGB", (width, MARGIN + sum(heights)), PAPER), MARGIN
    for (title, cells), height in zip(blocks, heights):
        write(picture, (MARGIN, top), printable(title), 36, INK, width - 2 * MARGIN)
        for number, (photos, i, text) in enumerate(cells):
            x = MARGIN + (number % across) * (tile + gap)
            y = top + head + (number // across) * (tile + caption + gap)
            picture.paste(fitted(photos, i, tile), (x, y))
            write(picture, (x, y + tile + 2), printable(text), 28, INK, tile)
        top += height
    return written(picture, out)


def duplicates_page(title: str, groups: Sequence[Sequence[tuple[Photos, int, str]]], out: Path) -> None:
    """Write a page of photos that are nearly alike: of the first fifty groups the first ten each."""
    title += ": the first fifty" if len(groups) > 50 else ""
    heads = [counted(len(group), "photo") + (", ten of them" if len(group) > 10 else "") for group in groups[:50]]
    sheet([(head, group[:10]) for head, group in zip(heads, groups)]).save(png := io.BytesIO(), "PNG")
    page = to_html(title, [Heading(title, 1), Picture("groups.png", "groups of photos", png.getvalue())])
    write_atomically(out, lambda path: path.write_text(page, "utf-8", "backslashreplace"))


def written(picture: Image.Image, out: Path | None) -> Image.Image:
    """Whole or as it was before; into a pipe or a device as it comes."""
    if out is not None and out.exists() and not out.is_file():
        picture.save(out, format="PNG", optimize=True)
    elif out is not None:
        write_atomically(out, lambda temporary: picture.save(temporary, format="PNG", optimize=True))
    return picture


def class_name(reader: Photos, label: int, otherwise: str) -> str:
    return reader.classes[label] if reader.classes and 0 <= label < len(reader.classes) else otherwise


def spread(count: int, wanted: int) -> np.ndarray:
    """At most ``wanted`` of ``count`` positions, evenly spaced, each in the middle of its part. int64, sorted."""
    wanted = max(1, min(wanted, count))
    return (2 * np.arange(wanted, dtype=np.int64) + 1) * count // (2 * wanted)


def choose(labels: np.ndarray | None, count: int, wanted: int) -> np.ndarray:
    """Positions of the queries: of evenly spaced classes the middle photo, more of each when classes are few."""
    wanted = min(wanted, count)
    if labels is None:
        return spread(count, wanted)
    found = np.unique(labels)
    members = [np.flatnonzero(labels == label) for label in found[spread(len(found), wanted)]]
    if len(found) >= wanted:
        return np.array([rows[len(rows) // 2] for rows in members])
    share = [wanted // len(members) + (k < wanted % len(members)) for k in range(len(members))]
    return np.concatenate([rows[spread(len(rows), n)] for rows, n in zip(members, share) if n])


def fitted(reader: Photos, sample: int, side: int) -> Image.Image:
    """The whole photo, fitted into a square and centred; a damaged one becomes a grey square that says so."""
    square = Image.new("RGB", (side, side), "#f2f4f7")
    try:
        photo = scaled(Image.fromarray(reader.decode(sample)), side)
        square.paste(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
    except JpegError:
        middle, font = (side / 2, side / 2), ImageFont.load_default(max(12, side // 9))
        ImageDraw.Draw(square).text(middle, "damaged", fill=QUIET, font=font, anchor="mm")
    return square


def scaled(photo: Image.Image, side: int) -> Image.Image:
    """Scale so that the longer side is ``side``. Thumbnails are enlarged in whole pixels first: blocks stay sharp."""
    factor = side / max(photo.size)
    width, height = (max(1, round(length * factor)) for length in photo.size)
    if factor > 1.5:
        whole = int(np.ceil(factor))
        photo = photo.resize((photo.width * whole, photo.height * whole), Image.Resampling.NEAREST)
    return photo.resize((width, height), Image.Resampling.LANCZOS)


def write(
    picture: Image.Image, at: tuple[float, float], text: str, size: int, fill: str, width: float = math.inf
) -> None:
    """Write ``text``, cut with an ellipsis to ``width`` pixels."""
    font = font_for(text, size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text = text.rstrip() + "…"
    ImageDraw.Draw(picture).text(at, text, fill=fill, font=font)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font has no letter beyond ASCII; matplotlib brings one that has those of most alphabets."""
    if text.isascii():
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
