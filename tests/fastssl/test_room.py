"""Running out of memory in training: said in one line, and with train.accumulate=auto the parts that fit are found."""

from __future__ import annotations

import gc
import math
import re
import weakref
from pathlib import Path

import pytest
import torch
from processes import run_processes
from small_run import Silent, options, same, small, state
from test_step import BATCH, CPU, rates, recipe, replayed, train, views

from fastssl.config.recipe import Recipe
from fastssl.distributed.collectives import all_reduce_sum, any_rank, average_gradients, gather_rows, rank, rehearsed
from fastssl.distributed.world import World
from fastssl.errors import FastSSLError, Interrupted, is_out_of_memory
from fastssl.pipelines.loader import Batch
from fastssl.pretrain import pretrain
from fastssl.runs.checkpoint import write_state
from fastssl.training import setup as of_runs
from fastssl.training import trainer
from fastssl.training.cuda_graph import StepInputs
from fastssl.training.room import fewest_parts
from fastssl.training.step import TrainStep


def limited(step: TrainStep, photos: int, error: type[Exception] = torch.OutOfMemoryError) -> list[int]:
    """Let a pass with more photos than that fail in the midst of it, as an allocator would; photos of each pass."""
    seen: list[int] = []
    step.arrived = []

    def allocate(layer: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if not layer.training:  # probes need little
            return
        seen.append(len(inputs[0]) // step.method.views.count)
        step.arrived.append(weakref.ref(output))
        if seen[-1] > photos:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    step.method.student.backbone.register_forward_hook(allocate)
    return seen


def test_what_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    assert (
        is_out_of_memory(found.value)
        and is_out_of_memory(MemoryError())
        and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    )
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))  # outside of torch's allocator
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("graph", [False, True])
def test_auto_takes_the_fewest_parts_that_fit_and_makes_their_steps(error: type[Exception], graph: bool) -> None:
    changes = {"train__graph": str(graph).lower(), "optim__name": "adamw"}
    given = {"amp": False, "seed": 0, "record": replayed}
    known, found = (TrainStep(recipe(train__accumulate=parts, **changes), CPU, **given) for parts in (4, "auto"))
    seen = limited(found, BATCH // 4, error)
    gc.disable()
    try:
        assert train(found) == train(known)
        assert not any(output() is not None for output in found.arrived), "a failed try is still in memory"
    finally:
        gc.enable()
    assert found.parts.count == 4 and seen[:3] == [BATCH, BATCH // 2, BATCH // 4] and max(seen[3:]) == BATCH // 4
    assert found.recorded == graph
    for name, value in known.method.state_dict().items():
        assert torch.equal(found.method.state_dict()[name], value), name


def test_a_try_that_cannot_even_keep_the_state_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    step = TrainStep(recipe(train__accumulate="auto"), CPU, amp=False, seed=0)
    snapshot = step.snapshot

    def allocate() -> object:
        if step.parts.count < 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return snapshot()

    monkeypatch.setattr(step, "snapshot", allocate)
    batch = StepInputs([views(0)], step.noise(0, 0), rates(step), ())
    assert fewest_parts(step, batch) == 4 and step.parts.count == 1


def test_parts_hold_whole_groups_and_two_samples() -> None:
    groups = {"moco__bn_by_view": "true", "moco__split_bn_queries": 2}
    step = TrainStep(recipe(train__accumulate="auto", **groups), CPU, amp=False, seed=0)
    assert step.parts.tries() == [1, 2]
    limited(step, 1)
    with pytest.raises(
        FastSSLError,
        match=r"out of memory: a step of 8 photos in 1 part does not fit this cpu, nor does one in up to 2; a",
    ):
        train(step, 1)
    assert TrainStep(recipe(train__accumulate="auto"), CPU, amp=False, seed=0).parts.tries() == [1, 2, 4]
    odd = TrainStep(recipe(train__accumulate="auto", train__batch_size=18, moco__queue=36), CPU, amp=False, seed=0)
    assert odd.parts.tries() == [1, 2, 6]


def test_other_errors_are_no_want_of_memory() -> None:
    step = TrainStep(recipe(train__accumulate="auto"), CPU, amp=False, seed=0)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    before = {name: value.clone() for name, value in step.method.state_dict().items()}
    step.method.student.projector.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(step, 1)
    assert all(torch.equal(value, before[name]) for name, value in step.method.state_dict().items())


def alone_on_one_rank() -> tuple[list[list[float]], int, torch.Tensor]:
    """Rank 1 holds half as much as rank 0. And what the collectives say in a rehearsal, which rank 0 makes alone."""
    with rehearsed():
        rows = gather_rows(torch.full((2, 3), float(rank())))
        if rank() == 0:
            all_reduce_sum(rows)
            gradient = torch.zeros(3, requires_grad=True)
            gradient.grad = torch.ones(3)
            average_gradients([gradient])
    any_rank(False)
    changes = {"moco__split_bn": 1, "moco__queue": 32}
    step = TrainStep(
        recipe(train__accumulate="auto", **changes), CPU, amp=False, seed=0, world=World(rank(), 2, rank())
    )
    limited(step, 4 if rank() == 0 else 2)
    half = views(0).unflatten(0, (2, BATCH))[:, rank() * 4 : rank() * 4 + 4].flatten(0, 1)
    batch = {"views": [half.contiguous(memory_format=torch.channels_last)]}
    metrics = step(**batch, noise=step.noise(0, 0, range(rank() * 4, rank() * 4 + 4)), rates=rates(step, 0))
    weights = torch.cat([p.detach().flatten() for p in step.method.parameters()])
    return metrics.tolist(), step.parts.count, weights, rows


def test_all_processes_take_as_many_parts_as_the_neediest() -> None:
    found = run_processes(alone_on_one_rank, 2)
    assert [parts for _, parts, _, _ in found] == [2, 2]
    assert torch.equal(found[0][2], found[1][2]), "the ranks have moved apart"
    for number, (_, _, _, rows) in enumerate(found):
        assert rows.shape == (4, 3) and (rows == number).all()


# ---------------------------------------------------------------------- runs


@pytest.fixture()
def two_photos(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of runs hold two photos' activations at a time; photos of each pass."""
    seen: list[int] = []

    class Limited(TrainStep):
        def __init__(self, *args: object, **options: object):
            super().__init__(*args, **options)
            self.seen = seen
            limit = limited(self, 2)
            self.method.student.backbone.register_forward_pre_hook(lambda *_: seen.append(len(limit)))

    monkeypatch.setattr(of_runs, "TrainStep", Limited)
    return seen


def test_a_run_without_memory_ends_in_one_line_with_the_parts_that_fit(
    beton: Path, tmp_path: Path, two_photos: list[int]
) -> None:
    with pytest.raises(FastSSLError) as found:
        pretrain(small(), options(beton, tmp_path / "run"), Silent())
    assert re.fullmatch(
        r"out of memory: a step of 8 photos in 1 part does not fit this cpu; one in 4 parts does: "
        r"--set train\.accumulate=4, BatchNorm then sees a part at a time; "
        r"or --set train\.checkpoint=true, if that is enough",
        str(found.value),
    )
    assert found.value.__cause__ is None and found.value.__context__ is None, "it would hold the failed step's tensors"


def test_a_run_keeps_the_parts_that_it_found_when_it_goes_on(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_photos: list[int]
) -> None:
    auto, said = small("train.accumulate=auto"), Silent()
    whole = pretrain(auto, options(beton, tmp_path / "whole"), said)
    assert whole["accumulate"] == 4 and "train.accumulate: 4 parts of a batch" in said.messages

    cut_after_three(auto, options(beton, tmp_path / "cut"))
    monkeypatch.undo()  # goes on where there is room for all
    assert pretrain(auto, options(beton, tmp_path / "cut"), Silent())["accumulate"] == 4
    assert same(state(tmp_path / "cut"), state(tmp_path / "whole"))


def cut_after_three(recipe: Recipe, where: of_runs.RunOptions) -> None:
    """Of a run its first three steps."""
    make_step = trainer.make_step

    def stop_after_three(run: of_runs.Setup, batch: object) -> object:
        metrics = make_step(run, batch)
        if run.position.step == 2:
            run.stop.set()
        return metrics

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer, "make_step", stop_after_three)
        pretrain(recipe, where, Silent())


def test_parts_of_other_processes_are_found_anew(beton: Path, tmp_path: Path) -> None:
    """Where a process has another share of the batch than those that found them."""
    auto, where, said = small("train.accumulate=auto", "train.epochs=1"), options(beton, tmp_path), Silent()
    cut_after_three(auto, where)
    saved = state(tmp_path)
    assert saved["position"]["parts"] == 1
    saved["position"]["parts"] = 8  # one photo each
    write_state(tmp_path / "checkpoints" / "last.pt", saved)
    assert pretrain(auto, where, said)["accumulate"] == 1 and "train.accumulate: 1 part of a batch" in said.messages


def test_a_run_that_was_set_back_behind_its_first_steps_still_knows_its_parts(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_photos: list[int]
) -> None:
    make_step = trainer.make_step

    def spoil_the_second(run: of_runs.Setup, batch: Batch) -> torch.Tensor:
        if run.position.step == 1:
            batch.views[0].fill_(math.nan)
        return make_step(run, batch)

    monkeypatch.setattr(trainer, "make_step", spoil_the_second)
    recipe = small("train.accumulate=auto", "train.epochs=1", "train.skip_nonfinite=1")
    assert pretrain(recipe, options(beton, tmp_path), Silent())["passed_over_steps"] == [2]
    assert state(tmp_path)["position"]["parts"] == 4


def test_a_run_without_memory_may_go_on_with_checkpoint(beton: Path, tmp_path: Path) -> None:
    """As the message says: it makes the same steps."""
    arch = ("arch=mobilenetv2_035", "train.epochs=1")
    pretrain(small(*arch), options(beton, tmp_path / "whole"), Silent())
    cut_after_three(small(*arch), options(beton, tmp_path / "cut"))
    pretrain(small(*arch, "train.checkpoint=true"), options(beton, tmp_path / "cut"), Silent())
    assert same(state(tmp_path / "cut"), state(tmp_path / "whole"))
