"""native, DALI, FFCV: three renderers of the same plan."""
