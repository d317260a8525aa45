"""What is learnt from data: calibration text, block-by-block streaming, transforms, rounding, metrics."""
