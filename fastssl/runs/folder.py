"""The folder of a run: who may write into it, what is in it when a run begins, and what is written while it lasts.

Only the first process of a run has one.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

from fastssl.config.recipe import Recipe, build_recipe, recipe_to_dict
from fastssl.config.resolved import differences
from fastssl.distributed.world import Launch
from fastssl.errors import FastSSLError, counted
from fastssl.runs.checkpoint import INITIAL, LAST, find_checkpoint, load_checkpoint, set_aside
from fastssl.runs.loggers import EVENTS, IDENTITY
from fastssl.runs.metrics_file import MetricsFile
from fastssl.runs.nonfinite import BAD_STEPS
from fastssl.runs.status import read_status
from fastssl.utils.atomic_files import link_atomically, remove_unfinished, write_atomically
from fastssl.utils.yaml_file import read_yaml

_RESULTS = ("summary.json", "report.html", "views.png", "neighbours.png", "status.json")
_CHECKPOINTS = ("last*.pt", "last*.safetensors", "step-*.pt", "epoch-*.pt", "epoch-*.safetensors", "*.aside", INITIAL)
#: What may be another when a run goes on: it decides what is told, kept and put up with, and no step that was made.
#: checkpoint: computes the same bits again. compile, graph: round differently, as another machine does. next_mark: in
#: the records of older versions. distill.teacher: a name; teacher.fingerprint decides.
_OF_TRAIN = ("checkpoint", "compile", "graph", "log_every", "checkpoint_minutes", "keep_last", "milestone_epochs")
_FREE = {"data.name", "data.val_photos", "val", "probe", "full_samples", "full_recipe", "next_mark", "init_from.name"}
_FREE |= {"distill.teacher", *(f"train.{key}" for key in (*_OF_TRAIN, "skip_nonfinite", "on_bad"))}
_RECIPE_KEYS = frozenset(field.name for field in dataclasses.fields(Recipe))


class RunFolder:
    """``--out`` of a run.

    Args:
        path: the folder; it need not exist.
        say: is told one line at a time what the user should know.

    Attributes:
        checkpoints: where they are.
        metrics: the rows of metrics.jsonl.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        self.path, self.checkpoints, self.say = path, path / "checkpoints", say
        self.metrics = MetricsFile(path / "metrics.jsonl")
        self._lock_file: TextIO | None = None

    def open(
        self,
        config: dict[str, Any],
        resume: str,
        about: dict[str, Any],
        put_in: Callable[[dict[str, Any]], object],
        launch: Launch = Launch(),  # noqa: B008 (frozen)
    ) -> dict[str, Any] | None:
        """Take the folder, and make it ready to go on, or for a new run.

        Args:
            config: every value that the run's numbers depend on.
            resume: ``auto``, ``never`` or the path of a checkpoint.
            about: what config.yaml says besides.
            put_in: takes the content of the checkpoint, or raises FastSSLError where it does not fit; called before
                anything in the folder is changed for it.
            launch: where it repeats the one that opened this folder, ``resume`` is taken for ``auto``.

        Returns:
            the content of the checkpoint to go on from; None for a new run.

        Raises:
            FastSSLError: the folder is taken or cannot be written; no checkpoint is whole, or it has other settings.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in (".lock", "config.yaml", "metrics.jsonl", *_RESULTS):
                if (self.path / name).exists() and not (self.path / name).is_file():
                    raise FastSSLError(f"{self.path / name}: is no plain file; move it away, or choose another --out")
            if self._lock():
                self._say_if_killed()
            remove_unfinished(self.path, *_RESULTS, "config.yaml", "metrics.jsonl")
            if resume != "auto" and launch.goes_on(self._launches()):
                self.say(
                    f"started again by {' and '.join(sorted(launch.again))}: --resume {resume} was for the "
                    "first start, this one goes on with the run"
                )
                resume = "auto"
            # One that cannot be made is better known now than at the first checkpoint.
            self.checkpoints.mkdir(exist_ok=True)
            remove_unfinished(self.checkpoints, *_CHECKPOINTS)
            found = self._find(config, resume)
            state = None
            if found is None:
                self._clear(resume)
            else:
                path, state = found
                put_in(state)
                at = state["position"]
                self._say_other_judges(config, state["config"].get("data"), at["step"])
                last = self.checkpoints / LAST
                if not (last.is_file() and last.samefile(path)):
                    # The next start goes on from here, too, if this one does not come to save.
                    link_atomically(path, last)
                set_aside(self.checkpoints, at["step"], path, say=self.say)
                if at["epoch"] < config["train"]["epochs"]:
                    for name in _RESULTS:  # of a run that was finished and is set back
                        (self.path / name).unlink(missing_ok=True)
                self.metrics.cut(at["step"], probed=at["step_in_epoch"] == 0)
            text = yaml.safe_dump({**config, **about, "launch": dict(launch.names)}, sort_keys=False)
            write_atomically(self.path / "config.yaml", lambda path: path.write_text(text))
            return state
        except OSError as error:
            raise FastSSLError(
                f"{self.path}: cannot write the run's folder ({error.strerror or error}); choose another with --out"
            ) from error

    def close(self) -> None:
        """Let other processes, and later runs of this one, have the folder."""
        if self._lock_file is not None:
            self._lock_file.close()

    def _lock(self) -> bool:
        """Hold the folder, which two runs would spoil, while this process lives. False: here nobody can."""
        self._lock_file = open(self.path / ".lock", "a")  # noqa: SIM115 (held open for the whole run)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FastSSLError(
                f"{self.path}: another fastssl pretrain is writing here; wait for its end, or choose another --out"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            self.say(f"{self.path}: this file system has no locks; see to it that no other run writes here")
            return False
        return True

    def _launches(self) -> object:
        """The names of the launch that last did here what its ``--resume`` asked for."""
        with suppress(FastSSLError):
            if isinstance(config := read_yaml(self.path / "config.yaml"), dict):
                return config.get("launch")
        return None

    def _say_if_killed(self) -> None:
        """A run that is at work by its status, in a folder that is ours now, was killed."""
        told = read_status(self.path)
        if told.get("state") == "training":
            heard = f"{told.get('time', 'at an unknown time')}, at step {told.get('step', 'unknown')}"
            why = "killed, out of memory, power cut?"
            self.say(f"{self.path}: the run before ended without a word ({why}); last heard of {heard}")

    def _find(self, config: dict[str, Any], resume: str) -> tuple[Path, dict[str, Any]] | None:
        if resume == "never":
            return None
        if resume == "auto":
            if (found := find_checkpoint(self.checkpoints, say=self.say)) is None:
                return None
            path, state = found
        else:
            path = Path(resume)
            if not path.is_file():
                raise FastSSLError(f"--resume {path}: no such checkpoint (auto, never, or the path of a last.pt)")
            state = load_checkpoint(path, advice="start over with --resume never")
            # One from elsewhere begins a new folder, or sets back this run; it would spoil another.
            elsewhere = path.resolve().parent != self.checkpoints.resolve()
            if elsewhere and (there := find_checkpoint(self.checkpoints)) and _other_settings(config, there[1]):
                raise FastSSLError(f"{self.path}: holds another run; for --resume {path} choose another --out")
        if others := _other_settings(config, state):
            shown = "; ".join([*others[:3], *(["..."] if others[3:] else [])])
            raise FastSSLError(
                f"{path} belongs to a run with other settings ({shown}): choose another --out, or --resume never to "
                "start over, which deletes it"
            )
        return path, state

    def _say_other_judges(self, config: dict[str, Any], data: object, step: int) -> None:
        """Probes before and behind a change of --val stand in one curve."""
        now = config["data"].get("val_photos")
        if isinstance(data, dict) and data.get("val_photos", now) != now:
            self.say(
                f"--val holds other photos than before: the probes up to step {step:,} were judged on those, "
                "and are no measure for the next ones"
            )

    def _clear(self, resume: str) -> None:
        """Remove what another run left here: its weights, figures and pictures beside the new run's would be a lie."""
        found = [name for name in (*_RESULTS, BAD_STEPS) if (self.path / name).exists()]
        if found and not (self.path / "config.yaml").is_file():
            raise FastSSLError(f"{self.path}: holds {found[0]} and is no run's folder; choose another --out")
        if resume != "never" and any(self.checkpoints.glob("epoch-*.safetensors")):
            raise FastSSLError(
                f"{self.path}: holds milestones of an earlier run and no checkpoint to go on from; choose "
                "another --out, or --resume never to start over"
            )
        for name in (*_RESULTS, IDENTITY):
            (self.path / name).unlink(missing_ok=True)
        old = [path for pattern in _CHECKPOINTS for path in self.checkpoints.glob(pattern)]
        for path in old:
            path.unlink()
        if old:
            self.say(f"{self.checkpoints}: of an earlier run {counted(len(old), 'file')} deleted")
        for name in (BAD_STEPS, EVENTS):
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
        self.metrics.clear()


def _other_settings(config: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """The deciding settings in which the run of a checkpoint differs from this one."""
    theirs = _with_defaults(state["config"])
    data = theirs.get("data")
    if isinstance(data, dict) and "photos" not in data:  # before there was this checksum the tables alone were compared
        theirs = {**theirs, "data": {**data, "photos": config["data"]["photos"]}}
    return differences(_deciding(config), _deciding(theirs))


def _deciding(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that decide what the steps are."""
    return {
        key: _deciding(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if prefix + key not in _FREE
    }


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the keys that its version of fastssl did not have yet, at what that version did."""
    recipe = {key: value for key, value in config.items() if key in _RECIPE_KEYS}
    try:
        filled = recipe_to_dict(build_recipe(recipe, where="the checkpoint"))
    except FastSSLError:  # written by another version, with keys that are gone: compared as it is
        return config
    return {**filled, **config, **{key: filled[key] for key in recipe}}
