"""The training loop, from top to bottom.

    pretrain(...)  sets up, resumes, runs the epochs, probes, writes the run's folder
    Run._epoch    one epoch: batch -> step -> now and then a line of metrics and a checkpoint
    Run._step     schedules and TrainStep (step.py): nothing in it waits for the device
    finish_run     (finish.py) what is left to do after the last step

Everything random comes from the seed: the networks' first weights, the queue, the order of samples, every view, the
BatchNorm groups of the keys, the coins of drop path. A run that is stopped and resumed makes the same steps as one that was not.

Under torchrun or srun each process runs this with its share of every batch; the batch of the recipe is that of all of them. The first process alone
writes, probes and reports.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
import yaml
from torch import nn

from fastssl.backbones import resolve_arch
from fastssl.checkpoint import Position, differences, load_checkpoint, restore, save_checkpoint
from fastssl.distributed import World, agree_any, broadcast_module, gather_values, joined, share, world_from_environment
from fastssl.finish import finish_run
from fastssl.meters import MetricRing
from fastssl.pipelines.beton import BetonReader
from fastssl.pipelines.engines import require_engine
from fastssl.pipelines.errors import FastSSLError, Interrupted
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.pipelines.multicrop import MultiCrop
from fastssl.pipelines.verify import verify
from fastssl.probe import OnlineProbe, choose_split, require_same_classes
from fastssl.recipe import Recipe, build_recipe, recipe_to_dict
from fastssl.schedules import RunLength
from fastssl.step import TrainStep, use_amp
from fastssl.versions import describe_git, describe_host, describe_versions


class Progress(Protocol):
    """Where the loop tells how it stands (a rich display, or plain lines)."""

    def row(self, row: dict[str, Any], done: int, total: int) -> None:
        """One block of steps: its metrics, and how many of the run's steps are done."""

    def message(self, text: str) -> None:
        """One line for the reader."""


