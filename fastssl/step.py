"""One training step: what the loop calls thousands of times, and what the benchmarks measure.

    views (uint8 crops and their colour table, or coloured already)
      -> teacher: keys, in BatchNorm groups        without gradient
      -> student: queries, loss, backward           in `train.accumulate` parts
      -> optimiser, moving average, queue

Two switches of the recipe change how it runs and not what it computes: ``train.compile`` compiles the networks, ``train.graph`` records all of
the above as one CUDA graph. Where one cannot be had here, the step runs without it and `TrainStep.fallbacks` says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.backbones import create_backbone
from fastssl.graph import RecordedCall, Recorder, record_cuda_graph
from fastssl.host_memory import keep_freed_memory
from fastssl.layout import channels_last_breaks, require_channels_last
from fastssl.methods.moco import MoCo
from fastssl.optim import create_optimizer, set_lr
from fastssl.pipelines.augment import augment_device
from fastssl.pipelines.crop import to_device
from fastssl.pipelines.errors import FastSSLError
from fastssl.pipelines.order import batch_permutation
from fastssl.precision import HalfCopy
from fastssl.recipe import Recipe


def use_amp(amp: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: ``auto`` does on a GPU and not on a CPU, where float32 is often the faster one."""
    return amp == "bf16" or (amp == "auto" and device.type == "cuda")


def initial_backbone(recipe: Recipe, seed: int) -> nn.Module:
    """The backbone as a run with this seed begins with it, on the CPU: the same weights at every call."""
    torch.manual_seed(seed)
    return create_backbone(recipe.arch, zero_init_residual=recipe.zero_init_residual)


