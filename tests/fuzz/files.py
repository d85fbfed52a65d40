"""Small ``.beton`` files to begin from, as plain values that can be changed and put together again.

The layout is written down here a second time, byte by byte: what is put together need not be a file that our writer
could write.
"""

from __future__ import annotations

import gzip
import io
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

#: ids of the types of fields, and their part of a sample's record
INT, IMAGE, BYTES, FLOAT = 1, 2, 3, 0
_RECORD = {INT: ("q", 8), IMAGE: ("BHHQ", 1), BYTES: ("QQ", 8), FLOAT: ("d", 8)}


@dataclass(frozen=True)
class Sample:
    """One picture as it is stored. ``mode`` 0: JPEG, 1: raw height x width x 3."""

    data: bytes
    height: int
    width: int
    mode: int = 0
    label: int = 0


@dataclass(frozen=True)
class Beton:
    """A file: its samples and the choices of its layout.

    Attributes:
        fields: type ids, in the order of the descriptors.
        backwards: the allocation table lists the last sample first.
        stored: the layout as somebody else wrote it; what is changed in a sample is laid out again.
        paged: data begins at a multiple of the page size, as real writers have it; otherwise right behind the metadata,
            which keeps files small.
    """

    name: str
    samples: tuple[Sample, ...]
    fields: tuple[int, ...] = (IMAGE, INT)
    backwards: bool = False
    paged: bool = False
    page_size: int = 2 << 20
    extra: bytes = field(default=b"some bytes", repr=False)
    stored: Layout | None = field(default=None, repr=False)

    def layout(self) -> Layout:
        """The bytes, and where what stands in them."""
        if self.stored is not None:
            return self.stored
        record, at_field = 0, []
        for type_id in self.fields:
            _, align = _RECORD[type_id]
            record += -record % align
            at_field.append(record)
            record += struct.calcsize("<" + _RECORD[type_id][0])
        record += -record % max(_RECORD[type_id][1] for type_id in self.fields)
        metadata = 24 + 1041 * len(self.fields)
        at = metadata + record * len(self.samples)
        at += -at % self.page_size if self.paged else 0
        data, table, records, places = b"", [], b"", []
        first = at
        for number, sample in enumerate(self.samples):
            row = bytearray(record)
            for type_id, where in zip(self.fields, at_field):
                if type_id == IMAGE:
                    struct.pack_into("<BHHQ", row, where, sample.mode, sample.width, sample.height, at)
                    table.append((number, at, len(sample.data)))
                    places.append((at, len(sample.data)))
                    data, at = data + sample.data, at + len(sample.data)
                elif type_id == BYTES:
                    struct.pack_into("<QQ", row, where, at, len(self.extra))
                    table.append((number, at, len(self.extra)))
                    data, at = data + self.extra, at + len(self.extra)
                elif type_id == INT:
                    struct.pack_into("<q", row, where, sample.label)
                else:
                    struct.pack_into("<d", row, where, number / 7)
            records += bytes(row)
        data += bytes(-at % 8)
        at += -at % 8
        rows = b"".join(struct.pack("<QQQ", *row) for row in (reversed(table) if self.backwards else table))
        names = {INT: b"label", IMAGE: b"image", BYTES: b"name", FLOAT: b"weight"}
        fields = b"".join(struct.pack("<B16s1024x", type_id, names[type_id]) for type_id in self.fields)
        header = struct.pack("<HHIQQ", 2, len(self.fields), self.page_size, len(self.samples), at)
        head = header + fields + records
        return Layout(head + bytes(first - len(head)) + data + rows, metadata, record, first, at, tuple(places))


@dataclass(frozen=True)
class Layout:
    """A file's bytes and where its parts begin; ``places``: (offset, size) of each picture."""

    content: bytes
    metadata: int
    record: int
    data: int
    table: int
    places: tuple[tuple[int, int], ...]


