"""What stands in the tables of a ``.beton`` file (format.py says how), of all samples or of some.

No number from a file is trusted before it was compared with the file's size: a damaged or hostile file ends in a
``BetonError``, never in a read outside of it.
"""

from __future__ import annotations

import os
import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastssl.errors import counted, printable
from fastssl.pipelines.beton.format import (
    FIELD_DTYPE,
    FIELD_TYPES,
    HEADER_DTYPE,
    MIN_PAGE_SIZE,
    MODE_JPEG,
    MODE_RAW,
    TABLE_DTYPE,
    TYPE_IMAGE,
    TYPE_INT,
    VERSION,
)
from fastssl.pipelines.beton.open_file import BetonFile, OpenFiles
from fastssl.pipelines.ops import jpeg

#: The columns of `Tables`.
KINDS = {"modes": np.uint8, "heights": np.int32, "widths": np.int32, **dict.fromkeys(("offsets", "sizes"), np.int64)}
#: IMAGE_DTYPE, a label and TABLE_DTYPE, for one sample: NumPy takes ten times as long for one.
_IMAGE, _INT, _ENTRY = struct.Struct("<BHHQ"), struct.Struct("<q"), struct.Struct("<QQQ")
#: Samples whose metadata is read at a time.
_BLOCK = 1 << 20


@dataclass
class Tables:
    """A row for each of N samples.

    Attributes:
        modes: (N,) uint8, 0 JPEG, 1 raw. heights, widths: (N,) int32, in pixels. offsets, sizes: (N,) int64, in bytes.
        labels: (N,) int64; None: the file has no integer field.
    """

    modes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray | None

    @classmethod
    def empty(cls, count: int, labelled: bool) -> Tables:
        """Of ``count`` samples, to be filled in."""
        labels = np.empty(count, np.int64) if labelled else None
        return cls(**{name: np.empty(count, kind) for name, kind in KINDS.items()}, labels=labels)

    def rows(self, which: slice) -> Tables:
        """Some neighbours, on the same memory."""
        labels = None if self.labels is None else self.labels[which]
        return Tables(**{name: getattr(self, name)[which] for name in KINDS}, labels=labels)

    @property
    def pixels(self) -> np.ndarray:
        """(N,) int64."""
        found: np.ndarray = self.heights.astype(np.int64) * self.widths
        return found


class Row(NamedTuple):
    """Of one sample; ``label``: -1 where there is none."""

    height: int
    width: int
    mode: int
    offset: int
    size: int
    label: int


