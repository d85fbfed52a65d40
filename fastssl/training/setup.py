"""What a run needs before its first step, agreed on by all of its processes: networks, position, folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from fastssl.config.recipe import Recipe, recipe_to_dict
from fastssl.config.recipe_choice import require_photos
from fastssl.config.resolved import differences, normalisation_of
from fastssl.distributed.collectives import any_rank, barrier, broadcast_module, broadcast_object
from fastssl.distributed.devices import use_amp
from fastssl.distributed.world import World, first_of_host_speaks, launch_from_environment
from fastssl.errors import FastSSLError, counted, without_folders
from fastssl.evaluate.online_probe import match_classes
from fastssl.evaluate.session import weights_fingerprint
from fastssl.evaluate.trained import Trained
from fastssl.methods.distill import Distill
from fastssl.models.backbones import plain_arch, save_backbone
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.verify import verify
from fastssl.pipelines.engines.registry import require_engine
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.order import steps_per_epoch
from fastssl.runs.checkpoint import INITIAL, Position, restore
from fastssl.runs.folder import RunFolder
from fastssl.runs.saver import Saver
from fastssl.runs.status import RunStatus, State
from fastssl.training.step import TrainStep
from fastssl.training.step_log import MetricRing
from fastssl.training.teacher import open_cache
from fastssl.utils.cores import available_cores
from fastssl.utils.signals import StopRequest
from fastssl.utils.versions import describe_git, describe_host, describe_versions


class Progress(Protocol):
    """Where the loop tells how it stands (a rich display, or plain lines)."""

    def row(self, row: dict[str, Any], done: int, total: int) -> None:
        """One block of steps: its metrics, the newest online probe's kNN, and how many of the run's steps are done."""

    def message(self, text: str) -> None:
        """One line that the reader should see: something is not as it was meant to be."""

    def note(self, text: str) -> None:
        """One line about what is going on; a quiet run leaves it out."""


@dataclass(frozen=True)
class RunOptions:
    """What is not the recipe's: data, place, machine.

    Attributes:
        recipe_name: for the records.
        data: the ``.beton`` file to learn from, or a pattern or folder of such; labels are used by the probes alone.
        val: the same, labelled, to probe on; None: a fifth of ``data`` is held out from the probe (not from the
            training).
        out: the run's folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: ``auto`` (go on if the folder holds a run, from its newest checkpoint that is whole), ``never``, or the
            path of a checkpoint; of the last two only the first start of a launch takes notice (``Launch``).
        init: the weights that the backbones begin with (``weights.source.initial_weights``); None: random ones. A run
            that goes on has its own.
        check: compare a compiled or recorded step with the eager one at the start (``TrainStep``).
        command: the call of the command line that this is part of, for the report; folders left out.
        log: names of loggers (``fastssl.runs.loggers.LOGGERS``) that follow the run.
    """

    recipe_name: str
    data: Path
    out: Path
    val: Path | None = None
    device: str = "auto"
    pipeline: str = "auto"
    seed: int = 0
    workers: int | None = None
    resume: str = "auto"
    command: str | None = None
    check: bool = False
    init: Trained | None = None
    log: tuple[str, ...] = ()


@dataclass(eq=False)
class Setup:
    """A run that is ready for its next step. The first process alone has ``folder``, ``saver`` and ``status``.

    Attributes:
        reader, val: photos to learn from; photos to judge on, or None.
        step: the networks, the optimiser, and one step of training.
        ring: metrics of the steps since the last line.
        config: every value that the run's numbers depend on, resolved.
        length: steps in all, and in an epoch.
        git: commit of the code, taken at the start: the files may be others when the run ends.
        position: where the run stands. Another object after a rollback.
        rates: what the schedules said for the newest step.
        online_knn: percent, of the newest online probe; None: there was none.
        online_judged: photos that an online probe judges.
    """

    recipe: Recipe
    options: RunOptions
    reader: BetonReader
    val: BetonReader | None
    progress: Progress
    world: World
    device: torch.device
    step: TrainStep
    ring: MetricRing
    config: dict[str, Any]
    length: RunLength
    git: str | None
    stop: StopRequest = field(default_factory=StopRequest)
    position: Position = field(default_factory=Position)
    folder: RunFolder | None = None
    saver: Saver | None = None
    status: RunStatus | None = None
    rates: dict[str, float | bool] = field(default_factory=dict)
    online_knn: float | None = None
    online_judged: int = 0

    @property
    def backbone(self) -> nn.Module:
        """The network that is being trained."""
        return self.step.method.student.backbone

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl; none in other processes than the first."""
        return self.folder.metrics.rows() if self.folder else []

    @property
    def extraction(self) -> dict[str, Any]:
        """Where and how features are taken (arguments of ``extract_features``)."""
        return {
            "device": self.device,
            "workers": self.options.workers,
            "amp": self.step.amp,
            "crop": self.recipe.probe.crop,
            "normalisation": normalisation_of(self.config),
            "on_bad": self.recipe.train.on_bad,
        }

    def make_loader(self, **changes: Any) -> ViewLoader:
        """A loader of this process's share of every batch; ``changes`` of its arguments make another."""
        usual = {
            "views": self.recipe.views_at(self.position.epoch),
            "batch_size": self.step.batch_size,
            "rank": self.world.rank,
            "world": self.world.size,
            "device": self.device,
            "pipeline": self.options.pipeline,
            "seed": self.options.seed,
            "workers": self.options.workers,
            "on_bad": self.recipe.train.on_bad,
            "dtype": self.step.view_dtype,
            "colour": not self.step.takes_crops,
            "window": self.recipe.train.window,
            "view_epochs": self.recipe.settings.view_epochs,
        }
        return ViewLoader(self.reader, **{**usual, **changes})

    def plan(self) -> list[str]:
        """What is about to be done, in lines of some 80 columns: the first line of metrics may be minutes away."""
        total = counted(self.length.total_steps, "step")
        left = self.length.total_steps - self.position.step
        if left <= 0:
            return [f"{self.length.total_steps:,} of {total} made already: what is left is the report"]
        photos, batch = counted(len(self.reader), "photo"), counted(self.recipe.train.batch_size, "photo")
        views = " + ".join(f"{spec.count} x {spec.size} px" for spec in self.recipe.views)
        if small := self.recipe.small_epochs:
            sizes = " + ".join(f"{spec.size}" for spec in self.recipe.views_at(0))
            views += f" ({sizes} px in the first {counted(small, 'epoch')})"
        elif share := self.recipe.progressive.epochs:
            views += f" (in all epochs: of so few, progressive.epochs={share:g} is none)"
        epochs, steps = counted(self.recipe.train.epochs, "epoch"), counted(self.length.steps_per_epoch, "step")
        return [
            f"recipe {self.options.recipe_name}, {photos}, {self._machine()}, views {views}",
            f"training {self.config['arch']}: {left:,} of {total} to make, {batch} each; {epochs} of {steps}",
            f"into {self.options.out}; Ctrl-C saves; the same command resumes",
        ]

    def _machine(self) -> str:
        """``cpu (2 threads)``, or the GPU's name and its decoding threads; before it the number of processes."""
        many = f"{self.world.size} x " if self.world.size > 1 else ""
        if self.device.type == "cuda":
            threads = counted(self.options.workers or available_cores(), "decoding thread")
            return f"{many}{torch.cuda.get_device_name(self.device)} ({threads})"
        return f"{many}{self.device.type} ({counted(torch.get_num_threads(), 'thread')})"

    def tell_status(self, state: State, **more: str) -> None:
        """Write status.json, where this is the first process."""
        if self.status:
            # Reports are passed on, and folders say where somebody works: names alone are left.
            for path in filter(None, (self.options.out, self.options.data, self.options.val)):
                more = {key: value.replace(f"{path.parent}/", "") for key, value in more.items()}
            self.status.tell(state, **{key: without_folders(value) for key, value in more.items()})

    def standing(self) -> dict[str, int | None]:
        """Steps made, of how many, and how many of them are saved."""
        saved = self.saver.saved_step if self.saver else None
        return {"step": self.position.step, "total_steps": self.length.total_steps, "saved_step": saved}

    def end_together(self, error: FastSSLError) -> NoReturn:
        """Raise what all processes end with. The first one says it for all before any of them leaves: when one has
        left, torchrun ends the others.
        """
        if self.world.size > 1:
            self.progress.message(f"fastssl: {error}")
            barrier()
            error.reported = True
        raise error

    def close(self) -> None:
        """Let other processes, and later runs of this one, have the folder."""
        if self.status:
            self.status.close()
        if self.folder:
            self.folder.close()


