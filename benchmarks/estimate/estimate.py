"""What a whole run will cost on this machine, from less than a minute of measuring: time, memory, the largest batch,
and what limits.

    loader alone -> step at two or three batch sizes -> features for the probes -> loader and step together
    -> arithmetic (cost.py)

A step of the recipe's whole batch is run only where it is quick enough; else time and memory are taken as lines over
the batch, and the estimate says so.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastssl.benchmarks.estimate import cost, memory
from fastssl.benchmarks.estimate.gauge import Gauge, Loading, Measured, gauge_step, measure
from fastssl.config.recipe import ProgressiveConfig, Recipe
from fastssl.errors import FastSSLError, counted
from fastssl.evaluate.online_probe import choose_split, match_classes
from fastssl.methods import METHODS
from fastssl.models.backbones import resolve_arch
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.registry import choose_engine
from fastssl.utils.versions import describe_git, describe_host, describe_versions


def _final_passes(recipe: Recipe, photos: int) -> int:
    """Photos through a network at the run's end, ``photos`` for each network that is probed (``finish.py``)."""
    judged = 1 + (recipe.probe.teacher and METHODS[recipe.method][0].HAS_TEACHER)
    networks = 1 + judged * (2 if recipe.probe.reestimate_bn else 1)  # the first is the one before training
    return networks * photos + judged * recipe.probe.reestimate_bn


def _recomputed(
    recipe: Recipe, device: torch.device, gauges: list[Gauge], need: cost.MemoryModel
) -> cost.MemoryModel | None:
    """``need`` with ``train.checkpoint``, by steps of the smaller batches that were measured; None: that cannot be."""
    recipe = replace(recipe, train=replace(recipe.train, checkpoint=True))
    lean = [gauge_step(recipe, device, one.batch) for one in gauges[:2]]
    if "checkpoint" in lean[0].step.inner.fallbacks:
        return None
    return replace(need, step=cost.fit_line([(one.batch, gauges[-1].overhead * one.peak_bytes) for one in lean]))


