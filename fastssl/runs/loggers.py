"""``--log``: a run's curves, pictures and settings in TensorBoard, Weights & Biases, MLflow and Trackio.

``metrics.jsonl`` is the truth. Each logger is a thread that follows the run's folder, so no step waits for it and no
run ends with it: one that fails or does not answer is told once, and dropped. A run that goes on shows all rows again;
of each kind those are left out that are not newer than what the logger's store has.
"""

from __future__ import annotations

import importlib.util
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastssl.errors import FastSSLError, counted, without_folders
from fastssl.runs.metrics_file import rows_in
from fastssl.runs.stores import LoggedRun, MLflow, Store, TensorBoard, Trackio, WandB, forget_events
from fastssl.utils.addresses import shown
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.deadline import Deadline

#: name, also of the extra -> (class, packages that it imports)
LOGGERS: dict[str, tuple[Callable[[], Store], tuple[str, ...]]] = {
    "tensorboard": (TensorBoard, ("tensorboard",)),
    "wandb": (WandB, ("wandb",)),
    "mlflow": (MLflow, ("mlflow", "sqlalchemy", "alembic")),
    "trackio": (Trackio, ("trackio",)),
}
#: what the stores know a run by: the name of its folder is not its alone
_IDENTITY = "loggers.json"
#: Seconds between two looks at the folder; for one call of a logger; at the end of a run, or of one that was stopped.
_POLL_S, _PATIENCE_S, _END_S, _STOP_S = 2.0, 300.0, 60.0, 10.0


def require_loggers(names: Iterable[str]) -> None:
    """Raise FastSSLError where one of ``names`` is no logger, or what it needs is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise FastSSLError(f"log {name!r}: no such logger; there are {', '.join(LOGGERS)}")
        if missing := [package for package in LOGGERS[name][1] if importlib.util.find_spec(package) is None]:
            how = f"pip install 'fastssl-vision[{name}]'"
            raise FastSSLError(f"log {name!r}: {counted(len(missing), 'package')} missing, {', '.join(missing)}; {how}")


def forget(folder: Path) -> None:
    """Delete what a logger would go on with, of another run that was in this folder. Raises OSError."""
    (folder / _IDENTITY).unlink(missing_ok=True)
    forget_events(folder)


@contextmanager
def logging_to(
    names: Iterable[str], folder: Path, config: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Let loggers follow a run, whose metrics.jsonl is ready to be added to, to the end of the block. Yields a function
    that takes what the run has found, the content of ``summary.json``.

    Args:
        names: of ``LOGGERS``.
        folder: of the run.
        config: the resolved recipe.
        say: prints a line; called by several threads.
    """
    threads: list[_Follower] = []
    try:
        with_id = LoggedRun(folder.absolute(), _identity(folder) if names else "", config, say)
        threads = [_Follower(name, with_id) for name in names]
    except OSError as error:
        say(f"nothing is logged to {', '.join(names)}: {folder / _IDENTITY}: {error.strerror}")
    for thread in threads:
        thread.start()
    patience = _STOP_S
    try:
        found: dict[str, Any] = {}
        yield found.update
        for thread in threads:
            thread.found = found
        patience = _END_S
    finally:
        ends = time.monotonic() + patience
        for thread in threads:
            thread.closing.set()
        for thread in threads:
            thread.join(max(0.0, ends - time.monotonic()))
            if thread.is_alive():
                thread.drop(f"has not come to its end in {patience:.0f} s; metrics.jsonl has what is missing there")
                Deadline(folder).give_up()  # nor does the end of the process wait for it


class _Follower(threading.Thread):
    """Shows one logger what appears in the folder of a run.

    Attributes:
        closing: set when the run has come to its end, good or bad.
        found: set before, when it is complete.
    """

    def __init__(self, name: str, run: LoggedRun):
        super().__init__(name=f"fastssl-log-{name}", daemon=True)
        self._named, self._run, self._store = name, run, LOGGERS[name][0]()
        self.closing, self.found = threading.Event(), dict[str, Any]()
        self._read = self._step = 0
        self._dropped = self._viewed = False

    def drop(self, why: str) -> None:
        """Say once that the run goes on without this logger."""
        if not self._dropped:
            self._dropped = True
            self._run.say(f"{self._named}: {' '.join(shown(why).split())[:300]}; the run goes on without it")

    def run(self) -> None:
        try:
            with self._patience():
                self._newest = {**self._store.start(self._run)}
            while not self._dropped:
                ends = self.closing.wait(_POLL_S)
                with self._patience():
                    self._look()
                    if ends:
                        self._end()
                        return
        except BaseException as error:  # other people's packages: also what would end an interpreter
            self.drop(f"failed ({type(error).__name__}: {without_folders(str(error))})")

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """Drop a logger that hangs in here. Its thread stays behind."""
        timer = threading.Timer(_PATIENCE_S, self.drop, [f"has not answered for {_PATIENCE_S / 60:.0f} min"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _look(self) -> None:
        """Show what is new since the last look."""
        with suppress(FileNotFoundError), (self._run.folder / "metrics.jsonl").open("rb") as file:
            file.seek(self._read)
            data = file.read()
            data = data[: data.rfind(b"\n") + 1]
            self._read += len(data)
            for row in rows_in(data.decode(errors="replace").splitlines()):
                if isinstance(step := row.pop("step", None), int):
                    self._step = max(self._step, step)
                    self._show("probe" if row.pop("kind", None) == "probe" else "train", row, step)
        if not self._viewed and (self._run.folder / "views.png").is_file():
            self._viewed = True
            self._picture("views", 0)

    def _end(self) -> None:
        """Show what a complete run has found, and close the store."""
        verdict = None
        if self.found:
            verdict, probe = self.found["verdict"]["text"], self.found["probe"]
            figures = {f"{kind} {row['name']}": row[kind] for row in probe["rows"] for kind in ("knn", "linear")}
            rates = {name: self.found[name] for name in ("pair_per_s", "view_per_s", "data_wait", "train_seconds")}
            self._show("final", {**figures, **rates, **self.found["features"]}, self._step)
            self._picture("neighbours", self._step)
        self._store.close(verdict)

    def _show(self, kind: str, row: Mapping[str, Any], step: int) -> None:
        if step > self._newest.get(kind, -1):
            # Names that every store takes; numbers that are not finite are null in the files.
            values = {f"{kind}/{re.sub(r'[^ .,_0-9A-Za-z-]', '', name)}": value for name, value in row.items()}
            figures = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
            self._store.scalars(kind, figures, step)

    def _picture(self, name: str, step: int) -> None:
        path = self._run.folder / f"{name}.png"
        if step > self._newest.get("pictures", -1) and path.is_file():
            self._store.picture(name, path, step)


def _identity(folder: Path) -> str:
    """Eight letters that are this run's, also when it goes on."""
    path = folder / _IDENTITY
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["id"])
    name = uuid.uuid4().hex[:8]
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps({"id": name}) + "\n"))
    return name
