"""``--log``: each logger against its own local store, killed and gone on with; and loggers that fail or hang."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from small_run import Silent, options, rows, small

from fastssl.cli import main
from fastssl.errors import FastSSLError
from fastssl.pretrain import pretrain
from fastssl.runs import loggers
from fastssl.runs.folder import RunFolder
from fastssl.utils import deadline

#: curve -> its steps and values, all that the store holds, in order
Curves = dict[str, list[tuple[int, float]]]

#: As a user's run that is killed: two blocks after its checkpoint, when every logger has shown them.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from small_run import Silent, options, small
from fastssl.pretrain import pretrain
from fastssl.errors import FastSSLError
from fastssl.runs import loggers

loggers._POLL_S = 0.05
data, out, names = Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3].split(","))
newest = dict.fromkeys(names, 0)

def told(name, store):
    def add(self, kind, row, step):
        store.add(self, kind, row, step)
        newest[name] = step
    return type(name, (store,), {"add": add})

loggers.LOGGERS.update({name: told(name, loggers.LOGGERS[name]) for name in names})

class UntilKilled(Silent):
    def row(self, row, done, total):
        if row["step"] == 10:
            while min(newest.values()) < 10:
                time.sleep(0.05)
            time.sleep(1)  # what is on its way comes to the store
            os.kill(os.getpid(), signal.SIGKILL)

pretrain(small("train.milestone_epochs=1"), options(data, out, log=names), UntilKilled())
"""


def tensorboard_curves(out: Path) -> Curves:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: Curves = defaultdict(list)
    for file in (out / "tensorboard").iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.startswith(("train/", "probe/", "final/")):
                    array = tensor_util.make_ndarray(value.tensor)
                    found[value.tag].append((event.step, float(array) if array.dtype == np.float32 else 0.0))
    return found


