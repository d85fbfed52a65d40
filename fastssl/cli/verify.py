"""``fastssl verify``: is this ``.beton`` file whole?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fastssl.cli.common import SomePath, console, json_option, late_progress_bar, quiet_option, write_json
from fastssl.errors import BetonError, counted


def _count(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value != "all" and not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither 'all' nor a number of samples", ctx, param)
    return None if value == "all" else int(value)


@click.command("verify", context_settings={"show_default": True})
@click.argument("file", type=SomePath())
@click.option(
    "--decode", metavar="ALL|N", callback=_count, default="100", help="Decode this many samples, evenly spaced, or all."
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: one a CPU]")
@quiet_option
@json_option
def verify(file: Path, decode: int | None, workers: int | None, json_path: str | None) -> None:
    """Check FILE's header and tables, its checksums if FILE.json is there, and decode samples. Status 1 when something
    is damaged.

    \b
    fastssl verify photos.beton --decode all
    """
    from fastssl.pipelines.beton.verify import verify as run

    def write(record: dict[str, Any]) -> None:
        # As in every record: the file's name without the folders that tell where somebody works.
        problems = [problem.replace(str(file), file.name) for problem in record["problems"]]
        write_json(json_path, {**record, "path": file.name, "problems": problems})

    try:
        with late_progress_bar("checking", "samples") as progress:
            report = run(file, decode, workers, progress)
    except BetonError as error:
        write({"path": "", "ok": False, "problems": [str(error)], "damaged": []})
        raise
    write({**asdict(report), "ok": report.ok})
    samples, sums = counted(report.samples, "sample"), f"{counted(report.checksummed, 'checksum')} compared"
    if not report.side_file:
        sums = f"no side file {file}.json, so no checksums"
    elif not report.checksummed:
        sums = "no checksums to compare"
    console.say(f"{file}: {samples}, tables in order, {sums}, {report.decoded:,} decoded, {report.seconds:,.1f} s")
    # The JSON names all of the samples.
    damaged = [*report.problems, *(f"sample {sample}: {complaint}" for sample, complaint in report.damaged[:20])]
    if len(report.damaged) > 20:
        damaged.append(f"and {counted(len(report.damaged) - 20, 'more sample')}")
    for problem in damaged:
        console.say(f"damaged: {problem}")
    if not report.ok:
        found = [f"{len(report.damaged):,} of {samples}"] if report.damaged else []
        found += report.problems[:1]
        raise BetonError(f"{file}: damaged ({'; '.join(found)}); convert it again, or copy it again from a good one")