def prepare(
    recipe: Recipe,
    options: RunOptions,
    reader: BetonReader,
    val: BetonReader | None,
    progress: Progress,
    world: World,
    device: torch.device,
) -> Setup:
    """Check everything, build the networks, take the folder, and go on with what is in it or begin.

    Raises:
        FastSSLError: what does not go together; processes, or a run in the folder, of other settings.
    """
    git, init = describe_git(), options.init
    if init is None and "." in recipe.arch:
        raise FastSSLError(f"{recipe.arch}: names weights, which have to be given as RunOptions.init, too")
    if init is None and recipe.frozen_bn:
        raise FastSSLError("frozen_bn keeps the statistics of weights: give some with --init-from, or set it to false")
    with first_of_host_speaks():  # all find the same faults, before they first wait for each other
        require_photos(recipe, len(reader), processes=world.size, where=str(reader.path))
        require_engine(options.pipeline, reader, recipe.views)
        reader.require_here(recipe.train.window)
        if val is not None:
            val.require_here(None)
            match_classes(reader, val)
            if world.is_main and recipe.train.on_bad == "fail":
                _require_whole_photos(val, options.workers)
        steps = steps_per_epoch(len(reader), recipe.train.batch_size)
        length, amp = RunLength(recipe.train.epochs * steps, steps), use_amp(recipe.train.amp, device)
        how: dict[str, Any] = {"seed": options.seed, "world": world, "steps": length.total_steps, "init": init}
        step = TrainStep(recipe, device, amp=amp, **how)
        step.check, step.say = options.check, progress.note
    if val is not None and reader.labelled and not val.labelled:
        progress.message("the photos of --val have no labels: the probes judge on a held-out fifth of --data")
    if (window := recipe.train.window) is not None and window >= (files := len(reader.files)):
        progress.message(f"train.window={window} has no effect: the photos are in {counted(files, 'file')}")
    for line in step.without_effect:
        progress.message(line)
    ring = MetricRing(step.method.METRICS, min(recipe.train.log_every, steps), device)
    config = _resolved(recipe, options, reader, val)
    if isinstance(step.method, Distill):
        about = step.method.frozen.about
        config["distill"]["teacher"] = about["name"]  # as of the data: no path
        config["teacher"] = {part: about[part] for part in ("arch", "fingerprint")}
    run = Setup(recipe, options, reader, val, progress, world, device, step, ring, config, length, git)
    _require_same_settings(run)
    try:
        if world.is_main:
            run.folder = RunFolder(options.out, progress.message)
            run.saver = Saver(run.folder, recipe, config, progress.message)
        _resume(run)
        if recipe.settings.view_epochs:
            step.known = open_cache(run)
        if run.folder:
            run.status = RunStatus(options.out, run.standing)
    except BaseException:
        run.close()
        raise
    return run


