"""The GEMMs on Hopper as custom operators, on operands that were laid out for it (`qoq.kernels.tiles`).

    qoq::w4a8_gemm_sm90   y [M, N] of activation tiles and 4-bit weight tiles, progressive or per channel
    qoq::w8a8_gemm_sm90   the same with int8 weight tiles: the baseline that W4A8 is measured against

They are the integers and roundings of `qoq::w4a8_gemm`; sums come with out_dtype torch.int32, before any scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qoq.kernels.dispatch import GemmChoice, choose_gemm
from qoq.kernels.gemm import check_tensor, launch_gemm
from qoq.kernels.gemm_tiles import HOPPER, WeightFormat, weight_block_bytes
from qoq.kernels.tiles import PAIR_CHANNELS, activation_tiles_shape
from qoq.recipes.schema import GROUP_SIZE


@torch.library.custom_op("qoq::w4a8_gemm_sm90", mutates_args=(), device_types="cuda")
def w4a8_gemm_sm90(
    act_tiles: Tensor,
    act_scales: Tensor,
    act_sums: Tensor,
    weight_tiles: Tensor,
    s1_scales: Tensor,
    s1_szeros: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, N] in `out_dtype` (float16, bfloat16, or int32 for the sums).

    act_tiles     int8, as `tiles.tile_activations` has them;  act_scales float32 [M];  act_sums int32 [M]
    weight_tiles  uint8, as `tiles.tile_weights` has them;  s1_scales float16 [N];  bias float16 [N] or None
    s1_szeros     float16 [N] per channel, None for progressive weights

    The kernel may read weights before what was enqueued ahead of it has ended: synchronize once after making the tiles.
    Raises ValueError when a tensor's shape, dtype, device or layout is another.
    """
    weights: WeightFormat = "g128" if s1_szeros is None else "per_channel"
    check_tensor("act_sums", act_sums, torch.int32, tuple(act_scales.shape), act_tiles.device)
    return run_gemm_sm90(weights, act_tiles, act_scales, act_sums, weight_tiles, s1_scales, s1_szeros, bias, out_dtype)


@torch.library.custom_op("qoq::w8a8_gemm_sm90", mutates_args=(), device_types="cuda")
def w8a8_gemm_sm90(
    act_tiles: Tensor,
    act_scales: Tensor,
    weight_tiles: Tensor,
    s1_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, N] of weights int8, as `tiles.tile_int8_weights` has them; the rest as `w4a8_gemm_sm90`."""
    return run_gemm_sm90("int8", act_tiles, act_scales, None, weight_tiles, s1_scales, None, bias, out_dtype)


def _fake_output(act_scales: Tensor, s1_scales: Tensor, out_dtype: torch.dtype) -> Tensor:
    return act_scales.new_empty((act_scales.shape[0], s1_scales.shape[0]), dtype=out_dtype)


w4a8_gemm_sm90.register_fake(lambda _tiles, scales, _sums, _weights, s1, *rest: _fake_output(scales, s1, rest[-1]))
w8a8_gemm_sm90.register_fake(lambda _tiles, scales, _weights, s1, *rest: _fake_output(scales, s1, rest[-1]))


def run_gemm_sm90(
    weights: WeightFormat,
    act_tiles: Tensor,
    act_scales: Tensor,
    act_sums: Tensor | None,
    weight_tiles: Tensor,
    s1_scales: Tensor,
    s1_szeros: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    choice: GemmChoice | None = None,
    out: Tensor | None = None,
    overlapping: bool = True,
) -> Tensor:
    """Check the operands and launch one GEMM. `choice`, `out` and `overlapping` are for tuning and for tests."""
    m, n = act_scales.shape[0], s1_scales.shape[0]
    k = _check_operands(weights, act_tiles, act_scales, weight_tiles, s1_scales, s1_szeros, bias)
    if out is None:
        out = torch.empty((m, n), dtype=out_dtype, device=act_tiles.device)
    if m == 0:
        return out
    choice = choice or choose_gemm(HOPPER, weights, m, n, k)
    operands = (weight_tiles, act_tiles, act_scales, act_sums, s1_scales, s1_szeros, bias)
    launch_gemm(choice, HOPPER, weights, operands, k, out, overlapping=overlapping)
    return out


def _check_operands(
    weights: WeightFormat,
    act_tiles: Tensor,
    act_scales: Tensor,
    weight_tiles: Tensor,
    s1_scales: Tensor,
    s1_szeros: Tensor | None,
    bias: Tensor | None,
) -> int:
    """The K of a product. Raises ValueError for operands that do not fit each other or the kernel."""
    device, m, n = act_tiles.device, act_scales.numel(), s1_scales.numel()
    k = GROUP_SIZE * act_tiles.shape[0]
    if n % 32 or n == 0:
        raise ValueError(f"s1_scales: N is {n}, expected a multiple of 32")
    check_tensor("act_tiles", act_tiles, torch.int8, activation_tiles_shape(m, k), device)
    check_tensor("act_scales", act_scales, torch.float32, (m,), device)
    blocks = (-(-n // PAIR_CHANNELS), act_tiles.shape[0], 2, weight_block_bytes(weights))
    check_tensor("weight_tiles", weight_tiles, torch.uint8, blocks, device)
    check_tensor("s1_scales", s1_scales, torch.float16, (n,), device)
    for name, optional in (("s1_szeros", s1_szeros), ("bias", bias)):
        if optional is not None:
            check_tensor(name, optional, torch.float16, (n,), device)
    return k
