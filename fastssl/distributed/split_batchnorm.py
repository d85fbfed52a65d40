"""Running statistics of BatchNorms whose groups were dealt over the ranks: what one process that sees all groups would
hold.

A running statistic is a linear recurrence. With momentum m, a = 1 - m and the groups' statistics x in their order:

    r <- a r + m x                                           one group
    r_k = a^n r + (what rank k's n groups add)               each rank, from the same r
    full = a^(nW) r + sum over k of a^(n (W - 1 - k)) (r_k - a^n r)      all W ranks' groups in the order of the ranks

so that one small all-reduce behind the pass makes it whole: 2 numbers a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.distributed.collectives import all_reduce_sum
from fastssl.errors import FastSSLError


class SplitBatchNormStats:
    """The running statistics of a network of which each rank passes ``groups`` groups a step in training mode, between
    ``before`` and ``combine``. It can be recorded.

    Args:
        network: on its device; its buffers may not be replaced or moved afterwards.

    Raises:
        FastSSLError: a layer averages over all batches (``momentum=None``): that is another recurrence.
    """

    def __init__(self, network: nn.Module, *, groups: int, rank: int, world: int):
        self._running: list[Tensor] = []
        self._counters: list[Tensor] = []
        shares = [torch.empty(0, dtype=torch.float64)]  # of the old value in the new one, for each value
        for name, layer in network.named_modules():
            if not isinstance(layer, _BatchNorm) or layer.running_mean is None or layer.running_var is None:
                continue
            if layer.momentum is None:
                raise FastSSLError(
                    f"layer {name or 'network'} averages its statistics over all batches (momentum=None), which "
                    "several processes with BatchNorm groups of their own cannot: set moco.split_bn=1 and "
                    "moco.split_bn_queries=1"
                )
            self._running += [layer.running_mean, layer.running_var]
            shares.append(torch.full((2 * layer.num_features,), 1 - layer.momentum, dtype=torch.float64))
            if layer.num_batches_tracked is not None:
                self._counters.append(layer.num_batches_tracked)
        self._sizes = [tensor.numel() for tensor in self._running]
        self._counted_elsewhere = groups * (world - 1)
        keep = torch.cat(shares)
        like = self._running[0] if self._running else torch.empty(0)
        # a^n, a^(n (W - 1 - k)) and a^(n W), one for each value
        self._own, self._weight, self._all = (
            keep.pow(groups * times).to(like.device, like.dtype) for times in (1, world - 1 - rank, world)
        )

    @torch.no_grad()
    def before(self) -> Tensor:
        """The statistics as they are, before this rank's passes: (values,)."""
        return torch.cat([tensor.flatten() for tensor in self._running]) if self._running else self._own

    @torch.no_grad()
    def combine(self, before: Tensor) -> None:
        """Behind the passes: put the statistics of all ranks' groups in the place of this rank's."""
        if not self._running:
            return
        added = (self.before() - self._own * before).mul_(self._weight)
        whole = all_reduce_sum(added).addcmul_(self._all, before)
        torch._foreach_copy_(self._running, list(whole.split(self._sizes)))
        if self._counters:
            torch._foreach_add_(self._counters, self._counted_elsewhere)
