"""Names of the rows that a run is judged by: the trained network, and what it has to beat."""

from __future__ import annotations

RAW = "raw pixels"
COLOURS = "colour histogram"
MAJORITY = "most frequent class"
RANDOM = "random initialisation"
TRAINED = "after pre-training"
#: What the trained network is compared with, in the order of the table.
MARKS = (MAJORITY, RAW, COLOURS, RANDOM)


def mark_of(name: str) -> str:
    """The mark that a row of ``summary.json`` stands for; behind raw pixels stands their size."""
    return RAW if name.startswith(RAW) else name
