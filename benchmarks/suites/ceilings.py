"""The machine's own limits, measured without any of our machinery: what decoding, memory, arithmetic and disk can give
at most.
"""

from __future__ import annotations

import torch

from fastssl.benchmarks.harness.disk import measure_disk
from fastssl.benchmarks.harness.limits import copy_bytes, copy_call, product_call, product_flop
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import Setting
from fastssl.benchmarks.harness.timing import measure_in_turns
from fastssl.benchmarks.harness.windows import measure_windows, rate
from fastssl.benchmarks.suites.loader import BareLoop

_PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(setting: Setting) -> list[Record]:
    """Measure decoding (for ``seconds``), then memory and arithmetic in turns, then the disk below ``folder``, to which
    each run writes up to 256 MB.

    Returns:
        One record, without a rate of its own; ``details`` hold

        * ``decode_per_s_1_thread``, ``decode_per_s``: JPEGs a second through a bare loop of the binding that the engine
          uses, on one thread and on ``decode_threads`` that share nothing; no crops
        * ``copy_bytes_per_s`` of a large copy in the device's memory, read and written counted
        * ``product_flop_per_s`` of a large matrix product by type of its numbers, two operations for a multiplication
          with its addition. float32 is computed as torch is set to do it, which on a GPU is without TF32 unless
          somebody changed that
        * ``threads``: torch's, which copy and multiply on a CPU
        * ``disk_read_bytes_per_s``, ``disk_write_bytes_per_s``, ``disk_problem``: see
          :class:`fastssl.benchmarks.harness.disk.DiskRates`
    """
    device, threads = setting.device, setting.threads
    with setting.open() as (reader, about):
        loops = {"one": BareLoop(reader, 1), "all": BareLoop(reader, threads)}
        windows = measure_windows(loops, seconds=setting.seconds, runs=setting.runs)
    products = {name: product_call(device, dtype) for name, dtype in _PRODUCTS.items()}
    timings = measure_in_turns({"copy": copy_call(device), **products}, device=device, runs=setting.runs)
    disk = measure_disk(setting.folder, setting.runs)
    details = {
        "decode_per_s_1_thread": rate(windows["one"]),
        "decode_per_s": rate(windows["all"]),
        "decode_threads": threads,
        "copy_bytes_per_s": copy_bytes(device) / timings["copy"].median_s,
        "product_flop_per_s": {name: product_flop(device) / timings[name].median_s for name in products},
        "threads": torch.get_num_threads() if setting.on_cpu else None,
        "disk_read_bytes_per_s": disk.read_bytes_per_s,
        "disk_write_bytes_per_s": disk.write_bytes_per_s,
        "disk_problem": disk.problem,
        "data": about,
    }
    return [setting.record("ceilings", workers=threads, details=details)]