def wandb_curves(out: Path) -> Curves:
    """Of the transaction log, which is a LevelDB log of protocol buffers behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: Curves = defaultdict(list)
    (folder,) = (out.parent / "wandb").glob("offline-run-*")
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

    client = MlflowClient(f"sqlite:///{out.parent / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("fastssl").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["views.0.size"] == "32"
    assert run.data.tags["final/verdict"]
    found: Curves = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
        if not name.endswith("/step")
    }
    for file in client.list_artifacts(run.info.run_id):
        found[f"final/{Path(file.path).stem}"] = [(12, 0.0)]
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
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-the-user" + 22 * "x")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(loggers, "_POLL_S", 0.05)
    monkeypatch.chdir(tmp_path)  # some write where they are


def is_here(name: str) -> bool:
    return all(map(find_spec, {"mlflow": ("mlflow", "sqlalchemy", "alembic")}.get(name, (name,))))


@pytest.mark.slow
def test_killed_and_gone_on_with_every_store_has_every_step_once(beton: Path, tmp_path: Path) -> None:
    if not (names := tuple(filter(is_here, STORES))):
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
        for picture in ("views", "neighbours"):
            assert [step for step, _ in curves[f"final/{picture}"]] == [12], name
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        if not {"checkpoints", "artifacts"} & {*file.parts} and file.name != "report.html":
            assert b"secret-of-the-user" not in file.read_bytes(), file


class Fake:
    """A store in memory: ``newest`` is there already."""

    newest: ClassVar[dict[str, float]] = {}

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rows: list[tuple[str, dict, int]] = []
        self.complete: bool | None = None

    def start(self, name: str, folder: Path, settings: dict) -> dict[str, float]:
        self.names.append(name)
        return self.newest

    def add(self, kind: str, row: dict, step: int) -> None:
        self.rows.append((kind, row, step))

    def close(self, complete: bool) -> None:
        self.complete = complete


class Failing(Fake):
    def add(self, kind: str, row: dict, step: int) -> None:
        raise SystemExit("no room in /home/me/store, see https://me:secret@host/x?token=1")


class Hanging(Fake):
    def start(self, name: str, folder: Path, settings: dict) -> dict[str, float]:
        time.sleep(30)
        return {}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    made: dict[str, Fake] = {}

    def maker(kind: type[Fake], name: str) -> Callable[[], Fake]:
        return lambda: made.setdefault(name, kind())

    kinds = {"fake": Fake, "failing": Failing, "hanging": Hanging}
    monkeypatch.setattr(loggers, "LOGGERS", {name: maker(kind, name) for name, kind in kinds.items()})
    monkeypatch.setattr(loggers, "_STOP_S", 0.5)
    monkeypatch.setattr(deadline, "_given_up", False)
    return made


def write(folder: Path, *written: dict) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in written)


def step(number: int, **more: object) -> dict:
    return {"kind": "step", "step": number, "loss": float(number), **more}


def test_what_is_written_is_shown_once_and_what_is_there_already_not_at_all(tmp_path: Path, fakes: dict) -> None:
    Fake.newest, said = {"train": 4, "probe": -1}, []
    try:
        write(tmp_path, step(4), {"kind": "probe", "step": 4, "knn": None, "effective rank (x)": 3}, step(8))
        with loggers.logging_to(["fake"], tmp_path, {"a": {"b": 1, "c": None}}, said.append):
            end_of_line = json.dumps(step(12))
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write(end_of_line[:20])
                file.flush()
                time.sleep(0.3)  # a look at half a line
                file.write(end_of_line[20:] + "\n")
    finally:
        Fake.newest = {}
    shown = [("probe", {"probe/effective rank x": 3}, 4), ("train", {"train/loss": 8.0}, 8)]
    assert fakes["fake"].rows == [*shown, ("train", {"train/loss": 12.0}, 12)]
    assert fakes["fake"].complete is False and said == []


def test_a_run_keeps_its_name_and_another_in_its_folder_has_another(tmp_path: Path, fakes: dict) -> None:
    write(tmp_path, step(1))
    for _ in range(2):
        with loggers.logging_to(["fake"], tmp_path, {}, print):
            pass
    first, second = fakes["fake"].names
    assert first == second and first.startswith(tmp_path.name)
    (tmp_path / "tensorboard").mkdir()
    folder = RunFolder(tmp_path, print)
    folder.checkpoints.mkdir()
    folder._clear("never")
    assert not (tmp_path / loggers.IDENTITY).exists() and not (tmp_path / "tensorboard").exists()


def test_one_that_fails_or_hangs_is_told_once_and_holds_up_nobody(tmp_path: Path, fakes: dict) -> None:
    said: list[str] = []
    write(tmp_path, step(1), step(2))
    began = time.monotonic()
    with loggers.logging_to(["failing", "hanging", "fake"], tmp_path, {}, said.append):
        assert time.monotonic() - began < 5
    assert time.monotonic() - began < 10
    assert [row[2] for row in fakes["fake"].rows] == [1, 2]
    end = "; the run goes on without it, and metrics.jsonl has everything"
    assert sorted(said) == [
        f"failing: failed (SystemExit: no room in store, see https://host/x){end}",
        f"hanging: did not come to its end in time{end}",
    ]
    assert deadline.threads_given_up()


def test_a_reason_of_our_own_is_told_as_it_is(tmp_path: Path, fakes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*given: object) -> None:
        raise FastSSLError("nobody is logged in")

    said: list[str] = []
    write(tmp_path, step(1))
    monkeypatch.setattr(Failing, "start", start)
    with loggers.logging_to(["failing"], tmp_path, {}, said.append):
        pass
    assert said == ["failing: nobody is logged in; the run goes on without it, and metrics.jsonl has everything"]


def test_unknown_and_missing_ones_end_a_run_before_it_begins(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    arguments = ["pretrain", "--data", str(beton), "--out", str(tmp_path / "run"), "--log"]
    for names, status, words in (
        ("wandb", 1, "fastssl: wandb is not installed: pip install 'fastssl-vision[wandb]'\n"),
        ("wandb,wandbe", 2, "--log 'wandbe' is none of tensorboard, wandb, mlflow, trackio"),
        ("", 2, "'' is none of"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, names])
        assert stop.value.code == status and words in capsys.readouterr().err
    with pytest.raises(FastSSLError, match="'other' is no logger; there are tensorboard"):
        pretrain(small(), options(beton, tmp_path / "run", log=("other",)), Silent())
    assert not (tmp_path / "run").exists()