def run(
    recipe: Recipe,
    recipe_name: str,
    data: Path,
    val: Path | None = None,
    device: torch.device | str = "cpu",
    pipeline: str = "auto",
    workers: int | None = None,
    seconds: float = 40.0,
) -> dict[str, Any]:
    """Measure for about ``seconds`` and work out what the run will cost that learns from the ``.beton`` file ``data``
    and is probed on ``val``, with the loader's ``pipeline`` and ``workers``. Raises FastSSLError for a file, network,
    batch or engine with which training would not begin either.

    Returns:
        Seconds, bytes, and pairs (source photos with both views) a second.

        recipe, arch, pipeline, device, workers, devices, epochs, batch_size, accumulate, steps_per_epoch: what would
            run, and on how many devices; small_epochs: those with small views. data: name and number of photos of the
            file.
        step_s: one step of the training loop, waiting for data included. epoch_s: the steps of an epoch of full views.
        run_s: all epochs, the online probes and the features of the final one; device_hours: the same of all devices.
        probes: online probes; ``probe_s`` each. ``final_probe_s``: features of the last one.
        loader_pair_per_s, step_pair_per_s: each alone; pair_per_s: the loop. limit: ``data`` or ``step``.
        memory_bytes: of the process at the peak of a step, on the device: ``static_bytes`` (networks, queue,
            optimiser), ``activation_bytes`` (what a step adds, on a CPU with what the allocator keeps) and
            ``data_bytes`` (views; on a CPU the loader's ring too). The interpreter and its libraries are not in it.
        host_bytes: the loader's ring on the host, for a GPU run.
        checkpoint_bytes: of the files in ``checkpoints/``; while one is written, the one before is there too.
        available_bytes, total_bytes: memory of the device, before the measurement; ``usable_bytes`` is the share that
            is planned with.
        fits: whether the recipe's batch does.
        largest_batch, largest_batch_limit: the largest batch that fits, in as many parts as the recipe has, and that
            the recipe allows, and what stops it (``memory``, ``photos``, or a key of the recipe, ``moco.queue``).
        fitting_accumulate: where the batch does not fit, the ``train.accumulate`` with which it would; None: none does,
            or none is needed.
        recomputed_bytes: where the batch does not fit, ``memory_bytes`` with ``train.checkpoint``; None: the recipe has
            it, the network cannot, or it is not needed.
        measured: the figures under the estimate. extrapolated, left_out: in words.
        seconds: that the measurement took. host, versions, git: as in a benchmark's record.
    """
    started, device = time.perf_counter(), torch.device(device)
    arch = resolve_arch(recipe.arch)
    train, cpu = recipe.train, device.type == "cpu"
    batch, parts = train.batch_size, train.parts
    with open_beton(data) as reader:
        photos = len(reader)
        if photos < batch:
            how_many = counted(photos, "photo")
            raise FastSSLError(
                f"{reader.path}: {how_many}, fewer than one batch of {batch}; give a smaller --batch-size"
            )
        measured = measure(Loading(reader, recipe, device, pipeline, workers), started, seconds)
        online, final = _probe_sizes(recipe, reader, val)
        on_device, on_host = map(float, memory.loader_bytes(recipe, reader, device))
    gauges, top, groups = measured.gauges, measured.gauges[-1], recipe.settings.groups
    # Steps with fewer BatchNorm groups than the recipe's make other passes: they count only where there is nothing
    # else.
    alike = [one for one in gauges if one.batch >= groups] or gauges[-1:]
    saved, backbone = memory.state_bytes(top.step)
    static = saved + memory.half_bytes(top.step)
    if not cpu and measured.device_data:
        on_device = measured.device_data / top.batch
    images = memory.image_bytes(recipe, device) if groups > 1 else 0
    of_step = cost.fit_line([(one.batch, top.overhead * one.peak_bytes) for one in alike])
    need = cost.MemoryModel(static, of_step, images, on_device + (on_host if cpu else 0))
    usable = cost.USABLE[device.type] * measured.available
    if train.accumulate == "auto":
        parts = cost.parts_that_fit(need, usable, batch, recipe.settings.student_groups) or 1
    peak, part = need.at(batch, parts), batch // parts
    fits = peak <= usable
    lean = None if fits or train.checkpoint else _recomputed(recipe, device, alike, need)
    largest, stopped = cost.largest_batch(need, usable, settings=recipe.settings, most=photos, parts=parts)
    time_line = cost.fit_line([(one.batch, one.median_s) for one in alike[-2:]])
    alone_s = parts * (top.median_s if top.batch == part else time_line.at(part))
    together = measured.together if parts == 1 else None
    step_s = cost.step_with_data_s(alone_s, batch, measured.loader, shared=cpu, together=together)
    probes = cost.probe_count(train.epochs, recipe.probe.every_epochs)
    probe_s, final_s = online / measured.features, _final_passes(recipe, final) / measured.features
    epoch_s, run_s = cost.run_seconds(photos, batch, train.epochs, step_s, probes=probes, probe_s=probe_s)
    # Small views spare the step's time, not the loader's, which is the least that a step takes on cores of its own.
    small_s = max(step_s - alone_s * (1 - _small_share(recipe, device, top)), 0.0 if cpu else batch / measured.loader)
    run_s += final_s - recipe.small_epochs * (photos // batch) * (step_s - min(small_s, step_s))
    steps = [
        {"batch_size": one.batch, "median_s": one.median_s, "runs": len(one.seconds), "peak_bytes": one.peak_bytes}
        for one in gauges
    ]
    online_knn = "kNN of the online probes, " if recipe.probe.every_epochs else ""
    return {
        "recipe": recipe_name,
        "arch": arch,
        "pipeline": choose_engine(device)[0] if pipeline == "auto" else pipeline,
        "device": device.type,
        "workers": measured.workers,
        "devices": 1,
        "data": {"name": reader.path.name, "samples": photos},
        "epochs": train.epochs,
        "small_epochs": recipe.small_epochs,
        "batch_size": batch,
        "accumulate": parts,
        "steps_per_epoch": photos // batch,
        "step_s": step_s,
        "epoch_s": epoch_s,
        "run_s": run_s,
        "device_hours": run_s / 3600,
        "probes": probes,
        "probe_s": probe_s,
        "final_probe_s": final_s,
        "loader_pair_per_s": measured.loader,
        "step_pair_per_s": batch / min(alone_s, step_s),  # where the loop came out the faster one, that was noise
        "pair_per_s": batch / step_s,
        "limit": "data" if measured.loader < batch / alone_s else "step",
        "memory_bytes": round(peak),
        "static_bytes": static,
        "activation_bytes": round(peak - static - need.data * batch),
        "data_bytes": round(need.data * batch),
        "host_bytes": 0 if cpu else round(on_host * batch),
        "checkpoint_bytes": saved + backbone,
        "available_bytes": measured.available,
        "usable_bytes": round(usable),
        "total_bytes": measured.total,
        "fits": fits,
        "largest_batch": largest,
        "largest_batch_limit": stopped,
        "fitting_accumulate": None
        if fits
        else cost.parts_that_fit(need, usable, batch, recipe.settings.student_groups),
        "recomputed_bytes": lean and round(lean.at(batch, parts)),
        "measured": {
            "loader": {"pair_per_s": measured.loader, "workers": measured.workers},
            "step": steps,
            "together": measured.together and {"batch_size": measured.together[0], "step_s": measured.together[1]},
            "features_per_s": measured.features,
            "step_overhead": top.overhead,
        },
        "extrapolated": _extrapolated(recipe, measured, parts, len(alike)),
        "left_out": [f"{online_knn}kNN, linear probe, pictures and report at the end", "writing checkpoints"],
        "seconds": time.perf_counter() - started,
        "host": describe_host(),
        "versions": describe_versions(),
        "git": describe_git(),
    }


def _small_share(recipe: Recipe, device: torch.device, full: Gauge) -> float:
    """Time of a step of small views (``progressive``) as a share of that of the full ones; 1: there are none."""
    if not recipe.small_epochs:
        return 1.0
    # Without `progressive`, which would make the small views smaller still.
    small = gauge_step(replace(recipe, views=recipe.views_at(0), progressive=ProgressiveConfig()), device, full.batch)
    for _ in full.seconds:
        small.time_once()
    return small.median_s / full.median_s


def _probe_sizes(recipe: Recipe, reader: BetonReader, val: Path | None) -> tuple[int, int]:
    """Photos of an online probe, and of the final one."""
    with open_beton(val) if val else nullcontext() as queries:
        if queries is not None:
            match_classes(reader, queries)
        limits = (recipe.probe.online_samples, recipe.probe.final_samples)
        online, final = (choose_split(reader, queries, limit, seed=0) for limit in limits)
        return len(online.bank_index) + len(online.query_index), len(final.bank_index) + len(final.query_index)


def _extrapolated(recipe: Recipe, measured: Measured, parts: int, points: int) -> list[str]:
    """What was not measured as the run will do it, in words."""
    train, top = recipe.train, measured.gauges[-1].batch
    part, found = train.batch_size // parts, []
    if top < part:
        how = "linearly" if points > 1 else "in proportion"
        found.append(f"time and memory of a step: {how} from batch {top} to {part}")
    if parts > 1:
        off = "long" if measured.gauges[-1].step.method.divisible else "short: its loss takes each part through twice"
        found.append(f"train.accumulate: {parts} times the time of a whole step of {part}, which is a little too {off}")
    if measured.together is None or parts > 1:
        found.append("loader and step together: from the rates that each has alone")
    elif top < train.batch_size:
        found.append(f"loader and step together: measured at batch {top}")
    for switch in ("compile", "graph"):
        if (asked := getattr(train, switch)) is True or (asked and measured.gauges[-1].step.device.type == "cuda"):
            found.append(f"train.{switch}: measured without it, the run should be faster")
    return found
