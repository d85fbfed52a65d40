"""Several evaluations side by side: a table for each set of photos, a row for each network, a column for each kind of
figure.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastssl.errors import FastSSLError, counted
from fastssl.report.document import Block, Heading, Paragraph, Table, to_html, to_markdown
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.json_text import read_json_records

Record = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One number of a record.

    Attributes:
        name: of its column.
        value: in percent.
        interval: its 95 % confidence interval, or None.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.1f}"
        return f"{self.value:.1f} ({self.interval[0]:.1f} to {self.interval[1]:.1f})"


def _accuracy(name: str, record: Record) -> list[Figure]:
    return [Figure(name, record["accuracy"], tuple(record["confidence"]))]


def _knn(record: Record) -> list[Figure]:
    return _accuracy(f"kNN, k {record['k']}, T {record['temperature']:g}", record)


def _leave_one_out(record: Record) -> list[Figure]:
    return _accuracy(f"leave-one-out kNN, k {record['k']}, T {record['temperature']:g}", record)


def _linear(record: Record) -> list[Figure]:
    # What is not as published makes another figure of it.
    changed = "; ".join(f"{name.replace('_', ' ')} {record[name]}" for name in record.get("changed", ()))
    return _accuracy(f"linear probe, {record['protocol']}" + (f", but {changed}" if changed else ""), record)


def _tuned(record: Record) -> list[Figure]:
    share = "all labels" if record["labels"] == 1 else f"{100 * record['labels']:.3g} % of the labels"
    head = ", half of the DINO head" if record["head"] == "dino" else ""
    epochs = counted(record["epochs"], "epoch")
    return _accuracy(f"fine-tuned, {share}{head}, {epochs}, {record['optimizer']} lr {record['lr']:g}", record)


def _detection(record: Record) -> list[Figure]:
    names = (("box_ap", "box AP"), ("box_ap50", "box AP50"), ("mask_ap", "mask AP"), ("mask_ap50", "mask AP50"))
    length = f", {counted(record['iterations'], 'iteration')} of {record['batch_size']}"
    return [Figure(name + length, record[key]) for key, name in names if record.get(key) is not None]


#: What of a record of each kind stands in the table.
FIGURES: dict[str, Callable[[Record], list[Figure]]] = {
    "knn": _knn,
    "knn_leave_one_out": _leave_one_out,
    "linear": _linear,
    "semi": _tuned,
    "finetune": _tuned,
    "detect": _detection,
}


#: What may differ between two figures of one name: where it does among the records compared, it goes into the name.
SETTINGS = (
    "size",
    "crop",
    "reestimate_bn",
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "cached_epochs",
    "chosen_on",
    "optimizer",
    "head_lr_factor",
    "list",
    "seed",
    "levels",
    "test_side",
    "short_sides",
)


def read_evaluations(paths: Iterable[str | Path]) -> list[Record]:
    """The records in files that ``fastssl evaluate ... --json`` wrote: one JSON document each, or an object a line.

    Raises:
        FastSSLError: something is no such record; the message names file and line, or the record's number.
        OSError: a file cannot be read.
    """
    expected = "records of `fastssl evaluate ... --json FILE`"
    found = [_record(value, where) for path in paths for where, value in read_json_records(path, expected)]
    if not found:
        raise FastSSLError("no evaluations in these files; `fastssl evaluate ... --json FILE` writes them")
    return found


def _record(record: Any, where: str) -> Record:
    if not isinstance(record, dict) or str(record.get("evaluation")) not in FIGURES:
        kinds = ", ".join(FIGURES)
        raise FastSSLError(f"{where}: not a record of an evaluation ({kinds})")
    try:
        figures = FIGURES[record["evaluation"]](record)
        wrong = [one for one in figures if not all(map(math.isfinite, (one.value, *(one.interval or ()))))]
        _network(record), _photos(record), _machine(record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FastSSLError(
            f"{where}: the record lacks a value or holds one of another kind ({type(error).__name__}: {error})"
        ) from error
    if wrong:
        raise FastSSLError(f"{where}: {wrong[0].name} is no finite number")
    return record


def comparison(records: Sequence[Record]) -> list[Block]:
    """The document. Figures of one name that were made with other settings have columns of their own, and other weights
    a row of their own; of several records that agree in all that the last one counts, and the page says how many it
    replaced.
    """
    blocks: list[Block] = [Heading("Evaluations", 1)]
    tables: dict[str, dict[tuple[str, str], dict[str, Figure]]] = {}
    rows, differing = _row_names(records), _differing(records)
    replaced = 0
    for record in records:
        cells = tables.setdefault(_photos(record), {}).setdefault(rows[_identity(record)], {})
        for figure in FIGURES[record["evaluation"]](record):
            name = figure.name + "".join(f", {_word(key)} {_word(record.get(key))}" for key in differing[figure.name])
            replaced += name in cells and cells[name] != figure
            cells[name] = figure
    for photos, networks in tables.items():
        columns = list(dict.fromkeys(name for cells in networks.values() for name in cells))
        blocks.append(Heading(photos))
        lines = [[*network, *(str(cells.get(name, "")) for name in columns)] for network, cells in networks.items()]
        blocks.append(Table(["checkpoint", "network", *columns], lines, [False, False] + [True] * len(columns)))
    blocks.append(Heading("How"))
    blocks.append(
        Paragraph(
            "Percent right, or average precision in percent; in brackets the 95 % interval by the number of "
            "photos that were judged, which says nothing of "
            "another seed of the training."
        )
    )
    if replaced:
        blocks.append(
            Paragraph(
                f"Of records that agree in network, photos and settings the last one is shown; {replaced} of "
                "the replaced had other figures."
            )
        )
    blocks += [Paragraph(text, quiet=True) for text in dict.fromkeys(map(_machine, records))]
    return blocks


def _differing(records: Sequence[Record]) -> dict[str, list[str]]:
    """For each name of a figure the settings in which its records differ."""
    seen: dict[str, dict[str, set[str]]] = {}
    for record in records:
        for figure in FIGURES[record["evaluation"]](record):
            values = seen.setdefault(figure.name, {key: set() for key in SETTINGS})
            for key in SETTINGS:
                values[key].add(json.dumps(record.get(key)))
    return {name: [key for key, found in values.items() if len(found) > 1] for name, values in seen.items()}


def _identity(record: Record) -> tuple[str, str, str]:
    return (*_network(record), str(record.get("weights") or ""))


def _row_names(records: Sequence[Record]) -> dict[tuple[str, str, str], tuple[str, str]]:
    """What each network is called: by its file, and by its weights too where two files of one name hold different
    ones.
    """
    known = list(dict.fromkeys(map(_identity, records)))
    called = Counter((file, network) for file, network, _ in known)
    return {
        (file, network, weights): (
            f"{file} [{weights or 'weights unknown'}]" if called[file, network] > 1 else file,
            network,
        )
        for file, network, weights in known
    }


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).replace("_", " ")


def write_comparison(records: Sequence[Record], out: str | Path) -> list[Path]:
    """Write ``evaluations.md`` and ``evaluations.html`` into the folder ``out`` and return their paths."""
    folder, blocks = Path(out), comparison(records)
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        folder / "evaluations.md": to_markdown(blocks),
        folder / "evaluations.html": to_html("Evaluations", blocks),
    }
    for path, text in pages.items():
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, "utf-8", "backslashreplace"))
    return list(pages)


def _network(record: Record) -> tuple[str, str]:
    """(which file, what is in it); random weights are those of no file."""
    if record["network"] == "random":
        return "random weights", record["arch"]
    step = "" if record["step"] is None else f", step {record['step']:,}"
    return record["checkpoint"], f"{record['arch']}, {record['network']}{step}"


def _photos(record: Record) -> str:
    """What was judged on, and what was learned from."""
    if record["evaluation"] == "knn_leave_one_out":
        return f"{record['val'] or record['data']}, among themselves"
    if record["val"] is None:
        return f"{record['data']}, a fifth held out (seed {record['held_out_seed']})"
    return f"{record['val']}, learned from {record['data']}"


def _machine(record: Record) -> str:
    versions = ", ".join(
        f"{name} {record['versions'][name]}"
        for name in ("python", "torch", "timm", "fastssl")
        if name in record["versions"]
    )
    host = record["host"]
    commit = f", commit {record['git']}" if record.get("git") else ""
    return f"{host.get('gpu') or host['cpu']}, {versions}{commit}"
