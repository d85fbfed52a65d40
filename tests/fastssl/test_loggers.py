"""``--log``: each logger against its own local store, killed and gone on with; and loggers that fail or hang."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_run import Silent, options, rows, small

from fastssl.errors import FastSSLError, Interrupted
from fastssl.pretrain import pretrain
from fastssl.runs import loggers
from fastssl.runs.stores import LoggedRun

#: curve -> its steps and values, all that the store holds, in order
Curves = dict[str, list[tuple[int, float]]]

#: As a user's run that is killed: two blocks after its checkpoint, when every logger has shown them.
KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from small_run import Silent, options, small
from fastssl.pretrain import pretrain
from fastssl.runs import loggers

loggers._POLL_S = 0.05

class UntilKilled(Silent):
    def row(self, row, done, total):
        if row["step"] == 10:
            followers = [one for one in threading.enumerate() if one.name.startswith("fastssl-log-")]
            while followers and min(one._step for one in followers if one.is_alive()) < 10:
                time.sleep(0.05)
            time.sleep(1)  # what is on its way comes to the store
            os.kill(os.getpid(), signal.SIGKILL)

data, out, names = Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3].split(","))
pretrain(small("train.milestone_epochs=1"), options(data, out, log=names), UntilKilled())
"""


def tensorboard_curves(out: Path) -> Curves:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: Curves = defaultdict(list)
    for file in (out / "tensorboard").iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.startswith(("train/", "probe/", "final/", "pictures/")):
                    array = tensor_util.make_ndarray(value.tensor)
                    found[value.tag].append((event.step, float(array) if array.ndim == 0 else 0.0))
    return found


def wandb_curves(out: Path) -> Curves:
    """Of the transaction log, which is a LevelDB log of protocol buffers behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: Curves = defaultdict(list)
    (folder,) = (out / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            # Of a picture there are several, nested: its file, its size, ...
            items = [(item.nested_key[0] if item.nested_key else item.key, item) for item in record.history.item]
            row = {name: json.loads(item.value_json) for name, item in items}
            for name, value in row.items():
                if "/" in name and not name.endswith("/step"):
                    step = row[f"{name.partition('/')[0]}/step"]
                    found[name].append((step, value if isinstance(value, float) else 0.0))
    return found


def mlflow_curves(out: Path) -> Curves:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("fastssl").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["views.0.size"] == "32"
    assert run.data.tags["verdict"]
    found: Curves = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
        if not name.endswith("/step")
    }
    for file in (out / "mlflow").rglob("*.png"):
        found[f"pictures/{file.stem}"] = [(12 if file.stem == "neighbours" else 0, 0.0)]
    return found


def trackio_curves(out: Path) -> Curves:
    from trackio.sqlite_storage import SQLiteStorage

    found: Curves = defaultdict(list)
    for run in SQLiteStorage.get_run_records("fastssl"):
        if run["name"].startswith(f"{out.name}-"):
            for row in SQLiteStorage.get_logs("fastssl", run["name"], run_id=run["id"]):
                for name, value in row.items():
                    if "/" in name:
                        found[name].append((row["step"], value if isinstance(value, float) else 0.0))
    return found


STORES: dict[str, Callable[[Path], Curves]] = {
    "tensorboard": tensorboard_curves,
    "wandb": wandb_curves,
    "mlflow": mlflow_curves,
    "trackio": trackio_curves,
}


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_DIR", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(loggers, "_POLL_S", 0.05)


def is_here(name: str) -> bool:
    return all(find_spec(package) for package in loggers.LOGGERS[name][1])


@pytest.mark.slow
def test_killed_and_gone_on_with_every_store_has_every_step_once(beton: Path, tmp_path: Path) -> None:
    names = tuple(filter(is_here, STORES))
    if not names:
        pytest.skip("no logger is installed")
    out = tmp_path / "run"
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{KILLED}"]
    killed = subprocess.run([*command, str(beton), str(out), ",".join(names)], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert [row["step"] for row in rows(out)] == [4, 6, 6, 10]

    progress = Silent()
    pretrain(small("train.milestone_epochs=1"), options(beton, out, log=names), progress)
    assert "resumed at step 6 (epoch 1)" in progress.messages
    assert not [text for text in progress.messages if "goes on without" in text]
    written = rows(out)
    summary = json.loads((out / "summary.json").read_text())
    trained = next(row for row in summary["probe"]["rows"] if row["name"] == "after pre-training")
    for name in names:
        curves = STORES[name](out)
        loss = [(row["step"], row["loss"]) for row in written if row["kind"] == "step"]
        assert curves["train/loss"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in loss], name
        assert [step for step, _ in curves["train/lr"]] == [4, 6, 10, 12], name
        assert [step for step, _ in curves["train/pair_per_s"]] == [4, 6, 10, 12], name
        assert [step for step, _ in curves["probe/knn"]] == [6], name
        assert curves["final/knn after pre-training"] == [(12, pytest.approx(trained["knn"]))], name
        assert [step for step, _ in curves["pictures/views"]] == [0], name
        assert [step for step, _ in curves["pictures/neighbours"]] == [12], name
