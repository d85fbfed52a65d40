"""Records as rows of a table: their cells, and lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeGuard

from fastssl.benchmarks.harness.records import Record
from fastssl.errors import counted

COLUMNS = ("what", "recipe", "setting", "pair/s", "view/s", "of ceiling", "ceiling", "bottleneck")
#: Column widths in a terminal, where lines come one by one and the widest is not known; text to the left, figures to
#: the right.
_WIDTHS = (-17, -26, -34, 9, 9, 10, -46, 0)
#: Which columns hold figures.
RIGHT = tuple(width > 0 for width in _WIDTHS)
#: Figures of a ``ceilings`` record: key in the details, words in a line and in a table of their own, factor, unit.
_CEILINGS = (
    ("decode_per_s_1_thread", "decoding, 1 thread", "JPEG decoding, 1 thread", 1.0, "photos/s"),
    ("decode_per_s", "decoding, all threads", "JPEG decoding, {threads}", 1.0, "photos/s"),
    ("copy_bytes_per_s", "memory copy", "memory copy, read and written", 1e-9, "GB/s"),
    ("product_flop_per_s", "{kind} product", "matrix product, {kind}", 1e-12, "TFLOP/s"),
    ("disk_read_bytes_per_s", "disk read", "reading from disk", 1e-6, "MB/s"),
    ("disk_write_bytes_per_s", "disk written", "writing to disk", 1e-6, "MB/s"),
)


def cells(record: Record) -> tuple[str, ...]:
    """A record in the order of COLUMNS; what does not apply is empty."""
    details = record.details or {}
    part, fraction = details.get("part") or details.get("stage"), record.fraction_of_ceiling
    return (
        f"{record.bench}: {part}" if part else record.bench,
        record.recipe or "",
        ", ".join(filter(None, _setting(record, details))),
        figure(record.pair_per_s),
        figure(record.view_per_s),
        "" if fraction is None else f"{fraction:.1%}",
        record.ceiling_name or "",
        "; ".join(filter(None, [record.bottleneck, *_remarks(record, details)])),
    )


def _setting(record: Record, details: dict) -> Iterator[str | None]:
    yield from (record.arch, details.get("loader"), record.device)
    yield f"batch {record.batch_size}" if record.batch_size else None
    yield counted(record.workers, "thread") if record.workers else None
    if "amp" in details:
        yield "bf16" if details["amp"] == "bf16" else "float32"
        yield details.get("compiled") and "compiled"
        yield details.get("graph") and "CUDA graph"
    yield f"queue {details['queue']}" if "queue" in details else None
    yield details.get("data") and details["data"]["name"]


def _remarks(record: Record, details: dict) -> Iterator[str | None]:
    yield from (f"without {switch}: {reason}" for switch, reason in (details.get("fallbacks") or {}).items())
    yield details.get("advice")
    if details.get("asked_batch_size") not in (None, record.batch_size):
        yield f"batch {details['asked_batch_size']} was too large for the memory"
    floor = details.get("byte_floor_fraction")
    yield f"its bytes alone take {floor:.0%} of the time" if positive(floor) else None
    yield details.get("not_counted") and f"bytes not counted: {details['not_counted']}"
    yield f"colour adds {details['colour_of_step']:.1%}" if details.get("colour_of_step") else None
    yield f"no memory for {', '.join(details['no_memory_for'])}" if details.get("no_memory_for") else None
    times = {key: value for key, value in details.get("times_1_view", {}).items() if key != "1 view"}
    yield ", ".join(f"{key}: {value:.2f}x the host time of one" for key, value in times.items())
    if "host_cpu_of_bare" in details:
        yield f"{details['host_cpu_of_bare']:.2f}x the processor time of the bare loop"
    if record.ratio_to_peer is not None:
        yield f"{'native is ' if 'loader' in details else ''}{record.ratio_to_peer:.2f}x {record.peer}"
    if record.bench == "ceilings":  # which has no rate of its own
        yield from (f"{short} {shown}" for short, _, shown in ceilings(details) if shown)
        yield details.get("disk_problem") and f"disk: {details['disk_problem']}"


def ceilings(details: dict) -> Iterator[tuple[str, str, str | None]]:
    """(words in a line, words in a table, figure with its unit or None) of each limit that a record may hold."""
    used = details.get("decode_threads")
    threads = counted(used, "thread") if isinstance(used, int) else f"{used or 'all'} threads"
    for key, short, long, factor, unit in _CEILINGS:
        values = details.get(key)
        # A matrix product has a figure for each type of number.
        for kind, value in values.items() if isinstance(values, dict) else [("", values)]:
            shown = f"{figure(value * factor)} {unit}" if positive(value) else None
            yield short.format(kind=kind), long.format(threads=threads, kind=kind), shown


def positive(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a rate or share that an axis has room for."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-30 < value < 1e30


def figure(value: float | None) -> str:
    """A rate as it is printed: 12,346 or 3.14; empty when there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def line(texts: Sequence[str]) -> str:
    """One line for a terminal, columns aligned."""
    padded = (text.rjust(width) if width > 0 else text.ljust(-width) for text, width in zip(texts, _WIDTHS))
    return "  ".join(padded).rstrip()
