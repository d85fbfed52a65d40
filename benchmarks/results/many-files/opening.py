"""Opening 1,000 files of a million photos as one set: python opening.py > record.json

Four files are written, with true tables of a million made-up photos each and holes where photos would be, and a side
file of 1,000 classes and a million checksums; they are linked until there are as many as a row needs. Each row is a
process of its own. All tables and headers are in the page cache (224 MB, where 1,000 true files would have 56 GB):
times are those of the program, not of a disk.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.pipelines.beton.dataset import open_beton
from fastssl.pipelines.beton.format import RECORD_DTYPE
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.utils.versions import describe_git, describe_host, describe_versions

PHOTOS, FILES, CLASSES, BATCH, BATCHES = 1_000_000, 4, 1000, 256, 40
ROWS = (1, 10, 100, 1000)


def write(path: Path, seed: int) -> None:
    """A file of a million photos of 20 to 44 kB, all of them holes."""
    rng = np.random.default_rng(seed)
    with BetonWriter(path, PHOTOS) as writer:
        records = np.zeros(PHOTOS, RECORD_DTYPE)
        sizes = rng.integers(20_000, 44_000, PHOTOS)
        page, each = np.divmod(np.arange(PHOTOS), writer._page_size // 44_000)
        # As many to a page as fit for certain: what the converter leaves at a page's end is smaller.
        records["offset"] = writer._position + page * writer._page_size + each * 44_000
        records["size"], records["label"] = sizes, rng.integers(0, CLASSES, PHOTOS)
        records["height"], records["width"] = rng.integers(256, 400, (2, PHOTOS))
        writer._records, writer.num_samples = records, PHOTOS
        writer._position = int(records["offset"][-1]) + 44_000
    with BetonReader(path) as reader:
        sums = base64.b64encode(rng.integers(0, 2**32, PHOTOS, np.uint32).tobytes()).decode("ascii")
        note = {"bytes": reader.num_bytes, "classes": [f"n{10_000_000 + k}" for k in range(CLASSES)]}
        Path(f"{path}.json").write_text(json.dumps({**note, "crc32": {**reader.table_checksums(), "samples": sums}}))


def memory(name: str) -> float:
    """``VmRSS``, or the peak ``VmHWM``, of this process in MB."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


def measure(pattern: str) -> dict[str, Any]:
    """Of one row, in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = memory("VmRSS"), time.perf_counter()
    with open_beton(pattern) as reader:
        row: dict[str, Any] = {"files": len(reader.files), "photos": len(reader), "lazy": reader.lazy}
        row |= {"open_s": time.perf_counter() - started, "kept_mb": memory("VmRSS") - before}
        row["peak_mb"] = memory("VmHWM") - before
        assert len(reader.classes or ()) == CLASSES
        started = time.perf_counter()
        row["identity"] = f"{reader.table_checksums()} {reader.photo_checksum():08x}"
        row["identity_s"] = time.perf_counter() - started
        rng, runs = np.random.default_rng(0), []
        for _ in range(5):
            batches = rng.integers(0, len(reader), (BATCHES, BATCH))
            started = time.perf_counter()
            for batch in batches:
                reader.shapes(batch)
            runs.append((time.perf_counter() - started) / batches.size * 1e6)
        row |= {"record_us": float(np.median(runs)), "record_us_runs": runs}
        return row | {"peak_mb_in_the_end": memory("VmHWM") - before}


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(FILES):
            write(Path(folder, f"true-{number}.beton"), number)
        for count in ROWS:
            place = Path(folder, str(count))
            place.mkdir()
            for number in range(count):
                for end in ("", ".json"):
                    target = Path(folder, f"true-{number % FILES}.beton{end}")
                    (place / f"train-{number:05}-of-{count:05}.beton{end}").hardlink_to(target)
            call = [sys.executable, __file__, str(place / "train-*.beton")]
            rows.append(json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout))
    about = {"command": "python benchmarks/results/many-files/opening.py", "host": describe_host()}
    print(json.dumps({**about, "versions": describe_versions(), "git": describe_git(), "rows": rows}, indent=1))


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1]))) if len(sys.argv) > 1 else main()
