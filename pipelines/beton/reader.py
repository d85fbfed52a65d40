"""Reading ``.beton`` files (format.py says what they look like) with NumPy alone.

The reader trusts no number from a file before it has compared it with the file's size: a damaged or hostile file ends
in a ``BetonError``, never in a read outside of it. It reads with ``preadv`` and maps nothing: where a file is cut
short, or a disk fails, a map would end the process with SIGBUS, and no program can make an error of that.
"""

from __future__ import annotations

import os
import stat
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastssl.errors import BetonError, JpegError, counted, printable
from fastssl.pipelines.beton.format import (
    FIELD_DTYPE,
    FIELD_TYPES,
    HEADER_DTYPE,
    MIN_PAGE_SIZE,
    MODE_RAW,
    TABLE_DTYPE,
    TYPE_IMAGE,
    TYPE_INT,
    VERSION,
)
from fastssl.pipelines.beton.side_file import read_side_file, side_path
from fastssl.pipelines.ops import jpeg
from fastssl.pipelines.ops.memory import ThreadMemory

#: Samples whose metadata is read at a time; bytes that are summed up at a time.
_BLOCK, _PART = 1 << 20, 16 << 20
#: Photos that tell a file from another one, and bytes of each.
_LOOKED_AT, _LOOK = 64, 4096


class OpenFile:
    """A file descriptor that is closed with the last reference to it. Closed with its reader, its number could be given
    to another file while a thread that the disk holds up is about to read from it.
    """

    def __init__(self, path: Path):
        self.descriptor = -1
        # A named pipe would wait here for its writer; a plain file knows nothing of the flag.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        about = os.fstat(self.descriptor)
        self.num_bytes, self.plain = about.st_size, stat.S_ISREG(about.st_mode)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read_into(self, out: np.ndarray, offset: int) -> int:
        """Fill ``out``, 1-D uint8, from byte ``offset`` on; how many bytes there were, fewer than wanted at the end of
        the file only.
        """
        view, done = out.data, os.preadv(self.descriptor, [out.data], offset)
        while 0 < done < len(view) and (got := os.preadv(self.descriptor, [view[done:]], offset + done)):
            done += got
        return done


