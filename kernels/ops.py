"""Registers the custom operators `torch.ops.qoq.*`, and says whether they can run here. Importing touches no GPU."""

from __future__ import annotations

from functools import cache

import torch

import qoq.kernels.act_quant
import qoq.kernels.attention
import qoq.kernels.gemm
import qoq.kernels.gemm_sm90
import qoq.kernels.kv_cache  # noqa: F401
from qoq.kernels.compiler import nvrtc_version
from qoq.kernels.launch import architecture
from qoq.recipes.errors import QoQError


@cache
def usable_device_problem() -> str | None:
    """Why the kernels cannot run on the current CUDA device, with the remedy; None when they can."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    try:
        architecture(torch.cuda.current_device())
        nvrtc_version()
    except QoQError as error:
        return str(error)
    return None