class TableFile(BetonFile):
    """An open ``.beton`` file, of which header and field descriptors are read and checked.

    Attributes:
        num_samples, page_size, table_at, metadata_end: as the header says, the last two in bytes.
        field_names, image_field: as the file calls them. labelled: whether there is an integer field.

    ``BetonError``: it is damaged, unfinished or empty, or has a field of a custom type.
    """

    def __init__(self, path: str | os.PathLike, among: OpenFiles | None = None):
        super().__init__(path, among)
        if self.num_bytes < HEADER_DTYPE.itemsize:
            raise self.error(f"only {self.num_bytes} bytes, shorter than a header: empty or cut off")
        # Python integers from here on: they cannot overflow, whatever the file says.
        version, num_fields, page_size, num_samples, table_at = self.array(0, 1, HEADER_DTYPE)[0].item()
        self.page_size, self.num_samples, self.table_at = page_size, num_samples, table_at
        if version in (0, VERSION) and table_at == 0:
            raise self.error("unfinished: its writer was stopped before the header was written; convert again")
        if version != VERSION:
            about = "a photo" if version in (0xD8FF, 0x5089) else f"the first two bytes say {version}"
            raise self.error(
                f"not a .beton file of version {VERSION} ({about}); fastssl convert-imagenet makes one from photos"
            )
        if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
            raise self.error(f"damaged header: page size {page_size} is not a power of two of at least {MIN_PAGE_SIZE}")
        if num_samples == 0:
            raise self.error("holds no samples")
        self._metadata_at = HEADER_DTYPE.itemsize + num_fields * FIELD_DTYPE.itemsize
        if num_fields == 0 or self._metadata_at > self.num_bytes:
            raise self.error(f"damaged header: {num_fields} field descriptors do not fit into {self.num_bytes} bytes")
        self._read_fields(self.array(HEADER_DTYPE.itemsize, num_fields, FIELD_DTYPE))
        self.metadata_end = self._metadata_at + num_samples * self._record.itemsize
        if self.metadata_end > self.num_bytes:
            raise self.error(
                f"damaged header or cut off: {num_samples} samples need {self.metadata_end} bytes of metadata, "
                f"the file has {self.num_bytes}"
            )
        if not self.metadata_end <= table_at <= self.num_bytes:
            raise self.error(
                f"cut off or damaged header: the allocation table should start at byte {table_at}, "
                f"between {self.metadata_end} and {self.num_bytes}"
            )
        room = self.num_bytes - table_at
        if room == 0 or room % TABLE_DTYPE.itemsize:
            raise self.error(f"cut off: the allocation table has {room} bytes, not a multiple of 24")
        self._entries = room // TABLE_DTYPE.itemsize
        if self._entries > num_samples * num_fields:
            raise self.error(
                f"damaged header: {self._entries} entries in the allocation table for {num_samples} samples of "
                f"{num_fields} fields"
            )

    def _read_fields(self, descriptors: np.ndarray) -> None:
        ended = (bytes(name).split(b"\0")[0] for name in descriptors["name"])
        names = [printable(name.decode("ascii", "backslashreplace")) for name in ended]
        types = descriptors["type_id"].tolist()
        for name, type_id in zip(names, types):
            if type_id not in FIELD_TYPES:
                raise self.error(
                    f"field {name!r} has the unknown or custom type {type_id}, whose size only its own program knows"
                )
        if TYPE_IMAGE not in types:
            raise self.error(f"has no image field, only {', '.join(names)}")
        image, label = types.index(TYPE_IMAGE), types.index(TYPE_INT) if TYPE_INT in types else None
        self.field_names, self.image_field, self.labelled = names, names[image], label is not None
        skipped = [
            f"{name} ({FIELD_TYPES[t][0]})" for k, (name, t) in enumerate(zip(names, types)) if k not in (image, label)
        ]
        if skipped:
            warnings.warn(f"{self.path}: fields not read: {', '.join(skipped)}", stacklevel=5)
        self._record = np.dtype([("", FIELD_TYPES[type_id][1]) for type_id in types], align=True)
        self._image, self._label = f"f{image}", f"f{label}"
        assert self._record.fields is not None  # it has some
        offsets = {name: offset for name, (_, offset, *_) in self._record.fields.items()}
        self._offsets = offsets[self._image], offsets.get(self._label)

    def read_all(self, out: Tables) -> None:
        """All tables into ``out``, about 0.2 s per million samples.

        In blocks, and each is checked before memory for the next is touched: a file with terabytes of holes is refused
        at its first one.
        """
        count = self.num_samples
        pointers, samples = np.empty(count, np.uint64), np.arange(count, dtype=np.uint64)
        for low in range(0, count, _BLOCK):
            part = slice(low, min(low + _BLOCK, count))
            pointers[part] = self._fill_in(self._records(low, part.stop - low), out.rows(part), samples[part])
        table = self._table()
        last = int(table["sample_id"].max())
        if not np.array_equal(table["ptr"], pointers):
            table = self._entries_of(_sorted(table), pointers, samples)
        if last >= count:
            raise self.error(f"damaged header: the allocation table knows more samples than the {count} of the header")
        self._fill_in_regions(pointers, table, out, samples)

    def expect(self, i: int) -> None:
        """Have the disk begin with what `row` reads, where the system can do so."""
        if hasattr(os, "posix_fadvise"):
            for at, size in self._places(i):
                os.posix_fadvise(self.open().descriptor, at, size, os.POSIX_FADV_WILLNEED)

    def row(self, i: int) -> Row:
        """What the tables say of sample ``i``, by two reads. What is out of order is looked at as in `read_all`, which
        says what is wrong; where the allocation table is not in the samples' order, by reading all of it.
        """
        with suppress(OSError, struct.error):
            record, entry = (os.pread(self.open().descriptor, size, at) for at, size in self._places(i))
            mode, width, height, pointer = _IMAGE.unpack_from(record, self._offsets[0])
            (label,) = (-1,) if self._offsets[1] is None else _INT.unpack_from(record, self._offsets[1])
            sample, place, size = _ENTRY.unpack(entry)
            pixels, mine = height * width, (sample, place) == (i, pointer) and self._entries == self.num_samples
            inside = self.metadata_end <= pointer <= self.table_at - size and 0 < size <= self.page_size
            whole = mode == MODE_JPEG or (mode == MODE_RAW and size == 3 * pixels)
            if mine and inside and whole and 0 < pixels <= jpeg.MAX_PIXELS:
                return Row(height, width, mode, pointer, size, label)
        one, out = np.array([i]), Tables.empty(1, self.labelled)
        pointers = self._fill_in(self._records(i, 1), out, one)
        table = self._table(i, 1) if self._entries == self.num_samples else np.empty(0, TABLE_DTYPE)
        if not np.array_equal(table["ptr"], pointers):
            table = self._entries_of(_sorted_table(self), pointers, one)
        self._fill_in_regions(pointers, table, out, one)
        numbers = out.heights, out.widths, out.modes, out.offsets, out.sizes, out.labels
        return Row(*(-1 if found is None else int(found[0]) for found in numbers))

    def _places(self, i: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the metadata and the table's entry of a sample stand: (byte, how many) of each."""
        size = self._record.itemsize
        return (self._metadata_at + i * size, size), (self.table_at + i * _ENTRY.size, _ENTRY.size)

    def _records(self, first: int, count: int) -> np.ndarray:
        return self.array(self._metadata_at + first * self._record.itemsize, count, self._record)

    def _table(self, first: int = 0, count: int | None = None) -> np.ndarray:
        return self.array(self.table_at + first * TABLE_DTYPE.itemsize, count or self._entries, TABLE_DTYPE)

    def _fill_in(self, records: np.ndarray, out: Tables, samples: np.ndarray) -> np.ndarray:
        """Fill in what stands in the samples' records; returns their data pointers, (n,) uint64."""
        images = records[self._image]
        out.modes[:], out.heights[:], out.widths[:] = images["mode"], images["height"], images["width"]
        if out.labels is not None:
            out.labels[:] = records[self._label]
        pixels = out.pixels
        self._require(pixels > 0, "height or width is zero", samples)
        self._require(pixels <= jpeg.MAX_PIXELS, f"more than {jpeg.MAX_PIXELS:,} pixels", samples)
        self._require(out.modes <= MODE_RAW, "its storage mode is neither 0 (JPEG) nor 1 (raw)", samples)
        pointers: np.ndarray = images["data_ptr"]
        return pointers

    def _entries_of(self, table: np.ndarray, pointers: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """The entries of a sorted table that belong to the images at ``pointers``."""
        place = np.searchsorted(table["ptr"], pointers)
        self._require(place < len(table), "no entry in the allocation table for its image", samples)
        table = table[place]
        self._require(table["ptr"] == pointers, "no entry in the allocation table for its image", samples)
        return table

    def _fill_in_regions(self, pointers: np.ndarray, table: np.ndarray, out: Tables, samples: np.ndarray) -> None:
        """Fill in where every image lies, and check that it lies between the metadata and the table."""
        sizes, low, high = np.ascontiguousarray(table["size"]), np.uint64(self.metadata_end), np.uint64(self.table_at)
        inside = (pointers >= low) & (pointers <= high)
        # Subtract before comparing: ptr + size could wrap around.
        fits = inside & (sizes <= high - np.where(inside, pointers, high))
        self._require(fits, "its image lies outside the data pages", samples)
        self._require(sizes > 0, "its image has no bytes", samples)
        self._require(sizes <= self.page_size, f"its image is larger than a page of {self.page_size} bytes", samples)
        own = table["sample_id"] == samples.astype(np.uint64, copy=False)
        self._require(own, "its image belongs to another sample", samples)
        out.offsets[:], out.sizes[:] = pointers.astype(np.int64), sizes.astype(np.int64)
        whole = (out.modes != MODE_RAW) | (out.sizes == 3 * out.pixels)
        self._require(whole, "raw pixels whose size is not height x width x 3", samples)

    def _require(self, good: np.ndarray, complaint: str, samples: np.ndarray) -> None:
        """Refuse the file where not all of these samples are ``good``."""
        if not good.all():
            bad = np.flatnonzero(~good)
            more = f" (and {counted(len(bad) - 1, 'more sample')})" if len(bad) > 1 else ""
            raise self.error(f"sample {samples[bad[0]]}: {complaint}{more}")


def _sorted(table: np.ndarray) -> np.ndarray:
    """By pointer. FFCV's workers write the table in the order in which they finish, with entries for every other field
    too. An empty bytes field takes no room, so its pointer can be the same as the image's that follows: it must not
    win.
    """
    table = table[table["size"] > 0]
    return table[np.argsort(table["ptr"], kind="stable")]


# A few: 24 bytes a sample.
@lru_cache(maxsize=4)
def _sorted_table(file: TableFile) -> np.ndarray:
    return _sorted(file._table())
