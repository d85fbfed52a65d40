"""What stands in the tables of a ``.beton`` file (format.py says how), of all samples or of some.

No number from a file is trusted before it was compared with the file's size: a damaged or hostile file ends in a
``BetonError``, never in a read outside of it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastssl.errors import counted, printable
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
from fastssl.pipelines.beton.open_file import BetonFile
from fastssl.pipelines.ops import jpeg

#: The columns of `Tables`.
KINDS = {"modes": np.uint8, "heights": np.int32, "widths": np.int32, **dict.fromkeys(("offsets", "sizes"), np.int64)}
#: Samples whose metadata is read at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Layout:
    """What header and field descriptors say, checked.

    Attributes:
        record: dtype of a sample's metadata; ``image`` and ``label`` are names in it (f0, f1, ...).
        field_names, image_field: as the file calls them.
        metadata_at, metadata_end, table_at: in bytes. entries: of the allocation table.
    """

    num_samples: int
    page_size: int
    record: np.dtype
    image: str
    label: str | None
    field_names: tuple[str, ...]
    image_field: str
    metadata_at: int
    metadata_end: int
    table_at: int
    entries: int


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
        return Tables(**{name: None if one is None else one[which] for name, one in vars(self).items()})

    @property
    def pixels(self) -> np.ndarray:
        """(N,) int64."""
        return self.heights.astype(np.int64) * self.widths


def read_layout(file: BetonFile) -> Layout:
    """``BetonError``: the file is damaged, unfinished or empty, or has a field of a custom type."""
    if file.num_bytes < HEADER_DTYPE.itemsize:
        raise file.error(f"only {file.num_bytes} bytes, shorter than a header: empty or cut off")
    # Python integers from here on: they cannot overflow, whatever the file says.
    version, num_fields, page_size, num_samples, table_at = file.array(0, 1, HEADER_DTYPE)[0].item()
    if version in (0, VERSION) and table_at == 0:
        raise file.error("unfinished: its writer was stopped before the header was written; convert again")
    if version != VERSION:
        about = "a photo" if version in (0xD8FF, 0x5089) else f"the first two bytes say {version}"
        raise file.error(
            f"not a .beton file of version {VERSION} ({about}); fastssl convert-imagenet makes one from photos"
        )
    if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise file.error(f"damaged header: page size {page_size} is not a power of two of at least {MIN_PAGE_SIZE}")
    if num_samples == 0:
        raise file.error("holds no samples")
    fields_end = HEADER_DTYPE.itemsize + num_fields * FIELD_DTYPE.itemsize
    if num_fields == 0 or fields_end > file.num_bytes:
        raise file.error(f"damaged header: {num_fields} field descriptors do not fit into {file.num_bytes} bytes")
    descriptors = file.array(HEADER_DTYPE.itemsize, num_fields, FIELD_DTYPE)
    record, image, label, names = _read_fields(file, descriptors)

    metadata_end = fields_end + num_samples * record.itemsize
    if metadata_end > file.num_bytes:
        raise file.error(
            f"damaged header or cut off: {num_samples} samples need {metadata_end} bytes of metadata, "
            f"the file has {file.num_bytes}"
        )
    if not metadata_end <= table_at <= file.num_bytes:
        raise file.error(
            f"cut off or damaged header: the allocation table should start at byte {table_at}, "
            f"between {metadata_end} and {file.num_bytes}"
        )
    if table_at == file.num_bytes or (file.num_bytes - table_at) % TABLE_DTYPE.itemsize:
        raise file.error(f"cut off: the allocation table has {file.num_bytes - table_at} bytes, not a multiple of 24")
    entries = (file.num_bytes - table_at) // TABLE_DTYPE.itemsize
    if entries > num_samples * num_fields:
        raise file.error(
            f"damaged header: {entries} entries in the allocation table for {num_samples} samples of "
            f"{num_fields} fields"
        )
    fields = f"f{image}", None if label is None else f"f{label}", tuple(names), names[image]
    return Layout(num_samples, page_size, record, *fields, fields_end, metadata_end, table_at, entries)


def _read_fields(file: BetonFile, descriptors: np.ndarray) -> tuple[np.dtype, int, int | None, list[str]]:
    """The metadata record's dtype, which fields are the image and the label, and all names."""
    ended = (bytes(name).split(b"\0")[0] for name in descriptors["name"])
    names = [printable(name.decode("ascii", "backslashreplace")) for name in ended]
    types = descriptors["type_id"].tolist()
    for name, type_id in zip(names, types):
        if type_id not in FIELD_TYPES:
            raise file.error(
                f"field {name!r} has the unknown or custom type {type_id}, whose size only its own program knows"
            )
    if TYPE_IMAGE not in types:
        raise file.error(f"has no image field, only {', '.join(names)}")
    image, label = types.index(TYPE_IMAGE), types.index(TYPE_INT) if TYPE_INT in types else None
    skipped = [
        f"{name} ({FIELD_TYPES[t][0]})" for k, (name, t) in enumerate(zip(names, types)) if k not in (image, label)
    ]
    if skipped:
        warnings.warn(f"{file.path}: fields not read: {', '.join(skipped)}", stacklevel=4)
    return np.dtype([("", FIELD_TYPES[type_id][1]) for type_id in types], align=True), image, label, names


