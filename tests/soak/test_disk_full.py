"""A disk that is full or read-only: one line that names the file, what was there before is as it was, and with room
again the work goes on.

Each case runs on a small disk of its own, and once more under a limit for the size of files: where mounting is not
allowed, both times under the limit, and the last test says so.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kills import Lab, make_photos, rows, tensors
from kills import pretrain as pretrain_command
from runs import finished_run
from small_disk import FULL, SmallDisk, Spoken, small_disk, speaking_child

from fastssl.runs.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

WAYS = ("mounted", "limited")
used: set[tuple[str, str]] = set()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(params=WAYS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", request.param) as disk:
        used.add((request.param, disk.how))
        yield disk


class Child:
    """A running command and what it says."""

    def __init__(self, lab: Lab, disk: SmallDisk, command: list[str], **patches: object):
        self.said = Spoken()
        self.process = lab._context.Process(target=speaking_child, args=(command, self.said.theirs, disk, patches))
        self.process.start()
        self.said.theirs.close()

    def until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline and self.process.exitcode is None, self.said.text
            time.sleep(0.01)

    def end(self, timeout: float = 180) -> tuple[int, str]:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"still running: {self.said.text}")
        return self.process.exitcode, self.said.end()


def run(lab: Lab, disk: SmallDisk, *command: object, **patches: object) -> tuple[int, str]:
    return Child(lab, disk, list(map(str, command)), **patches).end()


def refused(status: int, text: str, *names: str) -> None:
    """One line with status 1 that says what is full and what was to be written."""
    last = text.strip().splitlines()[-1]
    assert status == 1 and last.startswith("fastssl: ") and any(words in last for words in FULL), text
    assert "Traceback" not in text and "unexpected" not in text, text
    for name in names:
        assert name in last, text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("trained") / "run", "few-photos-moco")


# ---------------------------------------------------------------------- conversion


def test_a_conversion_goes_on_when_there_is_room_again(lab: Lab, disk: SmallDisk, tmp_path: Path) -> None:
    photos, dst = make_photos(tmp_path / "photos", 40, bad=(7,), side=200), disk.folder / "out.beton"
    command = ("convert-imagenet", photos, dst, "--workers", 2)
    patches = {"fastssl.pipelines.convert.conversion.CHECKPOINT_SECONDS": 0.0}
    assert (
        run(lab, SmallDisk(tmp_path, "limited"), "convert-imagenet", photos, tmp_path / "whole.beton", "--workers", 2)[
            0
        ]
        == 0
    )
    size = (tmp_path / "whole.beton").stat().st_size
    photos_bytes = size - 2 * 2**20  # they begin behind two pages of 2 MiB, which are a hole on the disk
    assert photos_bytes > 100_000
    # Counted by blocks that are taken, or by the length of the file.
    disk.fill(photos_bytes // 2 if disk.how == "mounted" else size - photos_bytes // 2)
    status, text = run(lab, disk, *command, **patches)
    refused(status, text, "out.beton: cannot write", "run the same command again to go on")
    assert not dst.exists() and not Path(f"{dst}.json").exists()
    disk.empty()
    status, text = run(lab, disk, *command, **patches)
    assert status == 0 and "taken over from an earlier run" in text, text
    for name in ("", ".json", ".rejects.jsonl"):
        mine, theirs = (Path(f"{path}{name}").read_bytes() for path in (dst, tmp_path / "whole.beton"))
        assert mine == theirs, name
    assert {path.name for path in disk.folder.iterdir()} == {"out.beton", "out.beton.json", "out.beton.rejects.jsonl"}


def test_a_conversion_without_resume_leaves_nothing(lab: Lab, disk: SmallDisk, tmp_path: Path) -> None:
    photos, dst = make_photos(tmp_path / "photos", 20, side=200), disk.folder / "out.beton"
    dst.write_bytes(b"what was there before")
    disk.fill(20_000 if disk.how == "mounted" else 2 * 2**20 + 20_000)
    status, text = run(lab, disk, "convert-imagenet", photos, dst, "--no-resume")
    refused(status, text, "out.beton: cannot write")
    assert "again to go on" not in text
    disk.empty()
    assert dst.read_bytes() == b"what was there before" and [path.name for path in disk.folder.iterdir()] == [
        "out.beton"
    ]


# ---------------------------------------------------------------------- results, exports, pages


def test_results_and_pages_are_named_and_as_they_were(
    lab: Lab, disk: SmallDisk, trained: Path, beton: Path, tmp_path: Path
) -> None:
    """Every command that writes a small file, one after the other on the same full disk."""
    evaluate = ["evaluate", "knn", trained, "--data", beton, "--size", 32, "--k", 3, "--device", "cpu", "--json"]
    record = tmp_path / "knn.json"
    room = SmallDisk(tmp_path, "limited")
    assert run(lab, room, *evaluate, record)[0] == 0
    run_folder = disk.folder / "run"
    shutil.copytree(trained, run_folder)
    (run_folder / "metrics.jsonl").write_text("")
    (run_folder / "config.yaml").write_text("recipe: few-photos\narch: lcnet_035\n")
    for path in ("result.json", "views.png", "run/report.html"):
        (disk.folder / path).write_text('{"before": 1}\n')
    before = {path: path.read_bytes() for path in disk.folder.rglob("*") if path.is_file()}
    disk.fill(0 if disk.how == "mounted" else 100)
    for command, name in (
        ([*evaluate, disk.folder / "result.json"], "result.json"),
        (["verify", beton, "--json", disk.folder / "new.json"], "new.json"),
        (
            ["views", beton, "--recipe", "few-photos-moco", "--samples", 1, "--out", disk.folder / "views.png"],
            "views.png",
        ),
        (["report", run_folder], "report.html"),
        (["evaluate", "compare", record, "--out", disk.folder], "evaluations.md"),
    ):
        status, text = run(lab, disk, *command)
        refused(status, text, name)
        now = {path: path.read_bytes() for path in disk.folder.rglob("*") if path.is_file() and path.name != "filler"}
        assert now == before, (command, sorted(now.keys() ^ before.keys()))
    disk.empty()
    assert (
        run(lab, disk, *evaluate, disk.folder / "result.json")[0] == 0
        and "knn" in (disk.folder / "result.json").read_text()
    )


@pytest.mark.parametrize("name", ["mine.safetensors", "mine.pth", "folder"])
def test_an_export_is_whole_or_as_it_was(lab: Lab, disk: SmallDisk, trained: Path, name: str) -> None:
    destination = disk.folder / name
    assert run(lab, disk, "export", trained, destination)[0] == 0
    before = {path: path.read_bytes() for path in disk.folder.rglob("*") if path.is_file()}
    disk.fill(50_000)
    status, text = run(lab, disk, "export", trained, destination)
    assert status == 1 and f"{name}: not written (" in text and "what was there before is untouched" in text, text
    assert len([line for line in text.splitlines() if line.startswith("fastssl:")]) == 1 and "Traceback" not in text
    assert {
        path: path.read_bytes() for path in disk.folder.rglob("*") if path.is_file() and path.name != "filler"
    } == before
    disk.empty()
    assert run(lab, disk, "export", trained, destination)[0] == 0


def test_standard_output_that_is_full_is_one_line(lab: Lab, beton: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fastssl", "verify", str(beton), "--json", "-"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.strip().splitlines()
    assert (
        done.returncode == 1 and lines[-1].endswith(f"{FULL[0]}: 'standard output'") and "Traceback" not in done.stderr
    ), done.stderr


# ---------------------------------------------------------------------- training

STEPS = 36


@pytest.fixture(scope="module")
def whole(lab: Lab, beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that has room all the time."""
    folder = tmp_path_factory.mktemp("whole")
    status, text = run(
        lab, SmallDisk(folder, "limited"), *pretrain_command("moco", beton, folder / "run", STEPS // 6, probe=True)
    )
    assert status == 0, text
    return folder / "run"


def same_run(out: Path, whole: Path) -> None:
    """Weights, optimiser and queue to the last bit, and every line of metrics once."""
    mine, theirs = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (out, whole))
    for part in ("method", "optimizer"):
        here, there = dict(tensors(mine[part])), dict(tensors(theirs[part]))
        assert here.keys() == there.keys() and all(here[name].equal(value) for name, value in there.items()), part
    kept = [[(row["kind"], row["step"], row.get("loss")) for row in rows(folder)] for folder in (out, whole)]
    assert kept[0] == kept[1] and len([row for row in kept[0] if row[0] == "step"]) == STEPS
    assert json.loads((out / "status.json").read_text())["state"] == "finished" and not list(out.rglob("*.tmp"))


