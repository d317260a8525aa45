"""What lies between products where PyTorch computes it: RMSNorm, silu(gate) * up, RoPE, conversion to float8.

Each is a function of tensors, called as it is, a kernel for each operation, or compiled into a single one (`compiled`):
so 16-bit and float8 baselines are not slowed down by what qoq's own kernels have fused. Compiled, what lies in between
is not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

FP8_MAX = 448.0
"""Of float8_e4m3fn, whose conversion makes NaN of what is larger."""


class Fuse(Protocol):
    """How a function of this module is run."""

    def __call__(self, function: Callable[..., Any], /) -> Callable[..., Any]: ...


def plain(function: Callable[..., Any], /) -> Callable[..., Any]:
    """As it is."""
    return function


@cache
def compiled(function: Callable[..., Any], /) -> Callable[..., Any]:
    """By torch.compile, for any number of tokens, which are the first dimension; compiled when it is first called.

    Other sizes stay constants: with a row of unknown length the compiler would load value by value.
    """
    inner: Callable[..., Any] = torch.compile(function)

    def run(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        return inner(*arguments)

    return run


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, times weight."""
    return functional.rms_norm(x, (x.shape[-1],), None, eps) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same of x + residual, and that sum."""
    added = x + residual
    return rms_norm(added, weight, eps), added


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [M, K] of gate_up [M, 2 K]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by cos and sin [T, 1, D], each step rounded to its dtype, as transformers'
    apply_rotary_pos_emb does."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale as float8_e4m3fn; what is too large becomes the largest."""
    return (x / scale.to(x.dtype)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, scale: Tensor) -> Tensor:
    """`rms_norm`, then `to_fp8`."""
    return to_fp8(rms_norm(x, weight, eps), scale)


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`add_rms_norm`, its norm as float8."""
    normalized, added = add_rms_norm(x, residual, weight, eps)
    return to_fp8(normalized, scale), added


def silu_mul_fp8(gate_up: Tensor, scale: Tensor) -> Tensor:
    """`silu_mul`, then `to_fp8`."""
    return to_fp8(silu_mul(gate_up), scale)
