"""What the KV cache kernels must compute, in float64 on the CPU, with every rounding spelt out.

Nothing here shares code with `formats.arithmetic` or with the kernels: a step in float32 is a step in float64, which
has more than twice its places, rounded by `act_oracles.round_to`. One exception: where bytes go is asked from
`layouts`, whose own tests have a slow loop for it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV
from qoq.kernels.act_oracles import round_to
from qoq.kernels.layouts import PAGE_SIZE, pack_pages, unpack_pages

Float64 = NDArray[np.float64]
_FLOAT16_MAX = 65504.0


def quantize_kv_oracle(x: Tensor, bits: int) -> QuantizedKV:
    """Codes uint8 [..., D], scales and zeros float16 [..., 1] of float16 or bfloat16 x [..., D].

    A head of values that are not all finite, or too far apart for float32, has codes 0 and NaN for the others.
    """
    values = _float64(x)
    levels = (1 << bits) - 1
    with np.errstate(all="ignore"):
        low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
        spread = round_to(high - low, torch.float32)
        is_finite = np.isfinite(spread)
        step = np.where(is_finite, round_to(spread / levels, torch.float32), 0.0)
        scales = round_to(np.minimum(step, _FLOAT16_MAX), torch.float16)
        is_usable = (scales > 0) & (np.abs(low) <= round_to(_FLOAT16_MAX * scales, torch.float32))
        scales = np.where(is_usable, scales, 1.0)
        ratios = round_to(np.where(is_finite, -low, 0.0) / scales, torch.float32)
        zeros = round_to(np.clip(ratios, -_FLOAT16_MAX, _FLOAT16_MAX), torch.float16)
        quotients = round_to(np.where(is_finite, values, 0.0) / scales, torch.float32)
        sums = round_to(quotients + zeros, torch.float32)
    codes = np.where(is_finite, np.clip(np.rint(sums), 0, levels), 0)
    return QuantizedKV(
        torch.from_numpy(codes.astype(np.uint8)),
        torch.from_numpy(np.where(is_finite, scales, np.nan)).half(),
        torch.from_numpy(np.where(is_finite, zeros, np.nan)).half(),
    )


def dequantize_kv_oracle(kv: QuantizedKV, dtype: torch.dtype) -> Tensor:
    """[..., D] in `dtype`: (code - zero) * scale, both steps in float32, then rounded."""
    with np.errstate(all="ignore"):
        differences = round_to(_float64(kv.codes) - _float64(kv.zeros), torch.float32)
        products = round_to(differences * _float64(kv.scales), torch.float32)
        return torch.from_numpy(round_to(products, dtype)).to(dtype)


def round_trip_oracle(x: Tensor, bits: int) -> Tensor:
    """x [..., D] as the cache gives it back, in its dtype."""
    return dequantize_kv_oracle(quantize_kv_oracle(x, bits), x.dtype)


def rotate_oracle(x: Tensor) -> Tensor:
    """x [..., D] times the Hadamard matrix over sqrt(D), in its dtype; D is a power of two.

    The matrix is [[H, H], [H, -H]] for H of half the order: the halves are transformed, then added and subtracted.
    """

    def transformed(values: Float64) -> Float64:
        if values.shape[-1] == 1:
            return values
        first, second = map(transformed, np.split(values, 2, axis=-1))
        return np.concatenate([round_to(first + second, torch.float32), round_to(first - second, torch.float32)], -1)

    with np.errstate(all="ignore"):
        scale = float(np.float32(1 / np.sqrt(x.shape[-1])))
        products = round_to(transformed(_float64(x)) * scale, torch.float32)
        return torch.from_numpy(round_to(products, x.dtype)).to(x.dtype)


def rope_oracle(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """RoPE of x [T, heads, D] by rows `positions` [T] of cos and sin float32 [max_positions, D/2], in its dtype.

    The tables and each step are rounded to the dtype; a position outside the tables gives NaN.
    """
    half = x.shape[-1] // 2
    known = ((positions >= 0) & (positions < cos.shape[0])).numpy()
    rows = positions.clamp(0, cos.shape[0] - 1).numpy()
    cosines, sines = (round_to(_float64(table)[rows][:, None], x.dtype) for table in (cos, sin))
    values = _float64(x)
    low, high = values[..., :half], values[..., half:]
    turned = []
    with np.errstate(all="ignore"):
        for own, other in ((low, -high), (high, low)):
            products = round_to(own * cosines, x.dtype), round_to(other * sines, x.dtype)
            turned.append(round_to(products[0] + products[1], x.dtype))
    result = np.where(known[:, None, None], np.concatenate(turned, axis=-1), np.nan)
    return torch.from_numpy(result).to(x.dtype)


def append_oracle(kv_pages: Tensor, key: Tensor, value: Tensor, slots: Tensor, bits: int) -> Tensor:
    """Pages uint8 after key and value [T, num_kv_heads, D] were written at `slots` [T], keys as they are stored."""
    head_dim = key.shape[-1]
    parts = unpack_pages(kv_pages, head_dim, bits)
    for kv, x in zip(parts, (key, value), strict=True):
        new = quantize_kv_oracle(x, bits)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                page, place = divmod(slot, PAGE_SIZE)
                kv.codes[page, :, place] = new.codes[token]
                kv.scales[page, :, place] = new.scales[token]
                kv.zeros[page, :, place] = new.zeros[token]
    return pack_pages(*parts, bits)


def gather_oracle(
    kv_pages: Tensor, page_ids: Tensor, head_dim: int, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [64 * P, num_kv_heads, D] in `dtype` of the pages page_ids [P]."""
    heads = kv_pages.shape[1]
    key, value = (
        dequantize_kv_oracle(kv, dtype).transpose(1, 2).reshape(-1, heads, head_dim)
        for kv in unpack_pages(kv_pages[page_ids.long()], head_dim, bits)
    )
    return key, value


def _float64(x: Tensor) -> Float64:
    array: Float64 = x.detach().cpu().to(torch.float64).numpy()
    return array
