"""A student is to be as similar to the keys of a queue as its teacher is.

Source: Fang et al., "SEED: Self-supervised Distillation for Visual Representation", arXiv 2101.04731. With s and t the
unit embeddings of student and teacher of one picture, n_1..n_K the teacher's embeddings of earlier pictures, n_0 = t,

    p = softmax(t.[n_0..n_K] / tau_t),  loss = - sum_j p_j log softmax(s.[n_0..n_K] / tau_s)_j
      = logsumexp(s.n / tau_s) - s.m / tau_s,      m = sum_j p_j n_j
    entropy of p = logsumexp(t.n / tau_t) - t.m / tau_t, the least that the loss can be

So the teacher's side is a vector m for each picture, and both read the queue in tiles, as ``smoothed_infonce`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.losses.smoothed_infonce import StreamedLoss, stream


@torch.no_grad()
def neighbours_mean(key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The teacher's side of unit vectors t (B, D) and a queue (K, D): m (B, D), and the entropy of p (B,) in nats;
    float32, or float64 where an input is. ``temperature``: tau_t, positive.
    """
    dtype = torch.float64 if torch.float64 in (key.dtype, queue.dtype) else torch.float32
    with torch.autocast(key.device.type, enabled=False):
        t = key.to(dtype)
        seen = stream(t, t, (t * t).sum(1), queue, temperature, None, True)
        mean = seen.weighted / seen.total[:, None]
        return mean, seen.total.log() + (seen.maximum - (t * mean).sum(1)) / temperature


def similarity_loss(query: Tensor, key: Tensor, mean: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The mean loss of unit vectors s (B, D) in nats, with gradient for them alone, of t and m of ``neighbours_mean``;
    float32, or float64 where an input is, whatever autocast says. ``temperature``: tau_s, positive.
    """
    # All of the mass is on the mean of neighbours: the smoothed loss with nothing left for the positive.
    loss: Tensor = StreamedLoss.apply(query, key, queue, 1.0, temperature, (), None, torch.is_grad_enabled(), mean)
    return loss
