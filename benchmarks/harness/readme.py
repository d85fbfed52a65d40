"""The figures of README.md and docs/performance.md, taken from the records: nobody types one in.

python -m fastssl.benchmarks.harness.readme README.md benchmarks/results/cpu-2core-epyc/*.jsonl

Replaces what stands between ``<!-- figures: NAME -->`` and ``<!-- /figures -->``. A test holds the README to the
records that are committed.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fastssl.benchmarks.harness.records import Record, read_records
from fastssl.benchmarks.harness.report import recipe_table
from fastssl.benchmarks.harness.table import figure
from fastssl.config.recipe import recipe_names
from fastssl.errors import FastSSLError, counted
from fastssl.pipelines.engines.base import PIPELINES

_PLACE = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)

#: Parts of a counted step that have a column, in GB.
_COUNTED_PARTS = ("colour", "teacher", "student", "backward")


def part_table(records: Iterable[Record]) -> str:
    """What was measured, the figure in words, and the command that made it: one row for each command and thing."""
    rows: dict[tuple[str, str], list[str]] = {}
    for record in records:
        said = in_words(record)
        if said is not None:
            rows.setdefault((said[0], str((record.details or {}).get("command"))), []).append(said[1])
    lines = ["| what | figure | command |", "| --- | --- | --- |"]
    lines += [
        f"| {what} | {'; '.join(dict.fromkeys(figures))} | `{command}` |" for (what, command), figures in rows.items()
    ]
    return "\n".join(lines) + "\n"


def in_words(record: Record) -> tuple[str, str] | None:
    """(what, figure) of one record; None: it has no row of its own (recipes and loaders have tables of theirs)."""
    details, recipe, times = record.details or {}, record.recipe, record.ratio_to_peer
    part, of_ceiling = details.get("part"), f"{record.fraction_of_ceiling or 0:.0%}"
    threads, pair_per_s = counted(record.workers, "thread") if record.workers else "", figure(record.pair_per_s)
    match record.bench:
        case "ceilings":
            product, memory = details["product_flop_per_s"]["float32"] / 1e9, details["copy_bytes_per_s"] / 1e9
            one, all_, cores = (details[f"decode_{name}"] for name in ("per_s_1_thread", "per_s", "threads"))
            disk = details.get("disk_read_bytes_per_s")
            read = f", reading from disk {disk / 1e6:,.0f} MB/s" if disk else ""
            decode = f"JPEG decoding {one:,.0f} photos/s on one thread and {all_:,.0f} on {cores}"
            words = f"{decode}, memory {memory:.1f} GB/s, float32 products {product:,.0f} GFLOP/s{read}"
            return "ceilings of the machine", words
        case "loader" if "loader" in details:
            return None
        case "loader" if part == "decode":
            return "decode-only rate of the engine, of a bare loop over the same JPEGs", f"{of_ceiling} ({threads})"
        case "loader" if part == "host cost":
            many, growth = list(details["times_1_view"].items())[-1]
            return f"host time of {many} against 1 view, crops on the device", f"{growth:.2f}x ({threads})"
        case "loader":
            crops = details.get("engine_crops_of_bare_crops")
            alone = f"; its crops alone {crops:.0%} of that loop" if crops else ""
            words = f"{of_ceiling} of a loop that decodes and crops and does no colour{alone}"
            views = counted(round((record.view_per_s or 0) / (record.pair_per_s or 1)), "crop")
            what = f"whole loader: decode, {views} of a photo to {recipe}'s sizes, colour, normalised"
            return what, f"{pair_per_s} photos/s ({threads}), {words}"
        case "step" if record.peer and part == "update":
            return f"optimiser and moving average of {recipe}", f"{times:.2f}x the loops over tensors"
        case "step" if record.peer:
            return f"training step of {recipe}, batch {record.batch_size}", f"{times:.2f}x {record.peer}"
        case "loss":
            memory = details["peer_peak_extra_bytes"] / details["peak_extra_bytes"]
            setting = f"batch {record.batch_size}, queue {details['queue']:,}"
            words = f"{times:.1f}x the dense way, 1/{memory:.0f} of its extra memory"
            return f"smoothed InfoNCE, forward and backward, {setting}", words
        case "convert":
            rate = f"{pair_per_s} photos/s ({threads}), {of_ceiling} of its ceiling ({record.ceiling_name})"
            return f"convert-imagenet, {part}", rate + (f", {times:.2f}x {record.peer}" if times else "")
        case "train" if details.get("remedies"):
            return f"what would help {recipe} with {record.arch}, and did ({threads})", details["advice"]
    return None


def loader_table(records: Iterable[Record]) -> str:
    """Loaders side by side: photos a second with and without colour, and how many times as fast `native` was."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        details = record.details or {}
        if record.bench == "loader" and "loader" in details:
            found.setdefault(details["loader"], {})[details["part"]] = record
    lines = ["| loader | decode, 2 antialiased crops, flip | MoCo-v2's whole augmentation |", "| --- | --- | --- |"]
    for name, parts in found.items():
        ours = f"**fastssl {name}**" if name in PIPELINES else name
        lines.append(f"| {ours} | {_beside(parts.get('crops'))} | {_beside(parts.get('augmented'))} |")
    return "\n".join(lines) + "\n"