def _picture(seed: int, height: int, width: int, grey: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    rgb = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return rgb[..., 0] if grey else rgb


def jpeg(seed: int, height: int, width: int, mode: str = "RGB", **options: object) -> bytes:
    """A small JPEG, by Pillow."""
    buffer = io.BytesIO()
    image = Image.fromarray(_picture(seed, height, width, mode == "L"))
    (image if mode in ("RGB", "L") else image.convert(mode)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    return exif.tobytes()


def kinds_of_jpeg(seed: int = 0) -> dict[str, bytes]:
    """One of each kind that is found in the wild, 24 x 16 pixels (height x width)."""
    size = (24, 16)
    return {
        "baseline": jpeg(seed, *size),
        "4:4:4": jpeg(seed + 1, *size, subsampling=0, quality=95),
        "4:2:2": jpeg(seed + 2, *size, subsampling=1),
        "progressive": jpeg(seed + 3, *size, progressive=True),
        "grey": jpeg(seed + 4, *size, "L"),
        "grey, progressive": jpeg(seed + 5, *size, "L", progressive=True),
        "restarts": jpeg(seed + 6, *size, restart_marker_blocks=1),
        "CMYK": jpeg(seed + 7, *size, "CMYK"),
        "EXIF": jpeg(seed + 8, *size, exif=_exif(), comment=b"a comment"),
        "own tables": jpeg(seed + 9, *size, optimize=True, quality=30),
    }


def seed_files() -> list[Beton]:
    """The files that corruption begins from."""
    small = [(8 + 8 * (k % 3), 8 + 4 * (k % 4)) for k in range(8)]
    raw = tuple(Sample(_picture(k, *size).tobytes(), *size, 1, k) for k, size in enumerate(small))
    coded = tuple(Sample(jpeg(k, *size), *size, 0, k) for k, size in enumerate(small))
    mixed = tuple(pair[k % 2] for k, pair in enumerate(zip(raw, coded)))
    kinds = tuple(Sample(data, 24, 16, 0, k) for k, data in enumerate(kinds_of_jpeg().values()))
    return [
        Beton("mixed", mixed),
        Beton("no labels", coded[:5], fields=(IMAGE,)),
        Beton("one sample", coded[2:3]),
        Beton("one raw sample", raw[1:2], fields=(IMAGE,)),
        Beton("table backwards", mixed, backwards=True),
        Beton("more fields", mixed[:6], fields=(BYTES, IMAGE, FLOAT, INT), backwards=True),
        Beton("kinds of JPEG", kinds),
        Beton("as written", mixed[:4], paged=True),
        Beton("large page", mixed[:4], page_size=1 << 31),
        written_by_ffcv(),
    ]


def with_data(file: Beton, number: int, data: bytes) -> Beton:
    """``file`` with other bytes for one picture."""
    samples = list(file.samples)
    samples[number] = replace(samples[number], data=data)
    return replace(file, samples=tuple(samples), stored=None, paged=False)


def written_by_ffcv() -> Beton:
    """What ffcv 1.0.2's ``DatasetWriter`` wrote: six pictures with a weight before and a label behind each."""
    content = gzip.decompress((Path(__file__).parent / "written-by-ffcv.beton.gz").read_bytes())
    count, table = struct.unpack_from("<QQ", content, 8)
    fields = tuple(content[24 + 1041 * k] for k in range(struct.unpack_from("<H", content, 2)[0]))
    metadata = 24 + 1041 * len(fields)
    assert fields == (FLOAT, IMAGE, INT)
    records = [struct.unpack_from("<dBHHQ3xq", content, metadata + 32 * k) for k in range(count)]
    sizes = {at: size for _, at, size in struct.iter_unpack("<QQQ", content[table:])}
    places = tuple((record[4], sizes[record[4]]) for record in records)
    samples = tuple(
        Sample(content[at : at + size], row[3], row[2], row[1], row[5]) for (at, size), row in zip(places, records)
    )
    return Beton(
        "written by ffcv",
        samples,
        fields,
        paged=True,
        stored=Layout(content, metadata, 32, places[0][0], table, places),
    )
