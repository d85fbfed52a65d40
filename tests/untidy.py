"""JPEGs that decoders complain of although their pixels are whole."""

from __future__ import annotations


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def markers_behind_the_header(data: bytes) -> list[int]:
    """Where markers stand behind the first scan's header: of tables, scans, restarts, and the end."""
    start = data.index(b"\xff\xda") + 8
    return [at for at in range(start, len(data) - 1) if data[at] == 0xFF and data[at + 1] not in (0x00, 0xFF)]


def untidy(data: bytes) -> dict[str, bytes]:
    """name -> the JPEG ``data``, of Pillow's, with headers or bytes that the strict decoder complains of, and with all
    of its pixels.
    """
    made = {}
    progressive, grey = b"\xff\xc2" in data, data[data.index(b"\xff\xda") + 4] == 1 and b"\xff\xc2" not in data

    def put(at: int, new: bytes) -> bytes:
        return data[:at] + new + data[at + len(new) :]

    if not progressive:
        end = data.index(b"\xff\xda") + 5 + 2 * data[data.index(b"\xff\xda") + 4]
        for three in [(0, 0, 0), (0, 0, 16), (1, 63, 0), (0, 64, 0), (0, 255, 0), (9, 2, 255)]:  # Samsung: 0, 0, 0
            made[f"scan of {three}"] = put(end, bytes(three))
    made["JFIF 2.1"] = put(11, b"\2")
    made["JFIF 0.9"] = put(11, b"\0\x09")
    for transform in (2, 7, 255) if not grey else ():
        made[f"Adobe's transform {transform}"] = (
            data[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform])) + data[20:]
        )
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    for name, at in [("tables", data.index(b"\xff\xdb")), ("frame", frame), ("scan", data.index(b"\xff\xda"))]:
        for junk in (b"\0", b"abcdefg", b"\0\xff\0"):
            made[f"{junk!r} before the {name}"] = data[:at] + junk + data[at:]
    made["comment of a wrong size"] = data[:20] + b"\xff\xfe\0\x04abcdefgh" + data[20:]
    for number, at in enumerate(markers_behind_the_header(data)):
        made[f"stray bytes before marker {number}, {data[at + 1]:x}"] = data[:at] + b"\1\2" * 6 + data[at:]
    spread = data
    for at in reversed(markers_behind_the_header(data)[::4]):
        spread = spread[:at] + bytes(20) + spread[at:]
    made["stray bytes in many places"] = spread
    return made
