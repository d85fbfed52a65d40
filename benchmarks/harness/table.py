"""Records as a table: one line each, in the terminal and in markdown.

python -m fastssl.benchmarks.harness.table results.jsonl > results.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastssl.benchmarks.harness.records import Record, read_records
from fastssl.errors import FastSSLError, counted
from fastssl.report.document import escape_markdown

COLUMNS = ("what", "recipe", "setting", "pair/s", "view/s", "of ceiling", "ceiling", "bottleneck")
#: Column widths in a terminal, where lines come one by one and the widest is not known; text to the left, figures to
#: the right.
_WIDTHS = (-17, -26, -34, 9, 9, 10, -46, 0)
#: Which columns hold figures.
RIGHT = tuple(width > 0 for width in _WIDTHS)


def cells(record: Record) -> tuple[str, ...]:
    """A record in the order of COLUMNS; what does not apply is empty."""
    details = record.details or {}
    part = details.get("part") or details.get("stage")
    fraction = record.fraction_of_ceiling
    return (
        f"{record.bench}: {part}" if part else record.bench,
        record.recipe or "",
        ", ".join(_setting(record, details)),
        figure(record.pair_per_s),
        figure(record.view_per_s),
        "" if fraction is None else f"{fraction:.1%}",
        record.ceiling_name or "",
        "; ".join(filter(None, [record.bottleneck, *_remarks(record, details)])),
    )


def _setting(record: Record, details: dict) -> list[str]:
    found = [
        record.arch,
        details.get("loader"),
        record.device,
        f"batch {record.batch_size}" if record.batch_size else None,
    ]
    if record.workers:
        found.append(counted(record.workers, "thread"))
    if "amp" in details:
        found.append("bf16" if details["amp"] == "bf16" else "float32")
        found += [name for key, name in (("compiled", "compiled"), ("graph", "CUDA graph")) if details.get(key)]
    if "queue" in details:
        found.append(f"queue {details['queue']}")
    if details.get("data"):
        found.append(details["data"]["name"])
    return [item for item in found if item]


def _remarks(record: Record, details: dict) -> list[str]:
    remarks = []
    remarks += [f"without {switch}: {reason}" for switch, reason in (details.get("fallbacks") or {}).items()]
    if details.get("advice"):
        remarks.append(details["advice"])
    if details.get("asked_batch_size") not in (None, record.batch_size):
        remarks.append(f"batch {details['asked_batch_size']} was too large for the memory")
    if "times_1_view" in details:
        remarks.append(
            ", ".join(
                f"{key}: {value:.2f}x the host time of one"
                for key, value in details["times_1_view"].items()
                if key != "1 view"
            )
        )
    if "host_cpu_of_bare" in details:
        remarks.append(f"{details['host_cpu_of_bare']:.2f}x the processor time of the bare loop")
    if record.ratio_to_peer is not None:
        ours = "native is " if "loader" in details else ""
        remarks.append(f"{ours}{record.ratio_to_peer:.2f}x {record.peer}")
    return remarks + (_limits(details) if record.bench == "ceilings" else [])


def _limits(details: dict) -> list[str]:
    """The figures of a ``ceilings`` record, which has no rate of its own."""
    product = details.get("product_flop_per_s")
    rows = [
        ("decoding, 1 thread", details.get("decode_per_s_1_thread"), 1.0, "photos/s"),
        ("decoding, all threads", details.get("decode_per_s"), 1.0, "photos/s"),
        ("memory copy", details.get("copy_bytes_per_s"), 1e-9, "GB/s"),
        *(
            (f"{name} product", value, 1e-12, "TFLOP/s")
            for name, value in (product.items() if isinstance(product, dict) else ())
        ),
        ("disk read", details.get("disk_read_bytes_per_s"), 1e-6, "MB/s"),
        ("disk written", details.get("disk_write_bytes_per_s"), 1e-6, "MB/s"),
    ]
    found = [
        f"{words} {figure(value * factor)} {unit}"
        for words, value, factor, unit in rows
        if isinstance(value, (int, float))
    ]
    return found + ([f"disk: {details['disk_problem']}"] if details.get("disk_problem") else [])


def figure(value: float | None) -> str:
    """A rate as it is printed: 12,346 or 3.14; empty when there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def line(texts: Sequence[str]) -> str:
    """One line for a terminal, columns aligned."""
    return "  ".join(
        text.ljust(-width) if width <= 0 else text.rjust(width) for text, width in zip(texts, _WIDTHS)
    ).rstrip()


def markdown(records: Iterable[Record]) -> str:
    """A table for every machine that the records name, with its versions above."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(machine(record), []).append(record)
    parts = []
    for name, members in groups.items():
        rows = [COLUMNS, tuple("--:" if right else ":--" for right in RIGHT), *(cells(record) for record in members)]
        parts.append(
            name
            + "\n\n"
            + "\n".join("| " + " | ".join(escape_markdown(text) for text in row) + " |" for row in rows)
            + "\n"
        )
    return "\n".join(parts)


def machine(record: Record) -> str:
    """Markdown that names the machine, the versions and the commit."""
    host, versions = record.host, record.versions
    gpu = f"{host['gpu']}, " if "gpu" in host else ""
    cores = f"{host.get('cpu', 'unknown processor')}, {host.get('cores', '?')} cores"
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("python", "torch", "cuda", "timm", "fastssl") if name in versions
    )
    return f"**{gpu}{cores}** ({packages}{f', commit {record.git}' if record.git else ''})"


def main(argv: Sequence[str]) -> int:
    """Print the table of a results file; 0 done, 1 unreadable, 2 wrong usage."""
    if len(argv) != 1:
        print("usage: python -m fastssl.benchmarks.harness.table RESULTS.jsonl", file=sys.stderr)
        return 2
    try:
        print(markdown(read_records(Path(argv[0]))), end="")
    except (OSError, FastSSLError) as error:
        print(f"table: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
