"""What a training loop's time goes into: data or step. The one rule of ``pretrain`` and ``bench train``.

The figure is the *share of data*: what part of the loop's time would be saved if data cost nothing. ``bench train``
measures it (the same steps on batches that are there already); a run of ``pretrain``, which has no such steps, counts
it from the loader's clocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.plan.draw import ViewSpec

#: Shares of data below that are not worth a word.
WORTH = 0.05


def data_share(
    seconds: float,
    *,
    on_cpu: bool,
    wait_s: float,
    colour_s: float,
    loader_cpu_s: float,
    step_cpu_s: float,
) -> float:
    """The share of data, counted.

    On a GPU that is the time for which the loop stood waiting. On a CPU photos are decoded beside the step on the same
    cores, which makes the step longer and the wait short. A step alone would take about the processor time of the
    thread that makes it; what the loop took above that is data's doing, as far as the loader was at work at all.

    Args:
        seconds: of the loop, above 0.
        on_cpu: whether step and decoding share the processor.
        wait_s: the loop stood waiting for a batch to be decoded. colour_s: and for its colours.
        loader_cpu_s: processor time of the decoding threads.
        step_cpu_s: processor time of the loop's own thread, without what it spent in the loader.

    Returns:
        0 to 1.
    """
    data_s = min(seconds - step_cpu_s, wait_s + colour_s + loader_cpu_s) if on_cpu else wait_s
    return min(max(data_s / seconds, 0.0), 1.0)


def bottleneck(share: float) -> str:
    """In words, from the share of data."""
    if share >= WORTH:
        return f"data ({share:.0%} of the time)"
    return f"step (data costs {max(0.0, share):.0%} of the time)"


def smaller_side(reader: BetonReader, views: Sequence[ViewSpec]) -> int | None:
    """The short side to which photos for these views are usually converted: 256 for 224 px; None: they are hardly
    larger, or not all are JPEGs.

    A crop of a fifth of the area is then still half as wide as the view, as it is with ImageNet's 256 for 224.
    """
    some = reader.some()
    if (reader.take("modes", some) == MODE_RAW).any():
        return None
    side = -(-max(spec.size for spec in views) * 8 // 7 // 16) * 16
    return side if float(np.median(np.minimum(*reader.shapes(some)))) > 1.1 * side else None