def read_tables(file: BetonFile, layout: Layout, out: Tables) -> None:
    """All of them into ``out``, about 0.2 s per million samples.

    In blocks, and each is checked before memory for the next is touched: a file with terabytes of holes is refused at
    its first one.
    """
    count = layout.num_samples
    pointers = np.empty(count, np.uint64)
    for low in range(0, count, _BLOCK):
        part = slice(low, min(low + _BLOCK, count))
        records = file.array(layout.metadata_at + low * layout.record.itemsize, part.stop - low, layout.record)
        pointers[part] = _fill_in(file, layout, records, out.rows(part), np.arange(low, part.stop))
    table = file.array(layout.table_at, layout.entries, TABLE_DTYPE)
    last, samples = int(table["sample_id"].max()), np.arange(count, dtype=np.uint64)
    if not np.array_equal(table["ptr"], pointers):
        table = _entries_of(file, _sorted(table), pointers, samples)
    if last >= count:
        raise file.error(f"damaged header: the allocation table knows more samples than the {count} of the header")
    _fill_in_regions(file, layout, pointers, table, out, samples)


def read_some(file: BetonFile, layout: Layout, index: np.ndarray) -> Tables:
    """Those of the samples ``index``, (n,) int64, within the file: two reads a sample, checked as `read_tables` does;
    the whole allocation table where it is not in the samples' order.
    """
    out, record = Tables.empty(len(index), layout.label is not None), layout.record
    records = np.concatenate([file.array(layout.metadata_at + i * record.itemsize, 1, record) for i in index.tolist()])
    pointers = _fill_in(file, layout, records, out, index)
    if layout.entries == layout.num_samples:
        places = (layout.table_at + i * TABLE_DTYPE.itemsize for i in index.tolist())
        table = np.concatenate([file.array(place, 1, TABLE_DTYPE) for place in places])
    if layout.entries != layout.num_samples or not np.array_equal(table["ptr"], pointers):
        table = _entries_of(file, _sorted_table(file, layout), pointers, index)
    _fill_in_regions(file, layout, pointers, table, out, index)
    return out


def _fill_in(file: BetonFile, layout: Layout, records: np.ndarray, out: Tables, samples: np.ndarray) -> np.ndarray:
    """Fill in what stands in the samples' records; returns their data pointers, (n,) uint64."""
    images = records[layout.image]
    out.modes[:], out.heights[:], out.widths[:] = images["mode"], images["height"], images["width"]
    if out.labels is not None:
        out.labels[:] = records[layout.label]
    pixels = out.pixels
    _require(file, pixels > 0, "height or width is zero", samples)
    _require(file, pixels <= jpeg.MAX_PIXELS, f"more than {jpeg.MAX_PIXELS:,} pixels", samples)
    _require(file, out.modes <= MODE_RAW, "its storage mode is neither 0 (JPEG) nor 1 (raw)", samples)
    pointers: np.ndarray = images["data_ptr"]
    return pointers


def _sorted(table: np.ndarray) -> np.ndarray:
    """By pointer. FFCV's workers write the table in the order in which they finish, with entries for every other field
    too. An empty bytes field takes no room, so its pointer can be the same as the image's that follows: it must not
    win.
    """
    table = table[table["size"] > 0]
    return table[np.argsort(table["ptr"], kind="stable")]


# A few: 24 bytes a sample.
@lru_cache(maxsize=4)
def _sorted_table(file: BetonFile, layout: Layout) -> np.ndarray:
    return _sorted(file.array(layout.table_at, layout.entries, TABLE_DTYPE))


def _entries_of(file: BetonFile, table: np.ndarray, pointers: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The entries of a sorted table that belong to the images at ``pointers``."""
    place = np.searchsorted(table["ptr"], pointers)
    _require(file, place < len(table), "no entry in the allocation table for its image", samples)
    table = table[place]
    _require(file, table["ptr"] == pointers, "no entry in the allocation table for its image", samples)
    return table


def _fill_in_regions(
    file: BetonFile, layout: Layout, pointers: np.ndarray, table: np.ndarray, out: Tables, samples: np.ndarray
) -> None:
    """Fill in where every image lies, and check that it lies between the metadata and the table."""
    sizes, low, high = np.ascontiguousarray(table["size"]), np.uint64(layout.metadata_end), np.uint64(layout.table_at)
    inside = (pointers >= low) & (pointers <= high)
    # Subtract before comparing: ptr + size could wrap around.
    fits = inside & (sizes <= high - np.where(inside, pointers, high))
    _require(file, fits, "its image lies outside the data pages", samples)
    _require(file, sizes > 0, "its image has no bytes", samples)
    _require(file, sizes <= layout.page_size, f"its image is larger than a page of {layout.page_size} bytes", samples)
    _require(file, table["sample_id"] == samples.astype(np.uint64), "its image belongs to another sample", samples)
    out.offsets[:], out.sizes[:] = pointers.astype(np.int64), sizes.astype(np.int64)
    whole = (out.modes != MODE_RAW) | (out.sizes == 3 * out.pixels)
    _require(file, whole, "raw pixels whose size is not height x width x 3", samples)


def _require(file: BetonFile, good: np.ndarray, complaint: str, samples: np.ndarray) -> None:
    """Refuse the file where not all of these samples are ``good``."""
    if not good.all():
        bad = np.flatnonzero(~good)
        more = f" (and {counted(len(bad) - 1, 'more sample')})" if len(bad) > 1 else ""
        raise file.error(f"sample {samples[bad[0]]}: {complaint}{more}")
