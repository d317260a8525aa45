"""What the GEMM kernels must compute, replayed on the CPU straight from the bytes of a checkpoint.

Nothing here shares code with qoq.formats: `formats.arithmetic` decodes and multiplies tensors, this module walks the
packed words as a GPU thread does. QServe (arXiv 2405.04532, section 5.2) decodes with register-level parallelism: four
codes sit in the four bytes of one 32-bit register, one 32-bit multiply by s2 scales all four, and only then are the
zeros subtracted ("subtraction after multiplication"), by one bytewise add of the negated zero. That is right only
while code * s2 fits a byte (no carry into the next) and code * s2 - zero fits int8 (no wrap). Neither the GPU nor these
functions check it: registers are int64 masked to 32 bits, so an illegal checkpoint decodes to the same wrong weights
here as there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qoq.recipes.schema import GROUP_SIZE

_TILE = 32
_NIBBLES = 0x0F0F0F0F
_EVERY_BYTE = 0x01010101
_REGISTER = 0xFFFFFFFF
_STRIPE_CODES = 1 << 22
"""Weights decoded at a time; each takes some 10 bytes while it is."""


def emulate_packed_level1(qweight: Tensor, s2_scales: Tensor, s2_zeros: Tensor) -> Tensor:
    """Level-1 weights int8 [N, K] that a progressive kernel feeds to the tensor cores.

    qweight int8 [N, K/2], s2_scales and s2_zeros int8 [K/128, N], all as on disk (see formats.packing for the order).
    Bytes that no quantizer may write are decoded as the hardware decodes them, carries and wraps included.
    """
    n, k = _logical_shape(qweight)
    groups = k // GROUP_SIZE
    for name, tensor in (("s2_scales", s2_scales), ("s2_zeros", s2_zeros)):
        if tensor.dtype != torch.int8 or tuple(tensor.shape) != (groups, n) or k % GROUP_SIZE:
            raise ValueError(
                f"{name}: expected torch.int8 [K/{GROUP_SIZE}, N] = [{k / GROUP_SIZE:g}, {n}], "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    scale_bytes, zero_bytes = _lane_bytes(s2_scales), _lane_bytes(s2_zeros)
    decoded = torch.empty(n, k, dtype=torch.uint8)
    for start, stop in _stripes(n, k):
        stripes = slice(start // _TILE, stop // _TILE)
        words = _load_words(qweight[start:stop])
        for half in (0, 1):
            codes = (words >> (4 * half)) & _NIBBLES
            grouped = codes.view(-1, groups, GROUP_SIZE // _TILE, 8, 4, 2, 2)  # nt g kt r l c b
            products = (grouped * scale_bytes[stripes, :, :, :, half]) & _REGISTER
            registers = _vadd4(products, zero_bytes[stripes, :, :, :, half] * _EVERY_BYTE)
            _store_bytes(decoded[start:stop], registers.view_as(codes), half)
    return decoded.view(torch.int8)


def emulate_packed_codes(qweight: Tensor) -> Tensor:
    """Raw codes uint8 [N, K], 0..15, that a per-channel kernel feeds to the tensor cores; qweight int8 [N, K/2]."""
    n, k = _logical_shape(qweight)
    decoded = torch.empty(n, k, dtype=torch.uint8)
    for start, stop in _stripes(n, k):
        words = _load_words(qweight[start:stop])
        for half in (0, 1):
            _store_bytes(decoded[start:stop], (words >> (4 * half)) & _NIBBLES, half)
    return decoded


def gemm_oracle(
    act_codes: Tensor,
    act_scales: Tensor,
    act_sums: Tensor,
    weight: Tensor,
    s1_scales: Tensor,
    s1_szeros: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y float64 [M, N] before any rounding to the output's dtype: the sum over K is exact, the rest is float64.

    act_codes   int8 [M, K];  act_scales float [M];  act_sums int [M], read only where there are s1_szeros
    weight      [N, K] of any integer dtype: `emulate_packed_level1` or `emulate_packed_codes`, cut to K columns
    s1_scales   float [N];  s1_szeros float [N], per channel only;  bias float [N]

    y = s1 * act_scale * acc - s1_szeros * act_scale * act_sum + bias, acc = act_codes @ weight.T in integers.
    """
    m, k = act_codes.shape
    n = weight.shape[0]
    expected = {"weight": (weight, (n, k)), "act_scales": (act_scales, (m,)), "s1_scales": (s1_scales, (n,))}
    if s1_szeros is not None:
        expected |= {"act_sums": (act_sums, (m,)), "s1_szeros": (s1_szeros, (n,))}
    if bias is not None:
        expected["bias"] = (bias, (n,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if act_codes.dtype != torch.int8 or weight.is_floating_point():
        raise ValueError(f"expected int8 act_codes and an integer weight, got {act_codes.dtype} and {weight.dtype}")
    acts = act_scales.double().unsqueeze(1)
    y = _integer_product(act_codes, weight).double() * (acts * s1_scales.double())
    if s1_szeros is not None:
        y -= acts * act_sums.double().unsqueeze(1) * s1_szeros.double()
    return y if bias is None else y + bias.double()


def _integer_product(act_codes: Tensor, weight: Tensor) -> Tensor:
    """Exact [M, N] product: in int32 (several times faster) where no partial sum can leave it, else in int64."""
    m, k = act_codes.shape
    n = weight.shape[0]
    if 0 in (m, n, k):
        return torch.zeros(m, n, dtype=torch.int64)
    largest = k * 128 * max(int(weight.max()), -int(weight.min()))
    accumulator = torch.int32 if largest < 1 << 31 else torch.int64
    rows = act_codes.to(accumulator)
    step = max(1, _STRIPE_CODES // k)
    return torch.cat([rows @ weight[i : i + step].to(accumulator).t() for i in range(0, n, step)], dim=1)


def _logical_shape(qweight: Tensor) -> tuple[int, int]:
    if qweight.dtype != torch.int8 or qweight.ndim != 2:
        raise ValueError(f"qweight: expected torch.int8 [N, K/2], got {qweight.dtype} {list(qweight.shape)}")
    n, k = int(qweight.shape[0]), 2 * int(qweight.shape[1])
    if n % _TILE or k % _TILE:
        raise ValueError(f"qweight: N and K must be multiples of {_TILE}, got N = {n}, K = {k}")
    return n, k


def _stripes(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Row ranges of whole tiles that keep the int64 registers of a large layer within some 100 MB."""
    step = max(_TILE, _STRIPE_CODES // max(k, 1) // _TILE * _TILE)
    return ((start, min(start + step, n)) for start in range(0, n, step))


def _load_words(rows: Tensor) -> Tensor:
    """The registers that the 32 lanes of a warp load from each tile: int64 [nt, kt, r, l, c, b], lane = 4 r + l.

    A lane's 16 bytes are four little-endian words; word 2 c + b holds inputs 16 c + 4 l + 0..3 of two channels, 8 b + r
    in the low nibbles of its bytes and 16 + 8 b + r in the high ones.
    """
    nt, kt = rows.shape[0] // _TILE, rows.shape[1] * 2 // _TILE
    parts = (rows.to(torch.int64) & 0xFF).reshape(nt, kt, 8, 4, 2, 2, 4)
    return parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16 | parts[..., 3] << 24


def _lane_bytes(packed: Tensor) -> Tensor:
    """The byte of s2_scales or s2_zeros [G, N] for each register, unsigned: int64 [nt, g, 1, r, half, 1, 1, b].

    Lane r of a tile loads four consecutive bytes: channels r, r + 8 (low nibbles), r + 16, r + 24 (high nibbles).
    """
    groups, n = packed.shape
    lanes = (packed.to(torch.int64) & 0xFF).reshape(groups, n // _TILE, 1, 8, 2, 1, 1, 2)
    return lanes.transpose(0, 1)


def _vadd4(a: Tensor, b: Tensor) -> Tensor:
    """Bytewise wrapping sum of two registers, as the `vadd4` of CUDA: bit 7 of a byte takes a carry but gives none."""
    low = (a & 0x7F7F7F7F) + (b & 0x7F7F7F7F)
    return low ^ ((a ^ b) & 0x80808080)


def _store_bytes(rows: Tensor, registers: Tensor, half: int) -> None:
    """Write the four bytes of each register [nt, kt, r, l, c, b] to where its weights are in rows uint8 [32 nt, K]."""
    nt, kt = registers.shape[:2]
    places = rows.view(nt, 2, 2, 8, kt, 2, 4, 4)[:, half]  # nt b r kt c l i
    ordered = registers.permute(0, 5, 2, 1, 4, 3)
    for i in range(4):
        places[..., i] = (ordered >> (8 * i)) & 0xFF
