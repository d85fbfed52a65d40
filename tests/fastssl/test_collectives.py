"""Collectives that give what one process with the whole batch would have."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn

from fastssl.distributed.collectives import (
    all_reduce_mean,
    all_reduce_sum,
    any_rank,
    average_gradients,
    barrier,
    broadcast_module,
    broadcast_object,
    gather_objects,
    gather_rows,
    gather_views,
    rank,
    world_size,
)
from fastssl.distributed.group import joined
from fastssl.distributed.world import World

CPU = torch.device("cpu")


def test_alone_every_collective_is_the_identity() -> None:
    rows = torch.randn(4, 3, requires_grad=True)
    with joined(World(), CPU):
        for call in (
            all_reduce_sum,
            all_reduce_mean,
            gather_rows,
            partial(gather_rows, gradient=True),
            lambda t: gather_views(t, 2),
            lambda t: gather_views(t, 2, True),
        ):
            assert call(rows) is rows
        rows.grad = torch.ones_like(rows)
        average_gradients([rows])
        assert rows.grad.eq(1).all()
        broadcast_module(nn.Linear(2, 2))
        assert (rank(), world_size(), any_rank(True), any_rank(False), broadcast_object("x")) == (
            0,
            1,
            True,
            False,
            "x",
        )
        assert gather_objects("x") == ["x"]
        barrier()
    with pytest.raises(ValueError, match="3 views"):
        gather_views(rows, 3)


VIEWS, BATCH, WIDTH = 3, 4, 5


def samples(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """View-major rows of all ranks (VIEWS, size * BATCH, WIDTH), a matrix that makes each row's loss, maps of the same
    samples.
    """
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(VIEWS, size * BATCH, WIDTH, generator=generator, dtype=torch.float64)
    maps = torch.randn(VIEWS, size * BATCH, 3, 2, 4, generator=generator)
    return rows, torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64), maps


def contrast(own: Tensor, everyone: Tensor, matrix: Tensor) -> Tensor:
    """Mean over own rows of a loss against all rows: every row is in every rank's loss."""
    return (own @ matrix @ everyone.T).logsumexp(1).mean()


def own_share(tensor: Tensor, at: int) -> Tensor:
    """(views, samples of all, ...) -> this rank's (views * BATCH, ...)."""
    return tensor[:, at * BATCH : (at + 1) * BATCH].flatten(0, 1)


def together() -> dict[str, object]:
    size, me = world_size(), rank()
    rows, matrix, maps = samples(size)
    own = own_share(rows, me).requires_grad_()
    images = own_share(maps, me).contiguous(memory_format=torch.channels_last)
    found: dict[str, object] = {"rank": (me, size)}

    found["rows"] = gather_rows(own)
    found["views"], found["maps"] = gather_views(own, VIEWS), gather_views(images, VIEWS)
    found["one view"] = gather_views(images, 1)
    found["bytes"] = gather_rows(torch.tensor([me, 255], dtype=torch.uint8))
    found["no gradient"] = found["rows"].requires_grad or found["views"].requires_grad

    contrast(own, gather_views(own, VIEWS, gradient=True), matrix).backward()
    found["gradient"], own.grad = own.grad, None
    contrast(own, gather_rows(own, gradient=True), matrix).backward()
    found["gradient of rows"] = own.grad
    picture = images.clone().requires_grad_()
    (
        gather_views(picture, VIEWS, gradient=True) * torch.arange(size * BATCH * VIEWS).view(-1, 1, 1, 1)
    ).sum().backward()
    found["gradient of maps"] = picture.grad

    transposed = torch.full((2, 3), float(me + 1)).T
    returned = all_reduce_sum(transposed)
    found["sum"], found["in place"] = transposed, returned is transposed
    found["mean"] = all_reduce_mean(torch.tensor([float(me), 2.0]))

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).to(
        memory_format=torch.channels_last
    )
    for number, tensor in enumerate((*network.parameters(), *network.buffers())):
        tensor.data.fill_(100 * me + number)
    network[0].weight.data.add_(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(me)))
    broadcast_module(network)
    found["module"] = network.state_dict()

    parameters = [*network.parameters(), nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]
    for parameter in parameters[:-2] + parameters[-1:]:  # one has no gradient
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 + me)).to(
            parameter.dtype
        )
    parameters[0].grad = parameters[0].grad.contiguous(
        memory_format=torch.contiguous_format if me else torch.channels_last
    )
    before = [parameter.grad for parameter in parameters]
    average_gradients(parameters)
    found["gradients"] = [parameter.grad for parameter in parameters]
    found["same tensors"] = all(parameter.grad is old for parameter, old in zip(parameters, before))

    found["any"] = (any_rank(me == size - 1), any_rank(False))
    found["shared"], found["said"] = broadcast_object({"from": me}), gather_objects([me] * me)
    barrier()
    return found


