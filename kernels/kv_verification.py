"""Proof, on the GPU, that the KV cache holds the bytes it should and that attention reads them right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV, dequantize_kv, quantize_kv
from qoq.kernels.kv_oracles import rotate_oracle
from qoq.kernels.layouts import PAGE_SIZE, pack_pages, page_bytes
from qoq.recipes.schema import KeyRotation

_LENS = (0, 1, 31, 32, 33, 63, 64, 65, 200, 511)
"""Tokens of the sequences: around the borders of sub-blocks (32) and pages (64), and long enough to be split."""
_TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative L2 error against float64 over the same codes. Probabilities and outputs are rounded to 16 bits: half a step
of float16 is 2^-11 = 5e-4 of a value, of bfloat16 2^-9 = 2e-3; twice that leaves room for both."""
_WINDOW = 100
"""A model's sliding window is cut to this, so that the sequences here are longer than it."""
_SHOWN = 3


@dataclass(frozen=True)
class CacheCheck:
    """relative_error of attention, L2, and what was allowed; `problems` is empty when all is well."""

    bits: int
    key_rotation: KeyRotation
    dtype: str
    relative_error: float
    tolerance: float
    problems: tuple[str, ...]


def check_cache_kernels(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    bits: int,
    dtype: torch.dtype,
    *,
    key_rotation: KeyRotation = "none",
    window: int | None,
    device: torch.device,
    seed: int = 0,
) -> CacheCheck:
    """Append keys and values to shuffled pages, compare the bytes, then attend to ragged lengths.

    Keys have outlier channels, some heads are constant. The bytes must equal those of `formats.arithmetic.quantize_kv`
    in the order of `layouts`, as must keys and values after the round trip without pages; with a key_rotation, keys
    and queries are first turned, bit for bit as `rotate_oracle` does. Attention must agree with float64 over the same
    codes within the format's tolerance.
    """
    random = torch.Generator().manual_seed(seed)
    batch, pages_each = len(_LENS), math.ceil(max(_LENS) / PAGE_SIZE)
    size = (batch, pages_each * PAGE_SIZE, num_kv_heads, head_dim)
    key, value = (torch.randn(size, generator=random) for _ in range(2))
    key[..., :: max(1, head_dim // 4)] *= 30
    key[:, 5], value[:, 6] = 0.25, 0
    key, value = key.to(dtype), value.to(dtype)
    table = torch.randperm(batch * pages_each, generator=random).view(batch, pages_each)
    query = torch.randn(batch, num_heads, head_dim, generator=random).to(dtype)
    stored, turned = (key, query) if key_rotation == "none" else (rotate_oracle(key), rotate_oracle(query))
    keys, values = (quantize_kv(tensor, 4 if bits == 4 else 8) for tensor in (stored, value))

    pages = _append(key, value, table, bits, key_rotation, device)
    expected_pages = _expected_pages(keys, values, table, bits).to(device)
    what = f"KV{bits} cache, {dtype}" + ("" if key_rotation == "none" else f", key rotation {key_rotation}")
    problems = describe_differences(f"{what}: byte", pages, expected_pages, pages == expected_pages)
    problems += _compare_without_pages(what, (key, value, query), (keys, values, turned), bits, key_rotation, device)

    lens = torch.tensor(_LENS, dtype=torch.int32)
    scale = 1 / math.sqrt(head_dim)
    window = None if window is None else min(window, _WINDOW)
    got = torch.ops.qoq.paged_decode_attention(
        turned.to(device), pages, table.int().to(device), lens.to(device), scale, bits, window or 0
    )
    expected = _attend(turned.double(), dequantize_kv(keys).double(), dequantize_kv(values).double(), scale, window)
    error = float((got.double().cpu() - expected).norm() / expected.norm())
    tolerance = _TOLERANCES[dtype]
    if not error <= tolerance:  # also when it is NaN
        problems.append(f"{what}: decode attention differs from float64 by {error:.2e}, allowed {tolerance:.0e}")
        wrong = (got.double().cpu() - expected).abs()
        place = tuple(int(i) for i in torch.unravel_index(wrong.nan_to_num(torch.inf).argmax(), wrong.shape))
        problems.append(f"{what}: output {place} is {got[place].item()}, expected {expected[place].item()}")
    return CacheCheck(bits, key_rotation, str(dtype).removeprefix("torch."), error, tolerance, tuple(problems))


def describe_differences(what: str, got: Tensor, expected: Tensor, equal: Tensor) -> list[str]:
    """A line for each of the first few elements that are not `equal`, with place and both values."""
    wrong = (~equal).nonzero()
    lines = []
    for place in wrong[:_SHOWN].tolist():
        index = tuple(place)
        lines.append(f"{what} {place} is {got[index].item()}, expected {expected[index].item()}")
    if len(wrong) > _SHOWN:
        lines[-1] += f" (and {len(wrong) - _SHOWN} more of {equal.numel()} differ)"
    return lines


def _compare_without_pages(
    what: str,
    given: tuple[Tensor, Tensor, Tensor],
    expected: tuple[QuantizedKV, QuantizedKV, Tensor],
    bits: int,
    key_rotation: KeyRotation,
    device: torch.device,
) -> list[str]:
    """Problems of `kv_round_trip` of keys and values, and of `rotate_heads` of queries, where they are rotated."""
    key, value, query = (tensor.to(device) for tensor in given)
    keys, values, turned = expected
    results = {
        "key": (torch.ops.qoq.kv_round_trip(key, bits, key_rotation), dequantize_kv(keys).to(key.dtype)),
        "value": (torch.ops.qoq.kv_round_trip(value, bits, "none"), dequantize_kv(values).to(value.dtype)),
    }
    if key_rotation != "none":
        results["query"] = (torch.ops.qoq.rotate_heads(query), turned)
    problems = []
    for name, (got, wanted) in results.items():
        problems += describe_differences(f"{what}: {name}", got, wanted, got == wanted.to(device))
    return problems


def _append(
    key: Tensor, value: Tensor, table: Tensor, bits: int, key_rotation: KeyRotation, device: torch.device
) -> Tensor:
    """Pages [batch * pages, KV heads, page bytes], poisoned and then written by the kernel in one shuffled call."""
    batch, tokens, num_kv_heads, head_dim = key.shape
    positions = torch.arange(tokens)
    slots = (table[:, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE).reshape(-1)
    order = torch.randperm(batch * tokens, generator=torch.Generator().manual_seed(1))
    rows = [tensor.reshape(-1, num_kv_heads, head_dim)[order].to(device) for tensor in (key, value)]
    size = (table.numel(), num_kv_heads, page_bytes(head_dim, bits))
    pages = torch.full(size, 0x7F, dtype=torch.uint8, device=device)
    torch.ops.qoq.append_kv(*rows, pages, slots[order].to(device), bits, key_rotation)
    return pages


def _expected_pages(key: QuantizedKV, value: QuantizedKV, table: Tensor, bits: int) -> Tensor:
    def by_page(tensor: Tensor) -> Tensor:
        """[batch, tokens, KV heads, ...] to [page, KV heads, 64, ...], in the order of the pool."""
        batch, tokens, *rest = tensor.shape
        parts = tensor.view(batch * tokens // PAGE_SIZE, PAGE_SIZE, *rest).transpose(1, 2)
        pool = torch.empty_like(parts.contiguous())
        pool[table.reshape(-1)] = parts
        return pool

    keys, values = (
        QuantizedKV(by_page(part.codes), by_page(part.scales), by_page(part.zeros)) for part in (key, value)
    )
    return pack_pages(keys, values, bits)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """float64 [B, H, D] of query [B, H, D] over the first tokens of key and value [B, tokens, KV heads, D]."""
    output = torch.zeros_like(query)
    share = query.shape[1] // key.shape[2]
    for i, length in enumerate(_LENS):
        first = max(0, length - window) if window else 0
        if length:
            keys, values = (
                tensor[i, first:length].repeat_interleave(share, dim=1).transpose(0, 1) for tensor in (key, value)
            )
            scores = (keys @ query[i].unsqueeze(2)).squeeze(2) * scale
            output[i] = (scores.softmax(dim=1).unsqueeze(1) @ values).squeeze(1)
    return output
