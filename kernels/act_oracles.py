"""What the activation kernels must compute, in float64 on the CPU, with every rounding spelt out.

Nothing here shares code with `formats.arithmetic` or with the kernels: values are float64, where the steps below are
exact or nearly so, and `round_to` rounds them by their exponent to the places that a narrower format has.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float64 = NDArray[np.float64]


class _Format(NamedTuple):
    places: int
    """Binary places of the significand, the hidden one included."""
    lowest: int
    """Exponent of the smallest number above 0, a power of two."""
    largest: float


_FORMATS = {
    torch.float16: _Format(11, -24, 65504.0),
    torch.bfloat16: _Format(8, -133, float(torch.finfo(torch.bfloat16).max)),
    torch.float32: _Format(24, -149, float(np.finfo(np.float32).max)),
}


def round_to(values: Float64, dtype: torch.dtype) -> Float64:
    """float64 `values` rounded half to even to what `dtype` holds, subnormal numbers and infinity included."""
    places, lowest, largest = _FORMATS[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        exponent = np.frexp(np.where(np.isfinite(values), values, 1.0))[1]
        unit = np.maximum(exponent - places, lowest)
        rounded: Float64 = np.ldexp(np.rint(np.ldexp(values, -unit)), unit)
    beyond = np.greater(np.abs(rounded), largest)
    rounded[beyond] = np.copysign(np.inf, rounded[beyond])
    return rounded


def quantize_oracle(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [M, K], scales float32 [M], sums int32 [M] of float16 or bfloat16 x [M, K].

    Each quotient of two float32 numbers is taken in float64, then rounded to float32: with 53 places in between, two
    roundings give what one gives (Figueroa, 1995: 2 * 24 + 2 are enough). Tokens with a NaN or an infinity get codes 0.
    """
    values = _float64(x)
    magnitudes = np.abs(values)
    is_finite = np.isfinite(values).all(axis=1, keepdims=True)
    amaxes = np.where(np.isnan(values).any(axis=1), np.nan, magnitudes.max(axis=1, initial=0.0))
    scales = round_to(amaxes / 127.0, torch.float32)
    scales[scales == 0] = 1.0
    usable = np.where(is_finite, scales[:, None], 1.0)
    quotients = round_to(np.where(is_finite, values, 0.0) / usable, torch.float32)
    below = np.floor(quotients)
    rest = quotients - below
    odd = np.mod(below, 2.0) == 1
    codes = np.clip(below + ((rest > 0.5) | ((rest == 0.5) & odd)), -127, 127).astype(np.int64)
    return (
        torch.from_numpy(codes.astype(np.int8)),
        torch.from_numpy(scales.astype(np.float32)),
        torch.from_numpy(codes.sum(axis=1).astype(np.int32)),
    )


def silu_mul_oracle(gate_up: Tensor) -> Tensor:
    """float64 [M, K] of gate_up [M, 2 K]: silu(gate) rounded to its dtype, times up, rounded again.

    For gates below -87, where bfloat16 has a tiny silu left, float32 gives -0: exp(-gate) leaves its range.
    """
    gate, up = np.split(_float64(gate_up), 2, axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        silu = round_to(gate / (1.0 + np.exp(-gate)), gate_up.dtype)
        return torch.from_numpy(round_to(silu * up, gate_up.dtype))


def add_oracle(x: Tensor, residual: Tensor) -> Tensor:
    """float64 [M, K]: x + residual rounded to their dtype.

    That PyTorch and the kernel round to float32 first changes nothing: its 24 places are 2 * 11 + 2.
    """
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(round_to(_float64(x) + _float64(residual), x.dtype))


def rms_norm_oracle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float64 [M, K]: x / sqrt(mean(x^2) + eps) rounded to x's dtype, times weight, rounded again."""
    values = _float64(x)
    with np.errstate(over="ignore", invalid="ignore"):
        normalized = values / np.sqrt(np.mean(values * values, axis=1, keepdims=True) + eps)
        return torch.from_numpy(round_to(round_to(normalized, x.dtype) * _float64(weight), x.dtype))


def _float64(x: Tensor) -> Float64:
    array: Float64 = x.detach().cpu().to(torch.float64).numpy()
    return array
