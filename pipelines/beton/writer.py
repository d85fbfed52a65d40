"""Writing ``.beton`` files (format.py says what they look like) with NumPy alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastssl.errors import BetonError, counted
from fastssl.pipelines.beton.format import (
    DEFAULT_PAGE_SIZE,
    FIELD_DTYPE,
    FIELD_TYPES,
    HEADER_DTYPE,
    MAX_PAGE_SIZE,
    MIN_PAGE_SIZE,
    MODE_JPEG,
    MODE_RAW,
    RECORD_DTYPE,
    TABLE_DTYPE,
    TYPE_IMAGE,
    TYPE_INT,
    VERSION,
)


class BetonWriter:
    """Write samples one after the other into a ``.beton`` file that FFCV reads too.

    Room is reserved for ``capacity`` samples and the header, written last, says how many came: a file whose writer was
    stopped has a header of zeros and is refused by every reader. Memory: 33 bytes a sample.

    A sample larger than a page doubles ``page_size`` as often as needed. That is safe at any time, because whatever
    does not cross a multiple of P does not cross a multiple of 2P either.

    Args:
        path: the file; it is replaced. capacity: most samples that may come.
        labels: with an integer field ``label`` behind ``image``, or without.
        page_size: in bytes, a power of two of at least 2 MiB.
        written: RECORD_DTYPE records of samples that ``path`` already holds, from a writer that was stopped and had the
            same ``capacity``, ``labels`` and ``page_size``: writing goes on behind them, and what lies behind them is
            cut off.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        capacity: int,
        *,
        labels: bool = True,
        page_size: int = DEFAULT_PAGE_SIZE,
        written: np.ndarray | None = None,
    ):
        if capacity < 1:
            raise BetonError(f"{path}: a .beton file needs at least one sample")
        if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
            raise BetonError(f"page size {page_size} is not a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}")
        self.path = Path(path)
        self.labels = labels
        self._fields = [("image", TYPE_IMAGE)] + ([("label", TYPE_INT)] if labels else [])
        self._record_dtype = np.dtype([("", FIELD_TYPES[type_id][1]) for _, type_id in self._fields], align=True)
        self._metadata_at = HEADER_DTYPE.itemsize + len(self._fields) * FIELD_DTYPE.itemsize
        metadata_end = self._metadata_at + capacity * self._record_dtype.itemsize
        self._page_size = page_size
        self._position = -(-metadata_end // page_size) * page_size
        self._records = np.zeros(capacity, RECORD_DTYPE)
        written = np.zeros(0, RECORD_DTYPE) if written is None else written
        self.num_samples = len(written)
        mode = "r+b" if self.num_samples else "wb"
        self._file = open(self.path, mode, buffering=1 << 20)  # noqa: SIM115 - lives on, see close()
        if self.num_samples:
            self._records[: self.num_samples] = written
            self._grow_page(int(written["size"].max()))
            self._position = int(written[-1]["offset"] + written[-1]["size"])
            self._file.truncate(self._position)
            # It may have been stopped between its header and its rename: unfinished again.
            self._file.write(bytes(HEADER_DTYPE.itemsize))

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, exc_type: type | None, *exc: object) -> None:
        """Finish the file; after an exception only close it, so that it stays recognisably unfinished."""
        try:
            if exc_type is None:
                self.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Close the file as it is: unless :meth:`finish` came before, every reader will call it unfinished."""
        self._file.close()

    @property
    def records(self) -> np.ndarray:
        """RECORD_DTYPE records of the samples so far."""
        return self._records[: self.num_samples]

    def add(self, data: bytes | np.ndarray, height: int, width: int, label: int = 0, mode: int = MODE_JPEG) -> None:
        """Append one sample: the bytes of a JPEG of ``height`` x ``width`` pixels, or with ``mode`` 1 its raw (H, W, 3)
        uint8 pixels.
        """
        view = (data.data if isinstance(data, np.ndarray) else memoryview(data)).cast("B")
        size = len(view)
        if self.num_samples == len(self._records):
            raise BetonError(f"{self.path}: room was reserved for {counted(self.num_samples, 'sample')} only")
        sides_fit = 0 < height <= 0xFFFF and 0 < width <= 0xFFFF
        if not sides_fit or size == 0 or (mode == MODE_RAW and size != height * width * 3):
            picture = f"a picture of {height}x{width} (sides are 1 to 65535)"
            raise BetonError(f"{self.path}: cannot store {size} bytes as {picture}")
        self._grow_page(size)
        if self._position % self._page_size + size > self._page_size:
            self._position += -self._position % self._page_size
        # Seeking over the rest of a page leaves a hole of zeros that takes no disk space.
        if self._file.tell() != self._position:
            self._file.seek(self._position)
        self._file.write(view)
        self._records[self.num_samples] = (self._position, size, label, height, width, mode)
        self.num_samples += 1
        self._position += size

    def _grow_page(self, size: int) -> None:
        if size > MAX_PAGE_SIZE:
            raise BetonError(f"{self.path}: a sample of {size} bytes is larger than the format's largest page")
        while size > self._page_size:
            self._page_size *= 2

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the allocation table, the metadata and, last, the header; bring all of it to the disk."""
        if self.num_samples == 0:
            raise BetonError(f"{self.path}: no samples were written")
        records = self.records
        table = np.empty(len(records), TABLE_DTYPE)
        table["sample_id"], table["ptr"], table["size"] = np.arange(len(records)), records["offset"], records["size"]
        metadata = np.zeros(len(records), self._record_dtype)
        metadata["f0"]["mode"], metadata["f0"]["data_ptr"] = records["mode"], records["offset"]
        metadata["f0"]["height"], metadata["f0"]["width"] = records["height"], records["width"]
        if self.labels:
            metadata["f1"] = records["label"]
        fields = np.zeros(len(self._fields), FIELD_DTYPE)
        for descriptor, (name, type_id) in zip(fields, self._fields):
            descriptor["type_id"], descriptor["name"] = type_id, name.encode("ascii")

        table_at = self._position + -self._position % 8
        self._file.seek(table_at)
        self._file.write(table.tobytes())
        self._file.seek(HEADER_DTYPE.itemsize)
        self._file.write(fields.tobytes() + metadata.tobytes())
        self.sync()
        header = np.array((VERSION, len(fields), self._page_size, len(records), table_at), HEADER_DTYPE)
        self._file.seek(0)
        self._file.write(header.tobytes())
        self.sync()
