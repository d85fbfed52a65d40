"""A whole step on a GPU that is not there: what it may do, and what is counted of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastssl.benchmarks.harness.fake_cuda import fake_cuda, why_not
from fastssl.benchmarks.harness.records import Record, missing_parts, read_records
from fastssl.benchmarks.suites import count
from fastssl.cli.bench import bench
from fastssl.config.recipe import Recipe, load_recipe
from fastssl.errors import FastSSLError
from fastssl.models.group_batchnorm import backward, compiled, forward
from fastssl.pipelines.ops.device_colour import device_colour
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils.versions import describe_versions

pytestmark = pytest.mark.skipif(why_not() != "", reason=why_not())


def small() -> Recipe:
    changes = {"views.0.size": "32", "simclr.neighbors": "5", "simclr.projector.hidden": "16"}
    return replace(load_recipe("simclr-mobilenetv3", changes), arch="mobilenetv3_small_050")


def test_a_step_is_counted_by_part_and_shown_in_80_columns() -> None:
    found = count.count_step(small(), 8, amp=True, compiled=False)
    parts = found["parts"]
    assert {"colour", "student", "loss", "backward", "optimiser and average"} <= set(parts) and not found["fallbacks"]
    assert found["bytes"] == sum(one["bytes"] for one in parts.values()) > 0
    assert parts["student"]["kept"] > 0 > parts["backward"]["kept"] and found["peak_bytes"] > found["state_bytes"] > 0
    details = {"amp": "bf16", "compiled": False, "command": "fastssl bench step --count", **found}
    record = Record("count", "simclr-mobilenetv3", "mobilenetv3_small_050", batch_size=8, git="abc", details=details)
    assert max(map(len, count.table(record).splitlines())) <= 80
    assert missing_parts(record) == [] and missing_parts(replace(record, details={**details, "bytes": 0})) == ["figure"]


@pytest.mark.parametrize("other", ["--peers", "--graph", "--device=cuda", "--device=cpu"])
def test_what_has_no_part_in_the_count_is_wrong_usage(other: str) -> None:
    result = CliRunner().invoke(bench, ["step", "--count", other])
    assert result.exit_code == 2 and "leave --peers, --graph and --device out" in result.output


def test_what_is_compiled_for_the_fake_gpu_goes_with_it() -> None:
    """It would count for a counter of the past, and a real GPU would be given it."""

    def made() -> list[object]:
        colour = device_colour(ViewSpec(size=8), torch.float32, torch.device("cuda"))
        return [colour, *(compiled(function, "") for function in (forward, backward))]

    with fake_cuda():
        before = made()
        assert all(one is other for one, other in zip(before, made()))
    assert not any(one is other for one, other in zip(before, made()))


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [(torch.backends.cuda, "is_built", "PyPI's torch"), (torch._C, "_ensureCUDADeviceGuardSet", "torch 2.10")],
)
def test_a_torch_that_cannot_says_why(owner: object, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "is_built":
        monkeypatch.setattr(owner, name, lambda: False)
    else:
        monkeypatch.delattr(owner, name)
    with pytest.raises(FastSSLError, match=words), fake_cuda():
        pass


@pytest.mark.slow
def test_the_main_recipe_moves_and_launches_no_more_than_is_said() -> None:
    """Budgets of what a GPU would do; and the figures of docs/performance.md are those of the code as it is."""
    name = "light-moco-mobilenetv3"
    recipe = load_recipe(name)
    found = count.count_step(recipe, recipe.train.batch_size, amp=True, compiled=False)
    parts = found["parts"]
    assert not found["fallbacks"]
    assert parts["colour"]["launches"] <= 30 and parts["colour"]["bytes"] <= min(5e9, 0.02 * found["bytes"])
    assert parts["teacher"]["launches"] <= 380 and parts["teacher"]["bytes"] <= 1.02 * parts["student"]["bytes"]
    assert found["launches"] <= 1450 and found["bytes"] <= 265e9
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "counted" / "step.jsonl"
    (said,) = [one for one in read_records(path) if one.recipe == name and not one.details["compiled"]]
    if said.versions["torch"] == describe_versions()["torch"]:  # another compiler, other kernels
        assert {key: said.details[key] for key in ("launches", "bytes", "peak_bytes")} == {
            key: found[key] for key in ("launches", "bytes", "peak_bytes")
        }
