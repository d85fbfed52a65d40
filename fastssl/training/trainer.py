"""The training loop.

    train(run)       epochs: steps, a probe, a checkpoint
    make_steps(run)  batch -> step -> now and then a line of metrics and a checkpoint
    make_step(run)   schedules and ``TrainStep``: nothing in it waits for the device

Everything random comes from the seed: first weights, queue, order of samples, every view, BatchNorm groups of the keys,
drop path. A run that is stopped and resumed makes the same steps as one that was not.

Under torchrun or srun each process runs this with its share of every batch; the batch of the recipe is that of all of
them. The first process alone writes, probes and reports.
"""

from __future__ import annotations

import math
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from fastssl.distributed.collectives import Vote, any_rank, barrier, broadcast_object, gather_objects
from fastssl.errors import FastSSLError, Interrupted, counted, duration
from fastssl.evaluate.online_probe import OnlineProbe, choose_split
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.runs.checkpoint import has_all_files
from fastssl.runs.saver import NotSaved
from fastssl.training.cuda_graph import StepInputs
from fastssl.training.rollback import NonFiniteGuard, advice
from fastssl.training.room import make_step_or_say
from fastssl.training.setup import Setup
from fastssl.training.step_log import StepLog


def train(run: Setup) -> None:
    """Make all steps that are left, with the probes between epochs."""
    with closing(run.step):
        vote, probe = Vote(), _online_probe(run)
        if run.saver:
            _complete_checkpoint(run, run.saver.folder.checkpoints)
            run.saver.begin()
        for line in run.plan():
            run.progress.note(line)
        while run.position.epoch < run.recipe.train.epochs:
            _make_epochs(run, vote, probe)
        vote.close()


def _make_epochs(run: Setup, vote: Vote, probe: OnlineProbe | None) -> None:
    """Those that are left with views of the present sizes."""
    small = run.recipe.small_epochs
    last = small if run.position.epoch < small else run.recipe.train.epochs
    run.step.take(run.recipe.views_at(run.position.epoch))
    with run.make_loader() as loader:
        log, guard = StepLog(run, loader), NonFiniteGuard(run)
        while run.position.epoch < last:
            while run.position.step_in_epoch < run.length.steps_per_epoch:
                make_steps(run, loader, log, guard, vote)
            _end_epoch(run, loader, vote, probe)


def make_steps(run: Setup, loader: ViewLoader, log: StepLog, guard: NonFiniteGuard, vote: Vote) -> None:
    """Steps to the end of the epoch, or until one that is not finite has set the run back."""
    with closing(loader.epoch(run.position.epoch, start_step=run.position.step_in_epoch)) as batches:
        log.begin_block()
        guard.begin_block()
        for batch in batches:
            if guard.careful:  # a block that was undone is made again step by step; the guilty one is passed over
                guard.step(make_step, batch)
            elif not guard.passes_over():
                make_step(run, batch)
            run.position.step += 1
            run.position.step_in_epoch += 1
            if log.is_block_end() and not _end_block(log, guard):
                return
            # Asked now, answered at the next step: no rank waits for another.
            stop, save = vote(bool(run.stop), run.saver is not None and run.saver.is_due())
            if stop or save:
                if not _end_block(log, guard, wait=True):
                    if run.saver:
                        run.saver.ask_again()
                    return
                _gather_skipped(run, loader)
                if stop:
                    _leave(run, vote)
                save_checkpoint(run)
                barrier()  # the others wait for the disk here, and not in a step
                log.begin_block()  # what was spent on the checkpoint is not the rate of a step


def make_step(run: Setup, batch: Batch) -> Tensor:
    """One step; its metrics, on the device. No value is read back from there."""
    position, step, first = run.position, run.step, not run.step.prepared
    run.rates = step.rates(position.step, run.length)
    noise = step.noise(position.epoch, position.step_in_epoch, batch.index.numpy())
    metrics = make_step_or_say(step, StepInputs(batch.views, noise, run.rates, batch.tables))
    run.ring.push(metrics, position.step + 1)
    if auto := run.recipe.train.accumulate == "auto":
        position.parts = step.parts.count  # also behind a rollback to a time when they were not known
    if first:
        if auto:
            run.progress.message(f"train.accumulate: {counted(step.parts.count, 'part')} of a batch")
        for switch, reason in step.fallbacks.items():
            run.progress.message(f"without {switch}: {reason}")
        if step.check or run.device.type == "cuda":
            how = "; ".join(f"{switch} {how}" for switch, how in step.switches.items())
            run.progress.note(f"{how}; ready after {duration(step.prepare_s)}")
    return metrics


