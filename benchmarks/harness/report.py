"""``fastssl bench report``: what records say, for a reader: images a second of each recipe, what limits them, and what
they are compared with. ``write_report([Path("train.jsonl"), Path("loader.jsonl")], Path("bench-report"))``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastssl.benchmarks.harness import plots
from fastssl.benchmarks.harness.records import Record, incomplete, read_records
from fastssl.benchmarks.harness.table import COLUMNS, RIGHT, ceilings, cells, figure, positive
from fastssl.errors import FastSSLError
from fastssl.report import document
from fastssl.report.document import Block, Bullets, Code, Heading, Paragraph, Picture, Table
from fastssl.utils.atomic_files import write_atomically

TITLE = "Images per second"
#: file name without suffix, what draws it, what it shows
PLOTS: tuple[tuple[str, Callable, str], ...] = (
    ("images_per_s", plots.images_per_s, "Pairs and views a second of each part, beside its ceiling"),
    ("share_of_time", plots.share_of_time, "What the time goes into"),
    ("scaling", plots.scaling, "Rates by decoding threads, and the host's time for a picture by its views"),
)


def write_report(results: Iterable[Path], out: Path) -> list[Path]:
    """Write report.md, report.html, recipes.md and the plots of all records in ``results`` into ``out``, and give their
    paths. Plots of a second and further machine have its number in their names. Raises FastSSLError where a file is
    missing, damaged or holds no record, or ``out`` is a file; nothing is written then.
    """
    records = [record for path in dict.fromkeys(results) for record in _read(path)]
    if out.exists() and not out.is_dir():
        raise FastSSLError(f"{out}: is a file; --out takes a folder")
    blocks = build(records)
    files = {block.name: block.png for block in blocks if isinstance(block, Picture)}
    files["report.md"] = document.to_markdown(blocks).encode()
    files["report.html"] = document.to_html(TITLE, blocks).encode()
    files["recipes.md"] = (recipe_table(records) or "No record of a step or of training.").encode() + b"\n"
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, partial(Path.write_bytes, data=content))
    pictures = [name for name in files if name.endswith(".png")]
    return [out / name for name in ("report.html", "report.md", "recipes.md", *pictures)]


def _read(path: Path) -> list[Record]:
    if path.is_dir() or not path.exists():
        why = "is a folder; give the files in it that" if path.is_dir() else "no such file; one is what"
        raise FastSSLError(f"{path}: {why} `fastssl bench ... --json FILE` wrote")
    records = read_records(path)
    if not records:
        raise FastSSLError(f"{path}: holds no records")
    for number, record in enumerate(records, 1):
        try:
            cells(record)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            why = f"its details are damaged ({type(error).__name__}: {error})"
            raise FastSSLError(f"{path}, record {number}: {why}") from error
    return records


def build(records: Sequence[Record]) -> list[Block]:
    """The report's blocks, plots drawn."""
    machines = _grouped(records, _machine)
    blocks: list[Block] = [Heading(TITLE, 1)]
    for name, members in machines.items():
        blocks += [Paragraph(f"On {name}:")] if len(machines) > 1 else []
        blocks += _lead(members)
    soak = "; a soak is one run, judged by its own lines" if any(one.bench == "soak" for one in records) else ""
    words = (
        "A pair is one source picture with all its views. Every figure is a median of alternating runs and stands "
        f"beside a ceiling that was measured in the same process{soak}."
    )
    blocks.append(Paragraph(words, quiet=True))
    for number, (name, members) in enumerate(machines.items(), 1):
        blocks += _section(name, members, f"-{number}" if number > 1 else "")
    return blocks


