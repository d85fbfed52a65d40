"""``fastssl bench``: images a second of each part, beside what limits it. One module for each command."""

from __future__ import annotations

import os

import click

from fastssl.cli.lazy import LazyCommand, LazyGroup

BENCHES = {
    "loader": LazyCommand(
        "fastssl.cli.bench.loader", "loader", "Decoding, the host's cost of views, the whole loader."
    ),
    "views": LazyCommand("fastssl.cli.bench.views", "views", "Crop and colour of pictures that lie on the device."),
    "loss": LazyCommand("fastssl.cli.bench.loss", "loss", "The loss, in turns with its dense form."),
    "step": LazyCommand("fastssl.cli.bench.step", "step", "The training step on views that are there already."),
    "train": LazyCommand("fastssl.cli.bench.train", "train", "Loader and step together, and what would help."),
    "convert": LazyCommand("fastssl.cli.bench.convert", "convert_bench", "Whole conversions, copied or encoded anew."),
    "ceilings": LazyCommand("fastssl.cli.bench.ceilings", "ceilings", "What this machine can do at most."),
    "report": LazyCommand("fastssl.cli.bench.report", "report", "What the records say, as a page, markdown and plots."),
}


@click.group(cls=LazyGroup, lazy=BENCHES, subcommand_metavar="WHAT [ARGS]...")
def bench() -> None:
    """Measure images/s of the loader, the views, the loss, the step, of training as a whole, or of the conversion; and
    what the machine can do.

    Every figure is a median of alternating runs after a warm-up, and stands beside a ceiling that was measured in the
    same process. A pair is one source picture with all its views.

    \b
    fastssl bench loader --seconds 10 --json loader.jsonl
    fastssl bench train --recipe light-moco-mobilenetv3 --data photos.beton
    """
    # torch's profiler, which counts bytes here, talks to the terminal unless told not to before torch is loaded.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
