"""Recipes: one yaml file holds every number of a published row. It is read into dataclasses that are owned by the parts
they configure (``ViewSpec``, ``MoCoConfig``, ...); a key that does not exist is an error that names the right one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from fastssl.errors import FastSSLError
from fastssl.losses.pairs import PairWeights
from fastssl.methods import METHODS, DINOConfig, EMPSSLConfig, MoCoConfig, ReSAConfig, SimCLRConfig, SwAVConfig
from fastssl.methods.base import MethodConfig
from fastssl.methods.distill import DistillConfig
from fastssl.optim.optimizers import OptimConfig
from fastssl.pipelines.plan.draw import Normalisation, ViewSpec
from fastssl.pipelines.plan.multicrop import AUGMENTATION, PRESETS, MultiCrop, smaller
from fastssl.utils.settings import (
    BY_FORM,
    LIST,
    MAPPING,
    AutoSwitch,
    BelowOne,
    Count,
    CountOrAuto,
    Natural,
    NotNegative,
    Real,
    Switch,
    Whole,
    in_words,
    settings,
)
from fastssl.utils.suggest import did_you_mean, nearest
from fastssl.utils.yaml_file import parse_yaml, read_yaml, shown

RECIPE_FOLDER = Path(__file__).parents[1] / "recipes"
if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


@settings("train")
class TrainConfig:
    """The loop.

    Attributes:
        epochs: passes over the data.
        samples: photos times epochs of a run: unless epochs are asked for, they follow from the number of photos, and
            with them all that is counted in epochs; ``epochs`` is then the length for which those numbers were written.
            None, as in a run's config.yaml: ``epochs`` holds for any number of photos.
        batch_size: samples a step.
        window: files of a set that are shuffled at a time, for remote or spinning storage: an epoch takes them in a
            random order, and a batch's photos are of one such group. None: all photos are shuffled among each other.
        accumulate: parts into which a step's batch is cut for the pass with gradient, to save memory: the loss and the
            gradients are the whole batch's, BatchNorms see a part at a time. ``auto``: the fewest that fit, tried at
            the start of a run: 1, 2, 4, ...
        checkpoint: keep the inputs of the backbone's blocks alone for the backward pass, and compute what is inside
            again (``models.recompute``): the same step, in a fraction of the memory, for a forward pass more.
        compile: compile the networks with ``torch.compile`` (minutes at the start); ``auto``: as graph, in a long run.
        graph: capture the whole step as a CUDA graph, colour operations included: one launch a step. ``auto``: in one
            process on a GPU, unless the run is deterministic.
        amp: ``auto`` (bfloat16 on a GPU, float32 on the CPU), ``bf16`` or ``off``. On a CPU torch's (2.15) bfloat16
            may find NaN where a convolution with a stride meets maps of one pixel (views below 32 px).
        log_every: steps between two lines of metrics.jsonl; the host reads the device's metrics only then.
        checkpoint_minutes: a checkpoint is written when the last one is older than this (0: behind every step), and at
            the end; the first one a minute after the start at the latest.
        keep_last: how many checkpoints are kept, the newest included: what a damaged one falls back to.
        milestone_epochs: epochs between two checkpoints that are kept forever; 0: none.
        on_bad: what to do with a damaged picture: ``fail`` or ``skip``.
        skip_nonfinite: how many steps of the run may be passed over because their loss or gradient is not finite (0:
            the first one ends the run); the state is copied every ``log_every`` steps, to go back to.
        deterministic: only algorithms that give the same bits at every call. On a CPU they do so anyway; on a GPU it
            costs speed, and a network that has an operation without such an algorithm is refused at its first step.
    """

    epochs: Count = 200
    samples: Count | None = None
    batch_size: Annotated[Whole, Field(ge=2)] = 512
    window: Count | None = None
    accumulate: CountOrAuto = 1
    checkpoint: Switch = False
    compile: AutoSwitch = "auto"
    graph: AutoSwitch = "auto"
    # yaml takes the bare word off for false
    amp: Annotated[Literal["auto", "bf16", "off"], BeforeValidator(lambda it: "off" if it is False else it)] = "auto"
    log_every: Count = 50
    checkpoint_minutes: NotNegative = 10.0
    keep_last: Count = 2
    milestone_epochs: Natural = 0
    on_bad: Literal["fail", "skip"] = "fail"
    skip_nonfinite: Natural = 0
    deterministic: Switch = False

    def __post_init__(self) -> None:
        if self.batch_size % self.parts or self.batch_size < 2 * self.parts:
            what = f"the batch of {self.batch_size} into equal parts of at least 2 samples"
            raise ValueError(f"accumulate={self.parts} must divide {what}")

    @property
    def parts(self) -> int:
        """``accumulate``, or where its tries begin."""
        return 1 if self.accumulate == "auto" else self.accumulate


@settings("probe")
class ProbeConfig:
    """The checks during and after training; they need labels only for kNN and linear.

    Attributes:
        size: pixels of the centre-crop view that the network is probed with.
        crop: side of the centre square as a share of the shorter side (0.875: the usual 224 of 256; 1 for photos that
            are cut tight already).
        every_epochs: epochs between two online probes (0: only at the end).
        online_samples: bank and query pictures together of the online probe.
        final_samples: pictures of the probe at the end (bank and queries together; 0: all).
        teacher: at the end also probe the teacher (the key network), which is saved beside the student in any case.
        reestimate_bn: at the end also probe with re-estimated BatchNorm statistics from that many centre-crop views,
            unlabelled: the stored ones are a mix of all kinds of views. 0: not.
    """

    size: Annotated[Whole, Field(ge=8)] = 224
    crop: Annotated[Real, Field(gt=0, le=1)] = 0.875
    every_epochs: Natural = 5
    online_samples: Annotated[Whole, Field(ge=20)] = 2000
    final_samples: Natural = 20000
    teacher: Switch = False
    reestimate_bn: Natural = 0

    def __post_init__(self) -> None:
        if self.reestimate_bn == 1:
            raise ValueError("reestimate_bn must be 0 (not at all) or at least 2 photos, got 1")
        if 0 < self.final_samples < 20:
            raise ValueError(f"final_samples must be 0 (all photos) or at least 20, got {self.final_samples}")


@settings()
class ProgressiveConfig:
    """Small views first, full ones at the end: most of what is learned is cheaper to learn from fewer pixels. Source:
    FastDINOv2 (Zhang et al., arXiv 2507.03779).

    Attributes:
        epochs: the share of the epochs, from the first one on, with small views, but never the last one; 0: none.
        size: their sides as a share of the views', see ``pipelines.plan.multicrop.smaller``.
    """

    epochs: BelowOne = 0.0
    size: Annotated[float, Field(gt=0, lt=1)] = 0.5


@settings()
class Recipe:
    """All numbers of a run but the data.

    Attributes:
        arch: the network the recipe was made for; ``--arch`` may put another in its place.
        method: ``moco``, ``dino``, ``swav``, ``simclr``, ``resa``, ``empssl`` or ``distill``; its numbers stand in the
            section of that name, and no other section may be given.
        init: ``timm`` (what the network's definition there does) or ``kaiming`` (``models.backbones.kaiming_init``).
        zero_init_residual: begin with every residual block as the identity
            (``models.backbones.zero_residual_branches``).
        frozen_bn: the backbone's BatchNorms keep the running statistics that they came with, and normalise with them in
            training, too: for a run that begins with weights. Scale and shift learn.
        drop_path: stochastic depth of the deepest block, of the student alone, for networks that have it.
        views: two views as a list of groups, or a multi-crop (``MultiCrop``), which a preset's name may stand for.
        progressive: smaller views in the first epochs.
        full_samples: pictures that a whole run of the published recipe (``full_recipe``) sees (epochs x data set), the
            measure of "what share of a full recipe was this"; None where the recipe is the full one.
    """

    arch: str
    method: MethodName = "moco"
    init: Literal["timm", "kaiming"] = "timm"
    zero_init_residual: Switch = False
    frozen_bn: Switch = False
    drop_path: BelowOne = 0.0
    views: Annotated[Annotated[list[ViewSpec], LIST] | Annotated[MultiCrop, MAPPING], BY_FORM] = field(
        default_factory=list
    )
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    moco: MoCoConfig = field(default_factory=MoCoConfig)
    dino: DINOConfig = field(default_factory=DINOConfig)
    swav: SwAVConfig = field(default_factory=SwAVConfig)
    simclr: SimCLRConfig = field(default_factory=SimCLRConfig)
    resa: ReSAConfig = field(default_factory=ReSAConfig)
    empssl: EMPSSLConfig = field(default_factory=EMPSSLConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    full_samples: Whole | None = None
    full_recipe: str | None = None

    def __post_init__(self) -> None:
        sizes, count = {spec.size for spec in self.views}, sum(spec.count for spec in self.views)
        if not isinstance(self.views, MultiCrop) and (count != 2 or len(sizes) != 1):
            raise ValueError(
                f"views as a list must be two views of one size; this one has {count} of sizes {sorted(sizes)}. "
                "Local views come with a multi-crop: `views: {threshold: 0.3, local_count: 6, ...}`"
            )
        if self.progressive.epochs and self.settings.view_epochs:
            raise ValueError("progressive makes other views; distill.cache_epochs keeps those of the first epochs")
        if self.progressive.epochs and sizes == {spec.size for spec in smaller(self.views, self.progressive.size)}:
            raise ValueError(f"progressive.size={self.progressive.size:g} leaves the views as they are; give less")

    @property
    def small_epochs(self) -> int:
        """How many epochs, from the first one on, have small views."""
        return min(round(self.progressive.epochs * self.train.epochs), self.train.epochs - 1)

    def views_at(self, epoch: int) -> list[ViewSpec] | MultiCrop:
        """The views of an epoch: of the same kind and number as ``views``."""
        return smaller(self.views, self.progressive.size) if epoch < self.small_epochs else self.views

    @property
    def pair_weights(self) -> PairWeights:
        """What the pairs of views weigh; also the number of local views."""
        if isinstance(self.views, MultiCrop):
            return PairWeights(self.views.local_count, *self.views.pair_weights)
        return PairWeights(0, 1.0, 0.0)

    @property
    def settings(self) -> MethodConfig:
        """The section of the recipe's method."""
        section: MethodConfig = getattr(self, self.method)
        return section


def recipe_names() -> list[str]:
    """Names of the recipes that install with the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe: one of ours by name, or any yaml file by path. Raises FastSSLError, with the nearest of
    ours, where there is neither.
    """
    path, ours = Path(name), RECIPE_FOLDER / f"{name}.yaml"
    if path.suffix in (".yaml", ".yml"):
        if not path.exists():
            raise FastSSLError(f"{name}: no such recipe file")
        return path
    if not ours.is_file():
        lists = "`fastssl recipes` lists them, a .yaml path works too"
        raise FastSSLError(f"no recipe {name!r}{nearest(name, recipe_names())}; {lists}")
    return ours


def load_recipe(
    name: str, overrides: Mapping[str, Any] | None = None, normalisation: Normalisation | None = None
) -> Recipe:
    """Read and check a recipe: one of ours by name, or a yaml file by path. Raises FastSSLError, with file and key, for
    an unknown recipe or key (with the nearest), a wrong type, or a value out of range.

    With another batch than the file's the whole schedule of the learning rate follows, see ``with_batch``; epochs take
    the place of ``train.samples``. ``overrides``, as ``{"optim.lr": "0.1", "views.0.size": 64}``, are taken as they
    are; text is yaml. ``normalisation``: of the views, where neither recipe nor overrides say theirs.
    """
    path, overrides = recipe_path(name), overrides or {}
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise FastSSLError(f"{path}: a recipe is a mapping of keys to values")
    train = tree.get("train")
    own_batch = (train if isinstance(train, dict) else {}).get("batch_size", TrainConfig.batch_size)
    # A whole design of the views first, wherever it stands: what was said of single numbers is a change of it.
    for key, text in sorted(overrides.items(), key=lambda item: ("views", "views.preset", item[0]).index(item[0])):
        not_one = f"--set {key}: {shown(text)} is not a value"
        _override(tree, key, parse_yaml(text, not_one) if isinstance(text, str) else text)
    if normalisation is not None:
        _normalise(tree, normalisation)
    recipe = build_recipe(tree, where=path.name)
    if "train.epochs" in overrides and "train.samples" not in overrides:
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, samples=None))
    if not isinstance(own_batch, int) or own_batch < 2:  # an override mended it: nothing to be in proportion to
        return recipe
    return with_batch(recipe, recipe.train.batch_size, own_batch, given=overrides)


