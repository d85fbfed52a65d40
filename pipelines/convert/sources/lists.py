"""Lists of photos: a table of paths and labels (CSV, TSV), or a path a line, in a file or on standard input."""

from __future__ import annotations

import csv
import io
import os
import stat
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from fastssl.pipelines.convert.formats import is_photo_name
from fastssl.pipelines.convert.sources.base import Found, Passed, Source, SourceError
from fastssl.pipelines.convert.sources.folder import read_whole
from fastssl.pipelines.convert.sources.webdataset import as_label

#: The name that stands for standard input.
STANDARD_INPUT = "-"
#: What columns are called, in lower case and without what stands between words; the first that is there counts.
PATH_COLUMNS = (
    "path",
    "file",
    "filename",
    "filepath",
    "image",
    "imagepath",
    "imagefile",
    "imagename",
    "img",
    "photo",
    "name",
)
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "classname",
    "category",
    "labelname",
    "target",
    "cls",
    "classid",
    "labelid",
)
#: No line of a list is longer, in characters: it is something else.
_LONGEST_LINE = 1 << 16


class ListSource(Source):
    """Photos of a list, in its order. Paths are relative to the list's folder (of standard input: to the current one)
    and may lead anywhere: the list is the user's own.

    A table has its columns in a header (path, file, image, ...; label, class, category, ...) or is a path and, perhaps,
    its label, apart by tab, comma, semicolon or blank. UTF-8 (bytes that are none stay as they are), or UTF-16 with its
    mark. Empty lines, and those behind '#', say nothing.
    """

    def __init__(self, name: str):
        super().__init__("standard input" if name == STANDARD_INPUT else name)
        self._path = None if name == STANDARD_INPUT else Path(name)
        self._folder = Path() if self._path is None else self._path.parent

    def photos(self) -> Iterator[Found | Passed]:
        taken = set[str]()
        for path, label in self._entries():
            path = self._respelled(path)
            name, place = os.path.normpath(path).lstrip("/"), self._folder / path
            if not is_photo_name(name):
                yield Passed(os.path.basename(name))  # whose kind does not depend on where it is
                continue
            if name in taken:
                yield Passed(name, "stands in the list a second time; the first counts")
                continue
            taken.add(name)
            try:
                info = os.stat(place)
            except (OSError, ValueError) as error:  # ValueError: a NUL in it
                yield Passed(name, f"cannot be read: {getattr(error, 'strerror', error)}")
                continue
            plain = stat.S_ISREG(info.st_mode)
            found = Found(name, info.st_size, info.st_mtime_ns, place, as_label(label))
            yield found if plain else Passed(name, "not a plain file")

    def read(self, place: Any, size: int) -> bytes:
        return read_whole(place, size)

    def _respelled(self, path: str) -> str:
        """A path as it is on this disk: lists of Windows have backslashes, disks of Macs take accents apart."""
        if "\\" not in path and path.isascii():
            return path
        others = [unicodedata.normalize(form, path.replace("\\", "/")) for form in ("NFC", "NFD")]
        return next((one for one in (path, *others) if os.path.lexists(self._folder / one)), path)

    def _entries(self) -> Iterator[tuple[str, str | None]]:
        """(path, label) of each line."""
        others = filter(_says_something, self._lines())
        if (first := next(others, None)) is None:
            return
        apart, lines = self._delimiter(first.strip()), chain([first], others)
        if apart is None:
            yield from ((path, None) for line in lines if (path := line.rstrip("\r\n")))
            return
        table = csv.reader(lines, delimiter=apart, skipinitialspace=True, strict=True)
        # A path may have blanks in it; the label is behind the last one.
        rows = iter(table) if apart != " " else (line.strip().rsplit(None, 1) for line in lines)
        try:
            head = next(rows)
            path_at, label_at, is_header = self._columns(head)
            for row in rows if is_header else chain([head], rows):
                if len(row) > path_at and row[path_at]:
                    yield row[path_at], row[label_at] if label_at is not None and label_at < len(row) else None
        except csv.Error as error:
            what = f"line {table.line_num}: not a table of photos ({error}; are all quotes closed?)"
            raise SourceError(f"{self.name}: {what}") from None

    def _delimiter(self, first: str) -> str | None:
        """What stands between the columns, by the first line; None: a path a line."""
        if self.name.lower().endswith((".csv", ".tsv")):
            return max("\t,;", key=first.count)
        if os.path.lexists(self._folder / first):  # "cat,1.jpg" may be a path
            return None
        for apart in "\t,;":
            cells = first.split(apart)
            if len(cells) > 1 and any(is_photo_name(cell) or plain(cell) in PATH_COLUMNS for cell in cells):
                return apart
        return " " if not is_photo_name(first) and is_photo_name(first.rpartition(" ")[0]) else None

    def _columns(self, first: list[str]) -> tuple[int, int | None, bool]:
        """Where path and label stand, and whether the first row says so."""
        cells = list(map(plain, first))
        paths, labels = ([cells.index(one) for one in known if one in cells] for known in (PATH_COLUMNS, LABEL_COLUMNS))
        at = paths or [k for k, cell in enumerate(first) if is_photo_name(cell.replace("\\", "/"))]
        if not at or not (paths or len(first) <= 2):
            raise SourceError(f"{self.name}: which column is the path, which the label? Put a line before: path,label")
        others = [*labels, *range(2)] if len(first) == 2 else labels
        return at[0], next((one for one in others if one != at[0]), None), bool(paths)

    def _lines(self) -> Iterator[str]:
        data = None if self._path else _standard_input()
        if data is not None and b"\0" in data and data[:2] not in _UTF_16:
            yield from map(os.fsdecode, data.split(b"\0"))
            return
        with io.BytesIO(data) if data is not None else open(self._path or "", "rb") as file:
            encoding = "utf-16" if file.read(2) in _UTF_16 else "utf-8-sig"
            file.seek(0)
            text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
            try:
                while line := text.readline(_LONGEST_LINE):
                    if len(line) == _LONGEST_LINE:
                        raise SourceError(f"{self.name}: a line of more than {_LONGEST_LINE:,} characters: not a list")
                    yield line
            except UnicodeError as error:
                raise SourceError(f"{self.name}: not a list of photos ({error})") from None


_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def plain(cell: str) -> str:
    """A column's name as it is looked for."""
    return cell.strip().lower().replace("_", "").replace(" ", "")


def _says_something(line: str) -> bool:
    return bool(line.strip()) and (not line.lstrip().startswith("#") or is_photo_name(line.strip()))


@cache
def _standard_input() -> bytes:
    """Read once: whoever lists again gets the same."""
    return sys.stdin.buffer.read()
