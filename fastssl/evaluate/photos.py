"""The photos of an evaluation: a ``.beton`` file, or a folder, with labels; a part to learn from and a part to be
judged on; and which keep their label, where only a few do: a draw, or a published list.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.distributed.collectives import world_size
from fastssl.distributed.world import first_of_host_speaks
from fastssl.errors import FastSSLError, counted
from fastssl.evaluate.features import ProbeError, draw_of_each, split_indices
from fastssl.evaluate.online_probe import match_classes
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import read_side_file, side_path
from fastssl.pipelines.convert.conversion import convert, rejects_path
from fastssl.pipelines.convert.options import ConvertOptions, chosen_photos
from fastssl.pipelines.convert.sources import SOURCE_ENDINGS, is_source, list_source
from fastssl.pipelines.convert.sources.classes import ListingRules
from fastssl.utils.addresses import shown


@contextmanager
def open_photos(path: str | Path, workers: int | None = None, split: str = "train") -> Iterator[BetonReader]:
    """What `open_beton` takes; or a folder or tar of class folders, converted into a temporary file, JPEGs untouched;
    where it holds train/, val/, ..., of those ``split``.

    Raises:
        FastSSLError: neither; a folder without photos; or one that several processes would each convert.
    """
    path = Path(path)
    if not is_source(path):
        with open_beton(path) as reader:
            yield reader
        return
    name = Path(shown(path)).name
    if world_size() > 1:
        raise ProbeError(
            f"{shown(path)}: several processes read one .beton file; make it with `fastssl convert-imagenet "
            f"{name} {name}.beton`"
        )
    with tempfile.TemporaryDirectory(prefix="fastssl-") as folder:
        target = Path(folder) / f"{name}.beton"
        try:
            # As of a .beton file: a damaged photo is an error, and no figure is over what is left.
            how: dict[str, Any] = {"quality": 95, "workers": workers, "resume": False, "on_bad": "fail"}
            with list_source(path, prefer=split) as listing:
                if listing.splits:
                    warnings.warn(listing.notes[0], stacklevel=3)
                convert(listing, target, ConvertOptions(keep_size=True, short_side=None, **how))
            with BetonReader(target) as reader:
                yield reader
        except FastSSLError as error:  # whoever gave a folder knows nothing of the file
            advice = "mend or remove it; `fastssl convert-imagenet` can leave bad photos out"
            said = str(error).replace(str(target), shown(path))
            raise FastSSLError(said.replace("--on-bad skip lists bad photos and goes on", advice)) from error


def require_labels(reader: BetonReader) -> np.ndarray:
    """The labels of all samples, (N,) int64.

    Raises:
        ProbeError: the file has no labels.
    """
    labels = reader.labels if reader.labelled else None
    if labels is None or (labels < 0).any():
        raise ProbeError(f"{reader.path}: has no labels; convert class folders, or with --labels FILE, to evaluate on")
    return labels


def require_classes(classes: np.ndarray, reader: BetonReader, photos: str, what: str) -> None:
    """Refuse photos of a single class: it is always right, which says nothing."""
    if len(classes) < 2:
        raise ProbeError(f"{reader.path}: the {photos} are of one class only; {what} needs at least two")


def scaled_to(reader: BetonReader) -> int | None:
    """To how many pixels photos were scaled down when the file was made: of the short side, or of the long one where
    ``--max-side`` was asked for; None: of none that is known.

    The note beside the file says it. Without one, all short sides alike are taken for scaled ones.
    """
    notes, (heights, widths) = reader.side_notes(), reader.shapes(reader.some())
    found = [options for note in notes if isinstance(options := note.get("options"), dict)]
    if len(found) < len(notes):
        short = np.minimum(heights, widths)
        return int(short[0]) if (short == short[0]).all() else None
    limits = [None if one.get("keep_size") else one.get("max_side") or one.get("short_side") for one in found]
    limit, copied = limits[0], sum(one for note in notes if isinstance(one := note.get("copied"), int))
    scaled = isinstance(limit, int) and limits == [limit] * len(limits) and copied != len(reader)
    return limit if scaled and ((heights == limit) | (widths == limit)).any() else None


@dataclass
class LabelledSplit:
    """The part to learn from and the part to be judged on: open files and (n,) int64 sample ids in them; one file where
    nothing was given to judge on.

    ``held_out_seed`` is of the draw of the held-out fifth; None where the second part is a file of its own.
    """

    train: BetonReader
    train_index: np.ndarray
    val: BetonReader
    val_index: np.ndarray
    held_out_seed: int | None

    @property
    def classes(self) -> np.ndarray:
        """(C,) int64, the labels that the first part has, sorted: class c of a classifier is label ``classes[c]``."""
        return np.unique(require_labels(self.train)[self.train_index])

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Labels -> (n,) int64 classes 0 .. C - 1; -1 for a label that the first part does not have."""
        classes = self.classes
        place = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
        return np.where(classes[place] == labels, place, -1)

    def scaled(self) -> dict[str, Any]:
        """``scaled_to`` and ``val_scaled_to``: of both parts."""
        return {"scaled_to": scaled_to(self.train), "val_scaled_to": scaled_to(self.val)}

    def record(self) -> dict[str, Any]:
        """What a result says of its photos."""
        val = None if self.held_out_seed is not None else self.val.path.name
        return {"data": self.train.path.name, "val": val, "held_out_seed": self.held_out_seed, **self.scaled()}


