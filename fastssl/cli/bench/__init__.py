"""``fastssl bench``: images a second of each part, beside what limits it."""

from __future__ import annotations

import os

import click

from fastssl.cli.lazy import LazyCommand, LazyGroup

_LINES = {
    "loader": "Decoding, the host's cost of views, the whole loader.",
    "views": "Crop and colour of pictures that lie on the device.",
    "loss": "The loss, in turns with its dense form.",
    "step": "The training step on views that are there already.",
    "train": "Loader and step together, and what would help.",
    "convert": "Whole conversions, copied or re-encoded.",
    "ceilings": "What this machine can do at most.",
    "report": "What the records say, as a page, markdown and plots.",
}
BENCHES = {name: LazyCommand("fastssl.cli.bench.commands", name, line) for name, line in _LINES.items()}


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
