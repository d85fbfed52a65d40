"""Which photos keep their label, where only a few do: a draw, or a published list.

A *draw* takes the same share of every class and is a pure function of (labels, share, seed). A *list* is a text file
with one photo a line, in one of three forms:

    734                                              position in the .beton file
    n01440764_10026.JPEG                     file name (SimCLR, arXiv 2002.05709, section A: 1 % and 10 % of ImageNet)
    1812,1,n01443537,n01443537_18335.JPEG    position, class number, class name, file name (SSLight, arXiv 2210.02808)

SSLight counts positions from 0 in the order of an image folder (by class, then by file name), which is the order of a
``.beton`` file that was made from a folder and rejected nothing. A ``.beton`` file holds no file names: they are had by
listing the source again that it was made from.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastssl.errors import counted
from fastssl.evaluate.features import ProbeError
from fastssl.evaluate.photos import require_labels
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import read_side_file
from fastssl.pipelines.convert.conversion import rejects_path
from fastssl.pipelines.convert.options import chosen_photos
from fastssl.pipelines.convert.sources import list_source
from fastssl.pipelines.plan.order import epoch_order


def parse_share(text: str) -> float:
    """``1%``, ``10 %`` or ``0.05`` -> 0.01, 0.1, 0.05.

    Raises:
        ProbeError: not a number above 0 and not above 1; a bare ``1`` or ``10``, which may mean either; names the two
            ways to write it.
    """
    number, percent = text.strip().removesuffix("%").strip(), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = float("nan")
    # NaN fails, too. 1.0 is everything, but so is 100%, which nobody reads as one percent.
    if not 0 < share <= 1 or (share == 1 and not percent):
        raise ProbeError(
            f"share of labels {text!r}: write a percentage as 1% (up to 100%), or a fraction below 1 as 0.01"
        )
    return share


def draw_labels(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The same share of every class, at least one sample of each; a pure function of its arguments.

    The samples of a smaller share are among those of a larger one with the same seed.

    Args:
        labels: (N,) integers.
        share: 0 < share <= 1. A class of n samples gets ``round(share * n)`` (halves to even), or one.
        seed: of the draw.

    Returns:
        sorted int64 positions in ``labels``.
    """
    if not 0 < share <= 1:
        raise ProbeError(f"the share of labels must lie above 0 and not above 1, got {share}")
    order = epoch_order(len(labels), seed, 0)
    # Class by class, each in the drawn order: one sort, where a thousand classes would be a thousand searches.
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, first, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    sizes = np.maximum(1, np.round(share * count)).astype(np.int64)  # of a class
    kept = [by_class[start : start + size] for start, size in zip(first, sizes)]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *kept]))


# ---------------------------------------------------------------------- lists


@dataclass(frozen=True)
class ListedPhoto:
    """One line of a list: what it says of a photo; None: nothing.

    Attributes:
        line: its number in the file, from 1.
        position: in the order of an image folder, from 0; of a line that says nothing else, in the .beton file.
        label: number of the class. class_name: its folder. name: of the file.
    """

    line: int
    position: int | None = None
    label: int | None = None
    class_name: str | None = None
    name: str | None = None


#: POSITION, POSITION,CLASS NUMBER,CLASS,NAME or NAME. "12" may be a file's name, but a photo has an extension.
_LINE = re.compile(
    r"(?P<position>[0-9]{1,18})(\s*,\s*(?P<label>[0-9]{1,18})\s*,\s*(?P<class_name>[^,]*[^,\s])\s*,\s*(?P<name>[^,]+))?"
    r"|(?P<alone>[^,]+)"
)


