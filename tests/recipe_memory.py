"""The memory that a recipe's step takes, counted on tensors without content, and the line of its header that says so.

python tests/recipe_memory.py [NAME ...]            # writes the lines, of all recipes or of these
python tests/recipe_memory.py --check [NAME ...]    # says which differ, and fails
"""

from __future__ import annotations

import re
import sys
import weakref
from typing import Any

import torch
from recipe_docs import rewrite
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl.config.recipe import load_recipe, recipe_names, recipe_path
from fastssl.methods import METHODS
from fastssl.methods.base import Views
from fastssl.methods.distill import FrozenTeacher
from fastssl.models.backbones import create_backbone
from fastssl.models.recompute import recompute_blocks
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.plan.draw import IMAGENET
from fastssl.training.networks import _only_multiplies

#: Of a card of 80 GB what a run is planned with; the rest is the allocator's.
CARD = 0.9 * 80e9


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are alive, ``now`` and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (one.untyped_storage() for one in tree_leaves(out) if isinstance(one, Tensor)):
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, count: int) -> None:
        self.seen.discard(key)
        self.now -= count


def without_content(network: nn.Module, mode: FakeTensorMode) -> int:
    """Put tensors without content in the place of the network's, those of convolutions and linear layers bfloat16.
    Returns the bytes of the float32 network, its gradients and its optimiser's averages besides.
    """
    seen: dict[int, Tensor] = {}
    total = 0
    for layer in network.modules():
        dtype = torch.bfloat16 if _only_multiplies(layer) else None
        for place in (layer._parameters, layer._buffers):
            for name, tensor in place.items():
                if tensor is not None and id(tensor) not in seen:
                    total += tensor.nbytes * (3 if tensor.requires_grad else 1)
                    empty = mode.from_tensor(tensor.detach().to(dtype))
                    trained = isinstance(tensor, nn.Parameter)
                    seen[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
                if tensor is not None:
                    place[name] = seen[id(tensor)]
    return total + sum(tensor.nbytes for tensor in seen.values())


def step_bytes(name: str, *, checkpoint: bool = False) -> int:
    """Most bytes alive in a step of the recipe ``name`` at its own batch in one part, in bfloat16: views, teacher,
    student, backward pass. A convolution's workspace is not in it.
    """
    recipe = load_recipe(name)
    batch, kind = recipe.train.batch_size, METHODS[recipe.method][0]
    backbone = create_backbone(recipe.arch, drop_path=recipe.drop_path, say=lambda text: None)
    more = {}
    if recipe.method == "distill":  # a teacher as SEED's smallest
        teacher = create_backbone("resnet50")
        more["teacher"] = FrozenTeacher(teacher, recipe.distill.teacher_size, given=IMAGENET, seen=IMAGENET, about={})
    method = kind(backbone, recipe.settings, views=Views(batch, recipe.pair_weights), **more).train()
    if checkpoint:
        assert recompute_blocks(method.student.backbone) == ""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fixed = without_content(method, mode) + sum(without_content(one, mode) for one in method.networks[1:] if more)
    with mode, Alive() as alive:
        shapes = [(spec.count * batch, spec.size, spec.size, 3) for spec in recipe.views]
        views = [torch.empty(shape, dtype=torch.bfloat16).permute(0, 3, 1, 2) for shape in shapes]
        noise = {key: torch.empty(value.shape, dtype=torch.int64) for key, value in method.noise(0, 0, 0).items()}
        if (drop := method.student.drop) is not None:
            drop.uniforms = torch.empty(drop.layers, method.views.count * batch)
        images, rates = method.images(views), method.rates(900, RunLength(1000, 10))
        with torch.autocast("cpu", torch.bfloat16):
            targets = method.targets(images, noise, rates)
            loss = method(images, targets, rates).loss
        loss.backward()
        return fixed + alive.peak


def line(name: str) -> str:
    """What the recipe's header says."""
    batch, whole = load_recipe(name).train.batch_size, step_bytes(name)
    text = f"# Memory: {gigabytes(whole)} at the peak of a step of {batch} (counted, bfloat16)"
    if whole <= CARD:
        return f"{text}: one card of 80 GB runs it as it is.\n"
    less = gigabytes(step_bytes(name, checkpoint=True))
    return f"{text}; on one card of 80 GB: --set train.checkpoint=true, {less}.\n"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.0f} GB" if count >= 1e9 else f"{count / 1e9:.1f} GB"


def with_memory(text: str, line: str) -> str:
    """A recipe's text with ``line`` at the end of its header, in the place of the one before."""
    text = re.sub(r"^# Memory:.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\A((?:#.*\n)*)", lambda header: header[1] + line, text)


def main(argv: list[str]) -> int:
    names = [one for one in argv if one != "--check"] or recipe_names()
    pages = {recipe_path(name): lambda text, name=name: with_memory(text, line(name)) for name in names}
    return rewrite(pages, check="--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
