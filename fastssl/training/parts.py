"""The student's pass over a batch that is cut into parts, so that one part's activations are kept at a time.

Where a batch's loss is the mean of its parts' losses, each part has its own loss and backward pass. Other losses look
at the whole batch: then, as GradCache does (Gao et al., arXiv 2101.06983),

    all parts are embedded without gradient
      -> the loss of all embeddings, and its gradient at each of them
      -> each part is embedded once more, with gradient, from where its share of that gradient flows on

Both give the loss and the gradients of the whole batch, whatever the number of parts. BatchNorm alone sees a part at a
time; its running statistics move once a step, by the mean over the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.methods.base import Method, Rates, StepOutput


class Parts:
    """How a step's batch is cut, and its passes with gradient.

    Args:
        method: whose student makes them.
        count: of parts, equal ones.
        groups: BatchNorm groups into which the method cuts this rank's share of the batch, of which parts hold whole
            ones: running statistics then move from group to group, parts or not. None: it does not.
    """

    def __init__(self, method: Method, count: int, *, groups: int | None):
        self.method, self.count, self._groups = method, count, groups
        layers = [] if groups else [one for one in method.student.modules() if isinstance(one, _BatchNorm)]
        running = [(one.running_mean, one.running_var) for one in layers]
        self._running = [tensor for pair in running for tensor in pair if tensor is not None]
        self._counters = [one.num_batches_tracked for one in layers if one.num_batches_tracked is not None]

    @property
    def changes_batchnorm(self) -> bool:
        """Whether there are BatchNorms that see less in more parts."""
        return bool(self._running)

    def tries(self) -> list[int]:
        """The count, and more parts: each at least twice as many as the one before, of two samples or more."""
        batch, groups, found = self.method.views.batch_size, self._groups or 0, [self.count]
        for more in range(self.count + 1, batch // 2 + 1):
            if more >= 2 * found[-1] and batch % more == 0 and groups % more == 0:
                found.append(more)
        return found

    def of(self, rows: Tensor, part: int) -> Tensor:
        """Of view-major ``rows`` (n B, ...) those of the ``part``-th share of the samples, view-major."""
        if self.count == 1:
            return rows
        batch = self.method.views.batch_size
        size = batch // self.count
        return torch.cat([rows.narrow(0, first + part * size, size) for first in range(0, len(rows), batch)])

    def whole(self, shares: Sequence[Tensor]) -> Tensor:
        """The rows of which ``shares`` are the parts: ``of`` undone."""
        size = self.method.views.batch_size // self.count
        return torch.stack([rows.unflatten(0, (-1, size)) for rows in shares], 1).flatten(0, 2)

    def images(self, images: Sequence[Tensor], noise: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
        """Each part's; drop path tosses the coins of its samples until the next is asked for."""
        drop = self.method.student.drop
        for part in range(self.count):
            if drop is not None:
                drop.uniforms = self.of(noise["drop_path"].t(), part).t()
            yield [self.of(rows, part) for rows in images]

    def backward(
        self,
        images: Sequence[Tensor],
        targets: tuple[Tensor, ...],
        noise: Mapping[str, Tensor],
        rates: Rates,
        *,
        autocast: Callable[[], AbstractContextManager],
        collect: Callable[[], None],
    ) -> StepOutput:
        """The loss, and its gradients at the parameters.

        Args:
            images, targets, noise: of the whole batch.
            autocast: the precision of the networks.
            collect: called behind each backward pass.
        """
        method, found = self.method, []
        if self.count > 1 and not method.DIVISIBLE:
            return self._backward_twice(images, targets, noise, rates, autocast, collect)
        for part, mine in enumerate(self._moving_once(self.images(images, noise))):
            with autocast():
                output = method(mine, tuple(self.of(rows, part) for rows in targets), rates)
            (output.loss / self.count if self.count > 1 else output.loss).backward()
            collect()
            found.append(output)
        return found[0] if self.count == 1 else StepOutput.of_parts(found)

    def _backward_twice(
        self,
        images: Sequence[Tensor],
        targets: tuple[Tensor, ...],
        noise: Mapping[str, Tensor],
        rates: Rates,
        autocast: Callable[[], AbstractContextManager],
        collect: Callable[[], None],
    ) -> StepOutput:
        embed, shares = self.method.embed, []
        for mine in self._moving_once(self.images(images, noise)):
            # autocast keeps a weight's cast until its end, and that of a pass without gradient has none.
            with torch.no_grad(), autocast():
                shares.append(embed(mine))
        embeddings, moved = self.whole(shares).requires_grad_(), self._statistics()
        with autocast():
            output = self.method.loss(embeddings, targets, rates)
        (gradient,) = torch.autograd.grad(output.loss, [embeddings])
        for part, mine in enumerate(self.images(images, noise)):
            with autocast():
                share = embed(mine)
            share.backward(self.of(gradient, part))
            collect()
        self._put_back(moved)
        return output

    # ------------------------------------------------------------------ running statistics

    def _moving_once(self, parts: Iterator[list[Tensor]]) -> Iterator[list[Tensor]]:
        """``parts``; behind the last one the running statistics have moved once, by the mean over the parts."""
        if self.count == 1 or not self._running:
            yield from parts
            return
        before, total = self._statistics(), torch._foreach_mul(self._running, 0)
        for mine in parts:
            self._put_back(before)
            yield mine
            torch._foreach_add_(total, self._running)
        torch._foreach_div_(total, self.count)
        torch._foreach_copy_(self._running, total)

    def _statistics(self) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of running means and variances, and of how many batches they have seen: a launch for all of a kind."""
        kinds = (self._running, self._counters)
        running, counters = ([*torch._foreach_add(kind, 0)] if kind else [] for kind in kinds)
        return running, counters

    @torch.no_grad()
    def _put_back(self, statistics: tuple[list[Tensor], list[Tensor]]) -> None:
        for places, values in zip((self._running, self._counters), statistics):
            if places:
                torch._foreach_copy_(places, values)