def _end_block(log: StepLog, guard: NonFiniteGuard, *, wait: bool = False) -> bool:
    """A line of metrics for the steps since the last one. False: one was not finite, and the run was set back."""
    if not guard.accept_block():
        return False
    log.end_block(wait=wait)
    log.begin_block()
    guard.begin_block()
    return True


def _end_epoch(run: Setup, loader: ViewLoader, vote: Vote, probe: OnlineProbe | None) -> None:
    """The probe, and a checkpoint at the very end and at milestones."""
    position, every = run.position, run.recipe.probe.every_epochs
    _gather_skipped(run, loader)
    ended = position.epoch + 1
    last = ended == run.recipe.train.epochs
    if every and ended % every == 0 and not last:
        row = None
        if probe:
            row = run.stop.unless_asked(lambda: probe.run(run.backbone, step=position.step, epoch=ended))
        # The others wait here for the first process, which probes alone. A run that goes on from here probes again.
        if any_rank(bool(run.stop)):
            _leave(run, vote)
        if probe and row is not None:
            _report_probe(run, probe, row)
    position.epoch, position.step_in_epoch = ended, 0
    milestone = _milestone(run, ended)
    if last or milestone:
        save_checkpoint(run, milestone, patiently=last)


# ---------------------------------------------------------------------- probes


def _online_probe(run: Setup) -> OnlineProbe | None:
    """The first process's; the others have none."""
    if not run.world.is_main:
        return None
    settings = run.recipe.probe
    split = choose_split(run.reader, run.val, settings.online_samples, run.options.seed)
    run.online_judged = len(split.query_index)
    return OnlineProbe(split, settings.size, **run.extraction)


def _report_probe(run: Setup, probe: OnlineProbe, row: dict[str, Any]) -> None:
    """The line of an online probe, which this process alone has made."""
    if run.saver:
        run.saver.write(row)
    run.online_knn = row["knn"]
    split, rank = probe.split, row["effective_rank"]
    photos = counted(len(split.query_index) + (0 if split.labelled else len(split.bank_index)), "photo")
    found = "features that are NaN or infinite outside of training"
    if math.isfinite(rank):
        found = f"effective rank {rank:.1f}"
    if row["knn"] is not None:
        found = f"kNN {row['knn']:.1f} % of {photos}, {found}"
    kind = "online probe" if split.labelled else f"online probe, {photos}: {split.obstacle}"
    run.progress.note(f"epoch {row['epoch']:,}: {found} ({kind})")


# ---------------------------------------------------------------------- checkpoints


def save_checkpoint(run: Setup, milestone: int | None = None, *, patiently: bool = False) -> bool:
    """A checkpoint; False: the disk did not take it. ``patiently``: wait for room, as nothing else is left to do.

    Raises:
        FastSSLError: the state is not finite; a checkpoint of it would be worse than none.
    """
    if not run.step.is_finite():
        found = f"the networks are no longer finite at step {run.position.step:,}, though the loss is"
        raise FastSSLError(f"{found}: the run has diverged{advice(run)}")
    if not run.saver:
        return True
    stop = run.stop if patiently else None
    saved = run.saver.save(run.step.method, run.step.optimizer, run.position, milestone=milestone, stop=stop)
    if saved:
        run.tell_status("training")
    return saved


def _complete_checkpoint(run: Setup, folder: Path) -> None:
    """Write the files that a kill in the middle of a checkpoint, or a checkpoint from elsewhere, left out."""
    position, milestone = run.position, None
    if position.step == 0:
        return
    if position.step_in_epoch == 0:
        milestone = _milestone(run, position.epoch)
    if not has_all_files(folder, run.step.method, position.step, milestone):
        save_checkpoint(run, milestone, patiently=position.epoch >= run.recipe.train.epochs)


def _milestone(run: Setup, ended: int) -> int | None:
    """The epoch that has just ended, where its checkpoint is to be kept for good."""
    every = run.recipe.train.milestone_epochs
    return ended if every and ended % every == 0 else None


def _leave(run: Setup, vote: Vote) -> NoReturn:
    """Save, and end the run, as all processes do here."""
    saved, step = save_checkpoint(run), run.position.step
    vote.close()
    if not broadcast_object(saved):
        why = run.saver.why() if run.saver else "its first process says why"
        run.end_together(NotSaved(f"stopped at step {step:,}, which could not be saved: {why}"))
    where = f"everything is saved in {run.options.out}; the same command goes on from here"
    run.end_together(Interrupted(f"stopped at step {step:,}; {where}"))


def _gather_skipped(run: Setup, loader: ViewLoader) -> None:
    """Put the damaged photos that all processes have met so far on record."""
    met = chain.from_iterable(gather_objects(loader.stats.skipped))
    run.position.skipped = sorted({*run.position.skipped, *met})
