"""What a recipe sends over the network in a step, and keeps in a checkpoint: counted from its networks and its method's code, nothing is run.

Bytes are those that a process receives. Gradients are float32 and go through one all-reduce (``collectives.average_gradients``); a BatchNorm over all processes
gathers mean, deviation and count in its forward pass and sums two numbers a channel in its backward pass (``sync_batchnorm.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.methods import METHODS
from fastssl.methods.method import Method, Views
from fastssl.recipe import Recipe
from fastssl.step import initial_backbone

#: Bytes of a float32 and of the bfloat16 in which images lie on a GPU.
_FLOAT, _HALF = 4, 2
#: Numbers that an optimiser keeps for each that is trained.
_MOMENTS = {"sgd": 1, "lars": 1, "adamw": 2}


@dataclass(frozen=True)
class Traffic:
    """One step of ``batch`` samples on ``world`` processes.

    Attributes:
        parameters: that are trained. gradient_bytes: summed over the processes.
        batchnorm_passes: through layers of student and teacher that look at all processes; batchnorm_collectives: calls for them, and
        batchnorm_bytes: gathered by them.
        image_bytes: of views gathered to be dealt into BatchNorm groups (MoCo).
        embedding_bytes: keys, embeddings, scores and sums that the method gathers or adds up.
        collectives: calls a step, the gradients' included.
        checkpoint_bytes: both networks, queue or centre, the optimiser's numbers.
    """

    parameters: int
    gradient_bytes: int
    batchnorm_passes: int
    batchnorm_collectives: int
    batchnorm_bytes: int
    image_bytes: int
    embedding_bytes: int
    collectives: int
    checkpoint_bytes: int

    @property
    def gathered_bytes(self) -> int:
        """All that grows with the number of samples or processes."""
        return self.batchnorm_bytes + self.image_bytes + self.embedding_bytes


def traffic(recipe: Recipe, batch: int, world: int) -> Traffic:
    """Count for steps of ``batch`` samples, ``batch // world`` on each process, on GPUs in bfloat16.

    A MoCo recipe's queue and BatchNorm groups are adapted as a run on so many processes would have to: the queue to a multiple of the keys, the groups to the
    processes.
    """
    settings = recipe.settings.scaled(batch)
    if recipe.method == "moco" and settings.split_bn > 1:
        settings = replace(settings, split_bn=max(settings.split_bn, world))
    views = Views(batch, recipe.pair_weights)
    with torch.device("meta"):  # shapes alone: nothing is allocated or drawn
        method = METHODS[recipe.method][0](initial_backbone(recipe, seed=0), settings, views=views)
    trained = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    state = sum(tensor.numel() * tensor.element_size() for tensor in method.state_dict().values())
    layers, channels = _synchronised(method, recipe, settings)
    count, sums, gathered, images = _method(method, recipe, settings, batch)
    several = world > 1
    return Traffic(
        parameters=trained,
        gradient_bytes=_FLOAT * trained,
        batchnorm_passes=len(layers),
        batchnorm_collectives=several * sum(layers),
        batchnorm_bytes=several * world * sum(_FLOAT * (2 * c + 1) for c in channels),
        image_bytes=several * images,
        embedding_bytes=several * (sums + gathered),
        # student: forward and backward; teacher: forward alone
        collectives=several * (1 + sum(layers) + count),
        checkpoint_bytes=state + _FLOAT * _MOMENTS[recipe.optim.name] * trained,
    )


def _synchronised(method: Method, recipe: Recipe, settings: object) -> tuple[list[int], list[int]]:
    """(collectives of each BatchNorm pass that looks at all processes, channels of each)."""
    sizes = len({spec.size for spec in recipe.views})
    calls, channels = [], []

    def add(network: nn.Module, passes: int, each: int) -> None:
        for layer in network.modules():
            if isinstance(layer, _BatchNorm):
                calls.extend([each] * passes)
                channels.extend([layer.num_features] * passes)

    add(method.student.backbone, sizes, 2)  # one pass for each size of views
    add(method.student.projector, 1, 2)
    if method.teacher is not None and not (recipe.method == "moco" and settings.split_bn > 1):  # dealt keys have their group's statistics
        add(method.teacher, 1, 1)
    return calls, channels


def _method(method: Method, recipe: Recipe, settings: object, batch: int) -> tuple[int, int, int, int]:
    """(collectives, bytes added up, bytes gathered, bytes of images gathered) of the method's own code."""
    if recipe.method == "moco":
        keys, out = settings.key_views * batch, settings.projector.out
        once = _FLOAT * keys * out
        if settings.split_bn == 1:
            return 1, 0, once, 0
        side = recipe.views[0].size if not hasattr(recipe.views, "global_size") else recipe.views.global_size
        # images, their keys back, keys for the queue; and one sum for the running statistics of the groups (mean and variance of each channel)
        statistics = _FLOAT * 2 * sum(layer.num_features for layer in method.teacher.modules() if isinstance(layer, _BatchNorm))
        return 4, statistics, 2 * once, _HALF * 3 * side**2 * keys
    if recipe.method == "dino":
        return 1, _FLOAT * settings.out, 0, 0
    if recipe.method == "swav":
        rounds = 1 + settings.sinkhorn_iterations
        queue = _FLOAT * 2 * batch * settings.projector.out if settings.queue else 0
        return 2 * rounds + (settings.queue > 0), _FLOAT * 2 * rounds * settings.prototypes, queue, 0
    embeddings = _FLOAT * 2 * batch * settings.projector.out  # simclr: both global views, and their gradient back
    return 2, embeddings, embeddings, 0
