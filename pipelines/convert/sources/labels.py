"""``--labels FILE``: the labels of photos that lie in no class folders; ``--classes``: all classes, in their order."""

from __future__ import annotations

import codecs
import csv
import io
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastssl.errors import FastSSLError, counted, printable
from fastssl.pipelines.beton.side_file import read_side_file
from fastssl.pipelines.convert.formats import is_photo_name
from fastssl.pipelines.convert.sources.lists import LABEL_COLUMNS, PATH_COLUMNS, plain
from fastssl.pipelines.convert.sources.matlab import read_synsets
from fastssl.utils.plain_file import read_plain

_TRUTH, _META, _SOLUTION = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"
#: What columns of photos and of labels are called, also by Kaggle and others.
_PATHS = (*PATH_COLUMNS, "imageid", "id")
_LABELS = (*LABEL_COLUMNS, "wnid", "synset", "predictionstring")
#: What a damaged file of some kind raises; RuntimeError: a zip with a password.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, csv.Error, tarfile.TarError, zipfile.BadZipFile, zlib.error)
#: Bytes that a file of labels may have: a hundred each of ten million photos.
_MOST = 1 << 30


class LabelError(FastSSLError):
    """A file of labels or of classes cannot be read, or does not belong to the photos."""


@dataclass
class Labels:
    """What a file of labels says.

    Attributes:
        path: the file. classes: N class names. names: of N photos; None: the N photos are those in the order of their
            sorted names.
    """

    path: Path
    classes: list[str]
    names: list[str] | None = None

    def of(self, photos: Sequence[str]) -> list[str]:
        """The class of each photo, '' for those that the file does not name.

        Photos and lines belong together by the whole path, or else by its last two parts, the file's name, or that
        without ending. ``LabelError``: lines of one name contradict each other, two photos have one name, or there are
        not as many lines as photos.
        """
        if self.names is None:
            if len(self.classes) != len(photos):
                both = f"{counted(len(self.classes), 'label')} for {counted(len(photos), 'photo')}"
                raise LabelError(f"{self.path}: {both}: nobody knows which belong together; write PHOTO,LABEL lines")
            order = sorted(range(len(photos)), key=lambda k: photos[k].split("/"))
            return [name for _, name in sorted(zip(order, self.classes))]
        found = [""] * len(photos)
        left, lines = list(range(len(photos))), list(range(len(self.names)))
        for key in _KEYS:
            table: dict[str, int] = {}
            clashes: set[str] = set()
            for line in lines:
                name = key(self.names[line])
                if self.classes[table.setdefault(name, line)] != self.classes[line]:
                    clashes.add(name)
            taken: dict[int, int] = {}
            for k in left:
                if (line := table.get(name := key(photos[k]), -1)) < 0:
                    continue
                if name in clashes or line in taken:
                    what = "has several classes" if name in clashes else f"is also {printable(photos[taken[line]])}"
                    raise LabelError(
                        f"{self.path}: {printable(name)}, which {printable(photos[k])} is found by, {what}: write the "
                        "photos' paths"
                    )
                found[k], taken[line] = self.classes[line], k
            left, lines = [k for k in left if not found[k]], [line for line in lines if line not in taken]
            if not left:
                break
        return found


