"""What the writers of files for runtimes without PyTorch share: the input, how they fail, keep silent and run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import statistics
import timeit
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastssl.errors import FastSSLError
from fastssl.pipelines.plan.draw import Normalisation

INPUT, OUTPUT = "images", "features"
#: images (N, 3, size, size) float32 -> features (N, F)
Run = Callable[[Tensor], Tensor]
PIXELS = Normalisation((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # makes a view of pixels 0 .. 255


class FromPixels(nn.Sequential):
    """A network that takes RGB pixels, 0 .. 255, and normalises them itself: by a convolution of each channel alone,
    which int8 for each channel expresses exactly.
    """

    def __init__(self, network: nn.Module, normalisation: Normalisation) -> None:
        mean, std = map(torch.tensor, normalisation)
        normalise = nn.Conv2d(3, 3, kernel_size=1, groups=3)
        normalise.load_state_dict({"weight": (1 / (255 * std)).view(3, 1, 1, 1), "bias": -mean / std})
        super().__init__(normalise, network)
        self.eval()


def require_packages(format: str, *packages: str) -> None:
    """FastSSLError where one of the packages that the extra ``format`` installs is not there."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise FastSSLError(f"--format {format} needs {' and '.join(missing)}: pip install 'fastssl-vision[{format}]'")


@contextlib.contextmanager
def refused(arch: str, runtime: str, size: int) -> Iterator[None]:
    """FastSSLError for whatever a converter raises inside the block."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise FastSSLError(f"{arch} cannot be exported to {runtime} at {size} px ({said})") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Converters talk by print, bars, warnings and logging, and past Python; errors come as exceptions all the same."""
    kept, nowhere, said = os.dup(2), os.open(os.devnull, os.O_WRONLY), io.StringIO()
    logging.disable(logging.WARNING)
    try:
        os.dup2(nowhere, 2)
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def milliseconds(run: Run, size: int) -> float:
    """For one image: the median of 30 runs after 5 others."""
    image = torch.zeros(1, 3, size, size)
    return 1000 * statistics.median(timeit.repeat(lambda: run(image), number=1, repeat=35)[5:])