@pytest.fixture(scope="module", params=[2, 3])
def world(request: pytest.FixtureRequest) -> list[dict]:
    """What each rank found."""
    return run_processes(together, request.param)


def test_gathered_rows_are_those_of_one_process(world: list[dict]) -> None:
    size = len(world)
    rows, _, maps = samples(size)
    expected = torch.cat([own_share(maps, at) for at in range(size)])
    for me, found in enumerate(world):
        assert found["rank"] == (me, size) and not found["no gradient"]
        assert torch.equal(found["rows"], torch.cat([own_share(rows, at) for at in range(size)]))
        assert torch.equal(found["views"], rows.flatten(0, 1))
        assert torch.equal(found["maps"], maps.flatten(0, 1)) and torch.equal(found["one view"], expected)
        assert all(found[name].is_contiguous(memory_format=torch.channels_last) for name in ("maps", "one view"))
        assert found["bytes"].tolist() == [value for at in range(size) for value in (at, 255)]


def test_gradients_through_a_gather_are_those_of_one_process(world: list[dict]) -> None:
    """Ranks that take the mean over their own rows: averaged, the gradients are those of the mean over all rows."""
    size = len(world)
    rows, matrix, maps = samples(size)
    whole = rows.clone().requires_grad_()
    contrast(whole.flatten(0, 1), whole.flatten(0, 1), matrix).backward()
    places = torch.arange(size * BATCH * VIEWS).view(VIEWS, -1, 1, 1, 1)
    for me, found in enumerate(world):
        for name in ("gradient", "gradient of rows"):
            torch.testing.assert_close(found[name] / size, own_share(whole.grad, me), rtol=1e-12, atol=1e-12)
        assert torch.equal(found["gradient of maps"] / size, own_share(places.expand(*maps.shape), me).float())


def test_gradients_are_averaged_in_place_whatever_their_layout(world: list[dict]) -> None:
    size = len(world)
    for found in world:
        assert found["same tensors"] and found["gradients"][-2] is None
        for mine, first in zip(found["gradients"], world[0]["gradients"]):
            if mine is None:
                continue
            each = [
                torch.randn(mine.shape, generator=torch.Generator().manual_seed(10 + at)).to(mine.dtype)
                for at in range(size)
            ]
            tolerance = 2e-2 if mine.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(mine, sum(each) / size, rtol=tolerance, atol=tolerance)
            assert torch.equal(mine, first)


def test_reductions_broadcasts_and_answers(world: list[dict]) -> None:
    size = len(world)
    for found in world:
        assert found["in place"] and found["sum"].shape == (3, 2) and found["sum"].eq(size * (size + 1) / 2).all()
        assert found["mean"].tolist() == [(size - 1) / 2, 2.0]
        for number, (name, value) in enumerate(found["module"].items()):
            assert torch.equal(value, world[0]["module"][name]) and (number == 0 or value.lt(100).all()), name
        assert found["module"]["1.num_batches_tracked"].dtype == torch.int64
        assert found["any"] == (True, False) and found["shared"] == {"from": 0}
        assert found["said"] == [[me] * me for me in range(size)]