def step_of(out: Path) -> int:
    return max((row["step"] for row in rows(out) if row["kind"] == "step"), default=0)


SLOW = {"fastssl.runs.saver._RETRY_S": 0.1}


def start(lab: Lab, disk: SmallDisk, beton: Path, out: Path) -> Child:
    return Child(lab, disk, pretrain_command("moco", beton, out, STEPS // 6, probe=True), **SLOW)


def test_a_run_lives_on_while_its_disk_is_full(lab: Lab, disk: SmallDisk, beton: Path, whole: Path) -> None:
    out = disk.folder / "run"
    child = start(lab, disk, beton, out)
    child.until(lambda: step_of(out) >= 4)
    pid = (child.process.pid,)
    disk.fill(0, pid)
    child.until(lambda: "checkpoint not written" in child.said.text)
    saved = load_checkpoint(out / "checkpoints" / "last.pt")["position"]["step"]  # whole, whatever was tried
    assert saved >= 3
    time.sleep(0.5)
    assert child.process.exitcode is None
    disk.empty(pid)
    status, text = child.end()
    assert status == 0 and "there is room again" in text and "the run goes on" in text and "Traceback" not in text, text
    same_run(out, whole)


def test_a_run_lives_on_while_its_folder_is_read_only(lab: Lab, disk: SmallDisk, beton: Path, whole: Path) -> None:
    out = disk.folder / "run"
    child = start(lab, disk, beton, out)
    child.until(lambda: step_of(out) >= 4)
    disk.read_only()
    child.until(lambda: "Read-only file system" in child.said.text)
    disk.writable()
    status, text = child.end()
    assert status == 0 and "Traceback" not in text, text
    same_run(out, whole)


def test_full_at_the_very_end(lab: Lab, disk: SmallDisk, beton: Path, whole: Path) -> None:
    """All steps are made and saved; only the summary has no room. The same command writes it later, without training
    again.
    """
    out = disk.folder / "run"
    shutil.copytree(
        whole, out, ignore=shutil.ignore_patterns("step-*.pt")
    )  # second names of files, which a copy would double
    for name in ("summary.json", "report.html", "views.png", "neighbours.png"):
        (out / name).unlink()
    child = start(lab, disk, beton, out)
    child.until(lambda: "resumed at step 36" in child.said.text)
    disk.fill(0 if disk.how == "mounted" else 100, (child.process.pid,))
    status, text = child.end()
    refused(status, text, "summary.json")
    assert not (out / "summary.json").exists() and not list(out.rglob("*.tmp"))
    disk.empty()
    status, text = start(lab, disk, beton, out).end()
    assert status == 0 and (out / "summary.json").exists() and (out / "report.html").exists(), text
    same_run(out, whole)


def test_a_folder_that_is_deleted_under_a_run(lab: Lab, beton: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = start(lab, SmallDisk(tmp_path, "limited"), beton, out)
    child.until(lambda: step_of(out) >= 4)
    out.rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    status, text = child.end()
    assert status == 0 and "Traceback" not in text, text
    mine, theirs = (
        dict(tensors(load_checkpoint(folder / "checkpoints" / "last.pt")["method"])) for folder in (out, whole)
    )
    assert all(mine[name].equal(value) for name, value in theirs.items())


def test_which_way_the_disk_was_full(capsys: pytest.CaptureFixture) -> None:
    """Never in silence: this line is printed whatever pytest captures."""
    assert used, "run this file as a whole"
    with capsys.disabled():
        print(f"\nfull disks: {', '.join(f'{wanted} wanted, {how}' for wanted, how in sorted(used))}")
    assert ("limited", "limited") in used
