"""One training step: what the loop calls thousands of times, and what the benchmarks measure.

    views (uint8 crops and their colour table, or coloured already), grouped by size
      -> teacher: keys or probabilities             without gradient
      -> student: one pass for each size, loss, backward      in `train.accumulate` parts
      -> gradients averaged over the ranks
      -> optimiser, moving average, queue or centre

What is computed between views and loss is the method's (``methods/``). Three switches of the recipe change how it runs
and not what it computes: ``train.checkpoint`` keeps less for the backward pass, ``train.compile`` compiles the
networks, ``train.graph`` records all of the above as one CUDA graph. Where one cannot be had here, the step runs
without it and `TrainStep.fallbacks` says why.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.config.recipe import Recipe
from fastssl.distributed.collectives import any_rank, average_gradients
from fastssl.distributed.sync_batchnorm import synchronise_batchnorm
from fastssl.distributed.world import World
from fastssl.errors import FastSSLError, counted, is_out_of_memory, without_folders
from fastssl.evaluate.trained import Trained
from fastssl.methods.base import Rates
from fastssl.models.depthwise import use_own_gradient
from fastssl.models.group_batchnorm import not_compiled, ordinary_batchnorm
from fastssl.models.pointwise import use_matrix_products
from fastssl.models.recompute import recompute_blocks
from fastssl.optim.optimizers import apply_decay, clip_gradients, create_optimizer, parameter_groups, set_lr
from fastssl.optim.schedules import RunLength, half_cosine
from fastssl.pipelines.ops.device_colour import device_colour
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.training.cuda_graph import RecordedStep, Recorder, StepInputs, record_cuda_graph
from fastssl.training.networks import Bf16Weights, channels_last_breaks, new_method, require_channels_last
from fastssl.training.parts import Parts
from fastssl.training.room import fewest_parts
from fastssl.training.switches import SWITCHES, Trial, compare, left_out, trial
from fastssl.utils.compiled import RECOMPUTE
from fastssl.utils.host_memory import keep_freed_memory
from fastssl.utils.transfer import to_device


def numbers(rates: Mapping[str, float | bool]) -> dict[str, float]:
    """``rates`` without the switches."""
    return {name: value for name, value in rates.items() if not isinstance(value, bool)}


class TrainStep:
    """The networks, the optimiser, and the step that moves them. Nothing in the step waits for the device.

    The first call looks for breaks in the memory layout, compiles and records; it makes one step like all others.

    Args:
        recipe: arch, method, optimiser, and the switches in ``train``; its batch is that of all ranks together.
        device: where everything lives.
        amp: autocast to bfloat16.
        seed: of the first weights, of the queue's first content and of what is drawn for each step.
        record: how a step is recorded for ``train.graph``; tests give another.
        world: which of how many processes this is; the process group is there already.
        steps: of the whole run, for a switch that is ``auto``; 0: unknown, and taken for few.
        init: the weights that the backbones begin with; None: random ones.

    Attributes:
        check: whether the first call compares what it compiled or recorded with the eager step, and goes on without
            what differs. say: is told what takes minutes. To be set before that call.
        known: gives what a teacher said of samples' views in an epoch (``training.teacher``); None: it is asked.
        method: the networks, the queue or centre; what is saved.
        parts: into which the student's pass is cut. autocast: makes a context of the networks' precision.
        batch_size: samples a step on this rank. views: those that it takes, see ``take``.
        without_effect: a line for each setting of the recipe that changes nothing in this network, with the reason.
        fallbacks: {switch: why it is not used here}; also ``channels_last``, where a network does not keep the layout,
            ``compiled colour`` and ``compiled BatchNorm groups``.
        networks: student and, if there is one, teacher in the form that computes: with ``amp`` copies, see
            ``Bf16Weights``.
        bf16_weights: of student and teacher; none without ``amp``.
        prepared: whether the first call was made, and ``prepare_s``, the seconds of it that went before the step
            itself.
        takes_crops: whether the step wants uint8 crops and colour tables (``ViewLoader(colour=False)``), to record the
            colour with the rest.

    Raises:
        FastSSLError: no such network, or a batch that does not fit the ranks, the queue or the BatchNorm groups.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        *,
        amp: bool,
        seed: int,
        record: Recorder = record_cuda_graph,
        world: World = World(),  # noqa: B008 (frozen)
        steps: int = 0,
        init: Trained | None = None,
    ):
        self.recipe, self.device, self.amp, self.seed, self.world = recipe, device, amp, seed, world
        if device.type == "cpu":
            keep_freed_memory()
        total, parts = recipe.train.batch_size, recipe.train.parts
        if total % world.size or total // world.size < 2 * parts or total // world.size % parts:
            raise FastSSLError(
                f"train.accumulate={parts} and {counted(world.size, 'process')} must divide the batch of {total} into "
                "equal parts of at least 2 samples; --batch-size changes it"
            )
        groups = recipe.settings.student_groups
        if groups > 1 and groups // world.size % parts:
            raise FastSSLError(
                f"train.accumulate={parts} must divide the {groups // world.size} BatchNorm groups of the queries on "
                "each process (moco.split_bn_queries)"
            )
        self.batch_size = total // world.size
        self.views: Sequence[ViewSpec] = recipe.views_at(0)
        self.without_effect: list[str] = []
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = not recipe.train.deterministic  # every step has the same shapes
        self.fallbacks: dict[str, str] = {}
        if device.type == "mps":
            asked = {"bfloat16": recipe.train.amp == "bf16", "compile": recipe.train.compile is True}
            self.fallbacks |= {what: "nobody tried it on an Apple GPU" for what, wanted in asked.items() if wanted}
        method = new_method(recipe, seed, self.batch_size, world.size, say=self.without_effect.append, init=init)
        self.method = method.to(device).to(memory_format=torch.channels_last).train()
        if recipe.train.checkpoint and (reason := recompute_blocks(self.method.student.backbone)):
            self.fallbacks["checkpoint"] = reason
        if device.type == "cpu":
            for network in self.method.networks:
                use_own_gradient(network)
                use_matrix_products(network)
        if world.size > 1:
            self.method.synchronise(lambda network: synchronise_batchnorm(ordinary_batchnorm(network), device))
        if recipe.frozen_bn and not self.method.freeze_batchnorm():
            self.without_effect.append(f"frozen_bn changes nothing: {recipe.arch} has no BatchNorm")
        rated = parameter_groups(self.method, recipe.optim, list(self.method.student.backbone.parameters()))
        self.optimizer = create_optimizer(self.method, recipe.optim, rated)
        self._trained = [p for p in self.method.parameters() if p.requires_grad]
        self.bf16_weights: list[Bf16Weights] = []
        self.networks: list[nn.Module] = self.method.networks
        if amp:
            self.bf16_weights = [Bf16Weights(network) for network in self.networks]
            self.networks = [half.network for half in self.bf16_weights]
            for half in self.bf16_weights:  # a hook that knew the step would keep it alive, graph and all
                self.method.register_load_state_dict_post_hook(lambda *_, half=half: half.refresh())
        self.method.set_forward_modules(*self.networks)
        self.autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=amp)
        collect = self.bf16_weights[0].collect_gradients if amp else lambda: None
        groups = groups // world.size if groups > 1 else 0
        self.parts = Parts(self.method, parts, groups=groups, autocast=self.autocast, collect=collect)
        self._left_out = left_out(recipe.train, device, processes=world.size, steps=steps)
        self.known: Callable[[int, np.ndarray], np.ndarray] | None = None
        self.check, self.say, self._checked = False, lambda text: None, dict[str, str]()
        self._record = record
        self._recorded: RecordedStep | None = None
        self._switches: dict[str, bool] = {}
        self.prepared, self.prepare_s = False, 0.0
        if "graph" not in self._left_out and device.type != "cuda" and record is record_cuda_graph:
            self.fallbacks["graph"] = f"a CUDA graph needs an NVIDIA GPU, this is the {device.type}"
        self.takes_crops = self.switches["graph"] == "on"

    @property
    def switches(self) -> dict[str, str]:
        """{switch: ``on``, with the verdict of a check, or why not}."""
        known = {**self._checked, **self._left_out, **self.fallbacks}
        return {switch: known.get(switch, "on") for switch in SWITCHES}

    @property
    def recorded(self) -> bool:
        """Whether calls replay a recorded step."""
        return self._recorded is not None

    def noise(self, epoch: int, step: int, index: np.ndarray | Sequence[int] | None = None) -> dict[str, Tensor]:
        """What is drawn for step ``step`` of ``epoch``, by name, on the device: a function of the seed and these.

        Args:
            index: (B,) the samples of this rank's batch; None: 0 .. B - 1.
        """
        drawn = self.method.noise(self.seed, epoch, step)
        samples = np.arange(self.batch_size) if index is None else np.asarray(index)
        if self.known is not None:
            drawn["teacher"] = self.known(epoch, samples)
        if self.method.student.drop is not None:
            drawn["drop_path"] = self.method.student.drop.draw(self.seed, epoch, samples, self.method.views.count)
        return {name: to_device(array, self.device) for name, array in drawn.items()}

    def rates(self, step: int, run: RunLength) -> dict[str, float | bool]:
        """What the schedules say for ``step`` (of the whole run), by name: numbers, and the method's switches."""
        optim = self.recipe.optim
        found: dict[str, float | bool] = {"lr": optim.rate(step, run, self.recipe.train.batch_size)}
        if optim.final_weight_decay is not None:
            progress = step / run.total_steps
            found["weight_decay"] = half_cosine(progress, optim.weight_decay, optim.final_weight_decay)
        return {**found, **self.method.rates(step, run)}

    @property
    def view_dtype(self) -> torch.dtype:
        """What views are best given in: the first layer's own input type, so that no pass casts them again."""
        return torch.bfloat16 if self.amp else torch.get_default_dtype()

    def __call__(
        self,
        views: list[Tensor],
        noise: Mapping[str, Tensor],
        rates: Rates,
        *,
        tables: Sequence[Tensor] = (),
    ) -> Tensor:
        """Forward, backward, optimiser, teacher, queue.

        Args:
            views: as ``ViewLoader`` gives them.
            noise: see ``noise``.
            rates: see ``rates``; the same names at every call.
            tables: the colour tables that belong to uint8 crops (``Batch.tables``); none: ``views`` are coloured and
                normalised.

        Returns:
            the method's metrics, (len(method.METRICS),) float32 on the device. With ``train.graph`` the next step
            writes over them.

        Raises:
            ValueError: the views are not in channels-last memory, or not those of one batch.
        """
        for view in () if tables else views:  # crops are coloured here, into the right layout
            require_channels_last(view)
        wanted = self.method.views.count * self.batch_size
        if sum(map(len, views)) != wanted:
            raise ValueError(f"{sum(map(len, views))} views, but a batch of {self.batch_size} has {wanted}")
        inputs = StepInputs(views, noise, rates, tables)
        if not self.prepared:
            started = time.monotonic()
            self._prepare(inputs)
            self.prepare_s += time.monotonic() - started
        elif self._recorded is not None and inputs.switches() != self._switches:  # what was recorded is another step
            self._recorded = None
            self._try("graph", self._capture, inputs)
        self._switches = inputs.switches()
        return (self._recorded or self._run)(inputs)

    def take(self, views: Sequence[ViewSpec]) -> None:
        """Let the next steps be of these views; where their sizes are others, the next call compiles and records anew,
        of the switches that have not failed before.
        """
        if list(views) != list(self.views):
            self.close()
            self.method.set_forward_modules(*self.networks)
            self.views, self.prepared = views, False

    def close(self) -> None:
        """Let go of a recorded step; later calls would run eagerly. To be called before the processes part (see
        ``joined``).
        """
        if self._recorded is not None:
            self._recorded.close()
            self._recorded = None

    # ------------------------------------------------------------------ the step itself

    def _run(self, inputs: StepInputs) -> Tensor:
        views, noise, rates, tables = inputs
        method = self.method
        images = method.images(self.coloured(views, tables) if tables else views)
        with self.autocast():
            targets = method.targets(images, noise, rates)
        output = self.parts.backward(images, targets, noise, rates)
        for parameter in output.frozen:
            parameter.grad = None
        average_gradients(self._trained)
        self.update(rates)
        self.clear_gradients()
        method.after_step(targets, output.pair, rates)
        if self.device.type == "cuda" and (reason := not_compiled()):
            self.fallbacks["compiled BatchNorm groups"] = reason
        return output.metrics

    def coloured(self, crops: Sequence[Tensor], tables: Sequence[Tensor]) -> list[Tensor]:
        """The views of uint8 crops, as ``ViewLoader`` gives them with ``colour=False``."""
        colours = [device_colour(spec, self.view_dtype, self.device) for spec in self.views]
        views = [colour(*given) for colour, *given in zip(colours, crops, tables)]
        if reasons := [colour.fallback for colour in colours if colour.fallback]:
            self.fallbacks["compiled colour"] = reasons[0]
        return views

    def update(self, rates: Rates) -> None:
        """Clipping, weight decay and the optimiser's step on the gradients that are there, then the moving average."""
        clip_gradients(self._trained, self.recipe.optim.clip_grad)
        if "weight_decay" in rates:
            apply_decay(self.optimizer, rates["lr"], rates["weight_decay"])
        set_lr(self.optimizer, rates["lr"])
        self.optimizer.step()
        if "momentum" in rates:
            self.method.update_teacher(rates["momentum"])
        self._refresh()

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        for half in self.bf16_weights:
            half.network.zero_grad(set_to_none=True)

    def _refresh(self) -> None:
        for half in self.bf16_weights:
            half.refresh()

    # ------------------------------------------------------------------ the first call

    def _prepare(self, inputs: StepInputs) -> None:
        """Compile and record what is on, on the first batch; the state is afterwards as it was before."""
        self.prepared = True
        sample = torch.zeros(2, *inputs.views[0].shape[1:], device=self.device)
        sample = sample.contiguous(memory_format=torch.channels_last)
        if broken := channels_last_breaks(self.method.student.backbone, sample):
            self.fallbacks["channels_last"] = f"{self.recipe.arch} leaves the layout behind {', '.join(broken[:3])}"
        if self.recipe.train.accumulate == "auto":
            self.parts.count = fewest_parts(self, inputs)
        wanted = [switch for switch, how in self.switches.items() if how == "on"]
        eager = trial(self, self._run, inputs) if self.check and wanted else None
        for switch in wanted:
            self._try(switch, self._compile if switch == "compile" else self._capture, inputs)
            if eager and switch not in self.fallbacks:  # all ranks make the steps of a trial, or none
                self._try(switch, self._verify, switch, eager, inputs)

    def _try(self, switch: str, prepare: Callable[..., None], *given: Any) -> None:
        undo, reason = self.snapshot(), ""
        try:
            prepare(*given)
        except Exception as error:  # whatever a compiler or a capture may fail with, the step runs without it
            if is_out_of_memory(error) and getattr(self.recipe.train, switch) is True:
                raise
            # A compiler quotes its command line, with all folders in it.
            reason = f"{type(error).__name__}: {without_folders(' '.join(str(error).split()))[:200]}"
        finally:
            self.clear_gradients()
            undo()
        if any_rank(bool(reason)):  # all ranks do the same, or wait for each other forever
            self.fallbacks[switch] = reason or "another process cannot"
            if switch == "compile":
                self.method.set_forward_modules(*self.networks)
            else:
                self.close()

    def _compile(self, inputs: StepInputs) -> None:
        if torch._dynamo.config.disable:
            raise FastSSLError("switched off by TORCH_COMPILE_DISABLE")
        self.say(f"compiling {' and '.join(('student', 'teacher')[: len(self.networks)])}, which may take minutes")
        # A compiler that gives up half way through a block would forget what surrounds its second pass.
        whole = self.recipe.train.checkpoint
        compiled = (
            torch.compile(network, dynamic=False, fullgraph=whole, options=RECOMPUTE) for network in self.networks
        )
        self.method.set_forward_modules(*compiled)
        self._run(inputs)

    def _capture(self, inputs: StepInputs) -> None:
        self._recorded = RecordedStep(self._run, inputs, undo=self.snapshot(), record=self._record)

    def _verify(self, switch: str, eager: Trial, inputs: StepInputs) -> None:
        self._checked[switch] = compare(eager, trial(self, self._recorded or self._run, inputs), amp=self.amp)

    def tensors(self) -> dict[str, Tensor]:
        """All that a step changes: networks, queue or centre by name, the optimiser's as ``optimizer.NUMBER.NAME``."""
        states = enumerate(self.optimizer.state.values())
        moments = {f"optimizer.{number}.{name}": value for number, state in states for name, value in state.items()}
        return self.method.state_dict() | {name: value for name, value in moments.items() if isinstance(value, Tensor)}

    def is_finite(self) -> bool:
        """Whether all numbers of ``tensors`` are. Waits for the device."""
        floats = [
            tensor
            for tensor in self.tensors().values()
            if tensor.is_floating_point() and tensor.numel() and tensor.device.type == self.device.type
        ]
        # The largest magnitude is finite if all are: one launch for all tensors, and one number to wait for.
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(floats, math.inf)).sum()))

    def snapshot(self) -> Callable[[], None]:
        """What puts ``tensors`` back, in place, as they are now. Takes as much memory as they do, and does not wait for
        the device.
        """
        kept = {name: tensor.clone() for name, tensor in self.tensors().items()}

        @torch.no_grad()
        def undo() -> None:
            for name, tensor in self.tensors().items():
                # A buffer that was made meanwhile is one that the first step would have begun at zero.
                tensor.copy_(kept[name]) if name in kept else tensor.zero_()
            self._refresh()

        return undo
