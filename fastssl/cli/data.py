"""``fastssl data``: what is in a set of photos."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastssl.cli.common import PlainConsole, SomePath, console, json_option, late_progress_bar, quiet_option, write_json
from fastssl.errors import counted, printable
from fastssl.utils.addresses import is_remote, shown

if TYPE_CHECKING:
    from fastssl.data.contents import Contents, Group, Photos

#: Groups of equal photos that the JSON names.
_NAMED = 1000


@click.command()
@click.argument("files", nargs=-1, required=True, type=SomePath(remote=True), metavar="FILE...")
@click.option("--sheet", type=SomePath(), metavar="FILE.png", help="Draw photos of each FILE, spread over its classes.")
@click.option("--copies/--no-copies", default=True, show_default=True, help="Look for photos that are there twice.")
@quiet_option
@json_option
def data(files: tuple[Path, ...], sheet: Path | None, copies: bool, json_path: str | None) -> None:
    """Say what is in each FILE, a .beton file, a pattern of such files in quotes, a folder or a tar of photos: classes,
    sizes, bytes, what was rejected and why, and photos that are there twice, in one FILE or in two. Nothing is
    converted.

    Copies are photos whose bytes are equal as they are stored. Files that fastssl made know their photos' checksums,
    and hardly any photo is read; of others all may be, which --no-copies spares.

    \b
    fastssl data photos.beton --sheet photos.png
    fastssl data train.beton val.beton        # is a photo of val in train, too?
    """
    if sheet is not None and (not sheet.parent.is_dir() or sheet.suffix.lower() != ".png"):
        wrong = "name a .png" if sheet.parent.is_dir() else f"{sheet.parent}: no such folder"
        raise click.BadParameter(f"{sheet}: {wrong}", param_hint="--sheet")
    from fastssl.data.contents import count_copies, find_copies, look_into, open_photos

    with ExitStack() as opened:
        sets: list[Photos] = []
        titles: list[str] = []
        for path in files:
            sets += (found := opened.enter_context(open_photos(path)))
            # Of an address the copy in the cache was opened.
            titles += [shown(path) if is_remote(path) and len(found) == 1 else shown(one.path) for one in found]
        contents = [look_into(photos) for photos in sets]
        groups: list[Group] = []
        if copies:
            with late_progress_bar("looking for copies", "photos") as progress:
                groups = find_copies(sets, progress)
        if sheet is not None:
            from fastssl.report.drawing import contact_sheet

            picture = contact_sheet(sets, sheet)
            console.note(f"{sheet}: {picture.width}x{picture.height} px")
    within, across = count_copies(groups, len(contents))
    out, records = PlainConsole(), []  # standard output
    for number, one in enumerate(contents):
        also = [(other, count) for other, count in enumerate(across[number]) if count]
        record = {**asdict(one), "path": one.path.name, "copies": None}
        rows = _rows(one)
        if copies:
            mine = [group for group in groups if any(k == number for k, _ in group)][:_NAMED]
            named = [[(contents[k].path.name, i) for k, i in group] for group in mine]
            shared = [{"path": contents[k].path.name, "photos": n} for k, n in also]
            record["copies"] = {"within": within[number], "also_in": shared, "groups": named}
            parts = [f"{counted(within[number], 'photo')} like an earlier one" if within[number] else "none within"]
            parts += [f"{counted(n, 'photo')} also in {titles[k]}" for k, n in also]
            parts += [] if also or len(contents) == 1 else ["none in the other" + "s" * (len(contents) > 2)]
            rows.append(("copies", "; ".join(parts)))
        records.append(record)
        if json_path != "-":
            _print(out, titles[number], rows)
    write_json(json_path, records)


def _print(out: PlainConsole, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A table on a terminal; else a line each that begins with the title, for other programs."""
    if not out.is_terminal:
        for what, text in rows:
            out.say(f"{title}: {what}: {text}")
        return
    from rich import box
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column(style="bold", no_wrap=True), Column(), box=box.SIMPLE, show_header=False)
    table.title, table.title_justify, table.title_style = Text(title), "left", "bold"
    for what, text in rows:
        table.add_row(what, Text(printable(text)))
    out.print(table)


def _rows(one: Contents) -> list[tuple[str, str]]:
    from fastssl.pipelines.convert.formats import in_words, remedies

    rows = [("photos", f"{one.photos:,}")]
    if one.classes is None:
        rows.append(("classes", "no labels"))
    else:
        named = [f"{name} ({count:,})" for name, count in sorted(one.classes.items(), key=lambda item: -item[1])]
        named[3:-3] = ["..."] if len(named) > 6 else named[3:-3]
        alike = len(named) > 6 and len(counts := set(one.classes.values())) == 1
        which = f" of {counted(counts.pop(), 'photo')} each" if alike else f": {', '.join(named)}"
        rows.append(("classes", f"{len(one.classes):,}{which}"))
    if (side := one.short_side) is not None:
        of = f" of {side['measured']:,} looked at" if side["measured"] < one.photos else ""
        spread = f"nine in ten from {side['p5']:,} to {side['p95']:,} px"
        most = f"median {side['median']:,} px, {spread if side['p5'] < side['p95'] else 'as nine in ten have'}"
        small = counted(side["below_224"], "photo") if side["below_224"] else "none"
        rows.append(("short side", f"{most}; {small}{of} below 224 px"))
    how = "" if one.raw is None else "; all JPEG" if not one.raw else f"; {one.raw:,} stored as pixels"
    if one.bytes is not None:
        total = f"{one.bytes / 1e6:,.1f} MB" if one.bytes >= 1e6 else f"{one.bytes / 1e3:,.1f} kB"
        rows.append(("bytes", f"{total}, {one.bytes / one.photos / 1e3:,.1f} kB a photo{how}"))
    if one.rejects:
        kinds = [f"{count:,} {kind}" for kind, count in one.rejects.items()]
        kinds[8:] = [f"and {counted(len(kinds) - 8, 'more kind')}"] if len(kinds) > 8 else []
        rows.append(("rejected", f"{sum(one.rejects.values()):,}: {'; '.join(kinds)}"))
    if one.passed_over:
        rows.append(("passed over", "; ".join([in_words(one.passed_over), *remedies(one.passed_over)])))
    return rows
