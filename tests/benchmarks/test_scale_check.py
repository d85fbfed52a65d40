"""The comparison of the simulator with this machine: what is chosen, what is predicted, and what the record says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastssl.benchmarks import scale_check
from fastssl.benchmarks.complete import missing_parts
from fastssl.benchmarks.scale_check import SITUATIONS, Parts, Situation, cluster_of, foreign_s, predict, quiet_windows, run
from fastssl.benchmarks.windows import Window
from fastssl.pipelines.native import available_cores

#: 1 ms to decode, 0.1 ms to colour, 4 ms for a step.
PARTS = Parts(engine_cpu_s=1e-3, colour_cpu_s=1e-4, step_cpu_s=4e-3, image_bytes=1000.0, read_rate=1e10)


def test_parts_become_times() -> None:
    cluster = cluster_of(PARTS, Situation("lcnet_035", 32, workers=2, threads=2), cores=8)
    assert cluster.load_s == pytest.approx(64 * 0.5e-3) and cluster.step_s == pytest.approx(64 * 2e-3)
    assert cluster.colour_s == pytest.approx(0.5e-4) and cluster.processes == 1


def test_enough_cores_hide_the_loader() -> None:
    for workers, threads, rate in ((1, 1, 1 / 4.1e-3), (2, 4, 1 / (0.05e-3 + 1e-3))):
        assert predict(PARTS, Situation("lcnet_035", 32, workers, threads), cores=8).images_per_s == pytest.approx(rate)


def test_one_core_does_one_thing_after_the_other() -> None:
    situation = Situation("lcnet_035", 32, workers=1)
    assert predict(PARTS, situation, cores=1).images_per_s == pytest.approx(1 / 5.1e-3)
    # half of a second core is gone: 1.5 cores for both while there is something to decode
    assert predict(PARTS, situation, cores=2, others=0.5).images_per_s == pytest.approx(1 / (1e-3 / 0.75 + (4.1e-3 - 1e-3)))
    # a core and a half are gone: 0.25 of one for each while there is something to decode, then half of one
    assert predict(PARTS, situation, cores=2, others=1.5).images_per_s == pytest.approx(1 / (1e-3 / 0.25 + (4.1e-3 - 1e-3) / 0.5))


def test_the_quietest_windows_of_the_loop_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others use the machine in every window but each fourth: five quiet ones are waited for."""
    used, made = [0.0], {"real": 0, "step": 0}

    def contender(key: str):
        def call(seconds: float) -> Window:
            made[key] += 1
            now[0] += 1.0
            if key == "real" and made[key] % 4:
                used[0] += 0.7
            return Window(seconds, made[key], cpu_s=seconds)

        return call

    now = [0.0]
    monkeypatch.setattr(scale_check, "foreign_s", lambda: used[0])
    monkeypatch.setattr(scale_check.time, "perf_counter", lambda: now[0])
    found, others = quiet_windows({"real": contender("real"), "step": contender("step")}, seconds=10.0, runs=5)
    assert [window.samples for window in found["real"]] == [4, 8, 12, 16, 20] and others == 0.0
    assert len(found["step"]) == 5 and made["step"] == 6 and all(window.seconds == 1.0 for window in found["step"])


def test_a_machine_that_is_never_quiet_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [0.0]

    def call(seconds: float) -> Window:
        used[0] += 100.0
        return Window(seconds, 1)

    monkeypatch.setattr(scale_check, "foreign_s", lambda: used[0])
    found, others = quiet_windows({"real": call}, seconds=1.0, runs=5)
    assert len(found["real"]) == 5 and others > 1


def test_others_are_all_but_this_process() -> None:
    before = foreign_s()
    assert 0 <= before <= foreign_s() + 0.05


def test_situations_lie_on_both_sides() -> None:
    assert len({situation.words for situation in SITUATIONS}) == len(SITUATIONS) >= 6
    assert {1, 2} <= {situation.workers for situation in SITUATIONS} and {1, 2} <= {situation.threads for situation in SITUATIONS}


def test_a_loop_is_measured_beside_its_prediction(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_check, "_MOST_TURNS", 1)
    threads = torch.get_num_threads()
    (record,) = run(Situation("lcnet_035", 32, workers=1, batch=8), str(beton), seconds=1.0)
    assert torch.get_num_threads() == threads
    assert missing_parts(record) in (["command"], ["git", "command"])
    details = record.details
    assert record.batch_size == 8 and record.workers == 1 and details["part"] == "check" and details["cores"] == available_cores()
    assert details["predicted_over_measured"] == pytest.approx(details["predicted"]["images_per_s"] / record.pair_per_s)
    assert details["range"][0] <= details["predicted_over_measured"] <= details["range"][1]
    assert 0.1 < details["predicted_over_measured"] < 10  # whatever else runs here
    assert all(value > 0 for value in details["parts"].values())
    record.to_json()
