"""The networks of a step: as a run begins with them, in which memory layout they compute, and with which weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastssl.config.recipe import Recipe
from fastssl.errors import FastSSLError
from fastssl.evaluate.trained import Trained
from fastssl.methods import METHODS
from fastssl.methods.base import Method, Views
from fastssl.models.backbones import create_backbone, plain_arch, require_sizes
from fastssl.pipelines.plan.multicrop import MultiCrop
from fastssl.training.teacher import load_teacher


def initial_backbone(
    recipe: Recipe, seed: int, say: Callable[[str], None] = lambda text: None, init: Trained | None = None
) -> nn.Module:
    """The backbone as a run with this seed begins with it, on the CPU: the same weights at every call.

    Args:
        init: whose weights it begins with; None: random ones.
        say: is told which settings of the recipe change nothing in this network. A recipe may be for other networks,
            too: that is no warning.

    Raises:
        FastSSLError: no such network, ``init`` of another, or a size of views or probe that the network does not take.
    """
    torch.manual_seed(seed)
    first: dict[str, Any] = {"init": recipe.init, "zero_init_residual": recipe.zero_init_residual}
    if init is not None:
        if init.arch != plain_arch(recipe.arch):
            raise FastSSLError(f"the weights {init.name} are those of {init.arch}, not of {recipe.arch}")
        if first != {"init": "timm", "zero_init_residual": False}:
            say(f"init and zero_init_residual change nothing: the run begins with {init.name}")
        first = {}
    backbone = create_backbone(recipe.arch, drop_path=recipe.drop_path, say=say, **first)
    if init is not None:
        backbone.load_state_dict(init.backbone.state_dict())
    require_sizes(backbone, recipe.arch, picture_sizes(recipe))
    try:
        require_sizes(backbone, recipe.arch, {f"views.{n}": spec.size for n, spec in enumerate(recipe.views_at(0))})
    except FastSSLError as error:
        why = str(error).partition(";")[0]
        raise FastSSLError(f"progressive.size={recipe.progressive.size:g}: {why}; choose another share") from error
    return backbone


def new_method(recipe: Recipe, seed: int, batch_size: int, ranks: int, **how: Any) -> Method:
    """The recipe's method as a run begins with it, on the CPU, for ``batch_size`` samples a step on each rank; ``how``:
    of ``initial_backbone``.

    Raises:
        FastSSLError: a batch that does not fit the method's numbers, no memory for the networks, or as
            ``initial_backbone``.
    """
    kind: Callable[..., Method] = METHODS[recipe.method][0]
    views = Views(batch_size, recipe.pair_weights, ranks)
    backbone = initial_backbone(recipe, seed, **how)
    more = {"teacher": load_teacher(recipe)} if recipe.method == "distill" else {}
    try:
        generator = torch.Generator().manual_seed(seed)
        return kind(backbone, recipe.settings, views=views, generator=generator, **more)
    except ValueError as error:
        batch = recipe.train.batch_size
        raise FastSSLError(f"batch of {batch}: {error}; --batch-size or --set changes that") from error
    except RuntimeError as error:  # torch's allocator: "you tried to allocate ... bytes"
        raise FastSSLError(
            f"no memory for the networks of {recipe.method} ({' '.join(str(error).split())[:120]}); lower "
            "its sizes (queue, out, prototypes, projector.hidden) with --set"
        ) from error


def picture_sizes(recipe: Recipe) -> dict[str, int]:
    """Sides of the pictures that the network will see, by the recipe's key."""
    views = recipe.views
    if isinstance(views, MultiCrop):
        sizes = {"views.global_size": views.global_size}
        if views.local_count:
            sizes["views.local_size"] = views.local_size
    else:
        sizes = {f"views.{number}.size": spec.size for number, spec in enumerate(views)}
    return {**sizes, "probe.size": recipe.probe.size}


# ---------------------------------------------------------------------- memory layout


def require_channels_last(images: Tensor) -> None:
    """Raise ValueError where ``images`` is not (N, C, H, W) in channels-last memory."""
    if images.dim() != 4 or not images.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"the step takes images (N, 3, S, S) in channels-last memory, got {tuple(images.shape)} with "
            f"strides {images.stride()}: images.contiguous(memory_format=torch.channels_last)"
        )