class TrainStep:
    """The networks, the optimiser, and the step that moves them. Nothing in the step waits for the device.

    The first call looks for breaks in the memory layout, compiles and records; it makes one step like all others.

    Args:
        recipe: arch, method, optimiser, and the switches in ``train``.
        device: where everything lives.
        amp: autocast to bfloat16.
        seed: of the first weights, of the queue's first content and of the BatchNorm groups.
        record: how a step is recorded for ``train.graph``; tests give another.

    Attributes:
        method: both networks and the queue; what is saved.
        fallbacks: {switch: why it is not used here}; also ``channels_last``, where a network does not keep the layout.
        networks: student and teacher in the form that computes: with ``amp`` copies that hold bfloat16 weights.
        prepared: whether the first call was made, and ``prepare_s``, the seconds of it that went before the step itself.
        takes_crops: whether the step wants uint8 crops and colour tables (``ViewLoader(colour=False)``), to record the colour with the rest.

    Raises:
        FastSSLError: no such network, or a batch that does not fit the queue or the BatchNorm groups.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, amp: bool, seed: int, record: Recorder = record_cuda_graph):
        self.recipe, self.device, self.amp, self.seed = recipe, device, amp, seed
        if device.type == "cpu":
            keep_freed_memory()
        self.batch_size = recipe.train.batch_size
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # every step has the same shapes
        backbone = initial_backbone(recipe, seed)
        try:
            method = MoCo(backbone, recipe.moco, batch_size=self.batch_size, generator=torch.Generator().manual_seed(seed))
        except ValueError as error:
            raise FastSSLError(f"batch of {self.batch_size}: {error}; --batch-size or --set changes that") from error
        except RuntimeError as error:  # torch's allocator: "you tried to allocate ... bytes"
            raise FastSSLError(
                f"no memory for the networks and a queue of {recipe.moco.queue:,} keys ({' '.join(str(error).split())[:120]}); "
                "lower moco.queue or projector.hidden with --set"
            ) from error
        self.method = method.to(device, memory_format=torch.channels_last).train()
        self.optimizer = create_optimizer(self.method, recipe.optim)
        self._half: list[HalfCopy] = []
        self.networks: tuple[nn.Module, nn.Module] = (self.method.student, self.method.teacher)
        if amp:
            self._half = [HalfCopy(network) for network in self.networks]
            self.networks = (self._half[0].network, self._half[1].network)
            self.method.register_load_state_dict_post_hook(lambda *_: self._refresh())
        self.method.compute_with(*self.networks)
        self.fallbacks: dict[str, str] = {}
        self._record = record
        self._recorded: RecordedCall | None = None
        self.prepared, self.prepare_s = False, 0.0
        if recipe.train.graph and device.type != "cuda" and record is record_cuda_graph:
            self.fallbacks["graph"] = f"a CUDA graph needs an NVIDIA GPU, this is the {device.type}"
        self.takes_crops = recipe.train.graph and "graph" not in self.fallbacks

    @property
    def half_copies(self) -> tuple[HalfCopy, ...]:
        """Of student and teacher; none without ``amp``."""
        return tuple(self._half)

    @property
    def recorded(self) -> bool:
        """Whether calls replay a recorded step."""
        return self._recorded is not None

    def permutation(self, epoch: int, step: int) -> Tensor:
        """The order in which this step's keys are dealt into BatchNorm groups, (2B,) int64 on the device."""
        return to_device(batch_permutation(2 * self.batch_size, self.seed, epoch, step), self.device)

    def autocast(self) -> torch.autocast:
        """The precision of the networks."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp)

    @property
    def view_dtype(self) -> torch.dtype:
        """What views are best given in: the first layer's own input type, so that no pass casts them again."""
        return torch.bfloat16 if self.amp else torch.float32

    def __call__(
        self,
        views: list[Tensor],
        permutation: Tensor,
        *,
        lr: float,
        momentum: float,
        smoothing: float,
        tables: Sequence[Tensor] = (),
    ) -> Tensor:
        """Forward, backward, optimiser, key network, queue.

        Args:
            views: as ``ViewLoader`` gives them.
            permutation: see ``permutation``.
            lr, momentum, smoothing: this step's values of the schedules.
            tables: the colour tables that belong to uint8 crops (``Batch.tables``); none: ``views`` are coloured and normalised.

        Returns:
            the method's metrics, (len(MoCo.METRICS),) float32 on the device. With ``train.graph`` the next step writes over them.

        Raises:
            ValueError: the views are not in channels-last memory, or not those of one batch.
        """
        if not tables:  # crops are coloured here, into the right layout
            for view in views:
                require_channels_last(view)
        if sum(map(len, views)) != 2 * self.batch_size:
            raise ValueError(f"{sum(map(len, views))} views, but a batch of {self.batch_size} has {2 * self.batch_size}")
        inputs = [permutation, *views, *tables]
        if not self.prepared:
            started = time.monotonic()
            self._prepare(inputs, len(views), (lr, momentum, smoothing))
            self.prepare_s = time.monotonic() - started
        if self._recorded is None:
            return self._run(inputs, len(views), lr, momentum, smoothing)
        # What the schedules say is an input like any other: a recorded number would stay what it was.
        return self._recorded([to_device(np.array([lr, momentum, smoothing], np.float32), self.device), *inputs])

    # ------------------------------------------------------------------ the step itself

    def _run(self, inputs: list[Tensor], views: int, lr: float | Tensor, momentum: float | Tensor, smoothing: float | Tensor) -> Tensor:
        method, parts = self.method, self.recipe.train.accumulate
        permutation, tables = inputs[0], inputs[1 + views :]
        with torch.no_grad():
            coloured = [
                augment_device(crops, table, spec, self.view_dtype)
                for crops, table, spec in zip(inputs[1 : 1 + views], tables, self.recipe.views)
            ]
        images = method.images(coloured or inputs[1 : 1 + views])
        with self.autocast():
            keys = method.keys(images, permutation)
        found = []
        for part in range(parts):
            with self.autocast():
                loss, metrics = method.part_loss(images, keys, smoothing, part, parts)
            (loss / parts if parts > 1 else loss).backward()
            if self._half:
                self._half[0].collect_gradients()
            found.append(metrics)
        self.update(lr, momentum)
        self.clear_gradients()
        method.enqueue(keys)
        return found[0] if parts == 1 else torch.stack(found).mean(0)

    def _run_recorded(self, inputs: list[Tensor], views: int) -> Tensor:
        """The step with the schedules' values read from the device: (3,) float32, the first input."""
        lr, momentum, smoothing = inputs[0].unbind()
        # Recipes without smoothing would otherwise search for neighbours that weigh nothing.
        return self._run(inputs[1:], views, lr, momentum, smoothing if self.recipe.moco.smoothing else 0.0)

    def update(self, lr: float | Tensor, momentum: float | Tensor) -> None:
        """The optimiser's step on the gradients that are there, then the moving average."""
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.method.update_teacher(momentum)
        self._refresh()

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        for half in self._half:
            half.network.zero_grad(set_to_none=True)

    def _refresh(self) -> None:
        for half in self._half:
            half.refresh()

    # ------------------------------------------------------------------ the first call

    def _prepare(self, inputs: list[Tensor], views: int, rates: tuple[float, float, float]) -> None:
        """Compile and record as the recipe asks, on the first batch; the state is afterwards as it was before."""
        self.prepared = True
        train, backbone = self.recipe.train, self.method.student.backbone
        sample = torch.zeros(2, *inputs[1].shape[1:], device=self.device).contiguous(memory_format=torch.channels_last)
        if broken := channels_last_breaks(backbone, sample):
            self.fallbacks["channels_last"] = f"{self.recipe.arch} leaves the layout behind {', '.join(broken[:3])}"
        if train.compile:
            self._try("compile", lambda: self._compile(inputs, views, rates))
        if self.takes_crops:
            self._try("graph", lambda: self._capture(inputs, views, rates))

    def _try(self, switch: str, prepare: Callable[[], None]) -> None:
        undo = self._snapshot()
        try:
            prepare()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a capture may fail with, the step runs without it
            self.fallbacks[switch] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if switch == "compile":
                self.method.compute_with(*self.networks)
            else:
                self._recorded = None
        finally:
            self.clear_gradients()
            undo()

    def _compile(self, inputs: list[Tensor], views: int, rates: tuple[float, float, float]) -> None:
        if torch._dynamo.config.disable:
            raise FastSSLError("switched off by TORCH_COMPILE_DISABLE")
        self.method.compute_with(*(torch.compile(network, dynamic=False) for network in self.networks))
        self._run(inputs, views, *rates)

    def _capture(self, inputs: list[Tensor], views: int, rates: tuple[float, float, float]) -> None:
        controls = to_device(np.array(rates, np.float32), self.device)
        self._recorded = RecordedCall(
            lambda places: self._run_recorded(places, views), [controls, *inputs], undo=self._snapshot(), record=self._record
        )

    def _snapshot(self) -> Callable[[], None]:
        """What puts networks, queue and optimiser back, in place, as they are now."""
        kept = [(tensor, tensor.clone()) for tensor in self.method.state_dict().values()]
        before = {id(t): t.clone() for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)}

        @torch.no_grad()
        def undo() -> None:
            for tensor, value in kept:
                tensor.copy_(value)
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    if isinstance(tensor, Tensor):
                        # A buffer that was made meanwhile is one that the first step would have begun at zero.
                        tensor.copy_(before[id(tensor)]) if id(tensor) in before else tensor.zero_()
            self._refresh()

        return undo