@contextmanager
def open_split(
    data: str | Path, val: str | Path | None, *, seed: int = 0, workers: int | None = None
) -> Iterator[LabelledSplit]:
    """Both parts, open inside the block. Without ``val`` a fifth of ``data`` is held out, the same one for a seed.

    Raises:
        FastSSLError: no labels, or other classes in one file than in the other; what ``open_photos`` raises.
    """
    with ExitStack() as files:
        with first_of_host_speaks():
            train = files.enter_context(open_photos(data, workers))
            labels = require_labels(train)
            if val is None:
                kept, held_out = split_indices(labels, len(train), seed=seed)
                if not len(held_out):
                    raise ProbeError(f"{data}: one photo in each class leaves nothing to hold out; give --val")
                split = LabelledSplit(train, kept, train, held_out, held_out_seed=seed)
            else:
                judged = files.enter_context(open_photos(val, workers, "val"))
                folder = os.path.exists(val) and os.path.exists(data) and os.path.samefile(val, data)
                splits = [[note.get("split") for note in one.side_notes()] for one in (train, judged)]
                if (folder and splits[0] == splits[1]) or judged.is_same(train):
                    warnings.warn(f"{val}: is --data itself; photos are judged that were learned from", stacklevel=3)
                require_labels(judged)
                match_classes(train, judged)
                split = LabelledSplit(train, np.arange(len(train)), judged, np.arange(len(judged)), None)
        yield split


def parse_share(text: str) -> float:
    """``1%``, ``10 %`` or ``0.05`` -> 0.01, 0.1, 0.05.

    Raises:
        ProbeError: not a number above 0 and not above 1; or a bare ``1`` or ``10``, which may mean either.
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
    """The same share of every class; the samples of a smaller one are among those of a larger one with the same seed.

    Args:
        labels: (N,) integers.
        share: 0 < share <= 1. A class of n samples gets ``round(share * n)`` (halves to even), or one.

    Returns:
        sorted int64 positions in ``labels``.
    """
    return np.flatnonzero(draw_of_each(labels, seed, lambda size: max(1, round(share * size))))


@dataclass(frozen=True)
class ListedPhoto:
    """One line of a published list of photos: what it says of one; None: nothing. The forms of a line:

        734                                     position in the .beton file
        n01440764_10026.JPEG                    file name (SimCLR, arXiv 2002.05709, section A: 1 % and 10 %)
        1812,1,n01443537,n01443537_18335.JPEG   position, class number, class, file name (SSLight, arXiv 2210.02808)

    SSLight counts positions from 0 in the order of an image folder (by class, then by file name), which is the order of
    a ``.beton`` file that was made from a folder and rejected nothing.

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

    @property
    def form(self) -> tuple[bool, bool]:
        """Alike in all lines of a list: (no position, no name)."""
        return self.position is None, self.name is None


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
        if not said or (photos and photo.form != photos[0].form):
            raise ProbeError(
                f"{path}, line {number}: {text.strip()[:80]!r} is not a photo as the list should name it: "
                "POSITION, NAME, or POSITION,CLASS NUMBER,CLASS,NAME, the same in all lines"
            )
        photos.append(photo)
    if not photos:
        raise ProbeError(f"{path}: the list names no photo")
    return photos


