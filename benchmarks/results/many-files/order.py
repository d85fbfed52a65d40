"""Time and memory of an epoch's order of many samples: python order.py > order.json

Each row is a process of its own. Positions are those of one of 512 ranks, batches all over the epoch; time is the
median of five runs, memory what the process's peak grows by, from behind the imports and the compilation to the end.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fastssl.pipelines.plan.order import batch_indices, steps_per_epoch
from fastssl.pipelines.plan.windows import FileWindows
from fastssl.utils.versions import describe_git, describe_host, describe_versions

WORLD, FILE, WINDOW = 512, 1_000_000, 16
#: samples, a rank's batch, steps that are timed, files drawn at a time
ROWS = [
    (10_000_000, 64, 400, None),
    (100_000_000, 64, 400, None),
    (1_000_000_000, 64, 400, None),
    (1_000_000_000, 8, 2000, None),
    (1_000_000_000, 512, 100, None),
    (1_000_000_000, 64, 400, WINDOW),
    (1_000_000_000, 512, 100, WINDOW),
]


def memory(name: str) -> float:
    """``VmRSS``, or the peak ``VmHWM``, of this process in MB."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


def measure(samples: int, batch: int, count: int, window: int | None) -> dict:
    """Of one row, in this process."""
    windows = None if window is None else FileWindows(np.arange(0, samples + 1, FILE), window)
    small = None if window is None else FileWindows(np.arange(0, 101, 10), 2)
    batch_indices(1 << 25, 0, 0, 0, 2)  # compiles
    batch_indices(100, 0, 0, 0, 2, windows=small)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, runs = memory("VmRSS"), []
    last = steps_per_epoch(samples, batch, WORLD) - 1
    steps = np.linspace(0, last, count).astype(int).tolist()
    started = time.perf_counter()
    batch_indices(samples, 0, 1, last, batch, WORLD - 1, WORLD, windows)
    first = time.perf_counter() - started
    for _ in range(5):
        started = time.perf_counter()
        for step in steps:
            batch_indices(samples, 0, 1, step, batch, WORLD - 1, WORLD, windows)
        runs.append((time.perf_counter() - started) / count / batch * 1e9)
    grown = memory("VmHWM") - before
    row = {"samples": samples, "batch": batch, "window": window, "files": windows and len(windows.starts) - 1}
    return row | {"first_ms": 1e3 * first, "ns_an_index": float(np.median(runs)), "runs": runs, "grown_mb": grown}


def main() -> None:
    rows = []
    for row in ROWS:
        done = subprocess.run([sys.executable, __file__, json.dumps(row)], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
    about = {"command": "python benchmarks/results/many-files/order.py", "host": describe_host()}
    print(json.dumps({**about, "versions": describe_versions(), "git": describe_git(), "rows": rows}, indent=1))


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1])))) if len(sys.argv) > 1 else main()
