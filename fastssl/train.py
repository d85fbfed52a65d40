"""The training loop, from top to bottom.

    pretrain(...)  sets up, resumes, runs the epochs, probes, writes the run's folder
    Run._steps    batch -> step -> now and then a line of metrics and a checkpoint
    Run._step     schedules and TrainStep (step.py): nothing in it waits for the device
    finish_run     (finish.py) what is left to do after the last step

Everything random comes from the seed: the networks' first weights, the queue, the order of samples, every view, the
BatchNorm groups of the keys, the coins of drop path. A run that is stopped and resumed makes the same steps as one that was not,
and one that comes upon a loss that is not finite can go back and make its steps again without the guilty one.

Under torchrun or srun each process runs this with its share of every batch; the batch of the recipe is that of all of them. The first process alone
writes, probes and reports.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from fastssl.backbones import resolve_arch
from fastssl.bad_step import BAD_STEPS, save_bad_step
from fastssl.bottleneck import data_share
from fastssl.checkpoint import Position, differences, has_all_files
from fastssl.collectives import Vote, agree_any, barrier, broadcast_module, gather_values, share
from fastssl.devices import choose_device, only_deterministic
from fastssl.distributed import joined
from fastssl.finish import finish_run
from fastssl.launch import launch_from_environment
from fastssl.meters import MetricRing
from fastssl.pipelines.beton import BetonReader
from fastssl.pipelines.engines import require_engine
from fastssl.pipelines.errors import FastSSLError, Interrupted, counted, without_folders
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.pipelines.native import available_cores
from fastssl.pipelines.order import steps_per_epoch
from fastssl.probe import OnlineProbe, choose_split, require_same_classes
from fastssl.recipe import Recipe, recipe_to_dict
from fastssl.recipe_choice import follow_samples, require_photos
from fastssl.requirements import require_readable_names, require_whole_photos
from fastssl.restore import require_fit, restore
from fastssl.run_folder import RunFolder
from fastssl.run_status import RunStatus
from fastssl.saver import NotSaved, Saver
from fastssl.schedules import RunLength
from fastssl.step import TrainStep, use_amp
from fastssl.stop import StopRequest
from fastssl.versions import describe_git, describe_host, describe_versions
from fastssl.world import World, first_of_host_speaks, world_from_environment


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
        data: the ``.beton`` file to learn from; its labels are used by the probes alone.
        val: a labelled ``.beton`` to probe on; None: a fifth of ``data`` is held out from the probe (not from the training).
        out: the run's folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: ``auto`` (go on if the folder holds a run, from its newest checkpoint that is whole), ``never``, or the path of a checkpoint;
            of the last two only the first start of a launch takes notice (`fastssl.launch`).
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


class _Silence:
    """The progress of all processes but the first."""

    def row(self, row: dict[str, Any], done: int, total: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def pretrain(recipe: Recipe, options: RunOptions, progress: Progress) -> dict[str, Any] | None:
    """Train, probe, and write the run's folder.

    Returns:
        the summary, as in ``summary.json``; None in all processes but the first.

    Raises:
        Interrupted: by a signal, after a checkpoint was written.
        NotSaved: there was no room for the checkpoint when a signal came, or for a long time at the end.
        FastSSLError: bad data, a run of other settings in the folder, or a loss that is no longer finite.
    """
    started = time.monotonic()
    world = world_from_environment()
    with ExitStack() as files:
        if recipe.train.deterministic:
            files.enter_context(only_deterministic())
        with first_of_host_speaks():
            device = choose_device(options.device, world)
            reader = files.enter_context(BetonReader(options.data))
            val = files.enter_context(BetonReader(options.val)) if options.val else None
            for one in filter(None, (reader, val)):
                require_readable_names(one)
        recipe = follow_samples(recipe, len(reader))
        said = progress if world.is_main else _Silence()
        if world.size > 1:
            said.note(f"{world.size} processes meet at {world.address}:{world.port}")
        meeting = time.monotonic()
        with ExitStack() as listening, _told() as told, joined(world, device, before_end=lambda why: _tell(told, "failed", why)):
            if world.size > 1:
                said.note(f"all {world.size} are here after {time.monotonic() - meeting:.0f} s")
            run = Run(recipe, options, reader, val, said, world, device)
            files.callback(run.close)
            told.append(run)
            run.tell_status("training")
            # Until this process has left the others: a launcher repeats itself, and ends all as soon as the first has gone.
            listening.enter_context(run.stop.by_signals())
            run.train()
        # The processes have parted: what follows is the first one's alone.
        if not world.is_main:
            return None
        if run.stop:  # too late for the last step to be told
            steps = counted(run.total_steps, "step")
            raise Interrupted(f"{run.total_steps:,} of {steps} made and saved in {run.out}; the same command writes the report")
        summary = finish_run(run, started)
        run.tell_status("finished")
        return summary


@contextmanager
def _told() -> Iterator[list[Run]]:
    """Keep the status.json of the run that is put into the list. Around ``joined``, which knows what became of the other processes."""
    runs: list[Run] = []
    try:
        yield runs
    except BaseException as error:
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            _tell(runs, "stopped", str(error) or "interrupted")
        else:
            kind = "" if isinstance(error, FastSSLError) else f"{type(error).__name__}: "
            _tell(runs, "failed", f"{kind}{error}")
        raise
    for run in runs:
        run.tell_status("trained")


def _tell(runs: list[Run], state: str, why: str) -> None:
    for run in runs:
        run.tell_status(state, why=why[:1000])


class Run:
    """One run: its networks, its position, its files."""

    def __init__(
        self,
        recipe: Recipe,
        options: RunOptions,
        reader: BetonReader,
        val: BetonReader | None,
        progress: Progress,
        world: World,
        device: torch.device,
    ):
        self.recipe, self.options, self.reader, self.val, self.progress = recipe, options, reader, val, progress
        self.world, self.device = world, device
        self.git = describe_git()  # now: the files may be others when the run ends
        self.amp = use_amp(recipe.train.amp, self.device)
        self.out = options.out
        self.batch_size = recipe.train.batch_size
        with first_of_host_speaks():  # all find the same faults, before they first wait for each other
            require_photos(recipe, len(reader), processes=world.size, where=str(reader.path))
            self.steps_per_epoch = steps_per_epoch(len(reader), self.batch_size)
            self.total_steps = recipe.train.epochs * self.steps_per_epoch
            require_engine(options.pipeline, reader, recipe.views)
            if val is not None:
                require_same_classes(reader, val)
                if world.is_main and recipe.train.on_bad == "fail":
                    require_whole_photos(val, workers=options.workers)
            self.step = TrainStep(recipe, self.device, amp=self.amp, seed=options.seed, world=world)
        if val is not None and val.labels is None and reader.labels is not None:
            progress.message("the photos of --val have no labels: the probes judge on a held-out fifth of --data")
        for line in self.step.without_effect:
            progress.message(line)
        self.position = Position()
        self.config = self._config()
        self._agree()
        self.stop = StopRequest()
        self.folder = RunFolder(self.out, progress.message) if world.is_main else None
        self.saver = Saver(self.folder, recipe, self.config, progress.message) if self.folder else None
        self.status: RunStatus | None = None
        self._knn: float | None = None  # of the newest online probe
        try:
            self._begin()
            if self.folder:
                self.status = RunStatus(self.out, self._standing)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ setting up

    def _config(self) -> dict[str, Any]:
        """Every value that the run's numbers depend on, resolved."""
        return {
            "recipe": self.options.recipe_name,
            "arch": resolve_arch(self.recipe.arch),
            # names, not paths: a report is passed on, and the folder it was made in is nobody's business
            "data": {
                "name": self.options.data.name,
                "samples": len(self.reader),
                "tables": "{head:08x}{table:08x}".format(**self.reader.table_checksums()),
                "photos": f"{self.reader.photo_checksum():08x}",
                "val_photos": f"{self.val.photo_checksum():08x}" if self.val else None,
            },
            "val": self.options.val.name if self.options.val else None,
            "seed": self.options.seed,
            **{key: value for key, value in recipe_to_dict(self.recipe).items() if key != "arch"},
        }

    def _agree(self) -> None:
        """Processes that were started with different settings would wait for each other for ever: better to say so now."""
        mine = {**self.config, "out": str(self.out), "resume": self.options.resume, "device": self.device.type, "bfloat16": self.amp}
        found = differences(mine, share(mine))
        if agree_any(bool(found)):
            what = f"this is process {self.world.rank}: {'; '.join(found[:3])}" if found else "another one says which"
            raise FastSSLError(f"the processes of this run were started with different settings ('there' is process 0; {what})")

    def _begin(self) -> None:
        """Take the folder, and go on with what is in it or begin. The first process alone looks at the files, and tells the others."""
        found: dict[str, Any] | str | None = None
        if self.folder:
            about = {"host": describe_host(), "versions": describe_versions(), "git": self.git}
            try:
                found = self.folder.open(
                    self.config, self.options.resume, {"device": self.device.type, **about}, self._require_fit, launch_from_environment()
                )
            except FastSSLError as error:
                found = str(error)
        found = share(found)
        if isinstance(found, str):
            self._end_together(FastSSLError(found))
        if found is not None:
            self.position = restore(found, method=self.step.method, optimizer=self.step.optimizer)
            if self.saver:
                self.saver.saved_step = self.position.step
            self.progress.note(f"resumed at step {self.position.step:,} (epoch {self.position.epoch})")
        broadcast_module(self.step.method)

    def _require_fit(self, state: dict[str, Any]) -> None:
        """Raise FastSSLError where this run cannot go on from the checkpoint."""
        require_fit(
            state,
            method=self.step.method,
            optimizer=self.step.optimizer,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.recipe.train.epochs,
            samples=len(self.reader),
        )

    def close(self) -> None:
        """Let other processes, and later runs of this one, have the folder."""
        if self.status:
            self.status.close()
        if self.folder:
            self.folder.close()

    @property
    def backbone(self) -> nn.Module:
        """The network that is being trained."""
        return self.step.method.student.backbone

    def tell_status(self, state: str, **more: str) -> None:
        """Write status.json, where this is the first process."""
        if self.status:
            # Folders are nobody's business, and reports are passed on: names alone are left.
            for path in filter(None, (self.out, self.options.data, self.options.val)):
                more = {key: value.replace(f"{path.parent}/", "") for key, value in more.items()}
            self.status.tell(state, **{key: without_folders(value) for key, value in more.items()})

    def _standing(self) -> dict[str, int | None]:
        return {"step": self.position.step, "total_steps": self.total_steps, "saved_step": self.saver.saved_step}

    # ------------------------------------------------------------------ training

    def train(self) -> None:
        """All epochs that are left."""
        train = self.recipe.train
        with self._loader() as loader, closing(self.step):
            self.length = RunLength(self.total_steps, self.steps_per_epoch)
            self.ring = MetricRing(self.step.method.METRICS, min(train.log_every, self.steps_per_epoch), self.device)
            self.probe = self._online_probe() if self.world.is_main else None
            self._vote = Vote(2)
            self._careful_until = 0
            self._known_skipped = list(self.position.skipped)
            if self.saver:
                self._complete_checkpoint()
                self.saver.begin()
            if self.position.step < self.total_steps:
                for line in self._plan():
                    self.progress.note(line)
            else:
                steps = counted(self.total_steps, "step")
                self.progress.note(f"{self.total_steps:,} of {steps} made already: what is left is the report")
            while self.position.epoch < train.epochs:
                self._epoch(loader)
            self._vote.close()

    def _plan(self) -> tuple[str, str, str]:
        """What is about to be done, in lines of some 80 columns: the first line of metrics may be minutes away."""
        left, epoch = self.total_steps - self.position.step, counted(self.steps_per_epoch, "step")
        photos, batch = counted(len(self.reader), "photo"), counted(self.batch_size, "photo")
        views = " + ".join(f"{spec.count} x {spec.size} px" for spec in self.recipe.views)
        return (
            f"recipe {self.options.recipe_name}, {photos}, {self._machine()}, views {views}",
            f"training {self.config['arch']}: {left:,} of {counted(self.total_steps, 'step')} to make, {batch} each; "
            f"{counted(self.recipe.train.epochs, 'epoch')} of {epoch}",
            f"into {self.out}; Ctrl-C saves; the same command resumes",
        )

    def _machine(self) -> str:
        """``cpu (2 threads)``, or the GPU's name and the threads that decode for it; before it how many processes."""
        many = f"{self.world.size} x " if self.world.size > 1 else ""
        if self.device.type == "cuda":
            threads = counted(self.options.workers or available_cores(), "decoding thread")
            return f"{many}{torch.cuda.get_device_name(self.device)} ({threads})"
        return f"{many}{self.device.type} ({counted(torch.get_num_threads(), 'thread')})"

    def _complete_checkpoint(self) -> None:
        """Write the files that a kill in the middle of a checkpoint, or a checkpoint from elsewhere, left out; they may never come again."""
        position, milestone = self.position, None
        if position.step == 0:
            return
        if position.step_in_epoch == 0:
            milestone = self._milestone(position.epoch)
        if not has_all_files(self.folder.checkpoints, self.step.method, position.step, milestone):
            self._save(milestone, patiently=position.epoch >= self.recipe.train.epochs)

    def _milestone(self, ended: int) -> int | None:
        """The epoch that has just ended, where it is one to be kept for ever."""
        every = self.recipe.train.milestone_epochs
        return ended if every and ended % every == 0 else None

    def _loader(self) -> ViewLoader:
        return ViewLoader(
            self.reader,
            views=self.recipe.views,
            batch_size=self.step.batch_size,
            rank=self.world.rank,
            world=self.world.size,
            device=self.device,
            pipeline=self.options.pipeline,
            seed=self.options.seed,
            workers=self.options.workers,
            on_bad=self.recipe.train.on_bad,
            dtype=self.step.view_dtype,
            colour=not self.step.takes_crops,
        )

    def _online_probe(self) -> OnlineProbe:
        probe = self.recipe.probe
        split = choose_split(self.reader, self.val, probe.online_samples, self.options.seed)
        return OnlineProbe(split, probe.size, **self.extraction)

    @property
    def extraction(self) -> dict[str, Any]:
        """How features are taken on this machine (arguments of ``extract_features``)."""
        return {
            "device": self.device,
            "workers": self.options.workers,
            "amp": self.amp,
            "crop": self.recipe.probe.crop,
            "on_bad": self.recipe.train.on_bad,
        }

    def _epoch(self, loader: ViewLoader) -> None:
        """From where the run stands to the end of that epoch."""
        while self.position.step_in_epoch < self.steps_per_epoch:
            self._steps(loader)
        self._end_epoch(loader)

    def _steps(self, loader: ViewLoader) -> None:
        """Steps up to the end of the epoch, or until the run was set back."""
        position = self.position
        with closing(loader.epoch(position.epoch, start_step=position.step_in_epoch)) as batches:
            self._start_block(loader)
            for batch in batches:
                if position.step < self._careful_until:
                    self._careful_step(batch)
                elif position.step + 1 not in position.passed_over:
                    self._step(batch)
                position.step += 1
                position.step_in_epoch += 1
                # By the position and not by the number of steps made: blocks end where those of an uninterrupted run do.
                ended = position.step_in_epoch % self.recipe.train.log_every == 0 or position.step_in_epoch == self.steps_per_epoch
                if ended and not self._close_block(loader):
                    return
                stop, save = self._vote(bool(self.stop), self.saver is not None and self.saver.is_due())
                if (stop or save) and not self._leave_or_save(loader, stop):
                    return

    def _leave_or_save(self, loader: ViewLoader, stop: bool) -> bool:
        """A checkpoint between two steps; the end of the run where a signal asked for it. False: the run was set back, and nothing saved."""
        if not self._close_block(loader, wait=True):
            if self.saver:
                self.saver.ask_again()
            return False
        self._gather_skipped(loader)
        if stop:
            self._leave()
        self._save()
        self._start_block(loader)  # what was spent on the checkpoint is not the rate of a step
        return True

    def _leave(self) -> NoReturn:
        """Save, and end the run, as all processes do here."""
        saved = self._save()
        self._vote.close()
        if not share(saved):
            why = self.saver.why() if self.saver else "its first process says why"
            self._end_together(NotSaved(f"stopped at step {self.position.step:,}, which could not be saved: {why}"))
        self._end_together(
            Interrupted(f"stopped at step {self.position.step:,}; everything is saved in {self.out}; the same command goes on from here")
        )

    def _end_together(self, error: FastSSLError) -> NoReturn:
        """Raise what all processes end with, by agreement. The first one says it for all before any of them leaves: when one has left, torchrun ends the others."""
        if self.world.size > 1:
            self.progress.message(f"fastssl: {error}")
            barrier()
            error.told = True
        raise error

    def _end_epoch(self, loader: ViewLoader) -> None:
        """The probe, and a checkpoint at the very end and at milestones."""
        train, position, every = self.recipe.train, self.position, self.recipe.probe.every_epochs
        self._gather_skipped(loader)
        ended = position.epoch + 1
        last = ended == train.epochs
        if every and ended % every == 0 and not last:
            row = self.probe and self.stop.unless_asked(lambda: self.probe.run(self.backbone, step=position.step, epoch=ended))
            # The others wait here for the first process, which probes alone. A run that goes on from here makes the probe again.
            if agree_any(bool(self.stop)):
                self._leave()
            if row is not None:
                self._report_probe(row)
        position.epoch, position.step_in_epoch = ended, 0
        milestone = self._milestone(ended)
        if last or milestone:
            self._save(milestone, patiently=last)

    def _gather_skipped(self, loader: ViewLoader) -> None:
        """Put the damaged photos that all processes have met so far on record."""
        self.position.skipped = sorted({*self._known_skipped, *chain.from_iterable(gather_values(loader.stats.skipped))})

    def _step(self, batch: Batch) -> Tensor:
        """One step; its metrics, on the device. No value is read back from there."""
        position, first = self.position, not self.step.prepared
        self._rates = self.step.rates(position.step, self.length)
        noise = self.step.noise(position.epoch, position.step_in_epoch, batch.index.numpy())
        phase = self.step.method.phase(position.step, self.length)
        metrics = self.step(batch.views, noise, self._rates, phase=phase, tables=batch.tables)
        self.ring.push(metrics, position.step + 1)
        if first:
            self._block_started += self.step.prepare_s  # minutes of compiling are not the rate of a step
            for switch, reason in self.step.fallbacks.items():
                self.progress.message(f"without {switch}: {reason}")
        return metrics

    # ------------------------------------------------------------------ steps that are not finite

    def _careful_step(self, batch: Batch) -> None:
        """One step that is taken back if its loss, or what it made of the networks, is not finite. Waits for the device."""
        number, most = self.position.step + 1, self.recipe.train.skip_nonfinite
        if number in self.position.passed_over:
            return
        undo = self.step.snapshot()
        loss = float(self._step(batch)[0])
        if not agree_any(not (math.isfinite(loss) and self.step.is_finite())):
            return
        undo()
        self.ring.pop()
        reason = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        where = self._keep_batch(batch, number, reason)
        if len(self.position.passed_over) >= most:
            were = "was" if most == 1 else "were"
            steps = counted(most, "such step")
            self._end_together(
                FastSSLError(
                    f"step {number:,}: {reason}, and {steps} {were} passed over before (train.skip_nonfinite){self._advice(where)}"
                )
            )
        self.position.passed_over.append(number)
        self.progress.message(f"step {number:,}: {reason}; passed over{f', its batch is in {where}' if where else ''}")

    def _set_back(self) -> None:
        """To the beginning of this block, to make its steps again one by one."""
        self._careful_until = self.position.step
        self._undo_block()
        self.ring.clear()
        self.position = dataclasses.replace(self._block_position)
        self.progress.message(f"a loss or gradient is not finite: back to step {self.position.step:,}, to find out which")

    def _diverged(self, loader: ViewLoader, number: int, reason: str) -> FastSSLError:
        """The error for step ``number``, whose batch is drawn once more for a look."""
        epoch, step_in_epoch = divmod(number - 1, self.steps_per_epoch)
        where = None
        # The loader has one consumer, and an epoch of it is running: this one is of its own.
        with self._loader() as other, closing(other.epoch(epoch, start_step=step_in_epoch)) as batches:
            where = self._keep_batch(next(batches), number, reason)
        return FastSSLError(f"{reason} at step {number:,}: the run has diverged{self._advice(where)}")

    def _advice(self, where: str | None) -> str:
        batch = f"; the step's batch is in {where}" if where else ""
        change = "a higher train.skip_nonfinite" if self.recipe.train.skip_nonfinite else "train.skip_nonfinite=1 (or more)"
        return (
            f". Lower optim.lr (now {self.recipe.optim.lr:g}) or lengthen optim.warmup_epochs; or go on with {change}, which passes over single "
            f"steps{batch}{f'; {self.saver.newest()}' if self.saver else ''}"
        )

    def _keep_batch(self, batch: Batch, number: int, reason: str) -> str | None:
        """Save what this process was given at step ``number``; where, for the message. None: the disk did not take it."""
        epoch, step_in_epoch = divmod(number - 1, self.steps_per_epoch)
        about = {"step": number, "epoch": epoch, "step_in_epoch": step_in_epoch, "seed": self.options.seed, "reason": reason}
        folder = self.out / BAD_STEPS / f"step-{number:08}"
        try:
            save_bad_step(
                folder, batch, self.recipe.views, rank=self.world.rank, about={**about, **self.step.rates(number - 1, self.length)}
            )
        except OSError as error:
            self.progress.message(f"{folder}: the batch could not be saved ({error.strerror or error})")
            return None
        return str(folder)

    # ------------------------------------------------------------------ metrics and files

    def _start_block(self, loader: ViewLoader) -> None:
        self._block_started = time.monotonic()
        self._block_stats, self._block_cpu = dataclasses.replace(loader.stats), time.thread_time()
        if self.recipe.train.skip_nonfinite and self.position.step >= self._careful_until:
            self._undo_block = self.step.snapshot()
            self._block_position = dataclasses.replace(self.position)

    def _close_block(self, loader: ViewLoader, wait: bool = False) -> bool:
        """A line of metrics for the steps since the last one. False: something in them was not finite, and the run was set back to before them.

        Args:
            wait: for the metrics of these very steps; otherwise on a GPU they may be written a block later.
        """
        if self.recipe.train.skip_nonfinite and agree_any(not (self.ring.is_finite() and self.step.is_finite())):
            self._set_back()
            return False
        if steps := len(self.ring):
            seconds = max(time.monotonic() - self._block_started, 1e-9)
            self.position.train_seconds += seconds
            views = sum(spec.count for spec in self.recipe.views)
            spent, before = loader.stats, self._block_stats
            waited = spent.wait_s - before.wait_s
            share = data_share(
                seconds,
                on_cpu=self.device.type == "cpu",
                wait_s=waited,
                colour_s=spent.colour_s - before.colour_s,
                loader_cpu_s=spent.host_cpu_s - before.host_cpu_s,
                step_cpu_s=time.thread_time() - self._block_cpu - (spent.consumer_cpu_s - before.consumer_cpu_s),
            )
            self.ring.flush(
                {
                    "kind": "step",
                    "step": self.position.step,
                    "epoch": self.position.step / self.steps_per_epoch,
                    **self._rates,
                    "pair_per_s": steps * self.batch_size / seconds,
                    "view_per_s": steps * self.batch_size * views / seconds,
                    "data_wait": waited / seconds,
                    "data_share": share,
                    "seconds": self.position.train_seconds,
                }
            )
        for row in self.ring.collect(wait=wait or self.position.step == self.total_steps):
            self._report(row, loader)
        self._start_block(loader)
        return True

    def _report(self, row: dict[str, Any], loader: ViewLoader) -> None:
        bad = row.pop("nonfinite", None)
        self._write(row)
        self.progress.row({**row, "knn": self._knn}, self.position.step, self.total_steps)
        if bad is not None:
            raise self._diverged(loader, bad, f"the loss is {row['loss']}")

    def _report_probe(self, row: dict[str, Any]) -> None:
        """The line of an online probe, which this process alone has made."""
        self._write(row)
        self._knn = row["knn"]
        split, rank = self.probe.split, row["effective_rank"]
        photos = counted(len(split.query_index) + (0 if split.labelled else len(split.bank_index)), "photo")
        found = f"effective rank {rank:.1f}" if math.isfinite(rank) else "features that are NaN or infinite outside of training"
        if row["knn"] is not None:
            found = f"kNN {row['knn']:.1f} % of {photos}, {found}"
        probe = "online probe" if split.labelled else f"online probe, {photos}: {split.obstacle}"
        self.progress.note(f"epoch {row['epoch']:,}: {found} ({probe})")

    def _write(self, row: dict[str, Any]) -> None:
        if self.saver:
            self.saver.write(row)

    def _save(self, milestone: int | None = None, *, patiently: bool = False) -> bool:
        """A checkpoint; False: the disk did not take it. ``patiently``: wait for room, as there is nothing else left to do.

        Raises:
            FastSSLError: the state is not finite; a checkpoint of it would be worse than none.
        """
        if not self.step.is_finite():
            raise FastSSLError(
                f"the networks are no longer finite at step {self.position.step:,}, though the loss is: the run has diverged{self._advice(None)}"
            )
        if not self.saver:
            return True
        saved = self.saver.save(self.step, self.position, milestone=milestone, stop=self.stop if patiently else None)
        if saved:
            self.tell_status("training")
        return saved