@torch.no_grad()
def channels_last_breaks(network: nn.Module, images: Tensor) -> list[str]:
    """Names of the layers that got channels-last maps and gave others, as one silent ``.contiguous()`` does; empty: the
    layout holds throughout.

    The network is run once in evaluation mode and left as it was.

    Args:
        network: any; layers whose input or output is no map (N, C, H, W) do not count, nor do maps of one pixel, which
            have no layout.
        images: (N, 3, S, S) channels-last, on the network's device.
    """
    broken: list[str] = []

    def is_map(tensor: object) -> TypeGuard[Tensor]:
        return isinstance(tensor, Tensor) and tensor.dim() == 4 and min(tensor.shape[1], tensor.shape[2:].numel()) > 1

    def watch(name: str, inputs: tuple[object, ...], output: object) -> None:
        if inputs and is_map(inputs[0]) and is_map(output):
            before, after = (t.is_contiguous(memory_format=torch.channels_last) for t in (inputs[0], output))
            if before and not after:
                broken.append(name)

    leaves = [(name, layer) for name, layer in network.named_modules() if next(layer.children(), None) is None]
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: watch(name, inputs, output))
        for name, layer in leaves
    ]
    modes = [(layer, layer.training) for layer in network.modules()]
    try:
        network.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, training in modes:
            layer.training = training
    return broken


# ---------------------------------------------------------------------- bfloat16 weights


#: Layers whose weights autocast casts to bfloat16; all others compute with their float32 parameters.
_CAST_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _only_multiplies(layer: nn.Module) -> bool:
    """Whether the layer's weights go into the product as they are. Some kinds standardise them first, in float32, and
    are left to autocast.
    """
    kinds = [kind for kind in _CAST_LAYERS if isinstance(layer, kind)]
    return any(type(layer).forward is kind.forward for kind in kinds) or type(layer).__name__ == "Conv2dSame"


class Bf16Weights:
    """A copy of a network that computes with bfloat16 weights where autocast would; they are cast once a step.

    Autocast casts a weight whenever a layer needs it, tensor by tensor, and in a network without gradient for every
    pass. Here all are filled from the float32 weights in one go, and the student's gradients come back the same way.
    The numbers are those of autocast to the last bit.

    Every other parameter and every buffer (BatchNorm's statistics, position embeddings) is the very tensor of the
    original, so that there is one truth.

    Args:
        original: in float32, on its device already, in training mode; it may not be replaced or moved afterwards.

    Attributes:
        network: the copy; to be called under autocast to bfloat16.
    """

    def __init__(self, original: nn.Module):
        layers = [layer for layer in original.modules() if _only_multiplies(layer)]
        cast = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}
        shared = {id(t): t for t in (*original.parameters(), *original.buffers()) if id(t) not in cast}
        self.network: nn.Module = copy.deepcopy(original, shared)
        names = [name for name, parameter in original.named_parameters() if id(parameter) in cast]
        self._full: list[Tensor] = [original.get_parameter(name) for name in names]
        self._half: list[Tensor] = [self._replace(name) for name in names]

    def _replace(self, name: str) -> nn.Parameter:
        path, _, last = name.rpartition(".")
        layer = self.network.get_submodule(path)
        full = getattr(layer, last)
        half = nn.Parameter(full.detach().to(torch.bfloat16), requires_grad=full.requires_grad)
        setattr(layer, last, half)
        return half

    @torch.no_grad()
    def refresh(self) -> None:
        """Fill the bfloat16 weights from the float32 ones."""
        torch._foreach_copy_(self._half, self._full)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add what a backward pass left at the bfloat16 weights to the float32 weights' gradients, and clear it."""
        pairs = [(full, half.grad) for full, half in zip(self._full, self._half) if half.grad is not None]
        again = [(full.grad, grad) for full, grad in pairs if full.grad is not None]
        fresh = [(full, grad) for full, grad in pairs if full.grad is None]
        if again:
            torch._foreach_add_([total for total, _ in again], [grad for _, grad in again])
        if fresh:
            totals = [torch.empty_like(full) for full, _ in fresh]
            torch._foreach_copy_(totals, [grad for _, grad in fresh])
            for (full, _), total in zip(fresh, totals):
                full.grad = total
        for half in self._half:
            half.grad = None
