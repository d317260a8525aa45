"""The proof of the KV cache kernels: right stand-ins pass, a wrong byte or a wrong output is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV, dequantize_kv, kv_round_trip, quantize_kv, rotate_heads
from qoq.kernels import kv_verification
from qoq.kernels.kv_verification import check_cache_kernels
from qoq.kernels.layouts import PAGE_SIZE, pack_pages, unpack_pages

CPU = torch.device("cpu")


def append_kv(key: Tensor, value: Tensor, pages: Tensor, slots: Tensor, bits: int, key_rotation: Any) -> None:
    """Every slot of the pool is written, as the check does."""

    def pool(x: Tensor) -> QuantizedKV:
        kv = quantize_kv(x[slots.argsort()], 4 if bits == 4 else 8)
        parts = (part.view(-1, PAGE_SIZE, *part.shape[1:]).transpose(1, 2) for part in (kv.codes, kv.scales, kv.zeros))
        return QuantizedKV(*(part.contiguous() for part in parts))

    assert slots.sort().values.tolist() == list(range(pages.shape[0] * PAGE_SIZE))
    pages.copy_(pack_pages(pool(rotate_heads(key, key_rotation)), pool(value), bits))


def round_trip(x: Tensor, bits: int, key_rotation: Any) -> Tensor:
    return kv_round_trip(rotate_heads(x, key_rotation), bits)


def rotate(x: Tensor) -> Tensor:
    return rotate_heads(x, "hadamard")


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
    monkeypatch.setattr(torch.ops.qoq, "kv_round_trip", round_trip, raising=False)
    monkeypatch.setattr(torch.ops.qoq, "rotate_heads", rotate, raising=False)


@pytest.mark.parametrize("key_rotation", ["none", "hadamard"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(6, 2, 64, None), (4, 4, 128, 33), (3, 1, 64, 4096)]
)
def test_right_kernels_pass(
    heads: int, kv_heads: int, head_dim: int, window: int | None, bits: int, dtype: torch.dtype, key_rotation: Any
) -> None:
    check = check_cache_kernels(
        heads, kv_heads, head_dim, bits, dtype, key_rotation=key_rotation, window=window, device=CPU
    )
    assert check.problems == ()
    assert 0 < check.relative_error <= check.tolerance
    found = (check.bits, check.key_rotation, check.dtype)
    assert found == (bits, key_rotation, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("key_rotation", ["none", "hadamard"])
@pytest.mark.parametrize("operator", ["append_kv", "kv_round_trip"])
def test_keys_rotated_otherwise_than_asked_for_are_told(
    operator: str, key_rotation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {"append_kv": append_kv, "kv_round_trip": round_trip}[operator]

    def otherwise(*args: Any) -> Any:
        return right(*args[:-1], "hadamard" if args[-1] == "none" else "none")  # type: ignore[operator]

    monkeypatch.setattr(torch.ops.qoq, operator, otherwise)
    check = check_cache_kernels(
        4,
        2,
        64,
        4,
        torch.float16,
        key_rotation=key_rotation,
        window=None,
        device=CPU,  # type: ignore[arg-type]
    )
    what = "KV4 cache, torch.float16" + (", key rotation hadamard" if key_rotation == "hadamard" else "")
    assert check.problems[0].startswith(f"{what}: {'byte' if operator == 'append_kv' else 'key'} [")


@pytest.mark.parametrize("wrong", [lambda x: x, lambda x: rotate(x).nextafter(torch.full_like(x, 9))])
def test_queries_rotated_wrongly_are_told(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.qoq, "rotate_heads", wrong)
    args = (4, 2, 64, 4, torch.float16)
    problems = check_cache_kernels(*args, key_rotation="hadamard", window=None, device=CPU).problems
    assert problems[0].startswith("KV4 cache, torch.float16, key rotation hadamard: query [0, 0, 0] is ")
    assert check_cache_kernels(*args, window=None, device=CPU).problems == ()


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