def listed_labels(path: str | Path, reader: BetonReader, photos: str | Path | None = None) -> np.ndarray:
    """The samples that a list names, sorted int64 ids.

    Args:
        photos: the folder or tar that the labelled photos were converted from: lists are then read by name. Without
            it, by position.

    Raises:
        ProbeError: names that cannot be looked up, a photo that is not there or stands twice, a class that is not the
            photo's; with file and line.
    """
    listed = read_list(path)
    if len(reader.files) > 1 and listed[0].name is not None:
        raise ProbeError(f"{path}: names photos of one folder, {reader.path} is several files: make one of that folder")
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
    advice = "say with --photos what folder or tar it was converted from"
    if not positions:
        raise ProbeError(f"{path}: a list of file names, which {reader.path} does not hold; {advice}")
    side = (read_side_file(reader.path) if listed[0].name is not None else None) or {}
    for reason, why in (
        (
            str(side.get("source", "")).lower().endswith(SOURCE_ENDINGS),
            "was made from an archive, a table or a list, whose order is its own",
        ),
        (side.get("rejected"), f"lacks {counted(side.get('rejected') or 0, 'rejected photo')}"),
        ((side.get("options") or {}).get("limit"), "holds a part of its source's photos (--limit)"),
    ):
        if reason:
            raise ProbeError(f"{path}: counts photos in the order of a folder, but {reader.path} {why}; {advice}")
    for photo, position in zip(listed, positions):
        if position >= len(reader):
            raise ProbeError(
                f"{path}, line {photo.line}: photo {position}, but {reader.path} has {len(reader):,}, counted from 0"
            )
    return positions


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
    """The path inside its source of every sample of a ``.beton`` file, which holds no names: the source, the folder or
    tar ``photos``, is listed again.

    Raises:
        ProbeError: it was not converted from these photos (their number, classes or sizes differ).
        SourceError: no photos there.
    """
    side, rejects = read_side_file(reader.path) or {}, rejects_path(reader.path)
    rejected: set[str] = set()
    if rejects.is_file():  # what the conversion left out
        try:
            rejected = {json.loads(line)["path"] for line in rejects.read_text(encoding="utf-8").splitlines()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProbeError(f"{rejects}: unreadable list of rejected photos ({error}); convert again") from None
    given = side.get("rules") or {}
    try:
        rules = ListingRules(depth=given.get("depth"), label_from=given.get("label_from"))
    except (FastSSLError, TypeError, AttributeError) as error:
        raise ProbeError(f"{side_path(reader.path)}: unreadable rules ({error}); convert again") from None
    with list_source(photos, rules=rules, prefer=side.get("split") or "train") as listing:
        limit = (side.get("options") or {}).get("limit")
        chosen = [i for i in chosen_photos(len(listing), limit) if listing.names[i] not in rejected]
        same = len(chosen) == len(reader)
        if reader.labelled and not given.get("labels"):  # those came from a file, and are not to be seen here
            same = listing.classes is not None and np.array_equal(listing.labels[chosen], require_labels(reader))
        # Photos that went in as they were still have their size.
        if same and side.get("copied") == len(reader):
            sizes = listing.sizes[chosen]
            same = bool(((sizes == reader.sizes) | (sizes < 0)).all())  # -1: of a table's photos, not known
        if not same:
            raise ProbeError(
                f"{photos}: not the photos that {reader.path} was converted from ({len(chosen):,} here, "
                f"{len(reader):,} there)"
            )
        return [listing.names[i] for i in chosen]
