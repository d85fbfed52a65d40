"""The peer of the step: plain, but the same mathematics."""

from __future__ import annotations

import copy

import pytest
import torch

from fastssl.benchmarks.harness.setting import RecipeSetting
from fastssl.benchmarks.suites.plain_step import PlainStep
from fastssl.benchmarks.suites.step import random_views, run
from fastssl.config.recipe import Recipe, load_recipe
from fastssl.training.step import TrainStep

CPU = torch.device("cpu")
LR, BATCH = 0.05, 8


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Networks without BatchNorm, which the plain step shows one view at a time: everything else must agree."""

    class Backbone(torch.nn.Sequential):
        num_features = 8

        def __init__(self) -> None:
            super().__init__(
                torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
            )

    monkeypatch.setattr("fastssl.training.networks.create_backbone", lambda name, **options: Backbone())
    changes = {
        "views.0.size": "16",
        "moco.queue": "64",
        "moco.smoothing": "0.2",
        "moco.momentum": "0.9",
        "moco.split_bn": "1",
    }
    changes |= {"moco.neighbors": "5", "moco.weighting": "uniform_topk", "train.batch_size": str(BATCH)}
    changes |= {
        "moco.projector.hidden": "16",
        "moco.projector.out": "8",
        "moco.projector.norm": "false",
        "moco.projector.norm_out": "false",
    }
    return load_recipe("few-photos-moco", changes)


def test_two_steps_of_both_end_at_the_same_weights(recipe: Recipe) -> None:
    plain, ours = PlainStep(recipe, CPU, BATCH, amp=False, lr=LR), TrainStep(recipe, CPU, amp=False, seed=0)
    ours.method.student.load_state_dict(plain.query.state_dict())
    ours.method.teacher.load_state_dict(plain.key.state_dict())
    ours.method.queue.copy_(plain.queue.t())
    start = copy.deepcopy(plain.query.state_dict())
    order = torch.arange(2 * BATCH)
    for number in range(2):
        torch.manual_seed(number)
        (views,) = random_views(recipe, BATCH, CPU)
        loss = plain(*(view.contiguous() for view in views.chunk(2)))
        rates = {"lr": LR, "momentum": recipe.moco.momentum, "smoothing": recipe.moco.smoothing}
        metrics = ours([views], {"permutation": order}, rates)
        assert loss == pytest.approx(metrics[0].item(), rel=1e-4)
    for name, value in plain.query.state_dict().items():
        torch.testing.assert_close(ours.method.student.state_dict()[name], value, rtol=1e-3, atol=1e-5)
        assert not torch.equal(value, start[name])
    assert plain.pointer == 4 * BATCH
    # The plain step moves its keys at the beginning, ours at the end: one average later they agree.
    plain.move_keys()
    for name, value in plain.key.state_dict().items():
        torch.testing.assert_close(ours.method.teacher.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    # The keys of a step come in the same order; those of the first are the first in both queues.
    torch.testing.assert_close(ours.method.queue[: 2 * BATCH], plain.queue.t()[: 2 * BATCH], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_record_stands_beside_its_peers(recipe: Recipe) -> None:
    def setting(recipe: Recipe, amp: str) -> RecipeSetting:
        return RecipeSetting(recipe=recipe, recipe_name="few-photos-moco", batch_size=BATCH, amp=amp, peers=True)

    ours, plain, update = run(setting(recipe, "off"))
    assert ours.peer is None and plain.peer == "plain MoCo step, NCHW, float32"
    assert (
        plain.ratio_to_peer > 0
        and plain.details["cpu_ratio_to_peer"] > 0
        and plain.pair_per_s == pytest.approx(BATCH / plain.median_s)
    )
    with_amp = run(setting(recipe, "bf16"))
    loops = "optimiser and moving average tensor by tensor"
    assert [record.peer for record in with_amp] == [
        None,
        "plain MoCo step, NCHW, bf16 autocast",
        "plain MoCo step, NCHW, float32",
        loops,
    ]
    assert update.peer == loops