def _respelled(path: str) -> str:
    """One spelling of names that come from different systems: separators, accents, bytes that are no UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        path = path.encode("utf-8", "surrogateescape").decode("latin-1")
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


def _base(path: str) -> str:
    return _respelled(path).rsplit("/", 1)[-1]


#: By which a photo and a line are brought together, the surest first.
_KEYS: tuple[Callable[[str], str], ...] = (
    lambda path: path.removeprefix("./").lstrip("/"),
    lambda path: _respelled(path).removeprefix("./").lstrip("/"),
    lambda path: "/".join(_respelled(path).split("/")[-2:]),
    _base,
    lambda path: _base(path).rpartition(".")[0] if is_photo_name(_base(path)) else _base(path),
)


def read_labels(path: Path, classes: Sequence[str] | None = None) -> Labels:
    """A CSV or TSV of photo and label, with or without a header (Kaggle's ``LOC_val_solution.csv`` is one); ``photo
    label`` in each line; one label a line, of the photos in the order of their sorted names; or ImageNet's devkit. Of a
    folder, zip or tar, what it holds of the devkit's or Kaggle's files is read.

    Args:
        classes: whose places numbers are, which count from 0 or 1.
    """
    try:
        files = dict(_files(path))
        name, data = next(((name, files[name]) for name in (path.name, _TRUTH, _SOLUTION) if name in files), ("", b""))
        if not name:
            raise LabelError(f"{path}: holds neither {_SOLUTION} of Kaggle nor {_TRUTH} of the devkit")
        names, labels = read_table(data)
        if name == _TRUTH:
            if _META not in files:
                raise LabelError(f"{path}: counts classes in an order that {_META} of the devkit says; put it beside")
            wnids = {f"{number}": wnid for number, wnid in read_synsets(files[_META]).items()}
            if strange := set(labels) - wnids.keys():
                raise LabelError(f"{path}: class {printable(min(strange))} is none of those in {_META}")
            return Labels(path, [wnids[label] for label in labels])
    except _UNREADABLE as error:
        raise LabelError(f"{path}: no labels can be read: {type(error).__name__}: {error}") from None
    if not labels:
        raise LabelError(f"{path}: no labels in it")
    return Labels(path, _by_number(path, labels, classes), names)


def read_classes(path: Path) -> list[str]:
    """All classes in their order: of a ``.beton`` file, or of a list with one a line; of ``n01440764 tench, ...`` the
    WordNet id. ``LabelError``: there are none, or one twice.
    """
    if path.suffix == ".beton":
        classes = (read_side_file(path) or {}).get("classes") or []
    else:
        try:
            classes = [line.strip() for line in _lines(read_plain(path, _MOST))]
        except (OSError, ValueError) as error:
            raise LabelError(f"{path}: cannot read: {error}") from None
        first = [line.split()[0] for line in classes]
        classes = first if all(len(one) == 9 and one[0] == "n" and one[1:].isdecimal() for one in first) else classes
    if not classes or len(set(classes)) < len(classes):
        raise LabelError(f"{path}: {'a class stands in it twice' if classes else 'names no classes'}")
    return classes


def read_table(data: bytes) -> tuple[list[str] | None, list[str]]:
    """(names of photos or None, labels) of a text file's lines; a label is '' where the table says -1."""
    lines = _lines(data)
    first = lines[0].strip() if lines else ""
    delimiter = next((one for one in "\t,;" if one in first), None)
    if delimiter is None:
        if not is_photo_name(first.rpartition(" ")[0].strip()):
            return None, [line.strip() for line in lines[1 if plain(first) in _LABELS else 0 :]]
        rows = [[part.strip() for part in line.strip().rpartition(" ")[::2]] for line in lines]
    else:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, strict=True)]
    if len(rows[0]) == 1:
        return None, [row[0] for row in rows]
    heads = list(map(plain, rows[0]))
    at = next((k for k, head in enumerate(heads) if head in _PATHS), 0)
    label = next((k for k, head in enumerate(heads) if head in _LABELS and k != at), 1 - min(at, 1))
    if heads[at] in _PATHS or heads[label] in _LABELS:
        rows = rows[1:]
    if short := next((row for row in rows if len(row) <= max(at, label) or not row[label]), None):
        raise ValueError(f"a line without photo or label: {printable(' '.join(short))[:80]}")
    # Of Kaggle's "n01440764 1 2 3 4" the boxes do not concern us.
    boxes = heads[label] == "predictionstring"
    labels = [row[label].split()[0] if boxes else row[label] for row in rows]
    return [row[at] for row in rows], ["" if label == "-1" else label for label in labels]


def is_number(label: str) -> bool:
    """Whether a label may count classes."""
    return label.isdecimal() and len(label) < 19


def _by_number(path: Path, labels: list[str], classes: Sequence[str] | None) -> list[str]:
    """The labels by name, where they are places in ``classes``."""
    said = set(labels) - {""}
    if classes is None or not said or not all(map(is_number, said)) or said <= set(classes):
        return labels
    numbers = [int(label) for label in said]
    first = 1 if len(classes) in numbers else 0
    if min(numbers) < first or max(numbers) - first >= len(classes) or (0 not in numbers and not first):
        raise LabelError(
            f"{path}: numbers from {min(numbers)} to {max(numbers)} do not say which of {len(classes)} classes are "
            "meant; write names"
        )
    return [classes[int(label) - first] if label else "" for label in labels]


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a file and what belongs to it beside it; or of what is known in a folder, zip or tar."""
    known = (_TRUTH, _META, _SOLUTION)
    if path.is_dir():
        for name in known:
            for file in (path / name, path / "data" / name, *sorted(path.glob(f"*/data/{name}"))):
                if file.is_file():
                    yield name, read_plain(file, _MOST)
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for about in archive.infolist():
                if (name := about.filename.rsplit("/", 1)[-1]) in known and about.file_size < _MOST:
                    yield name, archive.read(about)
    elif path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                if name in known and member.size < _MOST and (file_in := tar.extractfile(member)):
                    yield name, file_in.read()
    else:
        yield path.name, read_plain(path, _MOST)
        if path.name == _TRUTH and path.with_name(_META).is_file():
            yield _META, read_plain(path.with_name(_META), _MOST)


def _lines(data: bytes) -> list[str]:
    """Those of a text that say something, with their ends."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # Excel's "Unicode text"
    if b"\0" in data and not wide:
        raise ValueError("not a text file in UTF-8, UTF-16 or Latin-1")
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return [line for line in io.StringIO(text, newline="") if line.strip()]
