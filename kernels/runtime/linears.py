"""Linears of a decoder block, each of a kind that brings its input to the form that it multiplies.

A linear is asked for the product with x, with RMSNorm(x), with RMSNorm(x + residual) or with silu(gate) * up. Kinds
with int8 inputs have quantizers that are fused with the rest, the others compute one after the other.

    DenseLinear       16-bit weights, or float32 on the CPU: PyTorch's product
    ReferenceLinear   packed weights, decoded: the reference arithmetic
    PackedLinear      packed weights in the checkpoint's order: the kernels of every GPU
    TiledLinear       4-bit or int8 weights in the order of Hopper's kernels
    Int8Linear        int8 weights as they are
    Fp8Linear         float8 weights and inputs: torch._scaled_mm
    JoinedLinear      several that share an input and cannot be one
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import qoq.kernels.ops  # noqa: F401  (registers the operators)
from qoq.formats.arithmetic import IntegerWeight, linear_forward
from qoq.kernels.act_quant import Quantized
from qoq.kernels.runtime.elementwise import (
    Fuse,
    add_rms_norm,
    add_rms_norm_fp8,
    plain,
    rms_norm,
    rms_norm_fp8,
    silu_mul,
    silu_mul_fp8,
    to_fp8,
)


@dataclass(frozen=True)
class Norm:
    """RMSNorm with weight [K] in the dtype of what it is applied to."""

    weight: Tensor
    eps: float


class Linear(ABC):
    """y [M, N] of inputs [M, K], in their dtype; `fuse` runs what comes before the product, unless kernels do."""

    fuse: Fuse = staticmethod(plain)

    @abstractmethod
    def of(self, x: Tensor) -> Tensor:
        """The product with x."""

    def of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """The product with RMSNorm(x)."""
        return self.of(self.fuse(rms_norm)(x, norm.weight, norm.eps))

    def of_add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """The product with RMSNorm(x + residual), and that sum."""
        normalized, added = self.fuse(add_rms_norm)(x, residual, norm.weight, norm.eps)
        return self.of(normalized), added

    def of_silu_mul(self, gate_up: Tensor) -> Tensor:
        """The product with silu(gate) * up."""
        return self.of(self.fuse(silu_mul)(gate_up))

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of the weight and what belongs to it."""


