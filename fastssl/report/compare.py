"""Several evaluations side by side: a table a set of photos, a row a network, a column a kind of figure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastssl.errors import FastSSLError, counted
from fastssl.report.document import Block, Heading, Paragraph, Table, to_html, to_markdown
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.json_text import read_json_records

Record = dict[str, Any]
#: Evaluations whose records stand in the table.
KINDS = ("knn", "knn_leave_one_out", "linear", "semi", "finetune", "detect")


def figures(record: Record) -> dict[str, str]:
    """What of a record stands in the table, in percent: name of a column -> ``68.2 (67.8 to 68.7)``, where the 95 %
    interval is known. Raises ValueError where a figure is not finite.
    """
    if record["evaluation"] == "detect":
        names = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}
        length = f", {counted(record['iterations'], 'iteration')} of {record['batch_size']}"
        found = {name + length: [record[key]] for key, name in names.items() if record.get(key) is not None}
    else:
        found = {_accuracy_name(record): [record["accuracy"], *record["confidence"]]}
    for name, values in found.items():
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name} is no finite number")
    forms = {1: "{:.1f}", 3: "{:.1f} ({:.1f} to {:.1f})"}
    return {name: forms[len(values)].format(*values) for name, values in found.items()}


def _accuracy_name(record: Record) -> str:
    kind = record["evaluation"]
    if kind.startswith("knn"):
        among = "leave-one-out " * (kind == "knn_leave_one_out")
        return f"{among}kNN, k {record['k']}, T {record['temperature']:g}"
    if kind == "linear":  # what is not as published makes another figure of it
        changed = "; ".join(f"{_word(name)} {record[name]}" for name in record.get("changed", ()))
        # MoCo's steps once went by light-moco's name.
        protocol = "moco" if record["protocol"] == "light-moco" and record.get("milestones") else record["protocol"]
        return f"linear probe, {protocol}" + (f", but {changed}" if changed else "")
    share = "all labels" if record["labels"] == 1 else f"{100 * record['labels']:.3g} % of the labels"
    head = ", half of the DINO head" if record["head"] == "dino" else ""
    epochs = counted(record["epochs"], "epoch")
    return f"fine-tuned, {share}{head}, {epochs}, {record['optimizer']} lr {record['lr']:g}"


#: What may differ between two figures of one name: where it does among the records compared, it goes into the name.
SETTINGS = (
    *("size", "crop", "reestimate_bn", "epochs", "batch_size", "lr", "weight_decay", "cached_epochs", "chosen_on"),
    *("optimizer", "head_lr_factor", "list", "seed", "levels", "test_side", "short_sides", "drops", "warmup"),
    *("scaled_to", "val_scaled_to"),
)
_HOW = (
    "Percent right, or average precision in percent; in brackets the 95 % interval by the number of photos that were "
    "judged, which says nothing of another seed of the training."
)


def read_evaluations(paths: Iterable[str | Path]) -> list[Record]:
    """The records in files that ``fastssl evaluate ... --json`` wrote: one JSON document each, or an object a line.
    Raises OSError where a file cannot be read, FastSSLError with file and line for what is no such record.
    """
    expected, found = "records of `fastssl evaluate ... --json FILE`", []
    for where, record in (place for path in paths for place in read_json_records(path, expected)):
        if not isinstance(record, dict) or record.get("evaluation") not in KINDS:
            raise FastSSLError(f"{where}: not a record of an evaluation ({', '.join(KINDS)})")
        try:
            figures(record), _network(record), _photos(record), _machine(record)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FastSSLError(
                f"{where}: the record lacks a value or holds one of another kind ({type(error).__name__}: {error})"
            ) from error
        found.append(record)
    if not found:
        raise FastSSLError("no evaluations in these files; `fastssl evaluate ... --json FILE` writes them")
    return found


def comparison(records: Sequence[Record]) -> list[Block]:
    """The document. Figures of one name that were made with other settings have columns of their own, and other weights
    a row of their own; of several records that agree in all that the last one counts, and the page says how many it
    replaced.
    """
    blocks: list[Block] = [Heading("Evaluations", 1)]
    tables: dict[str, dict[tuple[str, str, str], dict[str, str]]] = {}
    named: dict[str, list[Record]] = {}
    for record in records:
        for name in figures(record):
            named.setdefault(name, []).append(record)
    differing = {
        name: [key for key in SETTINGS if len({json.dumps(record.get(key)) for record in members}) > 1]
        for name, members in named.items()
    }
    replaced = 0
    for record in records:
        cells = tables.setdefault(_photos(record), {}).setdefault(_network(record), {})
        for name, figure in figures(record).items():
            name += "".join(f", {_word(key)} {_word(record.get(key))}" for key in differing[name])
            replaced += name in cells and cells[name] != figure
            cells[name] = figure
    called = Counter((file, network) for file, network, _ in set(map(_network, records)))
    for photos, networks in tables.items():
        columns = list(dict.fromkeys(name for cells in networks.values() for name in cells))
        lines = []
        for (file, network, weights), cells in networks.items():
            # Two files of one name may hold different weights.
            which = f" [{weights or 'weights unknown'}]" if called[file, network] > 1 else ""
            lines.append([file + which, network, *(cells.get(name, "") for name in columns)])
        blocks.append(Heading(photos))
        blocks.append(Table(["checkpoint", "network", *columns], lines, [False, False] + [True] * len(columns)))
    blocks += [Heading("How"), Paragraph(_HOW)]
    if replaced:
        last = "Of records that agree in network, photos and settings the last one is shown"
        blocks.append(Paragraph(f"{last}; {replaced} of the replaced had other figures."))
    return blocks + [Paragraph(text, quiet=True) for text in dict.fromkeys(map(_machine, records))]


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")


def write_comparison(records: Sequence[Record], out: str | Path) -> list[Path]:
    """Write ``evaluations.md`` and ``evaluations.html`` into the folder ``out`` and return their paths."""
    folder, blocks = Path(out), comparison(records)
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"md": to_markdown(blocks), "html": to_html("Evaluations", blocks)}
    for ending, text in pages.items():
        write = partial(Path.write_text, data=text, encoding="utf-8", errors="backslashreplace")
        write_atomically(folder / f"evaluations.{ending}", write)
    return [folder / f"evaluations.{ending}" for ending in pages]


def _network(record: Record) -> tuple[str, str, str]:
    """(which file, what is in it, which weights); random weights are those of no file."""
    weights = str(record.get("weights") or "")
    if record["network"] == "random":
        return "random weights", record["arch"], weights
    step = "" if record["step"] is None else f", step {record['step']:,}"
    return record["checkpoint"], f"{record['arch']}, {record['network']}{step}", weights


def _photos(record: Record) -> str:
    """What was judged on, and what was learned from."""
    if record["evaluation"] == "knn_leave_one_out":
        return f"{record['val'] or record['data']}, among themselves"
    if record["val"] is None:
        return f"{record['data']}, a fifth held out (seed {record['held_out_seed']})"
    return f"{record['val']}, learned from {record['data']}"


def _machine(record: Record) -> str:
    names = [name for name in ("python", "torch", "timm", "fastssl") if name in record["versions"]]
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in names)
    host = record["host"]
    commit = f", commit {record['git']}" if record.get("git") else ""
    return f"{host.get('gpu') or host['cpu']}, {versions}{commit}"