def _require_whole_photos(reader: BetonReader, workers: int | None) -> None:
    """Decode once the photos that the run is judged on at its end: better to know now that one is damaged."""
    # A wrong checksum alone is no reason: the photo decodes, and training would take it too.
    for path in reader.files:
        report = verify(path, workers=workers)
        if damaged := [(sample, complaint) for sample, complaint in report.damaged if complaint != "wrong checksum"]:
            sample, complaint = damaged[0]
            raise FastSSLError(
                f"{path}: damaged are {len(damaged):,} of {counted(report.samples, 'photo')}, the first is sample "
                f"{sample} ({complaint}); convert again without them, or leave them out with --set train.on_bad=skip"
            )


def _resolved(recipe: Recipe, options: RunOptions, reader: BetonReader, val: BetonReader | None) -> dict[str, Any]:
    """Every value that the run's numbers depend on."""
    init = options.init
    return {
        "recipe": options.recipe_name,
        "arch": plain_arch(recipe.arch),
        "init_from": init and {"name": init.name, "weights": weights_fingerprint(init.backbone)},
        # Names, not paths: a report is passed on, and the folder it was made in is nobody's business.
        "data": {
            "name": reader.path.name,
            "samples": len(reader),
            "tables": "{head:08x}{table:08x}".format(**reader.table_checksums()),
            "photos": f"{reader.photo_checksum():08x}",
            "val_photos": f"{val.photo_checksum():08x}" if val else None,
        },
        "val": val.path.name if val else None,
        "seed": options.seed,
        **{key: value for key, value in recipe_to_dict(recipe).items() if key != "arch"},
    }


def _keep_first(init: Trained | None, path: Path) -> None:
    """A copy of what the run began with: at a later start the source may be gone."""
    if init is not None and not path.is_file():
        about = {"network": "imported", "origin": init.name, **init.normalisation._asdict()}
        save_backbone(init.backbone, path, arch=init.arch, **about)


def _require_same_settings(run: Setup) -> None:
    """Processes that were started with different settings would wait for each other forever: better to say so now."""
    place = {"out": str(run.options.out), "resume": run.options.resume, "device": run.device.type}
    mine = {**run.config, **place, "bfloat16": run.step.amp, "check": run.options.check}
    found = differences(mine, broadcast_object(mine))
    if any_rank(bool(found)):
        what = f"this is process {run.world.rank}: {'; '.join(found[:3])}" if found else "another one says which"
        raise FastSSLError(
            f"the processes of this run were started with different settings ('there' is process 0; {what})"
        )


def _resume(run: Setup) -> None:
    """Go on with what is in the folder, or begin. The first process alone looks at the files, and tells the others."""
    found: dict[str, Any] | str | None = None

    def put_in(state: dict[str, Any]) -> Position:
        return restore(state, method=run.step.method, optimizer=run.step.optimizer)

    if run.folder:
        about = {"device": run.device.type, "host": describe_host(), "versions": describe_versions(), "git": run.git}
        try:
            found = run.folder.open(run.config, run.options.resume, about, put_in, launch_from_environment())
            _keep_first(run.options.init, run.folder.checkpoints / INITIAL)
        except (FastSSLError, OSError) as error:
            found = str(error)
    found = broadcast_object(found)
    if isinstance(found, str):
        run.end_together(FastSSLError(found))
    if found is not None:
        run.position = put_in(found)
        if (found_before := run.position.parts) and run.step.parts.allows(found_before):
            run.step.parts.count = found_before  # not where there are other processes now, of other shares of the batch
        if run.saver:
            run.saver.saved_step = run.position.step
        run.progress.note(f"resumed at step {run.position.step:,} (epoch {run.position.epoch})")
    broadcast_module(run.step.method)
