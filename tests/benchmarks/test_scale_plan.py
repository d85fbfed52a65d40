"""``fastssl bench scale`` without options: a plan whose every number has a name."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace

import pytest

from fastssl.benchmarks.scale import Cluster, clusters, simulate
from fastssl.benchmarks.scale_plan import NAMES, assumptions, consequences
from fastssl.cli import main


def test_every_name_that_set_takes_is_listed_once() -> None:
    listed = [name for group in NAMES.values() for name in group]
    assert sorted(listed) == sorted(item.name for item in fields(Cluster))


def test_a_line_can_be_given_back_as_it_is() -> None:
    other = replace(Cluster(), hosts=3, images=12_345_678, decode_s=0.00123, storage_rate=math.inf, checkpoint_every_s=0.5)
    given = [line.split()[0] for line in assumptions(other) if line.startswith("    ")]
    ((_, again),) = clusters(given)
    assert asdict(again) == pytest.approx(asdict(other), rel=1e-5)


def test_what_comes_of_it_is_the_simulations_outcome() -> None:
    cluster = Cluster()
    outcome = simulate(cluster)
    said = "\n".join(consequences(cluster, outcome))
    assert f"{outcome.images_per_s:,.0f} images/s by 512 processes; a step of 32,768 samples takes {1000 * outcome.step_s:.1f} ms" in said
    assert f"limit: {outcome.limit}\n" in said and f"stragglers {outcome.shares['stragglers']:.1%}" in said
    assert f"{outcome.days * 24 * 60:.3g} minutes for 1,000,000,000 samples" in said
    assert "one somewhere every 43.4 hours, a checkpoint every 13.2 minutes" in said  # 1e7 s / 64 hosts; sqrt(2 x 2 s x that)


def test_the_command_tells_the_plan_only_where_nothing_was_set(capfd: pytest.CaptureFixture) -> None:
    said = []
    for arguments in ([], ["--set", "hosts=2"]):
        with pytest.raises(SystemExit) as stop:
            main(["bench", "scale", *arguments])
        assert not stop.value.code
        said.append(capfd.readouterr().err)
    assert "    hosts=64 " in said[0] and "--set NAME=VALUE changes one" in said[0] and "what comes of it:" in said[0]
    assert "NAME=VALUE" not in said[1] and "(hosts 2)" in said[1]