def read_list(path: str | Path) -> list[ListedPhoto]:
    """The photos of a list, in its order; empty lines are passed over.

    Raises:
        ProbeError: no such file, no photo in it, or a line of none of the three forms, or of another than the first's;
            names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ProbeError(f"{path}: no such list of photos") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"{path}: not a list of photos, one a line ({error})") from None
    photos: list[ListedPhoto] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        if said := _LINE.fullmatch(text.strip()):
            position, label = (None if said[part] is None else int(said[part]) for part in ("position", "label"))
            photo = ListedPhoto(number, position, label, said["class_name"], said["name"] or said["alone"])
        if not said or (
            photos
            and (photo.position is None, photo.name is None) != (photos[0].position is None, photos[0].name is None)
        ):
            raise ProbeError(
                f"{path}, line {number}: {text.strip()[:80]!r} is not a photo as the list should name it: "
                "POSITION, NAME, or POSITION,CLASS NUMBER,CLASS,NAME, the same in all lines"
            )
        photos.append(photo)
    if not photos:
        raise ProbeError(f"{path}: the list names no photo")
    return photos


def listed_labels(path: str | Path, reader: BetonReader, photos: str | Path | None = None) -> np.ndarray:
    """The samples that a list names.

    Args:
        path: the list.
        reader: the labelled photos.
        photos: the folder or tar that they were converted from: lists are then read by name. Without it, by position.

    Returns:
        sorted int64 sample ids.

    Raises:
        ProbeError: names that cannot be looked up, a photo that is not there or stands twice, a class that is not the
            photo's; with file and line.
    """
    listed = read_list(path)
    if photos is not None and listed[0].name is not None:
        found = _by_name(path, listed, stored_names(reader, photos), reader.path)
    else:
        found = _by_position(path, listed, reader)
    classes, labels, seen = reader.classes, require_labels(reader), dict[int, int]()
    for photo, sample in zip(listed, found):
        where = f"{path}, line {photo.line}"
        if sample in seen:
            raise ProbeError(f"{where}: sample {sample} of {reader.path} stands in line {seen[sample]} already")
        seen[sample] = photo.line
        label = int(labels[sample])
        class_name = classes[label] if classes is not None and label < len(classes) else None
        # Where only one side says what class it is, there is nothing to compare.
        pairs = ((photo.label, label), (photo.class_name, class_name))
        if any(said is not None and is_ is not None and said != is_ for said, is_ in pairs):
            actual = f"{label}" if class_name is None else f"{label} ({class_name})"
            raise ProbeError(
                f"{where}: says class {photo.label} ({photo.class_name}), but sample {sample} of {reader.path} "
                f"is of class {actual}: the list belongs to other photos"
            )
    return np.sort(np.array(found, np.int64))


def _by_position(path: str | Path, listed: list[ListedPhoto], reader: BetonReader) -> list[int]:
    positions = [photo.position for photo in listed if photo.position is not None]  # of all lines, or of none
    if not positions:
        raise ProbeError(
            f"{path}: a list of file names, which {reader.path} does not hold; say with --photos what folder "
            "or tar it was converted from"
        )
    if listed[0].name is not None and (why := _out_of_order(reader)):
        raise ProbeError(
            f"{path}: counts photos in the order of a folder, but {reader.path} {why}; say with --photos what "
            "it was converted from"
        )
    for photo, position in zip(listed, positions):
        if position >= len(reader):
            raise ProbeError(
                f"{path}, line {photo.line}: photo {position}, but {reader.path} has {len(reader):,}, counted from 0"
            )
    return positions


def _out_of_order(reader: BetonReader) -> str | None:
    """Why the samples of a file are not those of its image folder, in order; None where nothing speaks against it."""
    side = read_side_file(reader.path)
    if side is None:
        return None
    if str(side.get("source", "")).lower().endswith(".tar"):
        return "was made from a tar, whose order is its own"
    if side.get("rejected"):
        return f"lacks {counted(side['rejected'], 'rejected photo')}"
    if (side.get("options") or {}).get("limit") is not None:
        return "holds a part of its source's photos (--limit)"
    return None


def _by_name(path: str | Path, listed: list[ListedPhoto], names: list[str], data: Path) -> list[int]:
    places: dict[str, int] = {}
    for sample, name in enumerate(names):
        # -1: a name that several classes have, which alone says nothing.
        base = name.rsplit("/", 1)[-1]
        places[base] = -1 if base in places else sample
    places.update({name: sample for sample, name in enumerate(names) if "/" in name})
    found = []
    for photo in listed:
        place = places.get(f"{photo.class_name}/{photo.name}", places.get(photo.name or ""))
        if place is None or place < 0:
            what = f"not among the {counted(len(names), 'photo')} of {data}"
            what = what if place is None else "several photos have this name; write CLASS/NAME"
            raise ProbeError(f"{path}, line {photo.line}: {photo.name}: {what}")
        found.append(place)
    return found


def stored_names(reader: BetonReader, photos: str | Path) -> list[str]:
    """The path inside its source of every sample of a ``.beton`` file, by listing the source again.

    Args:
        photos: the folder or tar that the file was converted from.

    Raises:
        ProbeError: it was not converted from these photos (their number, classes or sizes differ).
        SourceError: no photos there.
    """
    side = read_side_file(reader.path) or {}
    rejected = _rejected(reader.path)
    with list_source(photos) as listing:
        limit = (side.get("options") or {}).get("limit")
        chosen = [i for i in chosen_photos(len(listing), limit) if listing.names[i] not in rejected]
        same = listing.classes is not None and np.array_equal(listing.labels[chosen], require_labels(reader))
        # Photos that went in as they were still have their size.
        if same and side.get("copied") == len(reader):
            same = np.array_equal(listing.sizes[chosen], reader.sizes)
        if not same:
            raise ProbeError(
                f"{photos}: not the photos that {reader.path} was converted from ({len(chosen):,} here, "
                f"{len(reader):,} there)"
            )
        return [listing.names[i] for i in chosen]


def _rejected(data: Path) -> set[str]:
    """What the conversion left out; it is listed beside the file."""
    path = rejects_path(data)
    if not path.is_file():
        return set()
    try:
        return {json.loads(line)["path"] for line in path.read_text(encoding="utf-8").splitlines()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProbeError(f"{path}: unreadable list of rejected photos ({error}); convert again") from None