class BetonReader:
    """An open ``.beton`` file with one image field and, usually, one integer label.

    All tables are checked when the file is opened (about 0.2 s per million samples); afterwards any sample can be read
    from any thread. It keeps to the file that it opened, and one that is cut short or written over meanwhile gives
    errors that name the sample. Fields other than the first image and the first integer are skipped with a warning.
    ``BetonError``: the file is missing, damaged, unfinished or empty, or uses a custom field.

    Attributes:
        path: the file. num_samples: N, also ``len(reader)``.
        heights, widths: (N,) int32, in pixels. modes: (N,) uint8, 0 JPEG, 1 raw. offsets, sizes: (N,) int64, in bytes.
        labels: (N,) int64, or None when the file has no integer field.
    """

    num_samples: int

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self._file: OpenFile | None = OpenFile(self.path)
        except OSError as error:
            raise BetonError(f"{self.path}: cannot open: {error.strerror or error}") from None
        self._scratch = ThreadMemory()
        self.num_bytes = self._file.num_bytes
        if not self._file.plain:
            raise self._error("is not a plain file")
        if self.num_bytes < HEADER_DTYPE.itemsize:
            raise self._error(f"only {self.num_bytes} bytes, shorter than a header: empty or cut off")
        try:
            self._read_tables()
        except MemoryError:
            samples = counted(self.num_samples, "sample")
            raise self._error(f"no memory for its tables: the header speaks of {samples}") from None

    def _read_tables(self) -> None:
        # Python integers from here on: they cannot overflow, whatever the file says.
        version, num_fields, page_size, self.num_samples, table_at = self._read_array(0, 1, HEADER_DTYPE)[0].item()
        if version in (0, VERSION) and table_at == 0:
            raise self._error("unfinished: its writer was stopped before the header was written; convert again")
        if version != VERSION:
            about = "a photo" if version in (0xD8FF, 0x5089) else f"the first two bytes say {version}"
            raise self._error(
                f"not a .beton file of version {VERSION} ({about}); fastssl convert-imagenet makes one from photos"
            )
        if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
            raise self._error(
                f"damaged header: page size {page_size} is not a power of two of at least {MIN_PAGE_SIZE}"
            )
        if self.num_samples == 0:
            raise self._error("holds no samples")
        self.page_size = page_size

        fields_end = HEADER_DTYPE.itemsize + num_fields * FIELD_DTYPE.itemsize
        if num_fields == 0 or fields_end > self.num_bytes:
            raise self._error(f"damaged header: {num_fields} field descriptors do not fit into {self.num_bytes} bytes")
        descriptors = self._read_array(HEADER_DTYPE.itemsize, num_fields, FIELD_DTYPE)
        record_dtype, image_field, label_field = self._read_fields(descriptors)

        self._metadata_end = fields_end + self.num_samples * record_dtype.itemsize
        if self._metadata_end > self.num_bytes:
            raise self._error(
                f"damaged header or cut off: {self.num_samples} samples need {self._metadata_end} bytes of metadata, "
                f"the file has {self.num_bytes}"
            )
        if not self._metadata_end <= table_at <= self.num_bytes:
            raise self._error(
                f"cut off or damaged header: the allocation table should start at byte {table_at}, "
                f"between {self._metadata_end} and {self.num_bytes}"
            )
        if table_at == self.num_bytes or (self.num_bytes - table_at) % TABLE_DTYPE.itemsize:
            raise self._error(
                f"cut off: the allocation table has {self.num_bytes - table_at} bytes, not a multiple of 24"
            )
        entries = (self.num_bytes - table_at) // TABLE_DTYPE.itemsize
        if entries > self.num_samples * num_fields:
            raise self._error(
                f"damaged header: {entries} entries in the allocation table for {self.num_samples} samples of "
                f"{num_fields} fields"
            )
        self._table_at = table_at

        pointers = self._read_metadata(fields_end, record_dtype, image_field, label_field)
        self._read_regions(pointers, self._read_array(table_at, entries, TABLE_DTYPE))
        whole = (self.modes != MODE_RAW) | (self.sizes == 3 * self._pixels())
        self._require(whole, "raw pixels whose size is not height x width x 3")

    def _read_metadata(
        self, start: int, record_dtype: np.dtype, image_field: str, label_field: str | None
    ) -> np.ndarray:
        """Fill in what stands in the samples' records; returns their data pointers, (N,) uint64.

        In blocks, and each is checked before memory for the next is touched: a file with terabytes of holes is refused
        at its first one.
        """
        count = self.num_samples
        self.modes = np.empty(count, np.uint8)
        self.heights, self.widths = np.empty(count, np.int32), np.empty(count, np.int32)
        self.labels = None if label_field is None else np.empty(count, np.int64)
        pointers = np.empty(count, np.uint64)
        for low in range(0, count, _BLOCK):
            high = min(low + _BLOCK, count)
            records = self._read_array(start + low * record_dtype.itemsize, high - low, record_dtype)
            images = records[image_field]
            self.modes[low:high], pointers[low:high] = images["mode"], images["data_ptr"]
            self.heights[low:high], self.widths[low:high] = images["height"], images["width"]
            if self.labels is not None:
                self.labels[low:high] = records[label_field]
            pixels = self._pixels(low, high)
            self._require(pixels > 0, "height or width is zero", low)
            self._require(pixels <= jpeg.MAX_PIXELS, f"more than {jpeg.MAX_PIXELS:,} pixels", low)
            self._require(self.modes[low:high] <= MODE_RAW, "its storage mode is neither 0 (JPEG) nor 1 (raw)", low)
        return pointers

    def _pixels(self, low: int = 0, high: int | None = None) -> np.ndarray:
        return self.heights[low:high].astype(np.int64) * self.widths[low:high]

    def _read_fields(self, descriptors: np.ndarray) -> tuple[np.dtype, str, str | None]:
        """Return the metadata record's dtype and the names in it (f0, f1, ...) of the image and of the label."""
        ended = (bytes(name).split(b"\0")[0] for name in descriptors["name"])
        names = [printable(name.decode("ascii", "backslashreplace")) for name in ended]
        types = descriptors["type_id"].tolist()
        for name, type_id in zip(names, types):
            if type_id not in FIELD_TYPES:
                raise self._error(
                    f"field {name!r} has the unknown or custom type {type_id}, whose size only its own program knows"
                )
        if TYPE_IMAGE not in types:
            raise self._error(f"has no image field, only {', '.join(names)}")
        image, label = types.index(TYPE_IMAGE), types.index(TYPE_INT) if TYPE_INT in types else None
        self.field_names, self.image_field = names, names[image]
        skipped = [
            f"{name} ({FIELD_TYPES[t][0]})" for k, (name, t) in enumerate(zip(names, types)) if k not in (image, label)
        ]
        if skipped:
            warnings.warn(f"{self.path}: fields not read: {', '.join(skipped)}", stacklevel=4)
        dtype = np.dtype([("", FIELD_TYPES[type_id][1]) for type_id in types], align=True)
        return dtype, f"f{image}", None if label is None else f"f{label}"

    def _read_regions(self, pointers: np.ndarray, table: np.ndarray) -> None:
        """Find the allocation of every image and check that it lies between the metadata and the table."""
        last = int(table["sample_id"].max())
        if not np.array_equal(table["ptr"], pointers):
            # FFCV's workers write the table in the order in which they finish, with entries for every other field too.
            # An empty bytes field takes no room, so its pointer can be the same as the image's that follows: it must
            # not win.
            table = table[table["size"] > 0]
            table = table[np.argsort(table["ptr"], kind="stable")]
            place = np.searchsorted(table["ptr"], pointers)
            self._require(place < len(table), "no entry in the allocation table for its image")
            table = table[place]
            self._require(table["ptr"] == pointers, "no entry in the allocation table for its image")
        if last >= self.num_samples:
            raise self._error(
                f"damaged header: the allocation table knows more samples than the {self.num_samples} of the header"
            )
        sizes, low, high = np.ascontiguousarray(table["size"]), np.uint64(self._metadata_end), np.uint64(self._table_at)
        inside = (pointers >= low) & (pointers <= high)
        # Subtract before comparing: ptr + size could wrap around.
        fits = inside & (sizes <= high - np.where(inside, pointers, high))
        self._require(fits, "its image lies outside the data pages")
        self._require(sizes > 0, "its image has no bytes")
        self._require(sizes <= self.page_size, f"its image is larger than a page of {self.page_size} bytes")
        own = table["sample_id"] == np.arange(self.num_samples, dtype=np.uint64)
        self._require(own, "its image belongs to another sample")
        self.offsets, self.sizes = pointers.astype(np.int64), sizes.astype(np.int64)

    def _require(self, good: np.ndarray, complaint: str, first: int = 0) -> None:
        """Refuse the file where not all are ``good``, of which the first one belongs to sample ``first``."""
        if not good.all():
            bad = np.flatnonzero(~good)
            more = f" (and {counted(len(bad) - 1, 'more sample')})" if len(bad) > 1 else ""
            raise self._error(f"sample {first + bad[0]}: {complaint}{more}")

    def _error(self, message: str) -> BetonError:
        return BetonError(f"{self.path}: {message}")

    def __len__(self) -> int:
        return self.num_samples

    def __enter__(self) -> BetonReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; a thread that is still reading from it finishes first."""
        self._file = None

    @property
    def classes(self) -> list[str] | None:
        """The class names, label k being ``classes[k]``, from the side file; None without one or for unlabelled
        photos.
        """
        side = read_side_file(self.path)
        if side is None or side["bytes"] == self.num_bytes:
            classes: list[str] | None = side.get("classes") if side else None
            return classes
        what = "belongs to another version of the file; class names not used"
        warnings.warn(f"{side_path(self.path)}: {what}", stacklevel=2)
        return None

    def encoded(self, i: int) -> np.ndarray:
        """The stored bytes of sample ``i``: 1-D uint8, a copy of the caller's own. ``BetonError``, which names file and
        sample: they cannot be read, or are no longer there.
        """
        self._require_sample(i)
        return self._stored(i, lambda size: np.empty(size, np.uint8))

    def decode_into(self, i: int, out: np.ndarray) -> None:
        """Decode sample ``i`` into ``out``, (heights[i], widths[i], 3) uint8 C-contiguous; after an error its contents
        are undefined. ``JpegError``, which names file and sample: the picture is damaged, or ``out`` is of another
        shape; ``BetonError``: as `encoded`.
        """
        self._require_sample(i)
        shape = (int(self.heights[i]), int(self.widths[i]), 3)
        if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise JpegError(f"{self.path}: sample {i} is {shape} uint8, the buffer {out.shape} {out.dtype}")
        if self.modes[i] == MODE_RAW:
            self._stored(i, lambda _: out.reshape(-1))
            return
        data = self._stored(i, self._memory)
        try:
            jpeg.decode_into(data, out)
        except JpegError as error:
            raise JpegError(f"{self.path}: sample {i}: {error}") from None

    def _stored(self, i: int, room: Callable[[int], np.ndarray]) -> np.ndarray:
        """The stored bytes of sample ``i`` in ``room(size)``."""
        file, size = self._open_file(), int(self.sizes[i])
        try:
            out = room(size)
        except MemoryError:
            raise self._error(f"sample {i}: no memory for its {size:,} bytes") from None
        self._read(file, int(self.offsets[i]), out, f"sample {i}")
        return out

    def _memory(self, size: int) -> np.ndarray:
        return self._scratch.take(size)

    def _open_file(self) -> OpenFile:
        if (file := self._file) is None:
            raise self._error("the reader is closed")
        return file

    def _require_sample(self, i: int) -> None:
        if not 0 <= i < self.num_samples:
            raise IndexError(f"{self.path}: no sample {i}, there are {self.num_samples}")

    def _read(self, file: OpenFile, offset: int, out: np.ndarray, what: str) -> None:
        """Fill ``out``, 1-D uint8, from byte ``offset`` on; ``BetonError`` says ``what`` could not be read."""
        try:
            got = file.read_into(out, offset)
        except OSError as error:
            raise self._error(f"{what}: cannot be read: {error.strerror or error}") from None
        self._require_bytes(got, len(out), f"{what}: ")

    def _require_bytes(self, there: int, wanted: int, what: str = "") -> None:
        if there < wanted:
            found = f"{there:,} of {wanted:,} bytes are there"
            raise self._error(f"{what}cut off since it was opened: {found}; put the whole file back")

    def _read_array(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        """(count,) of ``dtype``, as they stand at byte ``offset``."""
        out = np.empty(count * dtype.itemsize, np.uint8)
        self._read(self._open_file(), offset, out, "its tables")
        return out.view(dtype)

    def decode(self, i: int) -> np.ndarray:
        """Decode sample ``i`` to a new (heights[i], widths[i], 3) uint8 RGB array."""
        self._require_sample(i)
        out = np.empty((self.heights[i], self.widths[i], 3), np.uint8)
        self.decode_into(i, out)
        return out

    def table_checksums(self) -> dict[str, int]:
        """CRC-32 of header + descriptors + metadata (``head``) and of the allocation table (``table``)."""
        return {"head": self._checksum(0, self._metadata_end), "table": self._checksum(self._table_at, self.num_bytes)}

    def photo_checksum(self) -> int:
        """CRC-32 of some bytes from the middle of at most 64 photos, spread evenly over the file: tables alone do not
        tell two sets of raw pictures of one size apart. A photo that the disk does not give is left out: what to do
        about such ones is asked where they are needed.
        """
        found = 0
        for i in np.unique(np.linspace(0, self.num_samples - 1, _LOOKED_AT).astype(np.int64)):
            size = int(self.sizes[i])
            part = np.empty(min(size, _LOOK), np.uint8)
            try:
                self._read(self._open_file(), int(self.offsets[i]) + (size - len(part)) // 2, part, f"sample {i}")
            except BetonError:
                continue
            found = zlib.crc32(part.data, found)
        return found

    def _checksum(self, start: int, end: int) -> int:
        found = 0
        for low in range(start, end, _PART):
            found = zlib.crc32(self._read_array(low, min(_PART, end - low), np.dtype(np.uint8)).data, found)
        return found

    def same_file(self) -> str:
        """A name under which others open the very file that is open here, also if its path leads elsewhere by now."""
        here = "/proc/self/fd"
        return f"{here}/{self._open_file().descriptor}" if os.path.isdir(here) else os.fspath(self.path)

    def require_whole(self) -> None:
        """For those that map the file themselves: it is as long as when it was opened, or ``BetonError``."""
        self._require_bytes(os.fstat(self._open_file().descriptor).st_size, self.num_bytes)
