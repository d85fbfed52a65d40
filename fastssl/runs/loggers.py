"""``--log``: a run's curves, pictures and settings in TensorBoard, Weights & Biases, MLflow and Trackio.

``metrics.jsonl`` is the truth. Each logger is a thread that follows this file, so no step waits for it and no run ends
with it: one that fails or hangs is told, and dropped. A run that goes on shows all rows again but what a store has.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

from fastssl.errors import FastSSLError, without_folders
from fastssl.runs.metrics_file import rows_in
from fastssl.utils.addresses import shown
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.deadline import Deadline

#: in which the stores' own programs show the runs, unless their environment variables say another
PROJECT = "fastssl"
Values = dict[str, Any]
Say = Callable[[str], None]
#: with which all names of curves begin, ``train/loss``: steps, probes between them, the end's figures and pictures
KINDS = ("train", "probe", "final")
#: in a run's folder: the name that stores know it by; TensorBoard's events
IDENTITY, EVENTS = "logged-as.txt", "tensorboard"
#: Seconds between two looks at the file; for the end of a complete run, and of one that was stopped.
_POLL_S, _END_S, _STOP_S = 2.0, 60.0, 10.0


class Store(Protocol):
    """Where curves are kept. One thread makes all the calls, which may raise whatever they like."""

    def start(self, name: str, folder: Path, settings: Values) -> Mapping[str, float]:
        """Open the run ``name`` there, a new one or an older one of that name; its newest step of each of ``KINDS``."""

    def add(self, kind: str, row: Values, step: int) -> None:
        """Add figures, and at the end words and PNG files (Path), by names that begin with ``kind/``."""

    def close(self, complete: bool) -> None:
        """Bring everything to its place."""


class TensorBoard:
    """Event files in ``tensorboard/``. They can only be added to, so each start writes them anew."""

    def start(self, name: str, folder: Path, settings: Values) -> Mapping[str, float]:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        shutil.rmtree(folder / EVENTS, ignore_errors=True)
        self._writer = SummaryWriter(str(folder / EVENTS))
        for summary in hparams(settings, {"probe/knn": 0.0}):  # add_hparams() would open another folder, as a run
            self._writer._get_file_writer().add_summary(summary)
        return {}

    def add(self, kind: str, row: Values, step: int) -> None:
        from matplotlib.image import imread

        for name, value in row.items():
            if isinstance(value, Path):
                self._writer.add_image(name, imread(value), step, dataformats="HWC")
            else:
                (self._writer.add_text if isinstance(value, str) else self._writer.add_scalar)(name, value, step)
        self._writer.flush()

    def close(self, complete: bool) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, in ``./wandb`` or where WANDB_DIR says. An offline run cannot go on: each start begins anew."""

    def start(self, name: str, folder: Path, settings: Values) -> Mapping[str, float]:
        import wandb

        online = wandb.setup(wandb.Settings(silent=True)).settings.mode == "online"
        if online and not wandb.login(prompt=False, verify=False):
            raise FastSSLError("nobody is logged in: `wandb login`, or WANDB_MODE=offline and later `wandb sync`")
        # Not the console, the code, the command line: folders and passwords may stand there.
        private: Values = {"console": "off", "disable_git": True, "disable_code": True, "x_disable_meta": True}
        private |= {"host": "", "silent": True, "x_save_requirements": False}
        what: Values = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "id": name, "config": settings}
        self._run = wandb.init(**what, resume="allow", allow_val_change=True, settings=private)
        self._image = wandb.Image
        for kind in KINDS:
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
        mine = Path(self._run.dir).parent
        for old in {*mine.parent.glob(f"offline-run-*-{name}")} - {mine}:
            shutil.rmtree(old)
        return {kind: self._run.summary.get(f"{kind}/step", -1) for kind in KINDS}

    def add(self, kind: str, row: Values, step: int) -> None:
        shown = {name: self._image(str(value)) if isinstance(value, Path) else value for name, value in row.items()}
        self._run.log({f"{kind}/step": step, **shown})

    def close(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


class MLflow:
    """MLflow, in ``./mlflow.db`` or where MLFLOW_TRACKING_URI says."""

    def start(self, name: str, folder: Path, settings: Values) -> Mapping[str, float]:
        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        self._client = client = MlflowClient()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else client.create_experiment(project)
        found = client.search_runs([experiment], f"attributes.run_name = '{name}'", max_results=1)
        mine = found[0] if found else client.create_run(experiment, run_name=name)
        self._id = mine.info.run_id
        client.update_run(self._id, status="RUNNING")
        for key in settings.keys() - mine.data.params.keys():  # each is written once
            client.log_param(self._id, key, settings[key])
        # Rows come whole and in order, so one curve of each kind tells.
        steps = {kind: [row.step for row in client.get_metric_history(self._id, f"{kind}/step")] for kind in KINDS}
        return {kind: max(some) for kind, some in steps.items() if some}

    def add(self, kind: str, row: Values, step: int) -> None:
        from mlflow.entities import Metric

        now, figures = int(1000 * time.time()), [(f"{kind}/step", float(step))]
        for name, value in row.items():
            if isinstance(value, Path):
                self._client.log_artifact(self._id, str(value))
            elif isinstance(value, str):
                self._client.set_tag(self._id, name, value)
            else:
                figures.append((name, value))
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in figures])

    def close(self, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


class Trackio:
    """Trackio, in ``~/.cache`` or where TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

    def start(self, name: str, folder: Path, settings: Values) -> Mapping[str, float]:
        off = dict.fromkeys(("auto_log_gpu", "auto_log_cpu", "embed"), False)
        with redirect_stdout(StringIO()):  # it prints, and standard output is --json's
            import trackio
            from trackio.sqlite_storage import SQLiteStorage

            self._run, self._image = trackio.init(PROJECT, name, config=settings, resume="allow", **off), trackio.Image
        if not self._run._is_local:  # a server says the newest step of all kinds
            return dict.fromkeys(KINDS, self._run._next_step - 1)
        logged = SQLiteStorage.get_logs(PROJECT, name, run_id=self._run.id)
        return {key.partition("/")[0]: row["step"] for row in logged for key in row}

    def add(self, kind: str, row: Values, step: int) -> None:
        shown = {name: self._image(str(value)) if isinstance(value, Path) else value for name, value in row.items()}
        self._run.log(shown, step=step)

    def close(self, complete: bool) -> None:
        with redirect_stdout(StringIO()):
            self._run.finish()


#: name, also of the package and of the extra -> class
LOGGERS: dict[str, type[Store]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


def require_loggers(names: Sequence[str]) -> None:
    """Raise FastSSLError where one of ``names`` is no logger, or its package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise FastSSLError(f"{name!r} is no logger; there are {', '.join(LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise FastSSLError(f"{name} is not installed: pip install 'fastssl-vision[{name}]'")


@contextmanager
def logging_to(names: Sequence[str], folder: Path, config: Values, say: Say) -> Iterator[Callable[[Values], None]]:
    """Let loggers follow a run, whose metrics.jsonl is ready to be added to, to the end of the block. Yields a function
    that takes what a complete run has found, the content of ``summary.json``. ``say`` is called by several threads.
    """
    from fastssl.config.against import flat  # loads torch, which --help should not wait for

    settings = {key: value if isinstance(value, (int, float)) else str(value) for key, value in flat(config)}
    end: Future[Values] = Future()
    run = (_run_name(folder) if names else "", folder, settings, end, say)
    threads = {name: threading.Thread(target=_follow, args=(name, *run), daemon=True) for name in names}
    for thread in threads.values():
        thread.start()
    try:
        yield end.set_result
    finally:
        latest = time.monotonic() + (_END_S if end.done() else _STOP_S)
        if not end.done():
            end.set_result({})
        for name, thread in threads.items():
            thread.join(max(0.0, latest - time.monotonic()))
            if thread.is_alive():
                _drop(name, "did not come to its end in time", say)
                Deadline(folder).give_up()  # nor does the end of the process wait for it


def _follow(logger: str, name: str, folder: Path, settings: Values, end: Future[Values], say: Say) -> None:
    """Show one logger what is written of a run until its ``end``, and then what a complete one has found."""
    read, last, ended = 0, 0, False
    try:
        store = LOGGERS[logger]()
        newest = store.start(name, folder, settings)
        while not ended:
            ended = bool(wait([end], _POLL_S).done)
            with (folder / "metrics.jsonl").open("rb") as file:
                file.seek(read)
                lines = file.read().rpartition(b"\n")[0]
            read += len(lines) + bool(lines)
            rows = rows_in(lines.decode(errors="replace").splitlines())
            new = [("probe" if row.pop("kind") == "probe" else "train", row.pop("step"), row) for row in rows]
            last = max([last, *(step for _, step, _ in new)])
            if ended and end.result():
                new.append(("final", last, _figures(end.result(), folder)))
            for kind, step, row in new:
                if step > newest.get(kind, -1):
                    # In letters that every store takes. What is not finite is null in the files.
                    named = {f"{kind}/{re.sub('[^ .,_0-9A-Za-z-]', '', key)}": value for key, value in row.items()}
                    store.add(kind, {key: value for key, value in named.items() if value is not None}, step)
        store.close(bool(end.result()))
    except BaseException as error:  # other people's packages: also what would end an interpreter
        ours = isinstance(error, FastSSLError)
        _drop(logger, str(error) if ours else f"failed ({type(error).__name__}: {error})", say)


def _figures(found: Values, folder: Path) -> Values:
    figures = {f"{probe} {row['name']}": row[probe] for row in found["probe"]["rows"] for probe in ("knn", "linear")}
    pictures = {name: folder / f"{name}.png" for name in ("views", "neighbours")}
    rates = {name: found[name] for name in ("pair_per_s", "view_per_s", "train_seconds")}
    return {**figures, **rates, **found["features"], "verdict": found["verdict"]["text"], **pictures}


def _drop(logger: str, why: str, say: Say) -> None:
    said = " ".join(shown(without_folders(why)).split())[:300]
    say(f"{logger}: {said}; the run goes on without it, and metrics.jsonl has everything")


def _run_name(folder: Path) -> str:
    """The folder's, and some letters that are this run's alone, also when it goes on."""
    path = folder / IDENTITY
    if not path.is_file():
        name = f"{re.sub('[^0-9A-Za-z._-]', '-', folder.absolute().name)[:60]}-{uuid.uuid4().hex[:8]}"
        write_atomically(path, lambda temporary: temporary.write_text(name))
    return path.read_text()
