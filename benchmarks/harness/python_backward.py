"""Autograd's backward pass in Python: what torch's engine does, for a GPU that is not there.

The engine asks the driver for its streams, and fails without one. Nodes are called in the engine's order (the youngest
first), each when all gradients of its outputs have come together, and what it kept is let go behind it, so that the
memory that is alive at a time is the engine's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

_read: list[list[Any]] = []


def _take(place: list[Any]) -> Any:
    _read.append(place)
    return place[0]


def releasing_what_was_read() -> saved_tensors_hooks:
    """For the forward pass: each kept tensor lies in a place that `run_backward` can empty."""
    return saved_tensors_hooks(lambda tensor: [tensor], _take)


@torch.no_grad()
def run_backward(
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    keep_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any] = (),
    allow_unreachable: bool = True,
    accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd._engine_run_backward`: gradients of ``inputs``, or, with ``accumulate_grad``, at the leaves.
    Without ``create_graph``, and without the hooks of tensors and nodes.
    """
    roots = [get_gradient_edge(tensor) for tensor in tensors]
    wanted = [one if hasattr(one, "node") else get_gradient_edge(one) for one in inputs]
    found: dict[Any, Tensor | None] = {}
    before: dict[Any, list[Any]] = defaultdict(list)
    reached, stack = set(), [edge.node for edge in roots]
    while stack:
        if (node := stack.pop()) not in reached:
            reached.add(node)
            for after, _ in node.next_functions:
                if after is not None:
                    before[after].append(node)
                    stack.append(after)
    waiting = {node: len(before[node]) for node in reached}
    if wanted:  # what leads to none of them is left out
        reached, stack = set(), [edge.node for edge in wanted]
        while stack:
            if (node := stack.pop()) not in reached:
                reached.add(node)
                stack += before[node]
    given: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    ready: list[tuple[int, int, Any]] = []
    numbers = count()  # nodes are never compared

    def give(node: Any, number: int, grad: Tensor | None) -> None:
        if grad is not None:
            like, at = node._input_metadata[number], given[node]
            grad = grad if grad.shape == tuple(like.shape) else grad.sum_to_size(like.shape)
            grad = grad if grad.dtype == like.dtype else grad.to(like.dtype)
            at[number] = at[number] + grad if number in at else grad

    def queue(node: Any) -> None:
        if not waiting[node]:
            heappush(ready, (-(2**63) if hasattr(node, "variable") else -node._sequence_nr(), next(numbers), node))

    for edge, tensor, grad in zip(roots, tensors, grads):
        give(edge.node, edge.output_nr, torch.ones_like(tensor) if grad is None else grad)
    for node in dict.fromkeys(edge.node for edge in roots if edge.node in reached):
        queue(node)
    while ready:
        node = heappop(ready)[2]
        at = given.pop(node, {})
        found |= {(edge.node, edge.output_nr): at.get(edge.output_nr) for edge in wanted if edge.node is node}
        if hasattr(node, "variable"):
            if accumulate_grad and not inputs and at:
                _accumulate(node.variable, at.pop(0))
            continue
        results = _call(node, at) if at and any(after in reached for after, _ in node.next_functions) else ()
        for number, (after, place) in enumerate(node.next_functions):
            if after in reached:
                give(after, place, results[number] if number < len(results) else None)
                waiting[after] -= 1
                queue(after)
        del results
        for place in [] if keep_graph else _read:
            place.clear()
        _read.clear()
    return tuple(found.get((edge.node, edge.output_nr)) for edge in wanted)


def _call(node: Any, at: dict[int, Tensor]) -> Sequence[Tensor | None]:
    metadata, custom = node._input_metadata, hasattr(node, "apply")
    if custom and getattr(node, "materialize_grads", True):
        for number, like in enumerate(metadata):
            if number not in at and like.shape is not None:
                at[number] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    grads = [at.pop(number, None) for number in range(len(metadata))]
    results = (node.apply if custom else node)(*grads)
    return results if isinstance(results, (tuple, list)) else (results,)


def _accumulate(leaf: Tensor, grad: Tensor) -> None:
    if leaf.grad is not None:
        leaf.grad.add_(grad)
        return
    strides = zip(grad.stride(), leaf.stride(), leaf.shape)
    if all(ours == theirs or size == 1 for ours, theirs, size in strides):
        leaf.grad = grad
    else:  # the optimiser's kernels want the parameter's layout
        leaf.grad = torch.empty_like(leaf).copy_(grad)