def _beside(record: Record | None) -> str:
    if record is None:
        return ""
    return figure(record.pair_per_s) + (f" ({record.ratio_to_peer:.1f})" if record.ratio_to_peer is not None else "")


def counted_table(records: Iterable[Record]) -> str:
    """What a step launches, moves and holds, as it was counted: a row for each count."""
    lines = [
        "| recipe, batch | networks | launches | GB moved | colour | teacher | student | backward | GB alive at most |"
        " commit |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for record in records:
        if record.bench == "count" and record.details:
            details, parts = record.details, record.details["parts"]
            moved = [f"{parts[name]['bytes'] / 1e9:.1f}" if name in parts else "" for name in _COUNTED_PARTS]
            form = "compiled" if details["compiled"] else "as written"
            cells = [f"{record.recipe}, {record.batch_size}", form, f"{details['launches']:,}"]
            cells += [f"{details['bytes'] / 1e9:.1f}", *moved, f"{details['peak_bytes'] / 1e9:.1f}", f"{record.git}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def own_recipe_table(records: Iterable[Record]) -> str:
    """``recipe_table`` of the recipes with the networks that they were made for; below it, which are missing."""
    own = [record for record in records if "--arch" not in str((record.details or {}).get("command")).split()]
    measured = {bench: {record.recipe for record in own if record.bench == bench} for bench in ("step", "train")}
    missing = [name for name in recipe_names() if name not in measured["step"] & measured["train"]]
    return recipe_table(own).rstrip() + "\n" + (f"\nNot measured yet: {', '.join(missing)}.\n" if missing else "")


TABLES = {"recipes": own_recipe_table, "parts": part_table, "loaders": loader_table, "counted": counted_table}


def fill(text: str, records: Sequence[Record]) -> str:
    """``text`` with its marked places filled from ``records``; FastSSLError where a place is not named in TABLES."""
    return fill_places(text, {name: functools.partial(table, records) for name, table in TABLES.items()})


def fill_places(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """``text`` with each marked place filled by the table of its name; FastSSLError where there is none."""

    def replace(found: re.Match[str]) -> str:
        if found[2] not in tables:
            raise FastSSLError(f"figures: {found[2]} is not one of {', '.join(tables)}")
        return f"{found[1]}{tables[found[2]]().rstrip()}\n{found[3]}"

    return _PLACE.sub(replace, text)


def main(argv: Sequence[str]) -> int:
    """Fill a file in place; 0 done, 1 unreadable, 2 wrong usage."""
    if len(argv) < 2:
        print("usage: python -m fastssl.benchmarks.harness.readme README.md RESULTS.jsonl...", file=sys.stderr)
        return 2
    try:
        records = [record for path in argv[1:] for record in read_records(path)]
        page = Path(argv[0])
        page.write_text(fill(page.read_text(), records))
    except (KeyError, TypeError, OSError, FastSSLError) as error:
        damaged = f"a record's details are damaged ({type(error).__name__}: {error})"
        print(f"readme: {damaged if isinstance(error, (KeyError, TypeError)) else error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
