"""``--format coreml``: an ``.mlpackage`` for iOS 16 and macOS 13 and newer, whose numbers are float16. Core ML runs on
Apple's devices alone: the file is converted here, and not run.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.weights.runtimes import INPUT, OUTPUT, FromPixels, Run, quiet, refused, require_packages

_LEAST_WEIGHTS = 2048  # Core ML's own threshold: smaller weights stay float16


def write_coreml(
    network: nn.Module, arch: str, path: Path, about: dict[str, str], *, size: int, calibration: Tensor | None = None
) -> Run:
    """Write ``path``, a folder, as ``write_onnx`` does; a ``FromPixels`` takes an image. With ``calibration``, whose
    images are not read, the weights alone are int8.
    What is returned computes with the file's weights, in float32 by PyTorch.
    """
    require_packages("coreml", "coremltools")
    shape = (1, 3, size, size)
    with refused(arch, "Core ML", size), quiet(), torch.no_grad():
        import coremltools as ct
        from coremltools.optimize import coreml as optimize

        program = torch.export.export(network, (torch.zeros(shape),)).run_decompositions({})
        given: Any = ct.TensorType(name=INPUT, shape=shape)
        if isinstance(network, FromPixels):
            given = ct.ImageType(name=INPUT, shape=shape, color_layout=ct.colorlayout.RGB)
        ends = {"inputs": [given], "outputs": [ct.TensorType(name=OUTPUT)]}
        model = ct.convert(program, **ends, minimum_deployment_target=ct.target.iOS16)
        if calibration is not None:
            how = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=_LEAST_WEIGHTS)
            model = optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=how))
            network = _rounded(network)
        model.user_defined_metadata.update(about)
        model.save(str(path))
    return torch.no_grad()(network)


def _rounded(network: nn.Module) -> nn.Module:
    """A copy with what ``linear_quantize_weights`` leaves of its weights. The BatchNorms that are merged there before
    change nothing: they scale channels, each of which is rounded by itself.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel() > _LEAST_WEIGHTS:
            rows = module.weight.data.flatten(1)
            step = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
            module.weight.data = ((rows / step).round() * step).view_as(module.weight)
    return network
