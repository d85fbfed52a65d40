"""What stands in front of a JPEG's pixels: its segments, and a copy of it without what decoders only pass over.

Markers are found as libjpeg finds them: bytes that belong to nothing are passed over.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import suppress

#: A marker behind coded data, in which 0xFF is followed by 0 or a restart's number.
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")
#: The scan headers of a sequential JPEG: marker, length, 1 to 4 components, then three bytes that say what every
#: sequential scan holds, so that decoders need not read them.
_SCAN = re.compile(rb"(\xff\xda\0(?:\x08\x01..|\x0a\x02.{4}|\x0c\x03.{6}|\x0e\x04.{8}))...", re.DOTALL)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(second byte of the marker, where the content begins, where it ends) of what stands in front of the pixels, the
    header of the first scan (0xDA) being the last; it stops at what is cut off.
    """
    at, end = 2, len(data) - 3
    while 0 <= (at := data.find(b"\xff", at)) < end:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD7:  # no marker, or one that stands alone, without a length
            at += 2
        elif marker == 0xD9:
            return
        else:
            start, at = at + 4, at + 2 + max(2, data[at + 2] << 8 | data[at + 3])
            yield marker, start, at
            if marker == 0xDA:
                return


def is_frame(marker: int) -> bool:
    """Whether this marker begins a frame: tables, reserved, and conditioning stand among those that do."""
    return marker & 0xF0 == 0xC0 and marker not in (0xC4, 0xC8, 0xCC)


def count_scans(data: bytes) -> int:
    """Scans of a JPEG up to its end marker, or that of the file."""
    at, scans = 2, 0
    while (found := _MARKER.search(data, at)) and (marker := found[1][0]) != 0xD9:
        scans += marker == 0xDA
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    return scans


def tidied(data: bytes) -> bytes | None:
    """A copy with the same pixels, of nothing but what they are decoded by, and that as the standard has it: 0, 63, 0
    in the header of a sequential scan (Samsung's phones wrote 0, 0, 0), JFIF 1.1, a transform that Adobe knew, no stray
    bytes. None: there are no pixels, or it is no JPEG that decoders know.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    parts, sequential = [data[:2]], False
    for marker, start, end in segments(data):
        body = data[start:end]
        if marker == 0xE0 and len(body) >= 14 and body.startswith(b"JFIF\0"):
            body = b"JFIF\0\1\1\0\0\1\0\1\0\0"
        elif marker == 0xEE and len(body) >= 12 and body.startswith(b"Adobe"):
            body = body[:11] + bytes([min(body[11], 1)])  # libjpeg takes all but 0 (RGB) for YCbCr
        elif marker == 0xDA:
            scans = data[start - 4 :]
            return b"".join(parts) + (_SCAN.sub(b"\\g<1>\0\x3f\0", scans) if sequential else scans)
        elif marker & 0xF0 == 0xE0 or marker in (0xFE, 0xDC):
            continue  # what programs add for themselves, and a number of lines, which decoders do not read
        elif not (marker & 0xF0 == 0xC0 or marker in (0xDB, 0xDD)):
            return None  # nothing that belongs into a JPEG
        sequential = sequential or marker in (0xC0, 0xC1, 0xC9)
        parts.append(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body)
    return None


def orientation_and_profile(data: bytes) -> tuple[int, bytes]:
    """The EXIF orientation of a JPEG, 1 (upright) to 8, 1 when it has none or its EXIF block is damaged (EXIF 2.3, tag
    0x0112); and its colour profile, joined from its numbered APP2 segments, empty when it has none.
    """
    orientation, parts = 0, []
    for marker, at, end in segments(data):
        if marker == 0xE1 and not orientation and data.startswith(b"Exif\0\0", at):
            orientation = _tiff_orientation(data[at + 6 : end])
        elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0", at):
            parts.append(data[at + 12 : end])
    # Number and count of the part, then its bytes.
    return orientation or 1, b"".join(part[2:] for part in sorted(parts, key=lambda part: part[:1]))


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4], "not a TIFF")
    with suppress(struct.error):  # that, or cut off
        directory = struct.unpack_from(f"{order}I", tiff, 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", tiff, directory)[0]):
            tag, kind, _, value = struct.unpack_from(f"{order}HHI4s", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112:
                # A SHORT by the standard; some cameras write a LONG.
                orientation: int = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", value)[0]
                return orientation if 1 <= orientation <= 8 else 1
    return 1