def _normalise(tree: dict[str, Any], normalisation: Normalisation) -> None:
    """Give all views of a recipe's plain values a normalisation, where they have none."""
    if isinstance(views := tree.get("views"), str):
        tree["views"] = views = _preset(views, "views")
    parts = views if isinstance(views, list) else [views.setdefault("augment", {})] if isinstance(views, dict) else []
    for part in (part for part in parts if isinstance(part, dict)):
        for name, values in normalisation._asdict().items():
            part.setdefault(name, list(values))


def with_batch(recipe: Recipe, batch: int, own_batch: int, *, given: Container[str] = frozenset()) -> Recipe:
    """The recipe with steps of ``batch`` photos, and with ``optim.warmup_lr`` and ``optim.final_lr``, which were
    written for ``own_batch``, in proportion; keys (``optim.final_lr``) or sections (``optim``) of ``given`` stay.
    """
    keep = [name for name in ("warmup_lr", "final_lr") if is_given(f"optim.{name}", given)]
    optim = recipe.optim if batch == own_batch else recipe.optim.scaled(batch / own_batch, keep)
    return dataclasses.replace(recipe, optim=optim, train=dataclasses.replace(recipe.train, batch_size=batch))


def is_given(key: str, given: Container[str]) -> bool:
    """Whether a key, or the whole section that it stands in, is among those that were asked for."""
    return key in given or key.split(".")[0] in given


