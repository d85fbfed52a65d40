"""Tables of the Hugging Face hub: parquet files with a column of encoded photos and, usually, one of labels.

A photo is a row; rows are decoded in the table's order, some at a time, and each once: threads that convert them in
order find them in a window of what was decoded last.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastssl.errors import counted
from fastssl.pipelines.convert.sources.base import Found, Passed, Source, SourceError
from fastssl.pipelines.convert.sources.webdataset import as_label

logger = logging.getLogger(__name__)
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes")
_LABELS = ("label", "labels", "fine_label", "cls", "class", "category", "class_label", "class_id", "class_name")
_LABEL_TYPES = ("int", "string", "large_string", "dictionary<values=string", "dictionary<values=large_string")
#: What pandas makes of whole numbers, some of which are missing.
_FLOATS = ("float", "double")
#: How many times its own size a file may have uncompressed, and how many bytes beyond that.
_LARGEST_GROWTH, _ROOM = 200, 8 << 20
#: What is decoded at once, in rows (few, as a small file may hold large ones), and what is kept of a file, in bytes.
_BATCH_ROWS, _KEPT_BYTES = 16, 32 << 20
#: Files that have a window: threads are in one, some still in the last.
_OPEN_FILES = 3


class ParquetSource(Source):
    """Tables of one data set; photos are called FILE/ROW, FILE below the folder that all of them share, ROW from 0.

    The column of photos is the one that the hub's metadata call an image, otherwise one of bytes by its name; that of
    labels a ClassLabel, whose names are the classes in their order, or one of numbers or names that is called so.
    ``copies``: where files of servers lie on this machine.
    """

    in_folders = False

    def __init__(self, files: Sequence[str], copies: Sequence[str] | None = None):
        shared = os.path.commonpath([os.path.dirname(os.path.abspath(one)) for one in files])
        super().__init__(files[0] if len(files) == 1 else os.path.dirname(files[0]))
        names = [os.path.relpath(os.path.abspath(one), shared) for one in files]
        self._tables = [(name, _Table(Path(copy))) for name, copy in zip(names, copies or files)]
        self._open: OrderedDict[int, _Table] = OrderedDict()
        self._lock = threading.Lock()

    def photos(self) -> Iterator[Found | Passed]:
        for number, (called, table) in enumerate(self._tables):
            names = table.look()
            # Where tables disagree about the order, every class counts by its name.
            self.classes = names if number == 0 or names == self.classes else None
            for row, label in enumerate(table.labels()):
                if isinstance(label, int) and label < 0:  # what the hub has for "none"
                    label = None
                elif isinstance(label, int) and names is not None:
                    if label >= len(names):
                        yield Passed(f"{called}/{row}", f"label {label}, but the table names {len(names)} classes")
                        continue
                    label = names[label]
                yield Found(f"{called}/{row}", -1, table.stamp, (number, row), label)

    def read(self, place: Any, size: int) -> bytes:
        number, row = place
        with self._lock:
            table = self._open[number] = self._open.pop(number, self._tables[number][1])
            idle = self._open.popitem(last=False)[1] if len(self._open) > _OPEN_FILES else None
        if idle is not None:
            idle.close()
        return table.read(row)

    def close(self) -> None:
        for _, table in self._tables:
            table.close()


class _Table:
    """One file. ``stamp``: when it was changed."""

    def __init__(self, path: Path):
        self.path = path
        self._batches: Iterator[Any] = iter(())
        self._kept: deque[tuple[int, Any]] = deque()  # (number of the first row, column)
        self._next = self._kept_bytes = 0
        self._bad: dict[int, tuple[int, str]] = {}  # row group: (first row that cannot be read, why)
        self._lock = threading.Lock()

    def look(self) -> list[str] | None:
        """Read what the file says of itself; the names of its classes, if it has them."""
        self.stamp = self.path.stat().st_mtime_ns
        with self._damage():
            file = self._opened()
            features = _features(file.schema_arrow)
            self._image = _image_column(self.path, file.schema_arrow, features)
            self._label = _label_column(file.schema_arrow, features)
            groups = list(map(file.metadata.row_group, range(file.metadata.num_row_groups)))
            self._starts = [0, *accumulate(group.num_rows for group in groups)]  # of row groups, and the end
            packed, size = self.path.stat().st_size, sum(group.total_byte_size for group in groups)
            if self._starts[-1] > packed or size > _LARGEST_GROWTH * packed + _ROOM:
                what = f"{counted(self._starts[-1], 'row')}, {counted(size, 'byte')} uncompressed"
                raise SourceError(f"{self.path}: {what}, in a file of {counted(packed, 'byte')}: no photos are")
            if self._label is None:
                self._label = self._whole_floats(file)
        names = features.get(self._label or "", {}).get("names")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            return None
        # A name that two classes share would make them one.
        return [name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names)]

    def _whole_floats(self, file: Any) -> str | None:
        """The column of labels, where it has no type of labels but could have; it is said if not."""
        named = [field for name in _LABELS for field in file.schema_arrow if field.name.lower() == name]
        for field in named[:1]:
            if str(field.type) in _FLOATS and file.metadata.num_rows:
                batches = file.iter_batches(65536, columns=[field.name], use_threads=False)
                values = [one for batch in batches for one in batch.column(0).to_pylist() if one == one]
                if all(one is None or one.is_integer() for one in values):
                    return str(field.name)
            logger.warning("%s: no labels: its column %s holds %s, no classes", self.path, field.name, field.type)
        return None

    def labels(self) -> Iterator[str | int | None]:
        """Of all rows, in their order."""
        if self._label is None:
            yield from [None] * self._starts[-1]
            return
        with self._damage():
            for batch in self._opened().iter_batches(65536, columns=[self._label], use_threads=False):
                column = batch.column(0).to_pylist()
                yield from map(as_label, column) if str(batch.column(0).type) in _FLOATS else column

    def read(self, row: int) -> bytes:
        """The photo of a row. ``SourceError``: there is none, or none that can be read."""
        group = bisect_right(self._starts, row) - 1
        with self._lock, self._damage():
            bad_from, why = self._bad.get(group, (row + 1, ""))
            if row >= bad_from:
                raise SourceError(why)
            first = self._kept[0][0] if self._kept else self._next
            if row < first or self._starts[group] > self._next:
                self._forget()
                self._next = self._starts[group]
            while row >= self._next:
                self._decode_some(group)
            start, column = next((start, column) for start, column in reversed(self._kept) if start <= row)
            value = column[row - start]
            struct = str(value.type).startswith("struct") and value.is_valid
            data: bytes | None = (value["bytes"] if struct else value).as_py()
            if not data:
                path = struct and value.type.get_field_index("path") >= 0 and value["path"].as_py()
                raise SourceError(f"no photo in this row of the table{f', only its name, {path}' if path else ''}")
            return data

    def close(self) -> None:
        """Let go of the file and of what was decoded."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._kept.clear()
        # Without a window the next row is looked for anew.
        self._batches, self._kept_bytes, self._next = iter(()), 0, -1

    def _decode_some(self, group: int) -> None:
        """The next rows into the window."""
        try:
            with self._damage():
                if self._next == self._starts[group]:
                    if self.path.stat().st_mtime_ns != self.stamp:
                        raise SourceError("changed while it was being converted")
                    # Group by group, as damage in one spares the others. The iterator holds the file open.
                    columns = [self._image]
                    self._batches = self._opened().iter_batches(_BATCH_ROWS, [group], columns, use_threads=False)
                batch = next(self._batches, None)
                if not batch:
                    raise SourceError(f"{self.path}: cut off: has fewer rows than it says")
        except SourceError as error:
            self._bad[group] = (self._next, str(error))
            self._forget()
            raise
        self._kept.append((self._next, batch.column(0)))
        self._next += len(batch)
        self._kept_bytes += batch.nbytes
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 2:
            self._kept_bytes -= self._kept.popleft()[1].nbytes

    def _opened(self) -> Any:
        try:
            from pyarrow import parquet
        except ImportError:
            remedy = "pip install pyarrow (or 'fastssl-vision[parquet]')"
            raise SourceError(f"{self.path}: a parquet file, for which pyarrow is needed: {remedy}") from None
        # Read in small pieces: a group of rows may be larger than memory.
        options: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
        return parquet.ParquetFile(os.fspath(self.path), **options)

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """What pyarrow raises inside at damaged input becomes a ``SourceError`` that names the file."""
        try:
            yield
        except SourceError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's
                raise
            said = " ".join(str(error).split())[:200]
            raise SourceError(f"{self.path}: damaged, cut off or not a parquet file ({said})") from None


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the hub's library says of the columns, by their names."""
    try:
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: one for name, one in found.items() if isinstance(one, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _image_column(path: Path, schema: Any, features: dict[str, dict[str, Any]]) -> str:
    def holds_bytes(kind: Any) -> bool:
        if str(kind).startswith("struct"):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return str(kind) in ("binary", "large_binary", "binary_view")

    able: list[str] = [field.name for field in schema if holds_bytes(field.type)]
    called = sorted(able, key=lambda name: (*_IMAGES, name.lower()).index(name.lower()))
    said = [name for name in called if features.get(name, {}).get("_type") == "Image"]
    named = [name for name in called if name.lower() in _IMAGES or str(schema.field(name).type).startswith("struct")]
    if not (said or named):
        columns = ", ".join(f"{field.name} ({str(field.type)[:40]})" for field in schema)[:400]
        raise SourceError(f"{path}: no column of encoded photos (bytes, called image) among {columns or 'none'}")
    return (said or named)[0]


def _label_column(schema: Any, features: dict[str, dict[str, Any]]) -> str | None:
    able: list[str] = [field.name for field in schema if str(field.type).lstrip("u").startswith(_LABEL_TYPES)]
    said = [name for name in able if features.get(name, {}).get("_type") == "ClassLabel"]
    called = [name for one in _LABELS for name in (*said, *able) if name.lower() == one]
    return called[0] if called else said[0] if len(said) == 1 else None
