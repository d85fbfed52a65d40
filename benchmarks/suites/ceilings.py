"""The machine's own limits, measured without any of our machinery: what decoding, memory, arithmetic and disk can give
at most.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastssl.benchmarks.harness.disk import measure_disk
from fastssl.benchmarks.harness.limits import copy_bytes, copy_call, product_call, product_flop
from fastssl.benchmarks.harness.photos import describe_data, find_data
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.timing import MIN_RUNS, measure_in_turns
from fastssl.benchmarks.harness.windows import measure_windows, rate
from fastssl.benchmarks.suites.loader import BareLoop
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.utils.cores import available_cores

_PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Ceilings:
    """What one machine can do.

    Attributes:
        decode_per_s_1_thread, decode_per_s: JPEGs a second through a bare loop of the binding that the engine uses, on
            one thread and on ``decode_threads`` that share nothing; no crops.
        copy_bytes_per_s: of a large copy in the device's memory, read and written counted.
        product_flop_per_s: of a large matrix product by type of its numbers, two operations for a multiplication with
            its addition. float32 is computed as torch is set to do it, which on a GPU is without TF32 unless somebody
            changed that.
        threads: torch's, which copy and multiply on a CPU.
        disk_read_bytes_per_s, disk_write_bytes_per_s, disk_problem: see
            :class:`fastssl.benchmarks.harness.disk.DiskRates`.
        data: the JPEGs that were decoded.
    """

    decode_per_s_1_thread: float
    decode_per_s: float
    decode_threads: int
    copy_bytes_per_s: float
    product_flop_per_s: dict[str, float]
    threads: int | None
    disk_read_bytes_per_s: float | None
    disk_write_bytes_per_s: float | None
    disk_problem: str | None
    data: dict[str, Any]


def measure(
    data: str = "synthetic",
    device: torch.device | str = "cpu",
    workers: int | None = None,
    seconds: float = 10.0,
    runs: int = MIN_RUNS,
    photos: int = 512,
    folder: Path | None = None,
) -> Ceilings:
    """Measure one after the other: decoding, then memory and arithmetic in turns, then the disk. Arguments as of
    :func:`run`.
    """
    device = torch.device(device)
    threads = workers or available_cores()
    path, name = find_data(data, photos)
    with BetonReader(path) as reader:
        loops = {"one": BareLoop(reader, 1), "all": BareLoop(reader, threads)}
        windows = measure_windows(loops, seconds=seconds, runs=runs)
        about = describe_data(reader, name)
    products = {key: product_call(device, dtype) for key, dtype in _PRODUCTS.items()}
    timings = measure_in_turns({"copy": copy_call(device), **products}, device=device, runs=runs)
    disk = measure_disk(folder, runs)
    return Ceilings(
        decode_per_s_1_thread=rate(windows["one"]),
        decode_per_s=rate(windows["all"]),
        decode_threads=threads,
        copy_bytes_per_s=copy_bytes(device) / timings["copy"].median_s,
        product_flop_per_s={key: product_flop(device) / timings[key].median_s for key in products},
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        disk_read_bytes_per_s=disk.read_bytes_per_s,
        disk_write_bytes_per_s=disk.write_bytes_per_s,
        disk_problem=disk.problem,
        data=about,
    )


def run(
    data: str = "synthetic",
    device: torch.device | str = "cpu",
    workers: int | None = None,
    seconds: float = 10.0,
    runs: int = MIN_RUNS,
    photos: int = 512,
    folder: Path | None = None,
) -> list[Record]:
    """Measure the machine's limits.

    Args:
        data, photos: the JPEGs to decode, see :func:`fastssl.benchmarks.harness.photos.find_data`.
        device: whose memory and arithmetic are measured.
        workers: decoding threads; default: the cores that this process may use.
        seconds: counted time of decoding; the other figures take as long as their runs do.
        runs: counted runs of each figure, at least five. Each writes and reads up to 256 MB on the disk.
        folder: on the disk to be measured; default: the system's folder for temporary files.

    Returns:
        One record, whose details are the fields of :class:`Ceilings`. It has no rate of its own.
    """
    found = measure(data, device, workers, seconds, runs, photos, folder)
    device_type = torch.device(device).type
    return [
        Record(bench="ceilings", device=device_type, workers=found.decode_threads, runs=runs, details=asdict(found))
    ]
