"""The simulator against arithmetic, and against a slow twin that knows no vectors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastssl.benchmarks import scale
from fastssl.benchmarks.records import read_records
from fastssl.benchmarks.scale import Cluster, clusters, daly_s, pace, reduce_s, simulate, with_failures, worlds, young_s
from fastssl.cli import main
from fastssl.pipelines.errors import FastSSLError

#: One process that shares nothing, no jitter, no failures.
ONE = Cluster(
    hosts=1,
    gpus=1,
    cores=4,
    workers=3,
    batch=10,
    decode_s=0.003,
    gpu_rate=500.0,
    gpu_fixed_s=0.0,
    jitter=0.0,
    checkpoint_s=0.0,
    host_mtbf_s=1e15,
)


@pytest.mark.parametrize("decode_s", [0.0, 0.003, 0.0061, 0.03])
@pytest.mark.parametrize("slots", [2, 5])
def test_without_jitter_the_slower_side_decides(decode_s: float, slots: int) -> None:
    outcome = simulate(replace(ONE, decode_s=decode_s, slots=slots))
    assert outcome.images_per_s == pytest.approx(min(500.0, 3 / decode_s if decode_s else math.inf))
    assert sum(outcome.shares.values()) == pytest.approx(1)
    assert outcome.limit == ("data: decoding threads" if decode_s > 0.0065 else "step")


def test_reads_bound_a_host_and_a_wait_is_a_threads_time() -> None:
    both = replace(ONE, gpus=2, image_bytes=1000.0, disk_rate=4e4, storage_rate=1e5)
    assert simulate(both).images_per_s == pytest.approx(40) and simulate(both).limit == "data: own disk"
    assert simulate(replace(both, cached=0.0)).images_per_s == pytest.approx(100)
    assert simulate(replace(both, cached=0.0)).limit == "data: shared storage"
    waits = replace(ONE, read_s=0.007)
    assert simulate(waits).images_per_s == pytest.approx(3 / (0.003 + 0.007))


def test_on_one_core_times_add_up() -> None:
    shared = replace(ONE, cores=1, workers=1, step_threads=1, colour_s=0.001, colour_threads=1)
    assert simulate(shared).images_per_s == pytest.approx(1 / (0.003 + 0.001 + 0.002))
    assert simulate(replace(shared, cores=3)).images_per_s == pytest.approx(1 / 0.003)


def test_a_step_with_barriers_loses_what_its_slowest_thread_loses() -> None:
    """Two step threads and a decoder on two cores: while a batch is decoded (at half pace, 2 x 0.03 s) the step goes at half pace, then alone."""
    shared = replace(ONE, cores=2, workers=1, step_threads=2, gpu_rate=200.0)
    assert pace(2, 2, 1) == (0.5, 0.5) and pace(2, 2, 2) == (0.5, 0.5) and pace(4, 2, 2) == (1.0, 1.0)
    assert pace(2, 1, 2) == (2 / 3, 2 / 3) and pace(2, 1, 1, others=0.5) == (0.75, 0.75)
    step, load = 10 / 200, 10 * 0.003
    outcome = simulate(shared)
    assert outcome.step_s == pytest.approx(2 * load + (step - load)) and outcome.limit == "contention"


def twin(cluster: Cluster, seed: int, steps: int) -> float:
    """Seconds a step: every batch of every process has its times, on a clock."""
    rng, spread = np.random.default_rng(seed), math.sqrt(math.log1p(cluster.jitter**2))
    processes, warm = range(cluster.processes), scale._WARM
    ready, free, end, first = {}, {}, 0.0, 0.0
    for batch in range(warm + steps):
        work = cluster.step_s * np.exp(spread * rng.standard_normal(cluster.processes) - spread**2 / 2)
        done = []
        for process in processes:
            # rendered behind the batch before it, into a slot that the consumer gave back when it came for a later batch
            begun = max(ready.get((process, batch - 1), 0.0), free.get((process, batch - cluster.slots), 0.0))
            ready[process, batch] = begun + cluster.load_s
            start = max(end, ready[process, batch])
            done.append(start + float(work[process]))
        end = max(done) + cluster.collective_s
        for process in processes:
            free[process, batch] = end
        if batch == warm - 1:
            first = end
    return (end - first) / steps


@pytest.mark.parametrize(("decode_s", "jitter", "slots"), [(0.0055, 0.5, 2), (0.0059, 0.8, 3), (0.002, 0.3, 5), (0.009, 0.4, 5)])
def test_the_ring_and_the_meeting_are_those_of_a_clock(decode_s: float, jitter: float, slots: int) -> None:
    cluster = replace(ONE, hosts=2, gpus=2, cores=6, decode_s=decode_s, jitter=jitter, slots=slots, collectives=3, hop_s=1e-4)
    assert simulate(cluster, seed=3, steps=300).step_s == pytest.approx(twin(cluster, 3, 300), rel=1e-9)


def test_two_processes_wait_for_the_slower_one() -> None:
    """The larger of two normal times is sigma / sqrt(pi) above their mean."""
    cluster = replace(ONE, gpus=2, cores=8, decode_s=0.0, jitter=0.05, reduced_bytes=0.0, hop_s=0.0)
    outcome = simulate(cluster, steps=20000)
    assert outcome.step_s / cluster.step_s - 1 == pytest.approx(0.05 / math.sqrt(math.pi), rel=0.03)
    assert outcome.shares["stragglers"] == pytest.approx(1 - cluster.step_s / outcome.step_s, rel=0.03)


def test_collectives_by_hand() -> None:
    assert reduce_s(1e9, 1, 1.0, 1.0) == 0 and reduce_s(1000, 8, 0.1, 500) == pytest.approx(2 * 3 * 0.1 + 4)
    assert reduce_s(0, 5, 0.1, 1) == pytest.approx(0.6)
    cluster = replace(ONE, hosts=4, decode_s=0.0, reduced_bytes=1e6, gathered_bytes=2e6, collectives=5, hop_s=1e-3, link_rate=1e9)
    seconds = (4e-3 + 2e-3) + (2e-3 + 2e-3) + 5 * 4e-3
    assert simulate(cluster).step_s == pytest.approx(cluster.step_s + seconds) and simulate(cluster).limit == "collectives"


def test_failures_cost_what_daly_says_and_youngs_interval_is_the_cheapest() -> None:
    work, checkpoint, mtbf, restart = 50_000.0, 10.0, 3600.0, 120.0
    best = young_s(checkpoint, mtbf)
    assert best == pytest.approx(math.sqrt(2 * 10 * 3600))
    for every in (best, 4 * best):
        total, lost = with_failures(work, every, checkpoint, mtbf, restart, np.random.default_rng(0), runs=3000)
        pieces = math.ceil(work / every)
        assert total == pytest.approx(daly_s(work, work / pieces, checkpoint, mtbf, restart), rel=0.01)
        assert lost["checkpoints"] == pytest.approx(pieces * checkpoint) and total == pytest.approx(work + sum(lost.values()))
    costs = {factor: daly_s(work, factor * best, checkpoint, mtbf, restart) for factor in (0.25, 0.5, 0.8, 1.0, 1.25, 2, 4)}
    assert min(costs, key=costs.__getitem__) == 1.0


def test_a_run_that_can_never_end_is_refused() -> None:
    with pytest.raises(FastSSLError, match="checkpoint more often"):
        with_failures(1e6, 1e5, 1.0, 1e3, 1.0, np.random.default_rng(0))


def test_days_and_determinism() -> None:
    cluster = replace(ONE, hosts=8, images=10_000_000, epochs=3, checkpoint_s=5.0, host_mtbf_s=1e5, jitter=0.1)
    assert simulate(cluster, seed=1) == simulate(cluster, seed=1) != simulate(cluster, seed=2)
    calm = simulate(replace(cluster, checkpoint_s=0.0, host_mtbf_s=1e15, checkpoint_every_s=1e9))
    assert calm.days == pytest.approx(10_000_000 // 80 * 3 * calm.step_s / 86400) and set(calm.lost.values()) == {0.0}


def test_worlds_are_whole_hosts_that_divide_the_batch() -> None:
    for batch in (4032, 4096, 100):
        assert worlds(batch) == sorted((n for n in range(8, batch + 1, 8) if batch % n == 0), reverse=True)
    assert worlds(4096, least=8)[0] == 512 and worlds(4032, least=8)[:3] == [504, 448, 336]


def test_settings_are_crossed() -> None:
    found = dict(clusters(["hosts=1,8", "gpu_rate=1e3"]))
    assert list(found) == ["hosts 1, gpu_rate 1000", "hosts 8, gpu_rate 1000"]
    assert [(c.hosts, c.gpu_rate) for c in found.values()] == [(1, 1000.0), (8, 1000.0)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("host=1", "the names being"),
        ("hosts", "NAME=VALUE"),
        ("hosts=x", "no number"),
        ("hosts=1.5", "whole number"),
        ("hosts=0", "positive"),
        ("cached=2", "at most 1"),
        ("decode_s=inf", "endless"),
        ("jitter=-1", "at least 0"),
        ("gpu_rate=nan", "number"),
        ("slots=1", "at least 2"),
        ("others=96", "none of the cores"),
    ],
)
def test_settings_that_mean_nothing_are_named(text: str, complaint: str) -> None:
    with pytest.raises(FastSSLError, match=complaint):
        list(clusters([text]))


def invoke(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "scale", *arguments])
    return int(stop.value.code or 0)


def test_the_command_writes_what_was_simulated(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert invoke("--set", "hosts=1,8", "--seed", "5", "--json", str(out)) == 0
    records = read_records(out)
    assert [record.details["cluster"]["hosts"] for record in records] == [1, 8]
    assert records[1].details["outcome"]["images_per_s"] == simulate(Cluster(hosts=8), 5).images_per_s
    assert records[0].details["command"] == "fastssl bench scale --set hosts=1,8 --seed 5"
    assert all(record.pair_per_s is record.view_per_s is None for record in records)  # nothing that was not measured


@pytest.mark.parametrize(
    "arguments",
    [("--check", "--parts"), ("--check", "--set", "hosts=1"), ("--parts", "--data", "x"), ("--samples", "300000"), ("--seconds", "3")],
)
def test_options_without_effect_are_refused(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments) == 2


def test_check_and_parts_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastssl.benchmarks import scale_check, scale_parts
    from fastssl.benchmarks.records import Record

    asked: list[tuple] = []
    monkeypatch.setattr(scale_check, "run", lambda *args: asked.append(args) or [Record(bench="scale")])
    monkeypatch.setattr(scale_parts, "jobs", lambda *args: asked.append(args) or [("a part", lambda: [Record(bench="scale")])])
    assert invoke("--check", "--data", "x.beton", "--seconds", "3", "--runs", "6", "--photos", "7") == 0
    assert asked == [(situation, "x.beton", 3.0, 6, 7) for situation in scale_check.SITUATIONS]
    asked.clear()
    assert invoke("--parts", "--samples", "300000", "--folder", str(tmp_path)) == 0
    assert asked == [((300_000,), 5, tmp_path)]


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("--help") == 0
    printed = capsys.readouterr().out
    assert "fastssl bench scale --check" in printed and "--json FILE" in printed