def build_recipe(tree: Mapping[str, Any], *, where: str) -> Recipe:
    """A ``Recipe`` from plain values (as yaml gives them); ``where`` opens every error message."""
    method = tree.get("method", "moco")
    for other in METHODS:
        if other in tree and method in list(METHODS) and other != method:
            why = f"has no effect with method: {method}; its numbers stand under {method}.*"
            raise FastSSLError(f"{where}: {other}.* {why}")
    if isinstance(views := tree.get("views"), str):
        tree = {**tree, "views": _preset(views, f"{where}: views")}
    try:
        return _RECIPE.validate_python(tree)
    except ValidationError as mistakes:
        line, unknown = in_words(mistakes)
    if unknown:  # a section that does not exist is told by what was meant to stand in it
        key = next(_leaves(unknown))
        line = f"no key {key if len(key) <= 100 else shown(key)}{did_you_mean(key[:100], list(_keys(tree)))}"
    raise FastSSLError(f"{where}: {line}")


def _preset(name: object, where: str) -> dict[str, Any]:
    """A preset's design of the views; ``where`` opens the message if there is none of that name."""
    if not isinstance(name, str) or name not in PRESETS:
        hint = f"{nearest(str(name)[:100], PRESETS)}; there are {', '.join(PRESETS)}"
        raise FastSSLError(f"{where}: no preset {shown(name)}{hint}")
    return dict(PRESETS[name])


