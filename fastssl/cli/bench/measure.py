"""How every bench command measures: jobs one after the other, each record printed and written when it is there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from fastssl.cli.command import command_line
from fastssl.cli.common import console, write_json
from fastssl.errors import FastSSLError, counted
from fastssl.utils.json_text import to_json

if TYPE_CHECKING:
    from fastssl.benchmarks.harness.records import Record
    from fastssl.config.recipe import Recipe

#: A name for the reader, and the measurement.
Job = tuple[str, "Callable[[], list[Record]]"]


def load_recipes(names: Iterable[str], overrides: Iterable[str], arch: str | None = None) -> list[tuple[Recipe, str]]:
    from fastssl.config.recipe import load_recipe, parse_overrides
    from fastssl.models.backbones import resolve_arch

    if arch is not None:
        resolve_arch(arch)  # a mistyped network should fail before anything is measured
    changes = parse_overrides(overrides)
    loaded = [(load_recipe(name, changes), Path(name).stem) for name in names]
    return [(replace(recipe, arch=arch) if arch else recipe, name) for recipe, name in loaded]


def measure(json_path: str | None, jobs: list[Job]) -> None:
    """Run the jobs one after the other; every record is printed and written when it is there, so that a stop loses
    none.

    Each gets the running command in its details, so that its reader can make it again.

    Raises:
        FastSSLError: after all jobs, if some failed; the first failure is its cause.
    """
    from fastssl.benchmarks.harness.table import COLUMNS, cells, line

    command = command_line(click.get_current_context())

    def show(texts: Iterable[str]) -> None:
        console.print(line(tuple(texts)), highlight=False, markup=False, soft_wrap=True)

    failures: list[tuple[str, Exception]] = []
    written: list[dict] = []
    with _open(json_path) as file:
        show(COLUMNS)
        for label, job in jobs:
            try:
                records = job()
            except Exception as error:  # the other settings are worth their figures all the same
                failures.append((label, error))
                console.print(f"failed: {label}: {in_words(error)}", highlight=False, markup=False, soft_wrap=True)
                continue
            for record in records:
                record = replace(record, details={**(record.details or {}), "command": command})
                show(cells(record))
                written.append(asdict(record))
                _add(file, json_path, written)
    if failures:
        label, error = failures[0]
        others = f" ({len(failures)} of {counted(len(jobs), 'setting')} failed)" if len(jobs) > 1 else ""
        raise FastSSLError(f"{label}: {in_words(error)}{others}") from error


def _add(file: TextIO | None, json_path: str | None, records: list[dict]) -> None:
    """Bring the last of ``records`` to the file of lines; without one write the document of all of them anew."""
    try:
        if file is None:
            write_json(json_path, records)
        else:
            file.write(to_json(records[-1]) + "\n")
            file.flush()
    except OSError as error:
        with suppress(OSError, AttributeError):
            file.close()  # what is left in its buffer would be tried again at the end
        raise FastSSLError(
            f"{json_path}: a result was not written ({error.strerror or error}); it is in the table above"
        ) from error


def in_threads(number: int | None) -> str:
    return f", {counted(number, 'thread')}" if number else ""


def in_words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, FastSSLError) else f"{type(error).__name__}: {text}"


def _open(json_path: str | None) -> nullcontext[TextIO | None] | TextIO:
    """The file of lines; None where there is none, or a document is written."""
    if json_path is None or json_path.lower().endswith(".json"):
        write_json(json_path, [])  # what cannot be written should fail before it is measured
        return nullcontext(None)
    return nullcontext(sys.stdout) if json_path == "-" else open(json_path, "w", encoding="utf-8")
