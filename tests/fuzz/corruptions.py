"""What can happen to a file, drawn from a seed: (seed, number) always gives the same corrupted bytes.

A plain generator and not hypothesis: a case must run in a process that may die of it, with a clock beside it; ten
thousand of them must take a minute; and what is found is a file to keep, which needs no shrinking. Coverage could not
guide a search here, because the decoders in C come as wheels without instrumentation: knowing the format, and where its
numbers stand, finds what blind flips do not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from fuzz.files import Beton, Layout, seed_files, with_data

#: numbers at which arithmetic goes wrong
INTERESTING = sorted(
    {0, 1, 2, 3, 7, 8, 13, 23, 24, 25, 255, 256, 1041, 32767, 65535, 65536, 2 << 20, (2 << 20) - 1, 1 << 24}
    | {sign + (1 << bits) for bits in (31, 32, 47, 52, 53, 62, 63) for sign in (-1, 0, 1)}
    | {(1 << 64) - n for n in (1, 2, 8, 24, 4096)}
)


@dataclass(frozen=True)
class Case:
    """A corrupted file.

    Attributes:
        origin: the name of the file it began as. how: what was done to it. content: the result.
    """

    origin: str
    how: str
    content: bytes


class Corruptor:
    """Draws cases. ``files``: what they begin from."""

    def __init__(self, files: list[Beton] | None = None):
        self.files = seed_files() if files is None else files
        self.layouts = [file.layout() for file in self.files]

    def case(self, seed: int, number: int) -> Case:
        """Case ``number`` of ``seed``."""
        rng = np.random.default_rng([seed, number])
        # A file with real pages costs as much as all others together.
        weights = np.array([0.1 if file.stored else 0.2 if file.paged else 1.0 for file in self.files])
        chosen = int(rng.choice(len(self.files), p=weights / weights.sum()))
        file, layout = self.files[chosen], self.layouts[chosen]
        change = _CHANGES[int(rng.choice(len(_CHANGES), p=_WEIGHTS))]
        content = change(self, rng, file, layout)
        return Case(file.name, change.__name__.strip("_"), content)


# ---------------------------------------------------------------- the file


def _some_place(rng: np.random.Generator, layout: Layout) -> int:
    """Mostly where numbers stand, or pictures."""
    places = (
        lambda: rng.integers(0, 24),
        lambda: 24 + 1041 * rng.integers(0, (layout.metadata - 24) // 1041) + rng.integers(0, 17),
        lambda: rng.integers(layout.metadata, min(layout.data, layout.metadata + 16 * 48)),
        lambda: rng.integers(layout.data, layout.table),
        lambda: rng.integers(layout.table, len(layout.content)),
        lambda: rng.integers(0, len(layout.content)),
    )
    return int(places[rng.choice(6, p=[0.15, 0.1, 0.25, 0.25, 0.2, 0.05])]())


def bits(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    content = bytearray(layout.content)
    for _ in range(int(rng.choice([1, 1, 1, 2, 8, 64]))):
        content[_some_place(rng, layout)] ^= 1 << int(rng.integers(8))
    return bytes(content)


def some_bytes(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    content = bytearray(layout.content)
    for _ in range(int(rng.choice([1, 1, 2, 5, 30]))):
        content[_some_place(rng, layout)] = int(rng.choice([0, 255, 127, 128, rng.integers(256)]))
    return bytes(content)


def words(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    content = bytearray(layout.content)
    for _ in range(int(rng.choice([1, 1, 2, 4]))):
        at, size = _some_place(rng, layout), int(rng.choice([2, 4, 8, 16]))
        content[at : at + size] = rng.bytes(len(content[at : at + size]))
    return bytes(content)


def numbers(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    """An interesting number, or one near the right one, in a field of header, metadata or table."""
    content = bytearray(layout.content)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        count = len(file.samples)
        image = layout.metadata + layout.record * int(rng.integers(count))
        entry = layout.table + 24 * int(rng.integers((len(content) - layout.table) // 24))
        fields = [
            *[(0, "<H"), (2, "<H"), (4, "<I"), (8, "<Q"), (16, "<Q")],
            *[(24 + 1041 * int(rng.integers(len(file.fields))), "<B")],
            *[
                (image, "<B"),
                (image + 1, "<H"),
                (image + 3, "<H"),
                (image + 5, "<Q"),
                (image + layout.record - 8, "<q"),
            ],
            *[(entry, "<Q"), (entry + 8, "<Q"), (entry + 16, "<Q")],
        ]
        at, form = fields[int(rng.integers(len(fields)))]
        now = struct.unpack_from(form, content, at)[0]
        value = (
            int(rng.choice(INTERESTING))
            if rng.integers(2)
            else now + int(rng.choice([-24, -8, -1, 1, 2, 8, 24, now, len(content)]))
        )
        width = 8 * struct.calcsize(form)
        struct.pack_into(form.upper(), content, at, value & ((1 << width) - 1))
    return bytes(content)


def cut(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    ends = (layout.table, layout.data, layout.metadata, len(layout.content), int(rng.integers(len(layout.content))))
    return layout.content[: max(0, int(rng.choice(ends)) - int(rng.choice([0, 1, 7, 8, 24, 100])))]


def grown(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    size = int(rng.choice([1, 8, 24, 48, 4096]))
    more = rng.bytes(size) if rng.integers(2) else bytes(size)
    at = int(rng.choice([0, layout.metadata, layout.data, layout.table, len(layout.content)]))
    return layout.content[:at] + more + layout.content[at:]


def spliced(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    """The begin of one file and the end of another."""
    other = corruptor.layouts[int(rng.integers(len(corruptor.layouts)))]
    names = ("metadata", "data", "table")
    if rng.integers(2):
        part = names[int(rng.integers(3))]
        return layout.content[: getattr(layout, part)] + other.content[getattr(other, part) :]
    at = int(rng.integers(len(layout.content)))
    return layout.content[:at] + other.content[at:]


def blocks(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    """A part of the file lost (zeros), repeated, or written to another place: what disks and broken copies do."""
    content = bytearray(layout.content)
    size = int(rng.choice([24, 64, 512, 4096]))
    at, to = (int(place) for place in rng.integers(0, len(content), 2))
    part = bytes(content[at : at + size])
    content[to : to + len(part)] = bytes(len(part)) if rng.integers(2) else part
    return bytes(content[: len(layout.content)])


def swapped(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    """Two records, two entries of the table, or two parts of two records change places."""
    content = bytearray(layout.content)
    start, size, count = (
        (layout.metadata, layout.record, len(file.samples))
        if rng.integers(2)
        else (layout.table, 24, (len(content) - layout.table) // 24)
    )
    one, two = (start + size * int(rng.integers(count)) for _ in range(2))
    low = int(rng.choice([0, 0, size - 8, size // 2]))
    one, two, size = one + low, two + low, int(rng.choice([size - low, min(8, size - low)]))
    content[one : one + size], content[two : two + size] = content[two : two + size], content[one : one + size]
    return bytes(content)


def noise(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    size = int(rng.choice([0, 1, 23, 24, 25, 1065, 2106, 5000]))
    kept = int(rng.choice([0, 2, 16, 24, 2106]))
    return (layout.content[:kept] + rng.bytes(size))[: max(size, kept)]


# ---------------------------------------------------------------- pictures


def jpeg_bytes(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    """Damage to one picture inside a file whose tables are in order."""
    return _with_picture(rng, file, lambda data: _touched(rng, data))


def jpeg_markers(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    """An edit that knows what it hits: sizes, tables, restarts, scans, lengths of segments."""
    return _with_picture(rng, file, lambda data: edit_markers(rng, data))


def jpeg_of_another(corruptor: Corruptor, rng: np.random.Generator, file: Beton, layout: Layout) -> bytes:
    """Another picture's bytes, or the half of them."""
    donor = corruptor.files[int(rng.integers(len(corruptor.files)))]
    theirs = donor.samples[int(rng.integers(len(donor.samples)))].data
    at = int(rng.integers(0, 3))
    return _with_picture(
        rng, file, lambda data: theirs if at == 0 else data[: len(data) // 2] + theirs[len(theirs) // 2 :]
    )


def _with_picture(rng: np.random.Generator, file: Beton, change: Callable[[bytes], bytes]) -> bytes:
    number = int(rng.integers(len(file.samples)))
    data = change(file.samples[number].data)
    changed = with_data(file, number, data or b"\0")
    if rng.integers(8) == 0:  # and a record that says what the picture says of itself
        sample = replace(
            changed.samples[number], height=int(rng.choice([1, 8, 24, 65535])), width=int(rng.choice([1, 8, 16, 65535]))
        )
        changed = replace(changed, samples=(*changed.samples[:number], sample, *changed.samples[number + 1 :]))
    return changed.layout().content


def _touched(rng: np.random.Generator, data: bytes) -> bytes:
    changed = bytearray(data or b"\0")
    how = int(rng.integers(5))
    for _ in range(int(rng.choice([1, 2, 6]))):
        at = int(rng.integers(len(changed)))
        if how == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            changed[at] = int(rng.integers(256))
        elif how == 2:
            del changed[at : at + int(rng.integers(1, 9))]
        elif how == 3:
            changed[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            changed = changed[: at + 1]
        if not changed:
            break
    return bytes(changed)


def segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) of the segments of a JPEG before its coded data, and of what follows each start of scan."""
    found, at = [], 2
    while at + 4 <= len(data):
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            break
        marker = data[at + 1]
        if marker in (0x00, 0xFF, 0x01) or 0xD0 <= marker <= 0xD9:
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((marker, at, min(end, len(data))))
        at = max(end, at + 4)
    return found


def edit_markers(rng: np.random.Generator, data: bytes) -> bytes:
    """One or two edits of a JPEG's segments."""
    for _ in range(int(rng.choice([1, 1, 2]))):
        found = segments(data)
        if data[:2] != b"\xff\xd8" or not found:
            return _touched(rng, data)
        _, start, end = found[int(rng.integers(len(found)))]
        changed, how = bytearray(data), int(rng.integers(10))
        frames = [row for row in found if 0xC0 <= row[0] <= 0xCF and row[0] not in (0xC4, 0xC8, 0xCC)]
        scans = [row for row in found if row[0] == 0xDA]
        if how == 0 and frames:  # sizes and sampling factors of the frame
            at = frames[0][1]
            where, size = [(5, 2), (7, 2), (4, 1), (9, 1), (11, 1), (14, 1)][int(rng.integers(6))]
            value = int(rng.choice([0, 1, 2, 3, 4, 7, 8, 9, 12, 16, 17, 34, 50000, 65500, 65535]))
            changed[at + where : at + where + size] = (value & (256**size - 1)).to_bytes(size, "big")
        elif how == 1 and frames:  # another kind of frame: progressive, lossless, arithmetic
            changed[frames[0][1] + 1] = 0xC0 + int(rng.integers(16))
        elif how == 2 and scans:  # a scan said again and again, or without its data
            again = changed[scans[0][1] : scans[-1][2] + int(rng.integers(0, 60))]
            at = int(rng.choice([scans[0][1], scans[-1][1], len(data) - 2]))
            changed[at:at] = again * int(rng.choice([1, 3, 90, 200]))
        elif how == 3 and scans:  # the spectral band and the bits of a scan
            at = scans[int(rng.integers(len(scans)))][2]
            changed[at - 3 : at] = bytes(int(n) for n in rng.choice([0, 1, 2, 5, 63, 64, 255, 0x13, 0x21, 0xD0], 3))
        elif how == 4:  # a restart interval
            changed[start:start] = b"\xff\xdd\x00\x04" + int(rng.choice([0, 1, 2, 3, 65535])).to_bytes(2, "big")
        elif how == 5:  # a length that is not the segment's
            length = int(rng.choice([0, 1, 2, 3, 4, end - start - 1, end - start - 3, end - start + 40, 65535]))
            changed[start + 2 : start + 4] = (length & 0xFFFF).to_bytes(2, "big")
        elif how == 6:  # bytes of a table, of EXIF, of a comment
            for _ in range(int(rng.integers(1, 6))):
                changed[int(rng.integers(start + 4, max(start + 5, end))) % len(changed)] = int(
                    rng.choice([0, 1, 16, 127, 128, 255])
                )
        elif how == 7:  # a segment lost, or twice
            changed[start:end] = b"" if rng.integers(2) else changed[start:end] * 2
        elif how == 8:  # a segment of rubbish
            size = int(rng.choice([0, 1, 14, 300]))
            kind = int(rng.choice([0xE0, 0xE1, 0xE2, 0xEE, 0xC4, 0xDB, 0xCC, 0xDC, 0xFE, 0x01]))
            lead = [b"", b"Exif\0\0", b"JFIF\0", b"Adobe\0d", b"ICC_PROFILE\0"][int(rng.integers(5))]
            changed[start:start] = (
                bytes((0xFF, kind)) + (size + len(lead) + 2).to_bytes(2, "big") + lead + rng.bytes(size)
            )
        else:  # the coded data, end marker included
            at = int(rng.integers(found[-1][1], len(data)))
            changed[at:] = (
                changed[at:][: int(rng.integers(0, 4))]
                + [b"", b"\xff\xd9", b"\xff\xd0\xff\xd1", bytes(50)][int(rng.integers(4))]
            )
        if len(changed) > 1 << 20:  # repeats of repeats
            break
        data = bytes(changed)
    return data


_WEIGHED: list[tuple[Callable, float]] = [
    *[
        (bits, 3),
        (some_bytes, 3),
        (words, 2),
        (numbers, 4),
        (cut, 1.5),
        (grown, 1),
        (spliced, 1.5),
        (blocks, 2),
        (swapped, 2),
        (noise, 0.5),
    ],
    *[(jpeg_bytes, 3), (jpeg_markers, 5), (jpeg_of_another, 0.5)],
]
_CHANGES = [change for change, _ in _WEIGHED]
_WEIGHTS = np.array([weight for _, weight in _WEIGHED]) / sum(weight for _, weight in _WEIGHED)
