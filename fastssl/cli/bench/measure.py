"""How every bench command measures: jobs one after the other, each record printed and written when it is there."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.command import command_line
from fastssl.cli.common import console, write_json
from fastssl.errors import FastSSLError, counted

if TYPE_CHECKING:
    from fastssl.benchmarks.harness.records import Record

#: Options that may be repeated, in the order in which they vary, and the field that each value goes to.
_REPEATED = {
    "amps": "amp",
    "recipes": "recipe",
    "data": "data",
    "workers": "workers",
    "pipelines": "pipeline",
    "batch_sizes": "batch_size",
}


def settings(chosen: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """One setting, with words for it, for each combination of the repeated options among a command's."""
    from fastssl.benchmarks.harness.setting import RecipeSetting, Setting
    from fastssl.config.recipe import load_recipe, parse_overrides
    from fastssl.distributed.devices import choose_device
    from fastssl.models.backbones import resolve_arch

    options = {**chosen, "device": choose_device(chosen.get("device", "cpu"))}
    if "pipelines" in options:
        options["pipelines"] = tuple(dict.fromkeys(options["pipelines"]))
    arch, changes = options.pop("arch", None), parse_overrides(options.pop("overrides", ()))
    if arch is not None:
        resolve_arch(arch)  # a mistyped network should fail before anything is measured
    recipes = {name: load_recipe(name, changes) for name in options.get("recipes", ())}
    if arch is not None:
        recipes = {name: replace(recipe, arch=arch) for name, recipe in recipes.items()}
    repeated = [name for name in _REPEATED if isinstance(options.get(name), tuple)]
    found = []
    for values in itertools.product(*(options.pop(name) or (None,) for name in repeated)):
        one = dict(zip(repeated, values))
        fields = {**options, **{_REPEATED[name]: value for name, value in one.items()}}
        if name := one.get("recipes"):
            fields |= {"recipe": recipes[name], "recipe_name": Path(name).stem}
        words = [
            fields.get("recipe_name"),
            one.get("pipelines"),
            one.get("data"),
            one.get("workers") and counted(one["workers"], "thread"),
            one.get("amps") and f"amp {one['amps']}",
            one.get("batch_sizes") and counted(one["batch_sizes"], "query"),
        ]
        found.append((", ".join(filter(None, words)), (RecipeSetting if recipes else Setting)(**fields)))
    return found


def measure(
    what: str,
    json_path: str | None,
    suite: str | None = None,
    show: Callable[[Record], str] | None = None,
    **chosen: Any,
) -> None:
    """Measure each of a command's settings, one after the other; every record is printed and written when it is there,
    so that a stop loses none. ``suite``: the module of `fastssl.benchmarks.suites` that does it; None: ``what``.
    ``show``: how a record is printed; None: as a line of the table.

    Each gets the running command in its details, so that its reader can make it again. Raises FastSSLError after all
    settings, if some failed; the first failure is its cause.
    """
    from fastssl.benchmarks.harness.table import COLUMNS, cells, line
    from fastssl.benchmarks.harness.timing import free_memory

    run: Callable[[Any], list[Record]] = import_module(f"fastssl.benchmarks.suites.{suite or what}").run
    command = command_line(click.get_current_context())
    jobs = settings(chosen)

    failures: list[tuple[str, Exception]] = []
    written: list[dict] = []
    write_json(json_path, written)  # what cannot be written should fail before it is measured
    if show is None:
        console.say(line(COLUMNS))
    for words, setting in jobs:
        label = f"{what}, {words}"
        try:
            free_memory(setting.device)  # of what earlier settings left in cycles
            records = run(setting)
        except Exception as error:  # the other settings are worth their figures all the same
            _let_go(error)
            failures.append((label, error))
            console.say(f"failed: {label}: {in_words(error)}")
            continue
        for record in records:
            record = replace(record, details={**(record.details or {}), "command": command})
            console.say(line(cells(record)) if show is None else show(record))
            written.append(asdict(record))
            _write(json_path, written)
    if failures:
        label, first = failures[0]
        others = f" ({len(failures)} of {counted(len(jobs), 'setting')} failed)" if len(jobs) > 1 else ""
        raise FastSSLError(f"{label}: {in_words(first)}{others}") from first


def _let_go(error: BaseException | None) -> None:
    """Of all that the frames of ``error`` hold, tensors on a GPU too. Its traceback can still be printed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _write(json_path: str | None, records: list[dict]) -> None:
    """All records so far to a file, which is whole at every moment; to standard output, a pipe or a device the last."""
    file = Path(json_path) if json_path is not None and json_path != "-" else None
    try:
        write_json(json_path, records if file and (file.is_file() or not file.exists()) else records[-1:])
    except OSError as error:
        reason = f"a result was not written ({error.strerror or error}); it is in the table above"
        raise FastSSLError(f"{json_path}: {reason}") from error


def in_words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, FastSSLError) else f"{type(error).__name__}: {text}"
