"""``fastssl estimate``."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import click

from fastssl.cli.common import console, finite, json_option, write_json
from fastssl.cli.inputs import ON_CONSOLE, input_options
from fastssl.errors import counted, duration
from fastssl.inputs import Wanted, choose_inputs


@click.command()
@input_options()
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    callback=finite,
    default=40.0,
    show_default=True,
    help="Time for measuring; more of it comes closer to the recipe's batch.",
)
@json_option
def estimate(wanted: Wanted, seconds: float, json_path: str | None) -> None:
    """What a run will cost on this machine: time, memory, the largest batch, and what limits it.

    Measures the loader and the training step for less than a minute; where the recipe's batch is too slow for that,
    smaller ones.

    \b
    fastssl estimate --data photos/
    fastssl estimate --arch resnet18 --data photos.beton --recipe light-moco-mobilenetv3 --batch-size 256 --json -
    """
    # torch's profiler, which counts bytes here, talks to the terminal unless told not to before torch is loaded.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from fastssl.benchmarks.estimate.estimate import run
    from fastssl.distributed.devices import choose_device

    inputs = choose_inputs(wanted, ON_CONSOLE)
    if (place := choose_device(wanted.device)).type == "mps":
        raise click.UsageError("--device mps: measured are cpu and cuda")
    where = f"{inputs.recipe.arch} on this {'GPU' if place.type == 'cuda' else 'CPU'}"
    console.say(f"measuring {inputs.name} with {where} for about {seconds:.0f} s ...")
    result = run(inputs.recipe, inputs.name, inputs.data, inputs.val, place, wanted.pipeline, wanted.workers, seconds)
    for line in describe(result):
        console.say(line)
    write_json(json_path, result)


def describe(estimate: dict[str, Any]) -> list[str]:
    """The estimate in words, the most wanted figures first."""
    result = SimpleNamespace(**estimate)
    # From one small batch in proportion: what is fixed in a step was taken to grow with it.
    most = "at most " if any("in proportion" in item for item in result.extrapolated) else ""
    steps, on_cpu = counted(result.steps_per_epoch, "step"), result.device == "cpu"
    host = f"; {_bytes(result.host_bytes)} on the host for the loader" if result.host_bytes else ""
    sizes = ", ".join(str(step["batch_size"]) for step in result.measured["step"])
    online = f"{counted(result.probes, 'online probe')} of {_time(result.probe_s)}, " if result.probes else ""
    extrapolated = f" Extrapolated: {'; '.join(result.extrapolated)}." if result.extrapolated else ""
    small = f" ({result.small_epochs} with small views)" if result.small_epochs else ""
    return [
        f"One epoch: {most}{_time(result.epoch_s)} ({steps} of {result.batch_size:,}). "
        f"{counted(result.epochs, 'epoch')}{small}: {_time(result.run_s)} on this {'CPU' if on_cpu else 'GPU'}, "
        f"{_number(result.device_hours)} {'device hours' if on_cpu else 'GPU-hours'}.",
        _limit(result),
        f"Memory: {_bytes(result.memory_bytes)} at the peak of a step (networks, queue, optimiser "
        f"{_bytes(result.static_bytes)}, activations {_bytes(result.activation_bytes)}, "
        f"{'views and loader' if on_cpu else 'views'} "
        f"{_bytes(result.data_bytes)}) of {_bytes(result.available_bytes)} free{host}. "
        f"Checkpoints: {_bytes(result.checkpoint_bytes)} on disk, twice that while one is written.",
        _batch(result),
        f"Included: {online}{_time(result.final_probe_s)} for the features of the final probe.",
        f"Measured in {result.seconds:.0f} s: the step at batch {sizes}.{extrapolated}",
        f"Not counted: {'; '.join(result.left_out)}.",
    ]


def _limit(result: SimpleNamespace) -> str:
    step, data = _number(result.step_pair_per_s), _number(result.loader_pair_per_s)
    threads = counted(result.workers, "decoding thread")
    if result.limit == "step":
        text = f"Limit: the step, {step} pair/s; the loader alone could feed {data}"
    else:
        text = f"Limit: the data, {data} pair/s from {threads}; the step alone could take {step}"
    return f"{text}. Both together: {_number(result.pair_per_s)} pair/s."


def _batch(result: SimpleNamespace) -> str:
    """Whether the batch fits, and which would."""
    reason = {
        "memory": "memory is the limit",
        "moco.queue": "moco.queue, a multiple of the keys of a step, allows no more",
        "swav.queue": "swav.queue, which holds whole batches, allows no more",
        "simclr.neighbors": "the smoothing's neighbours want more negatives than a batch has",
        "photos": f"the file has {counted(result.data['samples'], 'photo')}",
    }[result.largest_batch_limit]
    if result.fits:
        return f"Largest batch that fits and that the recipe allows: {result.largest_batch:,} ({reason})."
    less, ways = result.recomputed_bytes, []
    if less and less <= result.usable_bytes:
        ways = [f"--set train.checkpoint=true ({_bytes(less)}, the same steps)"]
    ways += [f"--batch-size {result.largest_batch}"] if result.largest_batch else []
    ways += [f"--set train.accumulate={result.fitting_accumulate}"] if result.fitting_accumulate else []
    other = f"; {' or '.join(ways)} does" if ways else ", and no smaller one does"
    return f"The batch of {result.batch_size:,} does not fit{other}."


def _time(seconds: float) -> str:
    """0.3 s, 12 min, 3 h 12 min, 26.7 days."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return duration(seconds) if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def _number(value: float) -> str:
    """Two digits at least: 0.32, 4.1, 14, 1,100."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
