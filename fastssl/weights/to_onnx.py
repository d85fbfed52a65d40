"""``--format onnx``, one file with graph and weights for runtimes without PyTorch; and the comparison of every export
with the backbone that it was made from.

ONNX: input ``images`` (N, 3, size, size) float32; output ``features`` (N, F) float32; N is free, the size is not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from fastssl.errors import FastSSLError
from fastssl.weights.runtimes import INPUT, OUTPUT, FromPixels, Run, quiet, refused, require_packages

if TYPE_CHECKING:
    import onnx


def require_onnx() -> None:
    """Torch's exporter stands on onnxscript, and onnxruntime runs the file."""
    require_packages("onnx", "onnx", "onnxscript", "onnxruntime")


@torch.no_grad()
def check_features(
    path: Path,
    backbone: nn.Module,
    other: Run,
    *,
    size: int,
    tolerance: float,
    batches: Iterable[int] = (2,),
) -> float:
    """The largest difference between the backbone's features and the export's, on random images, as a share of how far
    features are from their mean: much of a feature can be the same for every image, and hide an export that reads no
    image at all.

    Args:
        path: for the message.
        backbone: what was exported, in evaluation mode, on the CPU.
        other: images (N, 3, size, size) float32 -> features (N, F).
        size: side of the images.
        tolerance: what the result may be; or ten times what rounding does, measured against a copy in float64, if that
            is more.
        batches: sizes N to try, at least two images in all.

    Raises:
        FastSSLError: the features differ by more, are not finite, or have another shape.
    """
    exact = copy.deepcopy(backbone).double()
    wanted, ours, found = [], [], []
    for number, batch in enumerate(batches):
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(number))
        if isinstance(backbone, FromPixels):
            images = (58 * images + 115).clamp(0, 255)
        wanted.append(exact(images.double()))
        ours.append(backbone(images))
        found.append(other(images))
        if found[-1].shape != ours[-1].shape:
            raise FastSSLError(
                f"{path.name}: gives features of shape {tuple(found[-1].shape)}, the backbone "
                f"{tuple(ours[-1].shape)}; not written"
            )
    truth, features, others = torch.cat(wanted), torch.cat(ours), torch.cat(found)
    spread = max(float((truth - truth.mean(0)).abs().max()), 1e-30)
    rounding, difference = (float((a - b).abs().max()) / spread for a, b in ((features, truth), (others, features)))
    if not difference <= max(tolerance, 10 * rounding):  # NaN is no number to pass on either
        raise FastSSLError(
            f"{path.name}: gives features that differ by {difference:.2g} of their spread from the backbone's; "
            "not written"
        )
    return difference


def fused(backbone: nn.Module, *, size: int) -> nn.Module | None:
    """A copy of a network that trains with several branches and runs with one (MobileOne, FastViT, RepViT, RepVGG,
    GhostNet-V3 and others: arXiv 2206.04040, 2303.14189), its branches and in some its BatchNorms merged into single
    convolutions by timm. It computes the same features with fewer layers; its tensors have other names.

    Args:
        backbone: in evaluation mode, on the CPU; left as it is.
        size: side of the pictures on which both are compared.

    Returns:
        None where timm has nothing to merge, cannot do it, or comes to other features (by more than 1e-4 of their
        spread).
    """
    try:
        merged = reparameterize_model(backbone)
        if merged.state_dict().keys() == backbone.state_dict().keys():
            return None
        check_features(Path("fused"), backbone, merged.eval(), size=size, tolerance=1e-4)
    except Exception:  # whatever timm's merging fails with in one network; that one is exported as it was trained
        return None
    return merged


def write_onnx(
    network: nn.Module, arch: str, path: Path, about: dict[str, str], *, size: int, calibration: Tensor | None = None
) -> Run:
    """Write ``path`` and load it with onnxruntime.

    Args:
        network: in plain layout: channels-last would put a transposition around every convolution.
        about: into the file's metadata. size: side of the images that the file will take.
        calibration: (N, 3, size, size) images, whose activations give the ranges of int8 for each tensor; weights are
            int8 for each channel. None: float32.

    Returns:
        the file as a function, on one thread. FastSSLError: the network cannot be expressed at this size.
    """
    require_onnx()
    import onnx
    import onnxruntime

    with refused(arch, "ONNX", size):
        # Two images: an example of one would be taken for a constant.
        example = torch.zeros(2, 3, size, size)
        with torch.no_grad():
            network(example)
        with quiet():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
            assert program is not None  # with dynamo=True there is one
            model = program.model_proto
            if calibration is not None:
                model = _quantised(model, path, calibration)
    model.doc_string = "; ".join(f"{name}: {value}" for name, value in about.items())
    onnx.helper.set_model_props(model, about)
    onnx.save(model, str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.contiguous().numpy()})[0])

    return run


def _quantised(model: onnx.ModelProto, path: Path, calibration: Tensor) -> onnx.ModelProto:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Photos(CalibrationDataReader):
        images = iter([{INPUT: image.numpy()} for image in calibration.split(1)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.images, None)

    onnx.save(model, str(path))  # given in memory, its tensors would go to a file of their own, and not be found
    quant_pre_process(str(path), str(path), skip_symbolic_shape=True)
    quantize_static(str(path), str(path), Photos(), per_channel=True)
    return onnx.load(str(path))