@dataclass(frozen=True)
class RunOptions:
    """What is not the recipe's: data, place, machine.

    Attributes:
        recipe_name: for the records.
        data: the ``.beton`` file to learn from; its labels are used by the probes alone.
        val: a labelled ``.beton`` to probe on; None: a fifth of ``data`` is held out from the probe (not from the training).
        out: the run's folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: ``auto`` (go on if the folder holds a run), ``never``, or the path of a ``last.pt``.
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


def choose_device(name: str, world: World = World()) -> torch.device:  # noqa: B008 (frozen)
    """``auto`` is the GPU when there is one; of several processes on a machine each has its own.

    Raises:
        FastSSLError: a GPU was asked for and torch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise FastSSLError(
            "--device cuda: torch sees no NVIDIA GPU here; `fastssl doctor` says what is missing, --device cpu works anywhere"
        )
    if name != "cuda" or world.size == 1:
        return torch.device(name)
    if world.local_rank >= torch.cuda.device_count():
        raise FastSSLError(
            f"process {world.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many processes"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def pretrain(recipe: Recipe, options: RunOptions, progress: Progress) -> dict[str, Any] | None:
    """Train, probe, and write the run's folder.

    Returns:
        the summary, as in ``summary.json``; None in all processes but the first.

    Raises:
        Interrupted: by SIGINT or SIGTERM, after a checkpoint was written.
        FastSSLError: bad data, a run of other settings in the folder, or a loss that is no longer finite.
    """
    started = time.monotonic()
    world = world_from_environment()
    with ExitStack() as files:
        device = choose_device(options.device, world)
        reader = files.enter_context(BetonReader(options.data))
        val = files.enter_context(BetonReader(options.val)) if options.val else None
        if world.size > 1 and world.is_main:
            progress.message(f"{world.size} processes meet at {world.address}:{world.port}")
        with joined(world, device):
            run = Run(recipe, options, reader, val, progress if world.is_main else _Silence(), world, device)
            files.callback(run.unlock)
            with run.stop_on_signal():
                run.train()
        # The processes have parted: what follows is the first one's alone.
        return finish_run(run, started) if world.is_main else None


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
        self._check_batch()
        require_engine(options.pipeline, reader, recipe.views)
        if val is not None:
            require_same_classes(reader, val)
            if world.is_main:
                self._check_val()
        self.step = TrainStep(recipe, self.device, amp=self.amp, seed=options.seed, world=world)
        self._check_sizes()
        self.position = Position()
        self.config = self._config()
        self._agree()
        self._stop = threading.Event()
        self._lock_file: TextIO | None = None
        try:
            self._prepare_folder()
        except BaseException:
            self.unlock()
            raise

    # ------------------------------------------------------------------ setting up

    def _check_batch(self) -> None:
        if len(self.reader) < self.batch_size:
            enough = (
                f"--batch-size {max(2, len(self.reader) // 2)} or lower would do" if len(self.reader) > 1 else "a batch has at least two"
            )
            raise FastSSLError(f"{self.options.data}: {len(self.reader)} photos are fewer than one batch of {self.batch_size}; {enough}")

    def _check_val(self) -> None:
        """Decode the photos to be judged on once: better now than at the probe behind the last epoch."""
        if self.recipe.train.on_bad != "fail":
            return
        # A wrong checksum alone is no reason: the photo decodes, and training would take it too.
        found = verify(self.options.val, workers=self.options.workers).damaged
        damaged = [(sample, complaint) for sample, complaint in found if complaint != "wrong checksum"]
        if damaged:
            sample, complaint = damaged[0]
            raise FastSSLError(
                f"{self.options.val}: {len(damaged)} of {len(self.val):,} photos are damaged, the first is sample {sample} ({complaint}); "
                "convert again without them, or leave them out with --set train.on_bad=skip"
            )

    def _check_sizes(self) -> None:
        """Show the network one black picture of every size that it will meet: better now than after the last epoch."""
        keys = "views.global_size, views.local_size" if isinstance(self.recipe.views, MultiCrop) else "views.0.size"
        for size in sorted({spec.size for spec in self.recipe.views} | {self.recipe.probe.size}):
            try:
                with torch.no_grad():
                    self.backbone.eval()(torch.zeros(1, 3, size, size, device=self.device))
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise FastSSLError(
                    f"{self.recipe.arch} cannot take pictures of {size} px ({reason}): change {keys} or probe.size"
                ) from error
        self.backbone.train()

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

    def _prepare_folder(self) -> None:
        """Make the folder, resume what is in it or clear it, and write config.yaml. All processes do what the first one finds to be done."""
        last = self.out / "checkpoints" / "last.pt"
        if self.options.resume not in ("auto", "never"):
            last = Path(self.options.resume)
            if not last.is_file():
                raise FastSSLError(f"--resume {last}: no such checkpoint (auto, never, or the path of a last.pt)")
        try:
            if self.world.is_main:
                self.out.mkdir(parents=True, exist_ok=True)
                self._lock()
            if share(self.options.resume != "never" and last.is_file()):
                self._resume(last)
            elif self.world.is_main:
                self._clear()
            broadcast_module(self.step.method)
            if not self.world.is_main:
                return
            about = {"host": describe_host(), "versions": describe_versions(), "git": self.git}
            resolved = {**self.config, "device": self.device.type, **about}
            (self.out / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
        except OSError as error:
            raise FastSSLError(
                f"{self.out}: cannot write the run's folder ({error.strerror or error}); choose another with --out"
            ) from error

    def _clear(self) -> None:
        """Remove what another run left here: its weights, figures and pictures beside the new run's would be a lie."""
        for name in (*_RESULTS, *(f"checkpoints/{name}" for name in ("last.pt", "last.safetensors", "last-teacher.safetensors"))):
            (self.out / name).unlink(missing_ok=True)
        self.metrics_path.write_text("")

    def _lock(self) -> None:
        """Hold the folder while this process lives: two runs in one folder would write over each other's files.

        Raises:
            FastSSLError: another process holds it.
        """
        self._lock_file = open(self.out / ".lock", "w")  # noqa: SIM115 (held open for the whole run)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FastSSLError(f"{self.out}: another fastssl pretrain is writing here; choose another --out") from error

    def unlock(self) -> None:
        """Let other processes, and later runs of this one, have the folder."""
        if self._lock_file is not None:
            self._lock_file.close()

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(path, advice="start anew with --resume never")
        found = differences(self.config, _with_defaults(state["config"]))
        if found:
            raise FastSSLError(
                f"{path} belongs to a run with other settings ({'; '.join(found[:3])}{'; ...' if len(found) > 3 else ''}): "
                "choose another --out, or --resume never to start over"
            )
        self.position = restore(state, method=self.step.method, optimizer=self.step.optimizer)
        if self.world.is_main:
            self._cut_metrics()
        self.progress.message(f"resumed at step {self.position.step:,} (epoch {self.position.epoch})")

    def _cut_metrics(self) -> None:
        """Drop the lines behind the checkpoint: those steps are about to be made again."""
        rows = []
        if self.metrics_path.is_file():
            for line in self.metrics_path.read_text(errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that the kill cut short
                if isinstance(row, dict) and row.get("kind") in ("step", "probe") and row.get("step", 0) <= self.position.step:
                    rows.append(line)
        self.metrics_path.write_text("".join(line + "\n" for line in rows))

    @property
    def backbone(self) -> nn.Module:
        """The network that is being trained."""
        return self.step.method.student.backbone

    @property
    def metrics_path(self) -> Path:
        return self.out / "metrics.jsonl"

    @contextmanager
    def stop_on_signal(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step in hand, with a checkpoint. A second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals belong to the main thread; used as a library, the caller decides
            return

        def ask(number: int, frame: object) -> None:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._stop.set()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------------ training

    def train(self) -> None:
        """All epochs that are left."""
        train = self.recipe.train
        loader = ViewLoader(
            self.reader,
            views=self.recipe.views,
            batch_size=self.step.batch_size,
            rank=self.world.rank,
            world=self.world.size,
            device=self.device,
            pipeline=self.options.pipeline,
            seed=self.options.seed,
            workers=self.options.workers,
            on_bad=train.on_bad,
            dtype=self.step.view_dtype,
            colour=not self.step.takes_crops,
        )
        with loader:
            self.steps_per_epoch = len(loader)
            self.total_steps = train.epochs * self.steps_per_epoch
            self.length = RunLength(self.total_steps, self.steps_per_epoch)
            self.ring = MetricRing(self.step.method.METRICS, min(train.log_every, self.steps_per_epoch), self.device)
            self.probe = self._online_probe() if self.world.is_main else None
            self._last_saved = time.monotonic()
            for epoch in range(self.position.epoch, train.epochs):
                self._epoch(loader, epoch)
            self.skipped = sorted(set(chain.from_iterable(gather_values(loader.stats.skipped))))

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

    def _epoch(self, loader: ViewLoader, epoch: int) -> None:
        train = self.recipe.train
        self._start_block(loader)
        batches = loader.epoch(epoch, start_step=self.position.step_in_epoch)
        for batch in batches:
            self._step(batch, epoch)
            self.position.step += 1
            self.position.step_in_epoch += 1
            if len(self.ring) == train.log_every or self.position.step_in_epoch == self.steps_per_epoch:
                self._close_block(loader)
            if self._stopped():
                batches.close()
                self._close_block(loader)
                self._save()
                raise Interrupted(
                    f"stopped at step {self.position.step:,}; everything is saved in {self.out}; the same command goes on from here"
                )
        self.position.epoch, self.position.step_in_epoch = epoch + 1, 0
        last = epoch + 1 == train.epochs
        every = self.recipe.probe.every_epochs
        if self.probe and every and ((epoch + 1) % every == 0) and not last:
            self._write(self.probe.run(self.backbone, step=self.position.step, epoch=epoch + 1))
        if last or time.monotonic() - self._last_saved > 60 * train.checkpoint_minutes:
            self._save()

    def _stopped(self) -> bool:
        """Whether a signal asked any process to end here. Several processes ask each other now and then: all must stop behind the same step."""
        if self.world.size == 1:
            return self._stop.is_set()
        return (self.position.step % _ASK_EVERY == 0 or self.position.step == self.total_steps) and agree_any(self._stop.is_set())

    def _step(self, batch: Batch, epoch: int) -> None:
        """One step. No value is read back from the device here."""
        step, first = self.position.step, not self.step.prepared
        self._rates = self.step.rates(step, self.length)
        noise = self.step.noise(epoch, self.position.step_in_epoch, batch.index.numpy())
        phase = self.step.method.phase(step, self.length)
        self.ring.push(self.step(batch.views, noise, self._rates, phase=phase, tables=batch.tables))
        if first:
            self._block_started += self.step.prepare_s  # minutes of compiling are not the rate of a step
            for switch, reason in self.step.fallbacks.items():
                self.progress.message(f"without {switch}: {reason}")

    # ------------------------------------------------------------------ metrics and files

    def _start_block(self, loader: ViewLoader) -> None:
        self._block_started = time.monotonic()
        self._waited = loader.stats.wait_s

    def _close_block(self, loader: ViewLoader) -> None:
        """A line of metrics for the steps since the last one."""
        steps = len(self.ring)
        if steps == 0:
            return
        seconds = max(time.monotonic() - self._block_started, 1e-9)
        self.position.train_seconds += seconds
        views = sum(spec.count for spec in self.recipe.views)
        self.ring.flush(
            {
                "kind": "step",
                "step": self.position.step,
                "epoch": self.position.step / self.steps_per_epoch,
                **self._rates,
                "pair_per_s": steps * self.batch_size / seconds,
                "view_per_s": steps * self.batch_size * views / seconds,
                "data_wait": (loader.stats.wait_s - self._waited) / seconds,
                "seconds": self.position.train_seconds,
            }
        )
        self._report(self.ring.collect(wait=self._stop.is_set() or self.position.step == self.total_steps))
        self._start_block(loader)

    def _report(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._write(row)
            self.progress.row(row, self.position.step, self.total_steps)
            if not math.isfinite(row["loss"]):
                raise FastSSLError(
                    f"the loss is {row['loss']} at step {row['step']:,}: the run has diverged. Lower optim.lr (now {self.recipe.optim.lr:g}) or lengthen "
                    f"optim.warmup_epochs; checkpoints up to the last one are in {self.out / 'checkpoints'}"
                )

    def _write(self, row: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _save(self) -> None:
        self._last_saved = time.monotonic()
        if not self.world.is_main:
            return
        save_checkpoint(
            self.out / "checkpoints",
            method=self.step.method,
            optimizer=self.step.optimizer,
            position=self.position,
            config=self.config,
            arch=self.recipe.arch,
        )


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the keys that its version of fastssl did not have yet, at what that version did."""
    recipe = {key: value for key, value in config.items() if key in _RECIPE_KEYS}
    try:
        filled = recipe_to_dict(build_recipe(recipe, where="the checkpoint"))
    except FastSSLError:  # written by another version, with keys that are gone: compared as it is
        return config
    return {**filled, **config, **{key: filled[key] for key in recipe}}


_RESULTS = ("summary.json", "report.html", "views.png", "neighbours.png")
#: Steps between two questions whether to stop, among several processes: an answer waits for all of them.
_ASK_EVERY = 10
_RECIPE_KEYS = frozenset(field.name for field in dataclasses.fields(Recipe))
