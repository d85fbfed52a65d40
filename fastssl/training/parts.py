"""The student's pass over a batch that is cut into parts, so that one part's activations are kept at a time.

Where a batch's loss is the mean of its parts' losses, each part has a loss and a backward pass of its own. Other losses
look at the whole batch: then, as GradCache does (Gao et al., arXiv 2101.06983), all parts are embedded without
gradient; the loss of all embeddings says what its gradient is at each of them; and each part is embedded once more, for
its share of that gradient to flow on.

Both give the loss and the gradients of the whole batch. BatchNorm alone sees a part at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.methods.base import Method, Rates, StepOutput


class Parts:
    """How a step's batch is cut, and its passes with gradient.

    Args:
        groups: BatchNorm groups into which the method cuts this rank's samples, of which parts hold whole ones: running
            statistics then move from group to group, parts or not. 0: it does not.
        autocast: the precision of the networks. collect: called behind each backward pass.

    Attributes:
        count: of parts, equal ones.
        statistics: of the BatchNorms that see a part at a time.
    """

    def __init__(
        self,
        method: Method,
        count: int,
        *,
        groups: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        collect: Callable[[], None],
    ):
        self.method, self.count, self._groups, self._autocast, self._collect = method, count, groups, autocast, collect
        norms = [] if groups else [one for one in method.student.modules() if isinstance(one, _BatchNorm)]
        self.statistics: list[Tensor] = [tensor for norm in norms for tensor in norm.buffers(recurse=False)]

    def tries(self) -> list[int]:
        """The count, and more parts: each at least twice as many as the one before."""
        found = [self.count]
        for more in range(self.count + 1, self.method.views.batch_size // 2 + 1):
            if more >= 2 * found[-1] and self.allows(more):
                found.append(more)
        return found

    def allows(self, count: int) -> bool:
        """Whether so many parts are equal ones, of two samples or more and of whole groups."""
        batch = self.method.views.batch_size
        return batch % count == 0 and batch >= 2 * count and self._groups % count == 0

    def of(self, rows: Tensor, part: int) -> Tensor:
        """Of view-major ``rows`` (n B, ...) those of the ``part``-th share of the samples, view-major."""
        if self.count == 1:
            return rows
        batch = self.method.views.batch_size
        size = batch // self.count
        return torch.cat([rows.narrow(0, first + part * size, size) for first in range(0, len(rows), batch)])

    def images(
        self, images: Sequence[Tensor], noise: Mapping[str, Tensor], *, still: bool = False
    ) -> Iterator[list[Tensor]]:
        """Each part's, to be passed through the student before the next is asked for, with the coins that drop path
        tosses for its samples. Behind the last one running statistics have moved once, by that part; ``still``: not.
        """
        drop, many = self.method.student.drop, self.count > 1
        before = [tensor.clone() for tensor in self.statistics] if many else []
        for part in range(self.count):
            if drop is not None:
                drop.uniforms = self.of(noise["drop_path"].t(), part).t()
            yield [self.of(rows, part) for rows in images]
            if before and (still or part + 1 < self.count):
                torch._foreach_copy_(self.statistics, before)

    def backward(
        self, images: Sequence[Tensor], targets: tuple[Tensor, ...], noise: Mapping[str, Tensor], rates: Rates
    ) -> StepOutput:
        """The whole batch's loss, without gradient where it has parts; and its gradients at the parameters."""
        method, found, shares = self.method, list[StepOutput](), list[Tensor]()
        twice = self.count > 1 and not method.divisible
        if twice:
            for mine in self.images(images, noise, still=True):
                # autocast keeps a weight's cast until its end, and that of a pass without gradient has none.
                with torch.no_grad(), self._autocast():
                    shares.append(method.embed(mine).unflatten(0, (-1, method.views.batch_size // self.count)))
            everything = torch.stack(shares, 1).flatten(0, 2).requires_grad_()  # rows (view, part, sample)
            with self._autocast():
                found.append(method.loss(everything, targets, rates))
            (gradient,) = torch.autograd.grad(found[0].loss, [everything])
        for part, mine in enumerate(self.images(images, noise)):
            with self._autocast():
                embeddings = method.embed(mine)
                if not twice:
                    found.append(method.loss(embeddings, tuple(self.of(rows, part) for rows in targets), rates))
            if twice:
                embeddings.backward(self.of(gradient, part))
            else:
                (found[-1].loss if self.count == 1 else found[-1].loss / self.count).backward()
            self._collect()
        return StepOutput.of_parts(found)
