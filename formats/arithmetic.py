"""The numbers of W4A8KV4, defined once: activations, the integer product, the KV cache.

Evaluation, the oracles and the kernels all mean these definitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qoq.formats.quantized_linear import QuantizedLinear
from qoq.recipes.schema import KeyRotation

ACT_QMAX = 127
CHANNEL_QMAX = 127
KvBits = Literal[4, 8, 16]
_EXACT_K = 1024
"""|act * weight| <= 127 * 128, so sums over 1024 inputs stay below 2**24, where float32 counts every integer."""
_LEAST_ROWS, _ALIGNED = 32, 8
"""What cuBLAS asks of an int8 product: more than 16 rows, and multiples of 8 of the rest."""


@dataclass(frozen=True)
class QuantizedActivation:
    """codes int8 [M, K] in -127..127, scales float32 [M], sums int32 [M] (the sum of a token's codes)."""

    codes: Tensor
    scales: Tensor
    sums: Tensor


def quantize_activation(x: Tensor) -> QuantizedActivation:
    """Per-token symmetric int8 of x [M, K]: scale = amax / 127 in float32, codes rounded half to even.

    A token of zeros, or one so small that its scale vanishes, gets scale 1 and codes 0. A NaN or an infinity in a token
    makes its scale NaN or infinite, so that it reaches the output.
    """
    x = x.float()
    scales = _divide_exactly(x.abs().amax(dim=1), ACT_QMAX)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = torch.clamp(torch.round(x / scales.unsqueeze(1)), -ACT_QMAX, ACT_QMAX).to(torch.int8)
    return QuantizedActivation(codes, scales, codes.sum(dim=1, dtype=torch.int32))


def _divide_exactly(x: Tensor, divisor: int) -> Tensor:
    """x / divisor rounded once: on a GPU, PyTorch multiplies by the reciprocal of a number, which rounds twice."""
    return x / torch.full_like(x, divisor)


@dataclass(frozen=True)
class IntegerWeight:
    """A linear decoded for multiplying, on one device.

    values     int8 [N, K]: level-1 weights (progressive) or raw codes 0..15 (per channel)
    s1_scales  float32 [N]
    s1_szeros  float32 [N], per channel only
    bias       float32 [N] or None
    """

    values: Tensor
    s1_scales: Tensor
    s1_szeros: Tensor | None
    bias: Tensor | None

    @staticmethod
    def decode(linear: QuantizedLinear, device: torch.device | str = "cpu") -> IntegerWeight:
        """Decode `linear` onto `device`, padding cut off (its activations are zero)."""
        integers = linear.level1() if linear.is_progressive else linear.codes
        return IntegerWeight(
            values=integers[:, : linear.in_features].to(torch.int8).contiguous().to(device),
            s1_scales=linear.s1_scales.to(device).float(),
            s1_szeros=None if linear.is_progressive else linear.s1_szeros().to(device).float(),
            bias=None if linear.bias is None else linear.bias.to(device).float(),
        )

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        weight = self.values.float() * self.s1_scales.unsqueeze(1)
        return weight if self.s1_szeros is None else weight - self.s1_szeros.unsqueeze(1)


def quantize_channels(weight: Tensor) -> IntegerWeight:
    """Symmetric int8 of weight [N, K], a scale for each channel: amax / 127, rounded to float16 before it divides.

    A channel of zeros, or so small that its scale vanishes in float16, has codes 0.
    """
    weight = weight.float()
    scales = (weight.abs().amax(dim=1) / CHANNEL_QMAX).half().float()
    scales = torch.where(scales > 0, scales, torch.inf)
    codes = (weight / scales.unsqueeze(1)).round().clamp(-CHANNEL_QMAX, CHANNEL_QMAX).to(torch.int8)
    return IntegerWeight(codes, torch.where(scales.isinf(), 1.0, scales), None, None)


def integer_matmul(act_codes: Tensor, weight_values: Tensor) -> Tensor:
    """Exact int32 [M, N] product of int8 codes [M, K] and int8 weights [N, K].

    On a GPU it runs as it is; elsewhere as float32 products over at most 1024 inputs at a time, each exact, added in
    int32. Raises ValueError where K is 0.
    """
    if act_codes.shape[1] < 1:
        raise ValueError("K must be at least 1")
    if act_codes.is_cuda:
        return _integer_matmul_cuda(act_codes, weight_values)
    total = torch.zeros(act_codes.shape[0], weight_values.shape[0], dtype=torch.int32, device=act_codes.device)
    for start in range(0, act_codes.shape[1], _EXACT_K):
        stop = start + _EXACT_K
        total += (act_codes[:, start:stop].float() @ weight_values[:, start:stop].float().t()).to(torch.int32)
    return total


def _integer_matmul_cuda(act_codes: Tensor, weight_values: Tensor) -> Tensor:
    (m, k), n = act_codes.shape, weight_values.shape[0]
    short, ragged = -k % _ALIGNED, -n % _ALIGNED
    act_codes = torch.nn.functional.pad(act_codes, (0, short, 0, max(_LEAST_ROWS - m, 0)))
    weight_values = torch.nn.functional.pad(weight_values, (0, short, 0, ragged))
    return torch._int_mm(act_codes, weight_values.t())[:m, :n]


def linear_forward(x: Tensor, weight: IntegerWeight, *, act_bits: int) -> Tensor:
    """y [..., N] of x [..., K] as the kernels compute it, in x's dtype (one rounding at the store, then the bias).

    act_bits 8: y = s1 * act_scale * acc (- s1_szeros * act_scale * act_sum); act_bits 16: x times the decoded weight.
    """
    if act_bits not in (8, 16):
        raise ValueError(f"act_bits must be 8 or 16, got {act_bits}")
    rows = x.reshape(-1, x.shape[-1])
    if act_bits == 16:
        y = rows.float() @ weight.dequantize().t()
    else:
        act = quantize_activation(rows)
        y = integer_matmul(act.codes, weight.values).float()
        y = y * (act.scales.unsqueeze(1) * weight.s1_scales)
        if weight.s1_szeros is not None:
            y = y - (act.scales * act.sums.float()).unsqueeze(1) * weight.s1_szeros
    y = y.to(x.dtype)
    if weight.bias is not None:
        y = y + weight.bias.to(x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class QuantizedKV:
    """codes uint8 [..., D], scales and zeros float16 [..., 1]: the value is (code - zero) * scale."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def quantize_kv(x: Tensor, bits: Literal[4, 8]) -> QuantizedKV:
    """Asymmetric codes of x [..., D] per token and head (the last axis); keys come after RoPE.

    scale = (max - min) / (2**bits - 1) is rounded to float16 first; zero = -min / scale is not rounded to an integer,
    both are then used as stored. A constant head gets scale 1 and zero -min, so that it decodes to itself; so does one
    whose scale vanishes in float16, or whose zero would leave float16 (only float32 can hold such a head). A head with
    a NaN or an infinity decodes to NaN.
    """
    x = x.float()
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    limit = torch.finfo(torch.float16).max
    levels = 2**bits - 1
    scales = _divide_exactly(high - low, levels).clamp(max=limit).to(torch.float16)
    usable = (scales > 0) & (low.abs() <= limit * scales.float())
    scales = torch.where(usable, scales, torch.ones_like(scales))
    scales = torch.where(torch.isfinite(high - low), scales, torch.full_like(scales, torch.nan))
    zeros = (-low / scales.float()).clamp(-limit, limit).to(torch.float16)
    codes = torch.clamp(torch.round(x / scales.float() + zeros.float()), 0, levels).to(torch.uint8)
    return QuantizedKV(codes, scales, zeros)


def dequantize_kv(kv: QuantizedKV) -> Tensor:
    """float32 [..., D]."""
    return (kv.codes.float() - kv.zeros.float()) * kv.scales.float()


def kv_round_trip(x: Tensor, bits: int) -> Tensor:
    """Keys or values [..., D] as attention sees them after the cache, in x's dtype; 16 bits leaves them alone."""
    if bits == 16:
        return x
    if bits not in (4, 8):
        raise ValueError(f"kv_bits must be 4, 8 or 16, got {bits}")
    return dequantize_kv(quantize_kv(x, 4 if bits == 4 else 8)).to(x.dtype)


def rotates(head_dim: int) -> bool:
    """Whether heads of this size can be rotated: a Hadamard matrix of Sylvester has a power of two for its order."""
    return head_dim > 0 and head_dim & (head_dim - 1) == 0


def rotate_heads(x: Tensor, key_rotation: KeyRotation) -> Tensor:
    """Queries or keys [..., D] after RoPE as `key_rotation` turns each head, in x's dtype; "none" leaves them alone.

    "hadamard": x times R = H / sqrt(D), H the Hadamard matrix of Sylvester of order D, a power of two. R is orthogonal
    and its own inverse, so scores of rotated queries and keys are those before; outliers of a key are spread over it.
    Computed in float32 from the values as they are: sums and differences of values 1 apart, then of the results 2
    apart, 4, ... D/2, each rounded; then times 1 / sqrt(D), itself rounded to float32; then rounded once to the dtype,
    from which keys are quantized. A head with a NaN becomes NaN, values whose sums leave float32 or whose results leave
    the dtype become NaN or infinite.
    Raises ValueError for another D or another rotation.
    """
    if key_rotation == "none":
        return x
    if key_rotation != "hadamard":
        raise ValueError(f"key_rotation must be none or hadamard, got {key_rotation!r}")
    head_dim = x.shape[-1]
    if not rotates(head_dim):
        raise ValueError(f"heads of {head_dim} values cannot be rotated, their number must be a power of two")
    y, step = x.float(), 1
    while step < head_dim:
        first, second = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        step *= 2
    turned: Tensor = (y * head_dim**-0.5).to(x.dtype)
    return turned


def as_attended(
    query: Tensor, key: Tensor, value: Tensor, *, kv_bits: int, key_rotation: KeyRotation
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [..., D] after RoPE as attention sees them with this cache, each in its dtype.

    Queries and keys are rotated, then keys and values go through the round trip; 16 bits leaves everything alone.
    """
    if kv_bits == 16:
        return query, key, value
    keys = kv_round_trip(rotate_heads(key, key_rotation), kv_bits)
    return rotate_heads(query, key_rotation), keys, kv_round_trip(value, kv_bits)
