"""``fastssl bench ceilings``."""

from __future__ import annotations

import click

from fastssl.cli.bench.measure import measure
from fastssl.cli.bench.options import data_option, device_option, folder_option, photos_option, runs_option
from fastssl.cli.common import finite, json_option


@click.command()
@data_option
@photos_option
@device_option
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads, beside one. Default: one a core.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    callback=finite,
    default=10.0,
    show_default=True,
    help="Counted time of decoding; the other figures take as long as their runs do.",
)
@folder_option
@runs_option
@json_option
def ceilings(data, photos, device, workers, seconds, folder, runs, json_path) -> None:
    """What this machine can do at most: bare JPEG decoding, memory copies, matrix products, and the disk past the page
    cache.

    Each run writes a file of up to 256 MB and reads it.

    \b
    fastssl bench ceilings --json out.jsonl
    fastssl bench ceilings --data photos.beton --folder /mnt/photos --seconds 30
    """
    from fastssl.benchmarks.suites.ceilings import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)
    measure(
        json_path,
        [
            (f"ceilings, {source}", lambda source=source: run(source, place, workers, seconds, runs, photos, folder))
            for source in data
        ],
    )
