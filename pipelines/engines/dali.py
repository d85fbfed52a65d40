"""The ``dali`` engine: NVIDIA DALI decodes each picture once and cuts all views of the plan from it.

The boxes are inputs of the graph, so DALI draws nothing. Colour is ours as in every engine: DALI's contrast pivots on
grey 128 and its hue is a rotation in YIQ, 8.6 grey levels from torchvision on average at MoCo-v2's strength. Without a
GPU the same graph is built from the operators' CPU versions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.errors import FastSSLError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.ahead import AheadEngine
from fastssl.pipelines.engines.base import EngineSettings, Request, batch_name
from fastssl.pipelines.plan.draw import ViewSpec


class DaliEngine(AheadEngine):
    """Decode and crop with DALI, a file of JPEGs only (`require_engine` sees to that); see the module's text."""

    name = "dali"
    ahead = 2

    def __init__(self, reader: BetonReader, specs: Sequence[ViewSpec], settings: EngineSettings):
        super().__init__(reader, specs, settings)
        self._pipeline: Any = None
        self._lent: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None

    def _views(self, request: Request, encoded: list[np.ndarray]) -> list[Tensor]:
        try:
            if self._pipeline is None:
                self._pipeline = self._build()
            self._pipeline.feed_input("pictures", encoded)
            for number, view in enumerate(view for plan in request.plans for view in plan):
                start = np.stack([view["top"], view["left"]], axis=1).astype(np.int32)
                size = np.stack([view["height"], view["width"]], axis=1).astype(np.int32)
                for what, values in (("start", start), ("end", start + size), ("flip", view["flip"].astype(np.int32))):
                    self._pipeline.feed_input(f"{what}{number}", values)
            outputs = self._pipeline.run(self._stream)  # on this stream: without one the host would wait for the GPU
            return self._groups([torch.from_dlpack(output.as_tensor()) for output in outputs])
        except RuntimeError as error:
            self._pipeline = None  # of no more use
            text = " ".join(str(error).split())[:300]
            raise FastSSLError(f"{self.reader.path}: DALI failed {batch_name(request)}: {text}") from error

    def _groups(self, views: list[Tensor]) -> list[Tensor]:
        """DALI's (B, S, S, 3) a view as (count * B, 3, S, S) a group."""
        left = iter(views)
        parts = [list(itertools.islice(left, spec.count)) for spec in self.specs]
        whole = [part[0] if len(part) == 1 and not self._stream else torch.cat(part) for part in parts]
        if self._stream:
            # What torch lets go of is DALI's to write to at once, though a stream has yet to copy it: until the next
            # batch is decoded it is kept, and then waited for.
            if self._copied:
                self._copied.synchronize()
            self._lent, self._copied = views, torch.cuda.Event(blocking=True)
            self._copied.record(self._stream)
        return [group.permute(0, 3, 1, 2) for group in whole]

    def _free(self) -> None:
        if self._copied:
            self._copied.synchronize()
        self._lent, self._pipeline = [], None

    def _largest(self) -> list[int]:
        """(height, width) that nvJPEG is to have memory for: else it takes it anew at each picture that is larger than
        those before. It may do so for every picture of a batch: 2 GiB in all, then.
        """
        largest = np.array([lengths.max() for lengths in self.reader.shapes(self.reader.some())], np.int64)
        fits = 2**31 / (3 * self.settings.batch_size * largest.prod())
        return [int(length) for length in largest * min(1.0, fits**0.5)]

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.backend import GetSchema

        gpu = self.device.type == "cuda"
        filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

        @pipeline_def(
            batch_size=self.settings.batch_size,
            num_threads=self.workers,
            device_id=self.device.index if gpu else None,
            prefetch_queue_depth=1,  # its thread is ahead of the consumer
        )
        def graph() -> tuple:
            boxes = [("start", 1), ("end", 1), ("flip", 0)]
            encoded = fn.external_source(name="pictures", dtype=types.UINT8, ndim=1)
            # The slow, smooth chroma upsampling is what libjpeg does in the other engines.
            options: dict[str, Any] = {"output_type": types.RGB, "jpeg_fancy_upsampling": True}
            if GetSchema("decoders__Image").HasArgument("adjust_orientation"):
                # DALI 2 turns by EXIF unasked; the converter has done it, other engines never do.
                options["adjust_orientation"] = False
            if gpu:
                options |= dict(zip(("preallocate_height_hint", "preallocate_width_hint"), self._largest()))
            pictures = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", **options)
            outputs = []
            every_view = [spec for spec in self.specs for _ in range(spec.count)]
            for number, spec in enumerate(every_view):
                start, end, flip = (
                    fn.external_source(name=f"{what}{number}", dtype=types.INT32, ndim=ndim) for what, ndim in boxes
                )
                # Cut first, resize then: with `roi_start` the filter would reach for pixels outside the box.
                crop, kind = fn.slice(pictures, start=start, end=end, axes=[0, 1]), filters[spec.interpolation]
                view = fn.resize(crop, size=[spec.size, spec.size], interp_type=kind, antialias=True)
                outputs.append(fn.flip(view, horizontal=flip))
            return tuple(outputs)

        pipeline = graph()
        pipeline.build()
        return pipeline