def _keys(tree: Mapping[str, Any]) -> Iterator[str]:
    """All keys of a recipe, with its views in the form that they have in ``tree``."""
    method, views = tree.get("method"), tree.get("views")
    plain = recipe_to_dict(Recipe("", method if method in list(METHODS) else "moco", views=MultiCrop()))
    if isinstance(views, list):
        plain["views"] = dict(enumerate([dataclasses.asdict(ViewSpec())] * len(views)))
    else:
        plain["views"]["augment"] = dict.fromkeys(AUGMENTATION)
    return _leaves(plain)


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values of all keys, resolved: what config.yaml holds, and what ``build_recipe`` reads back. Of the methods'
    sections only the recipe's own.
    """
    plain: dict[str, Any] = _RECIPE.dump_python(recipe, mode="json", exclude={*METHODS} - {recipe.method})
    return plain


def parse_overrides(pairs: Iterable[str]) -> dict[str, str]:
    """``["optim.lr=0.1"]`` -> ``{"optim.lr": "0.1"}``."""
    parsed = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise FastSSLError(f"--set {pair!r}: write key=value, for instance --set optim.lr=0.1")
        parsed[key.strip()] = value
    return parsed


def _override(tree: Any, key: str, value: Any) -> None:
    """Set ``a.b.0.c`` in nested mappings and lists, whether there is such a key or not."""
    if key == "views.preset":
        return _override_views(tree, value)
    parts, views = key.split("."), tree.get("views")
    if parts[0] == "views" and len(parts) > 1 and isinstance(views, str):  # of a preset one number is to be another
        tree["views"] = _preset(views, f"--set {key}")
    if parts[0] == "views" and len(parts) == 2 and isinstance(views, list) and not parts[1].isdigit():
        belongs = "a threshold belongs to a multi-crop, e.g. --set views.preset=sslight-cnn"
        raise FastSSLError(f"--set {key}: this recipe lists its two views (views.0.size ...); {belongs}")
    node, place = {"": tree}, ""
    for number, part in enumerate(parts):
        node = node[place] if isinstance(node, list) else node.setdefault(place, {})
        if isinstance(node, list) and not (part.isdigit() and int(part) < len(node)):
            raise FastSSLError(f"--set {key}: {part!r} is not a position in a list of {len(node)} (counted from 0)")
        if not isinstance(node, (dict, list)):
            raise FastSSLError(f"--set {key}: {'.'.join(parts[:number])} is a value, it holds no keys")
        place = int(part) if isinstance(node, list) else part
    node[place] = value


def _override_views(tree: dict[str, Any], name: Any) -> None:
    """Put a preset's design of the views in the place of the recipe's; how a view is augmented stays as it is."""
    before = tree.get("views")
    if isinstance(before, list):
        kept = [dict(view) for view in before if isinstance(view, dict)]
        for view, key in ((view, key) for view in kept for key in ("size", "count", "area", "center")):
            view.pop(key, None)
        before = {"augment": kept[0]} if kept else {}
        if len(kept) == 2 and kept[0] != kept[1]:  # each global view keeps its own; local ones are as the first
            before = {"global_1": kept[0], "global_2": kept[1], "local": kept[0]}
    # Of another preset's name nothing stays.
    tree["views"] = {**(before if isinstance(before, dict) else {}), **_preset(name, "--set views.preset")}


_RECIPE = TypeAdapter(Recipe)