def _grouped(records: Iterable[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _machine(record: Record) -> str:
    """GPU, processor and cores."""
    host = record.host
    gpu = f"{host['gpu']}, " if host.get("gpu") else ""
    return f"{gpu}{host.get('cpu') or 'unknown processor'}, {host.get('cores', '?')} cores"


def _lead(records: Sequence[Record]) -> list[Block]:
    """One sentence for each recipe that was trained end to end, and one for those that were not."""
    trains = [(key[:2], train) for key, (_, train) in _by_recipe(records).items() if train]
    items = [(", ".join(filter(None, key)), _sentence(train)) for key, train in trains]
    trained = {recipe for (recipe, _), _ in trains}
    absent = list(dict.fromkeys(one.recipe for one in records if one.recipe and one.recipe not in trained))
    blocks: list[Block] = [Bullets(items, lead=True)] if items else []
    if absent or not items:
        which = f" of {_listed(absent)}" if absent else ""
        how = "fastssl bench train --recipe NAME --json FILE"
        blocks.append(Paragraph(f"Not measured: training{which} end to end. This measures it: {how}"))
    return blocks


def _sentence(train: Record) -> str:
    """End-to-end figure, ceiling, bottleneck, advice."""
    text = f"trains end to end at {figure(train.pair_per_s)} pair/s ({figure(train.view_per_s)} view/s)"
    if train.ceiling:
        share = f"{train.fraction_of_ceiling:.0%} of " if train.fraction_of_ceiling is not None else "below "
        text += f": {share}its ceiling of {figure(train.ceiling)} view/s ({train.ceiling_name or 'unnamed'})"
    text += f". Bottleneck: {train.bottleneck or 'not named'}."
    advice = (train.details or {}).get("advice")
    return f"{text} Advice: {str(advice).rstrip('.')}." if advice else text


def _by_recipe(records: Iterable[Record]) -> dict[tuple[str, str | None, str], tuple[Record | None, Record | None]]:
    """(recipe, network, machine) -> the step's and the training's record; peers are left out.

    Where a recipe ran in several settings (precision, batch, threads, photos) the fastest counts, and of a setting that
    was measured again the last. A run with ``--set`` is of another recipe in all but its name, and counts only where
    there is no run of the recipe itself.
    """
    found: dict[tuple[str, str | None, str], dict[str, dict[str, Record]]] = {}
    for record in records:
        if record.bench in ("step", "train") and record.recipe and not record.peer and record.pair_per_s:
            of_recipe = found.setdefault(
                (record.recipe, record.arch, _short_machine(record)), {"step": {}, "train": {}}
            )
            of_recipe[record.bench][cells(record)[2] + (" --set" if _changed(record) else "")] = record

    def best(settings: dict[str, Record]) -> Record | None:
        return max(settings.values(), key=lambda record: (not _changed(record), record.pair_per_s), default=None)

    return {key: (best(kinds["step"]), best(kinds["train"])) for key, kinds in found.items()}


def _changed(record: Record) -> bool:
    return " --set " in str((record.details or {}).get("command"))


def _short_machine(record: Record) -> str:
    """The GPU where it did the work, else the processor with its cores."""
    gpu = record.host.get("gpu")
    if record.device == "cuda" and gpu:
        return str(gpu)
    return _machine(record).removeprefix(f"{gpu}, ")


def recipe_table(records: Iterable[Record]) -> str:
    """Markdown table of each recipe's step and end-to-end rate, as README files show it; empty without such records.

    A row is a recipe with its network on one machine. ``of its ceiling`` and ``bottleneck`` are those of the end-to-end
    figure; where there is none, the bottleneck is the step's.
    """
    table = _recipes(records)
    return document.table_markdown(table) if table.rows else ""


def _recipes(records: Iterable[Record]) -> Table:
    header = [
        "recipe",
        "network",
        "step pair/s",
        "end to end pair/s",
        "of its ceiling",
        "bottleneck",
        "machine",
        "command",
    ]
    rows: list[tuple[str | Code, ...]] = []
    for (recipe, network, machine), (step, train) in _by_recipe(records).items():
        fraction = train.fraction_of_ceiling if train else None
        bottleneck = train.bottleneck if train else step and f"step alone: {step.bottleneck}"
        commands = [(record.details or {}).get("command") for record in (step, train) if record]
        figures = [figure(record.pair_per_s if record else None) for record in (step, train)]
        figures.append("" if fraction is None else f"{fraction:.0%}")
        code = Code(tuple(dict.fromkeys(str(command) for command in commands if command)))
        rows.append((recipe, network or "", *figures, bottleneck or "", machine, code))
    return Table(header, rows, (False, False, True, True, True, False, False, False))


def _section(name: str, records: Sequence[Record], suffix: str) -> list[Block]:
    blocks: list[Block] = [Heading(name)]
    recipes = _recipes(records)
    if recipes.rows:
        blocks += [Heading("Recipes", 3), recipes]
    for stem, plot, words in PLOTS:
        drawn = plots.draw(plot, records)
        blocks.append(Heading(words, 3))
        if isinstance(drawn, str):
            blocks.append(Paragraph(f"No plot {stem}: {drawn}."))
        else:
            blocks.append(Picture(f"{stem}{suffix}.png", words, drawn))
    blocks += [Heading("Beside other people's code", 3), *_peers(records)]
    blocks += [Heading("Ceilings of this machine", 3), _ceilings(records)]
    blocks += [Heading("All records", 3), *_incomplete(records)]
    for text, members in _grouped(records, _versions).items():
        blocks += [Paragraph(text, quiet=True), Table(COLUMNS, [cells(record) for record in members], RIGHT)]
    return blocks


def _versions(record: Record) -> str:
    wanted = [name for name in ("python", "torch", "cuda", "timm", "fastssl") if name in record.versions]
    named = ", ".join(f"{name} {record.versions[name]}" for name in wanted) or "Versions unknown"
    return f"{named}; commit {record.git or 'unknown'}"


def _peers(records: Sequence[Record]) -> list[Block]:
    """Ratios above 1: ours is faster."""
    rows: list[tuple[str, ...]] = []
    for number, record in enumerate(records):
        if record.peer is None or record.ratio_to_peer is None:
            continue
        setting = cells(replace(record, details={**(record.details or {}), "loader": None}))[:3]
        rates = map(figure, _rates_beside(record, records[:number]))
        rows.append((", ".join(filter(None, setting)), record.peer, f"{record.ratio_to_peer:.2f}", *rates))
    if not rows:
        commands = "fastssl bench loader --peers; fastssl bench step --peers"
        return [Paragraph(f"No record has a peer. These commands make some: {commands}")]
    words = "How many times as fast ours is, both in turns in one process group: the median of the rounds' ratios."
    header = ("what", "peer", "ratio", "ours, pair/s", "peer, pair/s")
    return [Paragraph(words, quiet=True), Table(header, rows, (False, False, True, True, True))]


def _rates_beside(record: Record, before: Sequence[Record]) -> tuple[float | None, float | None]:
    """Pairs a second of ours, which went before, and of the peer; of the loss, from the peer's time in the details."""
    details = record.details or {}
    if positive(details.get("peer_median_s")) and record.median_s and record.pair_per_s:
        return record.pair_per_s, record.pair_per_s * record.median_s / details["peer_median_s"]

    def run(one: Record) -> list[Any]:
        fields = ("bench", "recipe", "arch", "device", "batch_size", "workers", "git")
        return [getattr(one, name) for name in fields] + [(one.details or {}).get(name) for name in ("part", "data")]

    ours = next((one for one in reversed(before) if one.peer is None and run(one) == run(record)), None)
    return ours.pair_per_s if ours else None, record.pair_per_s


def _ceilings(records: Sequence[Record]) -> Block:
    rows = []
    for record in (record for record in records if record.bench == "ceilings"):
        details = record.details or {}
        missing = str(details.get("disk_problem") or "not measured")
        rows += [(words, shown or missing, record.device or "") for _, words, shown in ceilings(details)]
    if rows:
        return Table(("what", "at most", "device"), rows, (False, True, False))
    beside = "The ceilings in the tables are those that were measured beside each figure."
    return Paragraph(f"Not measured: no record of ceilings. {beside}")


def _incomplete(records: Sequence[Record]) -> list[Block]:
    """Which records lack something that makes a figure evidence."""
    lacking = incomplete(records)
    if not lacking:
        those = "The one record is" if len(records) == 1 else f"All {len(records)} records are"
        parts = "machine, versions, runs, commit, command, ceiling"
        return [Paragraph(f"{those} complete: {parts}.", quiet=True)]
    items = []
    for part, members in lacking.items():
        kinds = Counter(cells(record)[0] for record in members)
        items.append((f"{part}:", ", ".join(f"{count} of {kind}" for kind, count in kinds.items())))
    count = len({id(record) for members in lacking.values() for record in members})
    verb = "records lack" if count > 1 else "record lacks"
    return [Paragraph(f"{count} {verb}: {_listed(list(lacking))}."), Bullets(items)]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
