"""native, DALI, FFCV, TorchCodec: renderers of the same plan."""
