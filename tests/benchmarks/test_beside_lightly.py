"""The race: turns that do not overlap, minutes that are a contender's own, states kept at the marks."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastssl.benchmarks import beside_lightly
from fastssl.benchmarks.beside_lightly import Contender, judge, race, to_markdown
from fastssl.models.backbones import create_backbone

#: Appends the time to its file every 20 ms.
CLOCK = (
    "import sys,time\nwhile True:\n    open(sys.argv[1], 'a').write(f'{time.monotonic()}\\n')\n    time.sleep(0.02)\n"
)


def clock(tmp_path, name: str, script: str = CLOCK) -> Contender:
    file = tmp_path / f"{name}.txt"
    return Contender(name, [sys.executable, "-c", script, str(file)], file, tmp_path / f"{name}.log")


def times(path) -> list[float]:
    return [float(line) for line in path.read_text().split()]


@pytest.mark.slow
def test_contenders_have_the_machine_in_turns(tmp_path):
    contenders = [clock(tmp_path, "a"), clock(tmp_path, "b")]
    race(contenders, [0.025, 0.05], slice_s=0.5)  # 1.5 and 3 seconds
    first, second = (times(one.snapshot) for one in contenders)
    assert len(first) > 30 and len(second) > 30
    # Nobody writes while the other has its turn: sorted by time, the owners change only between turns.
    owners = [owner for _, owner in sorted([*((t, "a") for t in first), *((t, "b") for t in second)])]
    assert sum(one != other for one, other in itertools.pairwise(owners)) <= 13
    for one in contenders:
        assert 2.9 < one.seconds < 4.5 and one.process.poll() is not None
        assert set(one.marks) == {0.025, 0.05}
        assert 0 < len(times(one.marks[0.025])) < len(times(one.marks[0.05])) <= len(times(one.snapshot))


def test_one_that_ends_early_keeps_its_last_state_and_one_that_fails_is_named(tmp_path):
    short = clock(tmp_path, "short", "import sys\nopen(sys.argv[1], 'w').write('1')\n")
    race([short, clock(tmp_path, "long")], [0.02, 0.03], slice_s=1)
    assert short.ended and {path.read_text() for path in short.marks.values()} == {"1"}
    long = clock(tmp_path, "other")
    with pytest.raises(SystemExit, match=r"bad failed; .*bad\.log"):
        race([long, clock(tmp_path, "bad", "import sys\nsys.exit('no photos')\n")], [0.05], slice_s=0.5)
    assert "no photos" in (tmp_path / "bad.log").read_text()
    assert long.process.poll() is not None  # nothing is left running


def test_the_judge_gives_percent(beton, tmp_path):
    state = create_backbone("lcnet_035").state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "ours.safetensors")
    found = judge(tmp_path / "ours.safetensors", "lcnet_035", beton, beton, 32, 1.0)
    assert 0 <= found["knn"] <= 100 and 0 <= found["linear"] <= 100


def test_table():
    rows = [{"name": "x", "seconds": 1.0, "marks": {"5": {"knn": 1.0, "linear": 2.25}}}]
    text = to_markdown({"minutes": [5, 10], "rows": rows})
    assert text.splitlines()[0] == "|  | 5 min | 10 min |" and text.splitlines()[-1] == "| x | 1.0 / 2.2 | - |"


def test_lightly_trains_and_leaves_snapshots(beton, tmp_path, monkeypatch):
    pytest.importorskip("lightly")
    monkeypatch.setattr(beside_lightly, "BATCH", 8)
    monkeypatch.setattr(beside_lightly, "_SNAPSHOT_S", 0.0)
    monkeypatch.setattr(beside_lightly, "available_cores", lambda: 1)

    class Enough(Exception):
        pass

    written = []

    def stop(path, write):
        write(path)
        written.append(load_file(path))
        if len(written) == 3:
            raise Enough

    monkeypatch.setattr(beside_lightly, "write_atomically", stop)
    for method in beside_lightly.METHODS:
        with pytest.raises(Enough):
            beside_lightly.train_lightly(method, str(beton), "lcnet_035", 32, 0, str(tmp_path / "out.safetensors"))
        assert any(not torch.equal(value, written[2][name]) for name, value in written[0].items())
        written.clear()
