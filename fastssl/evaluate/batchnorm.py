"""BatchNorm statistics, re-estimated from the views that a network is judged on.

In training they mix what the network saw: global and local crops, jittered and blurred. A probe shows it plain centre
crops. Mean and variance of those cost one pass over some photos, without labels, and leave all weights alone.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.distributed.sync_batchnorm import separate_batchnorm
from fastssl.errors import FastSSLError
from fastssl.evaluate.features import EVALUATION_CROP, collect
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation, ViewSpec
from fastssl.pipelines.plan.order import samples_at


def _layers(network: nn.Module) -> list[_BatchNorm]:
    """Those that keep statistics."""
    return [one for one in network.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]


def has_batchnorm(network: nn.Module) -> bool:
    """Whether there are statistics to take."""
    return bool(_layers(network))


def reestimated(
    backbone: nn.Module,
    data: BetonReader,
    *,
    samples: int,
    size: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    amp: bool = False,
    crop: float = EVALUATION_CROP,
    normalisation: Normalisation = IMAGENET,
    indices: np.ndarray | None = None,
    **how: Any,
) -> nn.Module:
    """A copy of ``backbone`` whose BatchNorms hold the statistics of centre crops: the mean over batches of each
    batch's mean and variance.

    Args:
        backbone: on ``device``; left as it is.
        data: photos; their labels are not read.
        samples: how many of them, at least 2, drawn by ``seed``: all where there are fewer, a few less where they do
            not fill equal batches.
        indices: draw from these sample ids alone; default: from all.
        size, batch_size, amp, crop, normalisation, how: as in ``extract_features``.

    Raises:
        FastSSLError: the network has no BatchNorm, or there are fewer than two photos.
    """
    if not has_batchnorm(backbone):
        raise FastSSLError("this network has no BatchNorm: there are no statistics to take again")
    total = len(data) if indices is None else len(indices)
    count = min(samples, total)
    if count < 2:
        raise FastSSLError(f"{data.path}: BatchNorm statistics need at least two photos, not {count}")
    device = torch.device(device)
    network = separate_batchnorm(copy.deepcopy(backbone).eval())  # of several processes this one is alone here
    for layer in _layers(network):
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches instead of a moving one
        layer.train()  # these layers alone: drop path and dropout stay still
    # Equal batches: a last one of a handful of photos would count as much as a whole one.
    batch = max(2, count // -(-count // batch_size))
    chosen = samples_at(np.arange(count - count % batch), total, seed, 0)
    chosen = np.sort(chosen if indices is None else np.asarray(indices)[chosen])
    forward = torch.autocast(device.type, torch.bfloat16, enabled=amp)(network)
    view = ViewSpec.evaluation(size, crop, normalisation)
    collect(forward, data, view, indices=chosen, batch_size=batch, device=device, **how)
    for layer, original in zip(_layers(network), _layers(backbone)):
        layer.momentum = original.momentum
    return network.train(backbone.training)
