"""The first start of a launch and the later ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small_run import Silent, options, same, small, state

from fastssl.distributed.world import launch_from_environment
from fastssl.pretrain import pretrain
from fastssl.runs.folder import RunFolder
from fastssl.training import trainer
from fastssl.training.setup import Setup

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
SLURM = {"SLURM_CLUSTER_NAME": "kings-cross", "SLURM_JOB_ID": "4711"}


def again(launcher: str) -> dict[str, str]:
    name = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm": "SLURM_RESTART_COUNT"}[launcher]
    return {name: "1"}


@pytest.mark.parametrize("environ", [{}, TORCHRUN, SLURM, {**TORCHRUN, **SLURM}])
def test_a_first_start_goes_on_with_nothing(environ: dict[str, str]) -> None:
    launch = launch_from_environment(environ)
    assert set(launch.names) == {
        name for name, part in (("torchrun", TORCHRUN), ("slurm", SLURM)) if part.items() <= environ.items()
    }
    assert not launch.again and not launch.goes_on(launch.names)
    assert "kings" not in str(launch) and "4711" not in str(launch)


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_a_second_start_goes_on_with_its_own_launch_alone(launcher: str) -> None:
    both = {**TORCHRUN, **SLURM}
    first, second = launch_from_environment(both), launch_from_environment({**both, **again(launcher)})
    assert second.again == {launcher} and second.names == first.names and second.goes_on(first.names)
    # A requeued job starts another torchrun; a torchrun that starts again may do so in the job of an earlier one.
    assert second.goes_on({launcher: first.names[launcher]})
    other = {**both, "TORCHELASTIC_RUN_ID": "other"} if launcher == "torchrun" else {**both, "SLURM_JOB_ID": "4712"}
    assert not second.goes_on(launch_from_environment(other).names)
    for nothing in (None, "none", [], {}, {launcher: None}):
        assert not second.goes_on(nothing)


def environment(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name in {**TORCHRUN, **SLURM, **again("torchrun"), **again("slurm")}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["never", "step-00000003.pt"])
def test_a_run_that_is_started_again_keeps_what_it_has_made(
    resume: str, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of twelve steps is there. The job begins over, or at its step 3, fails in step 9, and is requeued with the
    same arguments.
    """
    out, original = tmp_path / "run", trainer.make_step
    recipe = small("train.checkpoint_minutes=0", "train.keep_last=12", "probe.every_epochs=0", "probe.final_samples=0")
    pretrain(recipe, options(beton, out), Silent())
    whole, resume = state(out), resume if resume == "never" else str(out / "checkpoints" / resume)

    def start() -> str:
        said = Silent()
        try:
            pretrain(recipe, options(beton, out, resume=resume), said)
        finally:
            messages.append("\n".join(said.messages))
        return messages[-1]

    def fail(run: Setup, batch: object) -> object:
        if run.position.step == 9:
            raise KeyboardInterrupt
        return original(run, batch)

    messages: list[str] = []
    monkeypatch.setattr(trainer, "make_step", fail)
    # Requeued before it came to open the folder: nothing here is its own yet.
    environment(monkeypatch, {**SLURM, **again("slurm")})
    with pytest.raises(KeyboardInterrupt):
        start()
    assert (
        "started again" not in messages[-1]
        and ("deleted" if resume == "never" else "resumed at step 3 ") in messages[-1]
    )
    monkeypatch.undo()
    environment(monkeypatch, {**SLURM, **again("slurm")})
    said = start()
    assert f"started again by slurm: --resume {resume} was for the first start" in said and "resumed at step 9 " in said
    assert same(state(out), whole)
    # Somebody who gives the command once more means it.
    environment(monkeypatch, SLURM)
    assert "started again" not in start()


@pytest.mark.parametrize(
    "content", ["", "launch: 3", "- launch", "launch: {slurm: [", "[" * 100_000, "\0", "a: 2026-99-99"]
)
def test_a_config_that_is_none_has_no_launch(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(content)
    second = launch_from_environment({**SLURM, **again("slurm")})
    assert not second.goes_on(RunFolder(tmp_path, print)._launches())


def test_the_launch_is_written_down(tmp_path: Path) -> None:
    launch = launch_from_environment(SLURM)
    folder = RunFolder(tmp_path, print)
    folder.open({}, "auto", {}, lambda state: None, launch)
    folder.close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"launch": dict(launch.names)}
