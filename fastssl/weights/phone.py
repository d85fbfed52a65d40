"""A file for a runtime without PyTorch, and ``DST.json`` beside it: written, run, compared, timed, int8 also judged.
Input is ``raw``, RGB pixels 0 .. 255, which the file normalises, or ``normalised`` as in training.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fastssl.errors import FastSSLError
from fastssl.evaluate.features import EVALUATION_CROP
from fastssl.evaluate.trained import Trained
from fastssl.models.backbones import feature_dim, of_one_size
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.weights.int8 import Int8, quantised
from fastssl.weights.runtimes import INPUT, OUTPUT, PIXELS, FromPixels, milliseconds, refused
from fastssl.weights.to_coreml import write_coreml
from fastssl.weights.to_executorch import write_executorch
from fastssl.weights.to_onnx import check_features, fused, write_onnx

#: format -> (writer, its input where none is asked for, batches that it is tried with, how much its features may
#: differ); none are tried of a format that cannot be run here
WRITERS: dict[str, tuple[Any, str, tuple[int, ...], float]] = {
    "executorch": (write_executorch, "raw", (2,), 1e-5),
    "coreml": (write_coreml, "raw", (), 0.0),
    "onnx": (write_onnx, "normalised", (1, 3), 1e-4),  # as it was before there was a choice
}


def beside(path: Path) -> Path:
    """``mine.pte`` -> ``mine.pte.json``."""
    return path.with_name(f"{path.name}.json")


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def write_phone(
    trained: Trained, format: str, place: Path, about: dict[str, str], size: int, input: str | None, int8: Int8 | None
) -> tuple[dict[str, Any], str]:
    """Write ``place`` from a backbone in plain layout; arguments are those of ``export_backbone``. Returns what
    ``Exported`` says of it, and the text to write beside it. FastSSLError: features differ, int8 costs too much, or
    what the writer, ``Int8.check`` and ``quantised`` raise.
    """
    if int8 is not None:
        int8.check()  # before minutes go into the float form
    writer, usual, batches, tolerance = WRITERS[format]
    input, seen, reference = input or usual, trained.normalisation, trained.backbone
    network = merged if (merged := fused(reference, size=size)) is not None else reference
    tensors = len(network.state_dict())
    with refused(trained.arch, format, size):
        network = of_one_size(network, size)
    if input == "raw":
        reference, network, seen = FromPixels(reference, seen), FromPixels(network, seen), PIXELS
    view = ViewSpec.evaluation(size, trained.crop or EVALUATION_CROP, seen)
    write = partial(writer, network, trained.arch, place, about, size=size)
    run, difference, took, judged = write(), None, None, None
    if batches:
        difference = check_features(place, reference, run, size=size, tolerance=tolerance, batches=batches)
        took = milliseconds(run, size)
    if int8 is not None:
        run, judged = quantised(int8, view, run, lambda images: write(calibration=images), size_of(place), took)
        took = milliseconds(run, size) if batches else None
        if not (drop := judged.before - judged.after) <= int8.max_drop:
            raise FastSSLError(
                f"{place.name}: not written: int8 costs {drop:.1f} points, more than --max-drop {int8.max_drop:g} "
                f"({judged}); leave --int8 out, or allow more"
            )
    done = {"fused": merged is not None, "difference": difference, "milliseconds": took}
    taken = "0 .. 255, the file normalises" if input == "raw" else "(RGB / 255 - mean) / std"
    images = {"name": INPUT, "shape": [1, 3, size, size], "layout": "NCHW, RGB", "range": taken, "crop": view.center}
    numbers = {"weights": "int8 per channel", "activations": "float16" if format == "coreml" else "int8 per tensor"}
    said = {
        **{"description": about["description"], **trained.record(), "size_bytes": size_of(place)},
        **done,
        "input": {**images, **trained.normalisation._asdict()},
        "output": {"name": OUTPUT, "shape": [1, feature_dim(trained.backbone)]},
        "quantisation": numbers if judged else None,
        "int8": asdict(judged) if judged else None,
    }
    return {"tensors": tensors, **done, "input": input, "int8": judged}, json.dumps(said, indent=2) + "\n"