@dataclass(frozen=True)
class DenseLinear(Linear):
    """weight [N, K], bias [N] or None, in the dtype of the inputs."""

    weight: Tensor
    bias: Tensor | None
    fuse: Fuse = plain

    def of(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return _nbytes(self.weight, self.bias)


@dataclass(frozen=True)
class ReferenceLinear(Linear):
    """`formats.arithmetic.linear_forward`, on any device and in any dtype."""

    weight: IntegerWeight
    act_bits: int

    def of(self, x: Tensor) -> Tensor:
        return linear_forward(x, self.weight, act_bits=self.act_bits)

    @property
    def nbytes(self) -> int:
        weight = self.weight
        return _nbytes(weight.values, weight.s1_scales, weight.s1_szeros, weight.bias)


@dataclass(frozen=True)
class JoinedLinear(Linear):
    """Outputs of `parts` side by side."""

    parts: tuple[Linear, ...]

    def of(self, x: Tensor) -> Tensor:
        return torch.cat([part.of(x) for part in self.parts], dim=-1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class QuantizingLinear(Linear):
    """One with inputs of int8 a token; `tiled`: in the order of Hopper's products."""

    tiled: bool

    @abstractmethod
    def product(self, act: Quantized, dtype: torch.dtype) -> Tensor:
        """y of quantized inputs, in `dtype`."""

    def of(self, x: Tensor) -> Tensor:
        return self.product(torch.ops.qoq.quantize_activation(x, self.tiled), x.dtype)

    def of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self.product(torch.ops.qoq.rms_norm_quantize(x, norm.weight, norm.eps, self.tiled), x.dtype)

    def of_add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        codes, scales, sums, added = torch.ops.qoq.add_rms_norm_quantize(x, residual, norm.weight, norm.eps, self.tiled)
        return self.product((codes, scales, sums), x.dtype), added

    def of_silu_mul(self, gate_up: Tensor) -> Tensor:
        return self.product(torch.ops.qoq.silu_mul_quantize(gate_up, self.tiled), gate_up.dtype)


@dataclass(frozen=True)
class PackedLinear(QuantizingLinear):
    """Tensors as `formats.packing` names and orders them; checked before (`unpack_linear`)."""

    qweight: Tensor
    s1_scales: Tensor
    s2_scales: Tensor | None
    s2_zeros: Tensor | None
    s1_szeros: Tensor | None
    bias: Tensor | None
    tiled = False

    def product(self, act: Quantized, dtype: torch.dtype) -> Tensor:
        codes, scales, sums = act
        scale_tensors = (self.s1_scales, self.s2_scales, self.s2_zeros, self.s1_szeros)
        y: Tensor = torch.ops.qoq.w4a8_gemm(codes, scales, sums, self.qweight, *scale_tensors, self.bias, dtype)
        return y

    @property
    def nbytes(self) -> int:
        return _nbytes(self.qweight, self.s1_scales, self.s2_scales, self.s2_zeros, self.s1_szeros, self.bias)


@dataclass(frozen=True)
class TiledLinear(QuantizingLinear):
    """4-bit weights as `tiles.tile_weights` has them, or int8 ones as `tiles.tile_int8_weights` (`int8`)."""

    tiles: Tensor
    s1_scales: Tensor
    s1_szeros: Tensor | None
    bias: Tensor | None
    int8: bool = False
    tiled = True

    def product(self, act: Quantized, dtype: torch.dtype) -> Tensor:
        codes, scales, sums = act
        y: Tensor
        if self.int8:
            y = torch.ops.qoq.w8a8_gemm_sm90(codes, scales, self.tiles, self.s1_scales, self.bias, dtype)
        else:
            weights = (self.tiles, self.s1_scales, self.s1_szeros, self.bias)
            y = torch.ops.qoq.w4a8_gemm_sm90(codes, scales, sums, *weights, dtype)
        return y

    @property
    def nbytes(self) -> int:
        return _nbytes(self.tiles, self.s1_scales, self.s1_szeros, self.bias)


@dataclass(frozen=True)
class Int8Linear(QuantizingLinear):
    """weight int8 [N, K], K a multiple of 128; s1_scales float16 [N]."""

    weight: Tensor
    s1_scales: Tensor
    tiled = False

    def product(self, act: Quantized, dtype: torch.dtype) -> Tensor:
        codes, scales, _ = act
        y: Tensor = torch.ops.qoq.w8a8_gemm(codes, scales, self.weight, self.s1_scales, None, dtype)
        return y

    @property
    def nbytes(self) -> int:
        return _nbytes(self.weight, self.s1_scales)


@dataclass(frozen=True)
class Fp8Linear(Linear):
    """weight float8_e4m3fn [N, K] with one scale, inputs with a fixed one: the baseline at its cheapest.

    Only for bfloat16 outputs and random weights: nothing here calibrates a scale.
    """

    weight: Tensor
    scale: Tensor
    act_scale: Tensor
    fuse: Fuse = plain

    def of(self, x: Tensor) -> Tensor:
        return self._product(self.fuse(to_fp8)(x, self.act_scale), x.dtype)

    def of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self._product(self.fuse(rms_norm_fp8)(x, norm.weight, norm.eps, self.act_scale), x.dtype)

    def of_add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        codes, added = self.fuse(add_rms_norm_fp8)(x, residual, norm.weight, norm.eps, self.act_scale)
        return self._product(codes, x.dtype), added

    def of_silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._product(self.fuse(silu_mul_fp8)(gate_up, self.act_scale), gate_up.dtype)

    def _product(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        scales = {"scale_a": self.act_scale, "scale_b": self.scale}
        return torch._scaled_mm(codes, self.weight.t(), **scales, out_dtype=dtype, use_fast_accum=True)

    @property
    def nbytes(self) -> int:
        return _nbytes(self.weight, self.scale, self.act_scale)


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def joined(parts: Sequence[Linear]) -> Linear:
    """One linear of several that share an input."""
    return parts[0] if len(parts) == 1 else JoinedLinear(tuple(parts))
