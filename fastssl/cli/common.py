"""What several commands share: the console, JSON output, progress."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich import progress as bars
from rich.console import Console
from rich.text import Text

from fastssl.errors import printable
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.json_text import records_to_json


class PlainConsole(Console):
    """A console to which text is text: names of files and of classes are strangers' and may hold markup or what a
    terminal acts on. Without ``notes``, as with ``--quiet``, for all threads: no progress, and nothing that is noted.
    """

    notes = True

    def __init__(self, **options: Any):  # rich's own, as of `print`
        super().__init__(markup=False, highlight=False, **options)

    def print(self, *objects: object, **options: Any) -> None:
        """As rich does it; strings line by line through ``printable``."""
        shown = ["\n".join(map(printable, one.split("\n"))) if isinstance(one, str) else one for one in objects]
        super().print(*shown, **options)

    def say(self, text: str, style: str | None = None) -> None:
        """A line, which the terminal breaks where it is too long."""
        self.print(text, style=style, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that nothing depends on."""
        if self.notes:
            self.say(text)


#: Written to stderr, so that ``--json -`` owns standard output.
console = PlainConsole(stderr=True)


class SomePath(click.Path):
    """A path that is not the empty string: an unset ``"$VAR"`` in a script should not mean "the current folder".
    ``remote``: or an address of a server, which stays the text that it is. ``exists``: something has to be there.
    """

    def __init__(self, remote: bool = False, exists: bool = False):
        super().__init__(exists=exists)
        self.remote = remote

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == "":
            self.fail("the path is empty", param, ctx)
        if isinstance(value, str) and "://" in value:
            return self._address(value, param, ctx)
        return Path(os.fsdecode(super().convert(value, param, ctx)))

    def _address(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from fastssl.utils import remote_cache
        from fastssl.utils.addresses import shown

        if not self.remote:
            self.fail(f"{shown(value)}: an address; this has to be a path of this machine", param, ctx)

        @contextmanager
        def show(name: str) -> Iterator[Callable[[int, int], None]]:
            with late_progress_bar(f"downloading {name}", "kB") as progress:
                yield lambda done, total: progress(done // 1000, total // 1000)

        remote_cache.show = show
        return value  # type: ignore[return-value]  # pathlib would take one of the two slashes


def _check_json_path(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse before the work what could not be written behind it, and what must not be written over."""
    if value is None or value == "-":
        return value
    path = Path(value)
    if value == "" or path.is_dir():
        raise click.BadParameter(f"{value!r} is not a file; '-' is standard output", ctx, param)
    if not path.parent.is_dir():
        raise click.BadParameter(f"{path.parent}: no such folder; create it first", ctx, param)
    if path.name.endswith((".beton", ".beton.json")):
        raise click.BadParameter(f"{value}: that name belongs to a .beton file; choose another", ctx, param)
    begin = b""
    if path.is_file():
        with path.open("rb") as file:
            begin = file.read(4096).lstrip()[:1]
    if path.suffix.lower() in _OF_OTHERS or begin not in (b"", b"{", b"["):  # with which JSON begins
        other = "is the name of something else than results in JSON; choose another"
        raise click.BadParameter(f"{value}: {other}", ctx, param)
    return value


#: endings of weights, recipes and pages
_OF_OTHERS = frozenset(
    {".pt", ".pth", ".tar", ".safetensors", ".onnx", ".pte", ".yaml", ".yml", ".html", ".md", ".png", ".jpg", ".jpeg"}
)

json_option = click.option(
    "--json",
    "json_path",
    metavar="FILE",
    default=None,
    callback=_check_json_path,
    help="Also write the result as JSON to FILE ('-': standard output). FILE.jsonl gets a line a record.",
)

#: fastssl.pipelines.engines.base.PIPELINES, written out: that module loads torch, which --help should not wait for.
PIPELINES = ("auto", "native", "dali", "ffcv", "torchcodec")

pipeline_option = click.option(
    "--pipeline",
    type=click.Choice(PIPELINES),
    default="auto",
    show_default=True,
    help="Engine that decodes and crops; all give the same views. `fastssl doctor` says which can run here.",
)


def _be_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    vars(console).update(notes=not value)
    ctx.call_on_close(lambda: vars(console).update(notes=True))


quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_be_quiet,
    help="No progress and no notes: only warnings, errors and the result.",
)


def finite(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """For float options, also such that may be left out or repeated: NaN passes every comparison of a range."""
    for one in value if isinstance(value, tuple) else (value,):
        if one is not None and not math.isfinite(one):
            raise click.BadParameter(f"{one} is not a number to work with", ctx, param)
    return value


def write_json(path: str | None, records: dict | list[dict]) -> None:
    """Write to ``path`` (``-`` is standard output, ``None`` does nothing) what `records_to_json` gives for it."""
    if path is None:
        return
    text = records_to_json(records if isinstance(records, list) else [records], path)
    target = Path(path)
    if path == "-":
        try:
            sys.stdout.write(text)
            sys.stdout.flush()  # what fails when the interpreter ends is no error that a command could tell
        except OSError as error:
            with suppress(OSError, ValueError):  # what is left in the buffer would be tried again at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            error.filename = "standard output"
            raise
    elif target.is_file() or not target.exists():
        write_atomically(target, lambda temporary: temporary.write_text(text))
    else:  # a pipe or a device
        target.write_text(text)


class _RateColumn(bars.ProgressColumn):
    """Items a second, over the recent past."""

    def render(self, task: bars.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{f'{speed:,.0f}' if speed else '-'} {task.fields['unit']}/s")


@contextmanager
def progress_bar(label: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Yield ``advance(done_so_far)``: a live bar on a terminal, a plain line now and then in a log, nothing with
    ``--quiet``. ``total``: None when it is not known.
    """
    if not console.notes:
        yield lambda done: None
        return
    if console.is_terminal:
        columns = bars.SpinnerColumn(), bars.TextColumn(label), bars.BarColumn(), bars.MofNCompleteColumn()
        with bars.Progress(*columns, _RateColumn(), bars.TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(label, total=total, unit=unit)
            yield lambda done: bar.update(task, completed=done)
        return

    started = last = time.monotonic()
    first: int | None = None  # what was taken over from a stopped run is not this run's speed
    told = -1

    def advance(done: int) -> None:
        nonlocal last, first, told
        now = time.monotonic()
        first = done if first is None else first
        if done in (first, told) or (done != total and now - last < 10):
            return
        last, told = now, done
        rate = (done - first) / max(now - started, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if total and done < total else ""
        console.print(f"{label}: {done:,}{f'/{total:,}' if total else ''} {unit}, {rate:,.0f} {unit}/s{left}")

    yield advance


@contextmanager
def late_progress_bar(label: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
    """Yield ``progress(done, total)``, whose first call begins the bar: a large source's total is known late."""
    with ExitStack() as stack:
        begun: list[Callable[[int], None]] = []

        def progress(done: int, total: int) -> None:
            if not begun:
                begun.append(stack.enter_context(progress_bar(label, total, unit)))
            begun[0](done)

        yield progress
