"""The proof of the KV cache kernels: right stand-ins pass, a wrong byte or a wrong output is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV, dequantize_kv, quantize_kv
from qoq.kernels import kv_verification
from qoq.kernels.kv_verification import check_cache_kernels
from qoq.kernels.layouts import PAGE_SIZE, pack_pages, unpack_pages

CPU = torch.device("cpu")


def append_kv(key: Tensor, value: Tensor, pages: Tensor, slots: Tensor, bits: int) -> None:
    """Every slot of the pool is written, as the check does."""

    def pool(x: Tensor) -> QuantizedKV:
        kv = quantize_kv(x[slots.argsort()], 4 if bits == 4 else 8)
        parts = (part.view(-1, PAGE_SIZE, *part.shape[1:]).transpose(1, 2) for part in (kv.codes, kv.scales, kv.zeros))
        return QuantizedKV(*(part.contiguous() for part in parts))

    assert slots.sort().values.tolist() == list(range(pages.shape[0] * PAGE_SIZE))
    pages.copy_(pack_pages(pool(key), pool(value), bits))


def paged_decode_attention(
    query: Tensor, pages: Tensor, table: Tensor, lens: Tensor, scale: float, bits: int, window: int
) -> Tensor:
    output = torch.zeros_like(query)
    keys, values = (dequantize_kv(kv) for kv in unpack_pages(pages, query.shape[2], bits))
    for i, length in enumerate(lens.tolist()):
        first = max(0, length - window) if window else 0
        k, v = (t[table[i].long()].transpose(0, 1).flatten(1, 2)[:, first:length] for t in (keys, values))
        if length:
            found = torch.nn.functional.scaled_dot_product_attention(
                query[i, :, None].float()[None], k[None], v[None], scale=scale, enable_gqa=True
            )
            output[i] = found[0, :, 0].to(query.dtype)
    return output


@pytest.fixture(autouse=True)
def _operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.qoq, "append_kv", append_kv, raising=False)
    monkeypatch.setattr(torch.ops.qoq, "paged_decode_attention", paged_decode_attention, raising=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(6, 2, 64, None), (4, 4, 128, 33), (3, 1, 64, 4096)]
)
def test_right_kernels_pass(
    heads: int, kv_heads: int, head_dim: int, window: int | None, bits: int, dtype: torch.dtype
) -> None:
    check = check_cache_kernels(heads, kv_heads, head_dim, bits, dtype, window=window, device=CPU)
    assert check.problems == ()
    assert 0 < check.relative_error <= check.tolerance
    assert (check.bits, check.dtype) == (bits, str(dtype).removeprefix("torch."))


def test_a_wrong_byte_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(key: Tensor, value: Tensor, pages: Tensor, *rest: Any) -> None:
        append_kv(key, value, pages, *rest)
        pages[3, 1, 77] ^= 1

    monkeypatch.setattr(torch.ops.qoq, "append_kv", spoilt)
    problems = check_cache_kernels(4, 2, 64, 4, torch.float16, window=None, device=CPU).problems
    assert problems[0].startswith("KV4 cache, torch.float16: byte [3, 1, 77] is ")


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_output_is_told(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*args: Any) -> Tensor:
        output = paged_decode_attention(*args)
        output[7] *= factor
        return output

    monkeypatch.setattr(torch.ops.qoq, "paged_decode_attention", spoilt)
    first, second = check_cache_kernels(4, 2, 64, 4, torch.float16, window=None, device=CPU).problems
    assert "decode attention differs from float64 by" in first
    assert "output (7, " in second


def test_an_unwritten_output_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a sequence of no tokens, whose output must be zero."""

    def spoilt(query: Tensor, *args: Any) -> Tensor:
        output = paged_decode_attention(query, *args)
        output[kv_verification._LENS.index(0)] = 0.5
        return output

    monkeypatch.setattr(torch.ops.qoq, "paged_decode_attention", spoilt)
    assert check_cache_kernels(4, 2, 64, 4, torch.float16, window=None, device=CPU).problems
