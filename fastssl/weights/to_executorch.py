"""``--format executorch``: a ``.pte`` file for ExecuTorch's XNNPACK backend, which runs on the CPU of Android, iOS and
Linux. Input (1, 3, size, size) float32, output features (1, F) float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.weights.runtimes import Run, quiet, refused, require_packages


def write_executorch(
    network: nn.Module, arch: str, path: Path, about: dict[str, str], *, size: int, calibration: Tensor | None = None
) -> Run:
    """Write ``path`` and load it with ExecuTorch's runtime: all as ``write_onnx``, but that ``about`` has no place in
    it. ExecuTorch 1.5 fails on channels-last.
    """
    require_packages("executorch", "executorch", "torchao")
    example = (torch.zeros(1, 3, size, size),)
    with refused(arch, "ExecuTorch", size), quiet(), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from executorch.exir import to_edge_transform_and_lower
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        class Quantizer(xnnpack_quantizer.XNNPACKQuantizer):
            def annotate(self, model: Any) -> Any:
                # Of ReLU6 its output is measured alone: what it cuts off took most of int8's steps.
                for node in super().annotate(model).graph.nodes:
                    if "hardtanh" in str(node.target) and "conv2d" in str(node.args[0].target):
                        before = node.args[0].meta["quantization_annotation"]
                        node.meta["quantization_annotation"] = replace(before, input_qspec_map={})
                        before.output_qspec = None
                return model

        program = torch.export.export(network, example)
        if calibration is not None:
            how = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
            observed = prepare_pt2e(program.module(), Quantizer().set_global(how))
            for image in calibration.split(1):
                observed(image)
            program = torch.export.export(convert_pt2e(observed), example)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(lowered.buffer)
    with quiet():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(1)  # safe here, where nothing of it is running
        method = Runtime.get().load_program(path).load_method("forward")
        method.execute(list(example))  # the first one looks for the processor's features, and talks about them
    return lambda images: torch.cat([method.execute([image.contiguous()])[0] for image in images.split(1)])
