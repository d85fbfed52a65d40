"""``fastssl verify``: is this ``.beton`` file whole?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fastssl.cli.common import SomePath, console, json_option, late_progress_bar, quiet_option, write_json
from fastssl.errors import BetonError, counted
from fastssl.utils.addresses import is_remote, shown


def _count(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value != "all" and not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither 'all' nor a number of samples", ctx, param)
    return None if value == "all" else int(value)


@click.command("verify", context_settings={"show_default": True})
@click.argument("files", nargs=-1, required=True, type=SomePath(remote=True), metavar="FILE...")
@click.option(
    "--decode", metavar="ALL|N", callback=_count, default="100", help="Decode this many samples, evenly spaced, or all."
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: one a CPU]")
@quiet_option
@json_option
def verify(files: tuple[Path, ...], decode: int | None, workers: int | None, json_path: str | None) -> None:
    """Check each FILE's header and tables, its checksums if FILE.json is there, and decode samples. Status 1 when
    something is damaged. A folder of .beton files, or a pattern in quotes, stands for all of its files.

    \b
    fastssl verify photos.beton --decode all
    fastssl verify 'train-*.beton' --json checked.jsonl
    """
    from fastssl.pipelines.beton.dataset import beton_files

    records, failed = [], []
    for given, file in [(one, file) for one in files for file in beton_files(one)[0]]:
        # Of an address the copy in the cache is checked.
        name = f"{shown(given).rpartition('/')[0]}/{file.name}" if is_remote(given) else str(file)
        record, error = _check(file, name, decode, workers)
        records.append(record)
        if error is not None:
            failed.append(error)
    write_json(json_path, records if len(records) > 1 else records[0])
    if len(failed) > 1:
        raise BetonError(f"{len(failed):,} of {counted(len(records), 'file')} are damaged; the first: {failed[0]}")
    if failed:
        raise failed[0]


def _check(file: Path, name: str, decode: int | None, workers: int | None) -> tuple[dict[str, Any], BetonError | None]:
    """The record of one file, whose lines are said; and the error it ends with. ``name``: what messages call it."""
    from fastssl.pipelines.beton.verify import verify as run

    try:
        with late_progress_bar("checking", "samples") as progress:
            report = run(file, decode, workers, progress)
    except BetonError as error:
        said, told = (str(error).replace(str(file), one) for one in (file.name, name))
        return {"path": file.name, "ok": False, "problems": [said], "damaged": []}, BetonError(told)
    samples, sums = counted(report.samples, "sample"), f"{counted(report.checksummed, 'checksum')} compared"
    if not report.side_file:
        sums = f"no side file {name}.json, so no checksums"
    elif not report.checksummed:
        sums = "no checksums to compare"
    console.say(f"{name}: {samples}, tables in order, {sums}, {report.decoded:,} decoded, {report.seconds:,.1f} s")
    # The JSON names all of the samples.
    damaged = [*report.problems, *(f"sample {sample}: {complaint}" for sample, complaint in report.damaged[:20])]
    if len(report.damaged) > 20:
        damaged.append(f"and {counted(len(report.damaged) - 20, 'more sample')}")
    for problem in damaged:
        console.say(f"damaged: {problem.replace(str(file), name)}")
    # As in every record: the file's name without the folders that tell where somebody works.
    problems = [problem.replace(str(file), file.name) for problem in report.problems]
    record = {**asdict(report), "path": file.name, "problems": problems, "ok": report.ok}
    if report.ok:
        return record, None
    found = [f"{len(report.damaged):,} of {samples}"] if report.damaged else []
    found += report.problems[:1]
    words = f"{name}: damaged ({'; '.join(found)}); convert it again, or copy it again from a good one"
    return record, BetonError(words)
