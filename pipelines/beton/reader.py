"""Reading a ``.beton`` file (format.py says what it looks like) with NumPy alone."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from fastssl.errors import BetonError, JpegError, counted
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.open_file import OpenFiles
from fastssl.pipelines.beton.side_file import read_side_note, side_path
from fastssl.pipelines.beton.tables import KINDS, Row, TableFile, Tables
from fastssl.pipelines.ops import jpeg
from fastssl.pipelines.ops.memory import ThreadMemory
from fastssl.utils.addresses import shown

#: Bytes that are summed up at a time; photos that tell a file from another one, and bytes of each; samples that stand
#: for all where no table is in memory.
_PART, _LOOKED_AT, _LOOK, _SOME = 16 << 20, 64, 4096, 1 << 16
_Found = TypeVar("_Found")


class BetonReader:
    """An open ``.beton`` file with one image field and, usually, one integer label.

    All tables are checked when the file is opened (about 0.2 s per million samples); afterwards any sample can be read
    from any thread. It keeps to the file that it opened, and one that is cut short or written over meanwhile gives
    errors that name the sample. Fields other than the first image and the first integer are skipped with a warning.
    ``BetonError``: the file is missing, damaged, unfinished or empty, or uses a custom field.

    Several files that are read as one are a ``BetonSet``, which has all that is here.

    Attributes:
        path: the file. num_samples: N, also ``len(reader)``. labelled: whether it has labels.
        heights, widths: (N,) int32, in pixels. modes: (N,) uint8, 0 JPEG, 1 raw. offsets, sizes: (N,) int64, in bytes.
        labels: (N,) int64, or None when the file has no integer field.
        lazy: the tables are not in memory: `take` and all that reads a photo read and check the records that they
            need. Who asks for a whole column has all tables read.
        files: that it consists of. starts: (F + 1,) int64, the first sample of each, and N.
    """

    #: Not all of it fits on this machine at once.
    streamed = False

    modes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray | None
    num_samples: int
    #: Of a file in a set: where its classes stand in the set's, if they are others.
    _class_map: np.ndarray | None = None
    _classes: list[str] | None = None

    def __init__(self, path: str | os.PathLike, *, lazy: bool = False, among: OpenFiles | None = None):
        self._file = file = TableFile(path, among)
        self._scratch = ThreadMemory()
        self.path, self.num_bytes, self.num_samples = file.path, file.num_bytes, int(file.num_samples)
        self.page_size, self.labelled = file.page_size, file.labelled
        self.field_names, self.image_field = file.field_names, file.image_field
        self.files, self.starts, self.lazy = [self.path], np.array([0, self.num_samples]), lazy
        if not lazy:
            self._load()

    def _load(self) -> None:
        """Have all tables in memory."""
        try:
            tables = Tables.empty(self.num_samples, self.labelled)
            self._read_tables(tables)
        except MemoryError:
            samples = counted(self.num_samples, "sample")
            raise self._error(f"no memory for its tables: the header speaks of {samples}") from None
        vars(self).update(vars(tables))
        self.lazy = False

    def _read_tables(self, out: Tables) -> None:
        self._file.read_all(out)

    def __getattr__(self, name: str) -> Any:
        if name not in KINDS and name != "labels":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self._load()
        return getattr(self, name)

    def _error(self, message: str) -> BetonError:
        return BetonError(f"{shown(self.path)}: {message}")

    def __len__(self) -> int:
        return self.num_samples

    def __enter__(self) -> BetonReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; a thread that is still reading from it finishes first."""
        self._file.close()

    def side_notes(self) -> list[dict[str, Any]]:
        """What the side file of each file says, checksums left out; nothing where there is none that belongs to it."""
        note = read_side_note(self.path)
        return [note if note is not None and note["bytes"] == self.num_bytes else {}]

    @property
    def classes(self) -> list[str] | None:
        """The class names, label k being ``classes[k]``, from the side file; None without one or for unlabelled
        photos.
        """
        if self._classes is not None:
            return self._classes
        classes: list[str] | None = (self._note() or {}).get("classes")
        return classes

    def _note(self) -> dict[str, Any] | None:
        """What the side file says, checksums left out; None without one that belongs to the file."""
        side = read_side_note(self.path)
        if side is None or side["bytes"] == self.num_bytes:
            return side
        what = "belongs to another version of the file; class names not used"
        warnings.warn(f"{side_path(self.path)}: {what}", stacklevel=3)
        return None

    def take(self, name: str, index: np.ndarray) -> np.ndarray:
        """What the column ``name``, one of those above, says of the samples ``index``, (n,) int64. ``BetonError``: of a
        lazy one, a record is damaged, or cannot be read.
        """
        if self.lazy:
            return np.array([getattr(row, name[:-1]) for row in self._rows(index)], KINDS.get(name, np.int64))
        found: np.ndarray = getattr(self, name)[index]
        return found

    def use_classes(self, classes: list[str]) -> None:
        """Have the labels count in ``classes``, where those of the file are found by name. ``BetonError``: one is not
        there, or a label has no name.
        """
        own, place, labels = self.classes or [], {name: k for k, name in enumerate(classes)}, self.labels
        if labels is None or labels.max(initial=-1) >= len(own) or not place.keys() >= set(own):
            raise self._error("its labels or their names are not among the classes")
        self.labels = np.where(labels < 0, labels, np.array([place[name] for name in own], np.int64)[labels])
        self._classes = classes

    def shapes(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths of the samples ``index``, see `take`."""
        return self.take("heights", index), self.take("widths", index)

    def labels_of(self, index: np.ndarray) -> np.ndarray:
        """Labels of the samples ``index``, see `take`; -1 where there are none."""
        return self.take("labels", index) if self.labelled else np.full(len(index), -1)

    def require_here(self, window: int | None, ahead: int = 1) -> None:
        """``BetonError``: reading groups of so many files (None: of all), ``ahead`` samples at a time, needs more room
        than there is.
        """

    def hold(self, files: Sequence[int]) -> None:
        """These files are needed now or next, in this order, others no longer: of a ``streamed`` one, what to fetch."""

    def some(self) -> np.ndarray:
        """Sample ids, (n,) int64 and sorted, by which the whole can be judged: all; 65,536 of a lazy one; of a streamed
        one those of its first file.
        """
        total = int(self.starts[1]) if self.streamed else self.num_samples
        count = min(total, _SOME) if self.lazy else total
        found: np.ndarray = np.arange(count, dtype=np.int64) * total // count
        return found

    def _rows(self, index: np.ndarray) -> list[Row]:
        return [self._file.row(i) for i in np.asarray(index).tolist()]

    def _row(self, i: int) -> Row:
        if self.lazy:
            return self._file.row(i)
        height, width, mode = int(self.heights[i]), int(self.widths[i]), int(self.modes[i])
        return Row(height, width, mode, int(self.offsets[i]), int(self.sizes[i]), -1)

    def _owner(self, i: int) -> tuple[BetonReader, int]:
        """The file that holds sample ``i``, and its number there."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"{self.path}: no sample {i}, there are {self.num_samples}")
        return self, i

    def encoded(self, i: int) -> np.ndarray:
        """The stored bytes of sample ``i``: 1-D uint8, a copy of the caller's own. ``BetonError``, which names file and
        sample: they cannot be read, or are no longer there.
        """
        file, own = self._owner(i)
        return file._stored(own, self._row(i), lambda size: np.empty(size, np.uint8))

    def decode_into(self, i: int, out: np.ndarray) -> bool:
        """Decode sample ``i`` into ``out``, (heights[i], widths[i], 3) uint8 C-contiguous; after an error its contents
        are undefined. Returns whether it had to be `jpeg.repaired`. ``JpegError``, which names file and sample: the
        picture is damaged, or ``out`` is of another shape; ``BetonError``: as `encoded`.
        """
        file, own = self._owner(i)
        return file._decode(own, self._row(i), out)

    def decode(self, i: int) -> np.ndarray:
        """Decode sample ``i`` to a new (heights[i], widths[i], 3) uint8 RGB array."""
        file, own = self._owner(i)
        row = self._row(i)
        out = np.empty((row.height, row.width, 3), np.uint8)
        file._decode(own, row, out)
        return out

    def _decode(self, i: int, row: Row, out: np.ndarray) -> bool:
        shape = row.height, row.width, 3
        if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise JpegError(f"{self.path}: sample {i} is {shape} uint8, the buffer {out.shape} {out.dtype}")
        if row.mode == MODE_RAW:
            self._stored(i, row, lambda _: out.reshape(-1))
            return False
        data = self._stored(i, row, self._scratch.take)
        try:
            return jpeg.decode_into(data, out)
        except JpegError as error:
            raise JpegError(f"{self.path}: sample {i}: {error}") from None

    def _stored(self, i: int, row: Row, room: Callable[[int], np.ndarray]) -> np.ndarray:
        """The stored bytes of sample ``i`` in ``room(size)``."""
        try:
            out = room(row.size)
        except MemoryError:
            raise self._error(f"sample {i}: no memory for its {row.size:,} bytes") from None
        self._file.read(row.offset, out, f"sample {i}")
        return out

    def table_checksums(self) -> dict[str, int]:
        """CRC-32 of header + descriptors + metadata (``head``) and of the allocation table (``table``)."""
        end, table_at = self._file.metadata_end, self._file.table_at
        return {"head": self._checksum(0, end), "table": self._checksum(table_at, self.num_bytes)}

    def photo_checksum(self) -> int:
        """CRC-32 of some bytes from the middle of at most 64 photos, spread evenly over the file (of a set, of one of
        each file at least): tables alone do not tell two sets of raw pictures of one size apart. A photo that the disk
        does not give is left out: what to do about such ones is asked where they are needed.
        """
        found = 0
        for part in self._each(self._middle, self._looked_at()):
            found = zlib.crc32(part, found)
        return found

    def _looked_at(self) -> list[int]:
        return sorted(set(map(int, np.linspace(0, self.num_samples - 1, _LOOKED_AT))))

    def _each(self, look: Callable[[int], _Found], numbers: Iterable[int]) -> Iterable[_Found]:
        return map(look, numbers)

    def _middle(self, i: int) -> bytes:
        try:
            (file, own), row = self._owner(i), self._row(i)
            part = np.empty(min(row.size, _LOOK), np.uint8)
            file._file.read(row.offset + (row.size - len(part)) // 2, part, f"sample {own}")
        except BetonError:
            return b""
        return part.tobytes()

    def _checksum(self, start: int, end: int) -> int:
        found = 0
        for low in range(start, end, _PART):
            part = self._file.array(low, min(_PART, end - low), np.dtype(np.uint8))
            found = zlib.crc32(part.data, found)
        return found

    def same_file(self) -> str:
        """A name under which others open the very file that is open here, also if its path leads elsewhere by now."""
        here = "/proc/self/fd"
        return f"{here}/{self._file.open().descriptor}" if os.path.isdir(here) else os.fspath(self.path)

    def require_whole(self) -> None:
        """For those that map the file themselves: it is as long as when it was opened, or ``BetonError``."""
        self._file.require_bytes(os.fstat(self._file.open().descriptor).st_size, self.num_bytes)

    def is_same(self, other: BetonReader) -> bool:
        """Whether both are of the same files."""
        with suppress(FileNotFoundError):  # of a server's files
            return len(self.files) == len(other.files) and all(map(os.path.samefile, self.files, other.files))
        return self.files == other.files
