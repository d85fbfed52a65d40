"""``.beton``, FFCV's file format (version 2).

A file is: header | field descriptors | one metadata record a sample | data pages | allocation table up to the end of
the file. Everything is little-endian and packed except the metadata record, which is laid out as a C struct would be::

    header, 24 bytes        version u2, num_fields u2, page_size u4, num_samples u8, alloc_table_ptr u8
    descriptor, 1041 bytes  type id u1, name 16 bytes NUL-padded, arguments 1024 bytes
    image record, 13 bytes  mode u1 (0 JPEG, 1 raw height x width x 3), width u2, height u2, data_ptr u8
    table entry, 24 bytes   sample_id u8, ptr u8, size u8

A data region's size stands only in the allocation table, under the same ``ptr``. No region crosses a multiple of
``page_size``, because FFCV's process cache loads whole pages and finds them as ``ptr >> log2(page_size)``. The format
has no checksums: the converter keeps them in a side file, ``FILE.beton.json``.
"""

from __future__ import annotations

import numpy as np

VERSION = 2
MODE_JPEG = 0
MODE_RAW = 1
#: FFCV's smallest allowed page, and the size it takes unless told otherwise.
MIN_PAGE_SIZE = 2 << 20
DEFAULT_PAGE_SIZE = 8 << 20
#: ``page_size`` is 32 bits and a power of two.
MAX_PAGE_SIZE = 1 << 31
HEADER_DTYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD_DTYPE = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", (1024,))])
IMAGE_DTYPE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
TABLE_DTYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
TYPE_INT = 1
TYPE_IMAGE = 2
_REGION_DTYPE = np.dtype([("ptr", "<u8"), ("size", "<u8")])
#: field type id -> (what it is called, its part of a metadata record)
FIELD_TYPES: dict[int, tuple[str, np.dtype]] = {
    0: ("float", np.dtype("<f8")),
    TYPE_INT: ("int", np.dtype("<i8")),
    TYPE_IMAGE: ("image", IMAGE_DTYPE),
    3: ("bytes", _REGION_DTYPE),
    4: ("ndarray", np.dtype("<u8")),
    5: ("json", _REGION_DTYPE),
    6: ("torch tensor", np.dtype("<u8")),
}
#: One sample as the writer remembers it; also what a conversion journal stores.
RECORD_DTYPE = np.dtype(
    [("offset", "<u8"), ("size", "<u8"), ("label", "<i8"), ("height", "<u4"), ("width", "<u4"), ("mode", "u1")]
)
