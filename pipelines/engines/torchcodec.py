"""The ``torchcodec`` engine: torch's own decoder, on a GPU nvJPEG with its JPEG unit, then ``native``'s crops on the
device. For machines with few cores to a GPU where DALI is not installed: a wheel of 10 MB.

nvJPEG repeats chroma where the other engines' decoders smooth it, and TorchCodec cannot be told otherwise. To do so in
libjpeg moves crops of the sample photos by 0.2 grey levels on average.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchcodec.decoders import decode_jpeg

from fastssl.pipelines.engines.ahead import AheadEngine
from fastssl.pipelines.engines.base import Request
from fastssl.pipelines.ops.crop import crop_resize_device
from fastssl.pipelines.ops.jpeg_header import tidied


class TorchcodecEngine(AheadEngine):
    """Decode with TorchCodec, a file of JPEGs only (`require_engine` sees to that); see the module's text."""

    name = "torchcodec"

    def _views(self, request: Request, encoded: list[np.ndarray]) -> list[Tensor]:
        pictures = decode_jpeg([_as_stored(data) for data in encoded], mode="RGB", device=self.device)
        packed = torch.cat([picture.permute(1, 2, 0).flatten() for picture in pictures])
        heights, widths = self.reader.shapes(request.index)
        sizes = 3 * heights.astype(np.int64) * widths
        return crop_resize_device(packed, sizes.cumsum() - sizes, heights, widths, request.plans, self.specs)


def _as_stored(data: np.ndarray) -> Tensor:
    """A copy that TorchCodec does not turn by EXIF: the converter has done it, other engines never do."""
    whole = tidied(data.tobytes()) if b"Exif\0\0" in data.tobytes() else None
    return torch.from_numpy(np.array(data) if whole is None else np.frombuffer(bytearray(whole), np.uint8))
