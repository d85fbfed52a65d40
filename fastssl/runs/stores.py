"""The stores of curves that ``--log`` names: TensorBoard, Weights & Biases, MLflow, Trackio. See loggers.py."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

#: in which the stores' own programs show the runs, unless their environment variables say another
PROJECT = "fastssl"
#: with which the names of curves and pictures begin: steps, probes between them, the end's figures, pictures
KINDS = ("train", "probe", "final", "pictures")


@dataclass(frozen=True)
class LoggedRun:
    """What a store is told of a run: its ``folder`` (absolute); an ``id`` that is the run's alone, and stays when it
    goes on; ``config``, the resolved recipe. ``say`` prints a line.
    """

    folder: Path
    id: str
    config: Mapping[str, Any]
    say: Callable[[str], None]

    @property
    def settings(self) -> dict[str, Any]:
        """``config`` without levels: ``{"optim.lr": 0.1, "views.0.size": 224, ...}``; what is not set is left out."""
        return dict(_flat("", self.config))


class Store(Protocol):
    """One thread makes all the calls, which may raise whatever they like."""

    def start(self, run: LoggedRun) -> Mapping[str, float]:
        """Open the store; the newest step of each of ``KINDS`` that is there and stays."""

    def scalars(self, kind: str, values: dict[str, float], step: int) -> None:
        """Add a row: ``{"train/loss": 9.7, "train/lr": 0.1, ...}``."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Add a PNG file, as ``pictures/NAME``."""

    def close(self, verdict: str | None) -> None:
        """Bring everything to the store. ``verdict``: in words; None: the run is not complete."""


class TensorBoard:
    """Event files in ``tensorboard/``. They can only be added to, so each start writes them anew."""

    def start(self, run: LoggedRun) -> Mapping[str, float]:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        forget_events(run.folder)
        self._writer = SummaryWriter(str(run.folder / "tensorboard"))
        file = self._writer._get_file_writer()  # add_hparams() would open another folder: another run
        for summary in hparams(run.settings, {"probe/knn": 0.0}):
            file.add_summary(summary)
        return {}

    def scalars(self, kind: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(f"pictures/{name}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, verdict: str | None) -> None:
        if verdict is not None:
            self._writer.add_text("verdict", verdict)
        self._writer.close()


class WandB:
    """Weights & Biases; offline where nobody is logged in. An offline run cannot go on: each start writes it anew."""

    def start(self, run: LoggedRun) -> Mapping[str, float]:
        import wandb

        online = wandb.setup(wandb.Settings(silent=True)).settings.mode == "online"
        place = Path(os.environ.get("WANDB_DIR") or run.folder)
        mode = None
        if online and not wandb.login(prompt=False, verify=False):
            mode = "offline"
            run.say(f"wandb: nobody is logged in, so it writes into {place / 'wandb'}; `wandb sync` sends it later")
        # Not the console, the code, the command line: folders and passwords may stand there.
        private = {"console": "off", "disable_git": True, "disable_code": True, "x_disable_meta": True, "host": ""}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.folder.name,
            dir=str(place),
            config=dict(run.config),
            allow_val_change=True,
            resume="allow",
            mode=mode,
            settings=wandb.Settings(silent=True, x_save_requirements=False, **private),
        )
        for kind in KINDS:
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
        if not self._run.offline:
            found = {kind: self._run.summary.get(f"{kind}/step") for kind in KINDS}
            return {kind: step for kind, step in found.items() if step is not None}
        for old in (place / "wandb").glob(f"offline-run-*-{run.id}"):
            if old != Path(self._run.dir).parent:
                shutil.rmtree(old)
        return {}

    def scalars(self, kind: str, values: dict[str, float], step: int) -> None:
        self._run.log({f"{kind}/step": step, **values})

    def picture(self, name: str, path: Path, step: int) -> None:
        import wandb

        self._run.log({"pictures/step": step, f"pictures/{name}": wandb.Image(str(path))})

    def close(self, verdict: str | None) -> None:
        if verdict is not None:
            self._run.summary["verdict"] = verdict
        self._run.finish(exit_code=int(verdict is None))


class MLflow:
    """MLflow: where MLFLOW_TRACKING_URI says, or in ``mlflow.db``, with the pictures in ``mlflow/``."""

    def start(self, run: LoggedRun) -> Mapping[str, float]:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        given = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = client = MlflowClient(given or f"sqlite:///{run.folder / 'mlflow.db'}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        pictures = None if given else (run.folder / "mlflow").as_uri()
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name, artifact_location=pictures)
        found = client.search_runs([experiment], f"tags.fastssl = '{run.id}'", max_results=1)
        mine = found[0] if found else client.create_run(experiment, run_name=run.folder.name, tags={"fastssl": run.id})
        self._id = mine.info.run_id
        client.update_run(self._id, status="RUNNING")
        # A setting is written once, and 100 are as many as a server takes together.
        new = [Param(key, str(value)[:6000]) for key, value in run.settings.items() if key not in mine.data.params]
        for begin in range(0, len(new), 100):
            client.log_batch(self._id, params=new[begin : begin + 100])
        # Rows come whole and in order, so one curve of each kind tells.
        steps = {kind: [row.step for row in client.get_metric_history(self._id, f"{kind}/step")] for kind in KINDS}
        return {kind: max(some) for kind, some in steps.items() if some}

    def scalars(self, kind: str, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now, row = int(1000 * time.time()), {f"{kind}/step": float(step), **values}
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in row.items()])

    def picture(self, name: str, path: Path, step: int) -> None:
        self._client.log_artifact(self._id, str(path), "pictures")  # over one of that name

    def close(self, verdict: str | None) -> None:
        if verdict is not None:
            self._client.set_tag(self._id, "verdict", verdict)
        self._client.set_terminated(self._id, "KILLED" if verdict is None else "FINISHED")


class Trackio:
    """Trackio: in its own folder (TRACKIO_DIR), or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

    def start(self, run: LoggedRun) -> Mapping[str, float]:
        name, quiet = f"{run.folder.name}-{run.id}", {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        with redirect_stdout(StringIO()):  # it prints, and standard output is --json's
            import trackio
            from trackio.sqlite_storage import SQLiteStorage

            self._run = trackio.init(PROJECT, name, config=dict(run.config), resume="allow", **quiet)
        newest: dict[str, float] = {}
        if not self._run._is_local:  # a server says the newest step of all
            return (
                newest if self._run._initial_last_step is None else dict.fromkeys(KINDS, self._run._initial_last_step)
            )
        for row in SQLiteStorage.get_logs(PROJECT, name, run_id=self._run.id):
            newest |= {key.partition("/")[0]: row["step"] for key in row}
        return newest

    def scalars(self, kind: str, values: dict[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        import trackio

        self._run.log({f"pictures/{name}": trackio.Image(str(path))}, step=step)

    def close(self, verdict: str | None) -> None:
        import trackio

        if verdict is not None:
            self._run.log({"verdict": trackio.Markdown(verdict)})
        with redirect_stdout(StringIO()):
            self._run.finish()


def forget_events(folder: Path) -> None:
    """Delete TensorBoard's files in the folder of a run."""
    for file in (folder / "tensorboard").glob("events.out.tfevents.*"):
        file.unlink()


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Mapping, list, tuple)):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _flat(f"{prefix}.{key}".lstrip("."), each)
    elif value is not None:
        yield prefix, value
