"""Smoothed InfoNCE, forward and backward: our kernel in turns with the dense form that the paper's public code uses.

The ceiling is the two products with the queue that no exact method can leave out (queries with keys for the logits,
probabilities with keys for the gradient), over large tiles, and nothing else.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import RecipeSetting, rates
from fastssl.benchmarks.harness.timing import measure_in_turns, peak_extra_bytes
from fastssl.errors import FastSSLError
from fastssl.losses import SmoothedInfoNCE
from fastssl.losses.reference import dense_step

PEER = "light-moco (dense logits and target)"
_CEILING_TILE = 16384


def run(setting: RecipeSetting) -> list[Record]:
    """Measure a MoCo recipe's loss on random unit vectors.

    A run is one call of the loss and its backward pass: a batch of queries against one positive each and the queue. The
    symmetric loss makes two calls a pair, so ``view_per_s`` is batch over ``median_s`` and ``pair_per_s`` half of it.

    The one record is the kernel's; its ``details`` hold the peer's times too, the ratio of processor times and the peak
    extra memory of both in bytes.
    """
    if setting.recipe.method != "moco":
        raise FastSSLError(
            f"{setting.recipe_name}: bench loss measures smoothed InfoNCE, which {setting.recipe.method} does not use; "
            "name a MoCo recipe"
        )
    device, moco = setting.device, setting.recipe.moco
    queue, dim, batch_size = moco.queue, moco.projector.out, setting.batch_size or setting.recipe.train.batch_size
    target = (moco.temperature, moco.smoothing, moco.weighting, moco.neighbors)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(rows, dim, generator=generator) for rows in (batch_size, batch_size, queue)]
    queries, keys, negatives = (F.normalize(rows, dim=1).to(device) for rows in drawn)
    queries.requires_grad_()
    criterion = SmoothedInfoNCE(*target)

    def kernel() -> None:
        queries.grad = None
        criterion(queries, keys, negatives).backward()

    def peer() -> None:
        queries.grad = None
        dense_step(queries, keys, negatives, *target).backward()

    logits = torch.empty(min(queue, _CEILING_TILE), batch_size, device=device)
    gradient = torch.empty(batch_size, dim, device=device)

    @torch.no_grad()
    def products_alone() -> None:
        gradient.zero_()
        for tile in negatives.split(_CEILING_TILE):
            part = logits[: len(tile)]
            torch.mm(tile, queries.t(), out=part)
            gradient.addmm_(part.t(), tile)

    contenders = {"kernel": kernel, "peer": peer, "ceiling": products_alone}
    ours, theirs, ceiling = measure_in_turns(contenders, device=device, runs=setting.runs).values()
    fraction = 1 / ceiling.times_faster_than(ours)
    details = {
        "queue": queue,
        "dim": dim,
        "weighting": moco.weighting,
        "neighbors": criterion.neighbors,
        "smoothing": moco.smoothing,
        "threads": torch.get_num_threads(),
        "cpu_s": ours.median_cpu_s,
        "peer_median_s": theirs.median_s,
        "peer_cpu_s": theirs.median_cpu_s,
        "ratio_to_peer_cpu": ours.times_less_cpu_than(theirs),
        "peak_extra_bytes": peak_extra_bytes(kernel, device),
        "peer_peak_extra_bytes": peak_extra_bytes(peer, device),
    }
    values = {**rates(batch_size / ours.median_s / 2, batch_size, 2, fraction), "median_s": ours.median_s}
    record = setting.record(
        "loss",
        **values,
        ceiling_name="the two matrix products with the queue alone",
        bottleneck="matrix products" if fraction >= 0.5 else "exponentials and the search for the nearest",
        peer=PEER,
        ratio_to_peer=ours.times_faster_than(theirs),
        details=details,
    )
    return [record]
