"""Distillation: the three losses written out, the teacher that stands still, what it is shown, the queue."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loss_twins import dense_similarity, dense_smoothed_infonce
from tiny import TWO, B, TinyBackbone, images
from torch import Tensor, nn
from torch.nn import functional

from fastssl.losses.pairs import PairWeights
from fastssl.methods.base import Views
from fastssl.methods.distill import Distill, DistillConfig, FrozenTeacher
from fastssl.models.heads import HeadConfig
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation

SMALL = DistillConfig(queue=4 * B, weighting="nearest", head=HeadConfig(hidden=16, norm=True))
OTHER = Normalisation((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


class Wide(nn.Module):
    """A teacher of another width, which remembers what it was shown."""

    num_features = 7

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Linear(3, 7), nn.BatchNorm1d(7)

    def forward(self, pictures: Tensor) -> Tensor:
        self.seen = pictures
        return self.norm(self.weight(pictures.mean((2, 3))))


def frozen(size: int | None = None, given: Normalisation = IMAGENET) -> FrozenTeacher:
    torch.manual_seed(3)
    return FrozenTeacher(Wide().double(), size, given=given, seen=IMAGENET, about={})


def make(config: DistillConfig = SMALL, weights: PairWeights = TWO) -> Distill:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    return Distill(TinyBackbone(), config, views=Views(B, weights), teacher=frozen(), generator=generator).double()


def expected_pair(method: Distill, query: Tensor, key: Tensor, smoothing: float) -> Tensor:
    if method.config.loss == "features":
        return sum((q - k).square().sum() for q, k in zip(query, key)) / len(query)
    if method.config.loss == "smoothed":
        return dense_smoothed_infonce(query, key, method.queue, 0.2, smoothing, "nearest")
    return dense_similarity(query, key, method.queue, 0.2, 0.05)[0]


@pytest.mark.parametrize("loss", ["similarity", "smoothed", "features"])
@pytest.mark.parametrize("local", [0, 3])
def test_a_step_of_each_loss_is_what_is_written(loss: str, local: int) -> None:
    weights = PairWeights(local, 0.4, 0.6) if local else TWO
    method = make(replace(SMALL, loss=loss, teacher_temperature=0.05), weights).train()
    views = [images(0).double(), *([images(1, views=3, size=7).double()] if local else [])]
    reference = make(replace(SMALL, loss=loss), weights).train()  # BatchNorm's statistics move with each pass
    with torch.no_grad():
        queries = reference.student(views).split(B)
        keys = functional.normalize(method.frozen.backbone(views[0]), dim=1).split(B)
    own = sum(expected_pair(method, queries[g], keys[g], 0.3) for g in range(2)) / 2
    total = own
    if local:
        far = [expected_pair(method, queries[2 + v], keys[g], 0.3) for v in range(3) for g in range(2)]
        total = 0.4 * own + 0.6 * sum(far) / 6
    before = {name: value.clone() for name, value in method.frozen.state_dict().items()}
    rates = {"smoothing": 0.3}
    targets = method.targets(views, {}, rates)
    found = method(views, targets, rates)
    torch.testing.assert_close(found.loss, total)
    metrics = dict(zip(method.METRICS, found.metrics.tolist()))
    cosine = (torch.cat(queries[:2]) * torch.cat(keys)).sum(1).mean()
    assert metrics["teacher_cosine"] == pytest.approx(cosine.item(), abs=1e-6)
    assert 0 <= metrics["kl"] <= metrics["loss"] and 0 < metrics["embedding_std"] <= 1.1
    found.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())
    method.after_step(targets, found.pair, rates)
    if loss == "features":
        assert not hasattr(method, "queue")
    else:
        torch.testing.assert_close(method.queue[: 2 * B], torch.cat(keys))
        assert int(method.queue_pointer) == 2 * B
    # It stands still: no statistics moved, nothing has a gradient.
    assert all(torch.equal(before[name], value) for name, value in method.frozen.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in method.frozen.parameters())


def test_the_teacher_is_no_part_of_the_state_and_stays_in_evaluation_mode() -> None:
    method = make().train()
    assert not any("frozen" in name or "norm.weight" in name for name in method.state_dict())
    assert method.teacher is None and not method.frozen.training and not method.frozen.backbone.norm.training
    assert method.frozen.backbone.weight.weight.dtype == torch.float64
    method.float()
    assert method.frozen.backbone.weight.weight.dtype == torch.float32
    assert all(p.is_meta for p in method.to("meta").frozen.parameters())


@pytest.mark.parametrize("size", [None, 9, 5, 16])
def test_the_teacher_is_shown_pictures_of_its_own_size_and_normalisation(size: int | None) -> None:
    teacher, pictures = frozen(size, OTHER), torch.rand(4, 3, 9, 9)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in OTHER)
    expected = (pictures - torch.tensor(IMAGENET.mean).view(3, 1, 1)) / torch.tensor(IMAGENET.std).view(3, 1, 1)
    teacher.float()
    found = teacher(((pictures - mean) / std).contiguous(memory_format=torch.channels_last))
    if size in (5, 16):
        expected = functional.interpolate(expected, (size, size), mode="bilinear", antialias=size == 5)
    torch.testing.assert_close(teacher.backbone.seen, expected, rtol=1e-5, atol=1e-5)
    assert teacher.backbone.seen.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4)) and found.shape == (4, 7)


def test_what_is_cached_takes_the_teachers_place() -> None:
    method = make(replace(SMALL, loss="features"))
    known = functional.normalize(torch.randn(2 * B, 7, dtype=torch.float64), dim=1)
    assert method.targets([images().double()], {"teacher": known}, {})[0] is known
    assert not hasattr(method.frozen.backbone, "seen")


def test_batches_that_do_not_fit_and_what_is_made_of_them() -> None:
    with pytest.raises(ValueError, match=r"distill\.queue=40 must be a multiple of twice the batch size \(12\)"):
        make(replace(SMALL, queue=40))
    assert make(replace(SMALL, queue=40, loss="features")).config.allows(7)
    assert replace(SMALL, queue=40).scaled(6).queue == 48 and SMALL.scaled(6) == SMALL
    assert SMALL.scaled(6, photos=13).queue == 12 and replace(SMALL, loss="features").scaled(7, photos=9).queue == 24
    assert SMALL.largest_batch == 12 and replace(SMALL, loss="features").largest_batch is None
    with pytest.raises(ValueError, match="there are 24 negatives, and weighting='uniform_topk' needs at least 30"):
        make(replace(SMALL, loss="smoothed", weighting="uniform_topk", neighbors=30))
    with pytest.raises(ValueError, match=r"distill\.loss must be 'similarity', 'smoothed' or 'features'"):
        replace(SMALL, loss="cosine")


def test_rates_are_those_of_the_smoothed_target_alone() -> None:
    assert make().rates(0, RunLength(4, 2)) == {} == make(replace(SMALL, loss="features")).rates(0, RunLength(4, 2))
    warm = replace(SMALL, loss="smoothed", smoothing=0.5, smoothing_schedule="warm", smoothing_warm_epochs=1)
    assert [make(warm).rates(step, RunLength(4, 2))["smoothing"] for step in (0, 3)] == [0.0, 0.5]
