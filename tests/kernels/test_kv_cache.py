"""The KV cache on the CPU: the oracles against the definition and transformers, the kernels' arithmetic replayed, the
checks of operands, fake tensors, and that every kernel compiles without spilling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qoq.formats.arithmetic import kv_round_trip, quantize_kv, rotate_heads
from qoq.kernels import kv_cache, kv_operands
from qoq.kernels.compiler import compile_all, nvrtc_version
from qoq.kernels.kv_oracles import (
    append_oracle,
    gather_oracle,
    quantize_kv_oracle,
    rope_oracle,
    rotate_oracle,
    round_trip_oracle,
)
from qoq.kernels.layouts import page_bytes
from qoq.recipes.errors import EnvironmentProblem

DTYPES = (torch.float16, torch.bfloat16)
SHAPES = [(64, 4), (64, 8), (128, 4), (128, 8)]
ROTATED = (64, 128, 256)
"""Sizes of heads that kernels rotate."""


def heads_of_all_kinds(head_dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Heads [N, D]: random of many sizes, with outliers and offsets, constant, tiny, huge, and not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, head_dim, generator=generator, dtype=torch.float64)
    x[::5, :3] *= 100
    x[1::5] += 50
    x *= 10 ** (torch.rand(400, 1, generator=generator) * 10 - 6)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = x.clamp(-largest, largest)
    for i, constant in enumerate((0.0, -0.0, 0.25, -1e4, largest, -largest, smallest, -smallest)):
        x[i] = constant
    x[8, 0], x[9, 1], x[10, 2] = np.nan, np.inf, -np.inf
    x[11, :2] = torch.tensor([largest, -largest])
    x[12] = -1e4
    x[12, 0] = -1e4 * (1 + torch.finfo(dtype).eps)
    x[13], x[13, 0] = 0, smallest
    x[14], x[14, 0] = 0, -smallest * 20
    x[15], x[15, 0] = min(1e30, largest), -1
    x[16] = torch.arange(head_dim) % 16  # scale 1 with 4 bits
    x[17] = torch.arange(head_dim) % 16 / 2  # ties
    x[17, :2] = torch.tensor([0.0, 15.0])
    return x.to(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal, NaN in the same places."""
    return torch.equal(torch.nan_to_num(found, nan=12345), torch.nan_to_num(expected, nan=12345)) and torch.equal(
        found.isnan(), expected.isnan()
    )


def tables(max_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin float32 [max_positions, D/2]."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.arange(max_positions).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


# ---- oracles


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_oracle_is_the_definition(dtype: torch.dtype, bits: Any) -> None:
    x = heads_of_all_kinds(64, dtype)
    found, expected = quantize_kv_oracle(x, bits), quantize_kv(x, bits)
    assert same(found.scales, expected.scales)
    assert same(found.zeros, expected.zeros)
    assert torch.equal(found.zeros.signbit(), expected.zeros.signbit() & ~expected.zeros.isnan())
    finite = expected.scales.isfinite()[:, 0]
    assert torch.equal(found.codes[finite], expected.codes[finite])
    assert same(round_trip_oracle(x, bits), kv_round_trip(x, bits))
    assert int(finite.sum()) == len(x) - (4 if dtype == torch.bfloat16 else 3)


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_oracle_rotates_as_the_definition(dtype: torch.dtype, head_dim: int) -> None:
    """Bit for bit, for heads of all kinds: too large for the dtype, not finite, and with sums that float32 rounds."""
    x = heads_of_all_kinds(head_dim, dtype)
    found, expected = rotate_oracle(x), rotate_heads(x, "hadamard")
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert same(found, expected)
    assert torch.equal(found.signbit() & (found == 0), expected.signbit() & (expected == 0))
    assert same(rotate_oracle(x.view(20, 20, head_dim)).view_as(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_is_that_of_transformers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(50, 3, 64, generator=generator) * 30).to(dtype)
    cos, sin = tables(1000, 64)
    positions = torch.randint(0, 1000, (50,), generator=generator).int()
    positions[0] = 999
    wide = [torch.cat([table[positions.long()]] * 2, dim=-1).to(dtype) for table in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(x, x, *wide, unsqueeze_dim=1)
    assert torch.equal(rope_oracle(x, cos, sin, positions), expected)
    positions[3], positions[4] = -1, 1000
    outside = rope_oracle(x, cos, sin, positions)
    assert outside[3:5].isnan().all()
    assert torch.equal(outside[5:], expected[5:])


@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_what_is_appended_is_gathered(head_dim: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(2)
    key, value = (torch.randn(100, 2, head_dim, generator=generator).half() for _ in range(2))
    pages = torch.full((4, 2, page_bytes(head_dim, bits)), 0x7F, dtype=torch.uint8)
    slots = torch.randperm(256, generator=generator)[:100]
    slots[7] = -1
    written = append_oracle(pages, key, value, slots, bits)
    ids = torch.tensor([3, 0, 2, 1, 3], dtype=torch.int32)
    for found, x in zip(gather_oracle(written, ids, head_dim, bits, torch.float16), (key, value), strict=True):
        by_slot = torch.cat([found[256 - 192 : 128], found[192:256], found[128:192], found[256:]])
        taken = slots >= 0
        assert torch.equal(by_slot[slots[taken]], round_trip_oracle(x, bits)[taken])


# ---- the kernels' arithmetic, replayed


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c with one rounding: the float64 sum is rounded to odd before it is rounded to float32."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    c = c.astype(np.float64)
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)  # total + error is the sum, exactly
    is_even = total.view(np.int64) % 2 == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    odd = np.where((error != 0) & is_even, np.nextafter(total, toward), total)
    return odd.astype(np.float32)


def test_the_corrected_quotient_is_that_of_a_division() -> None:
    """For every pair of significands of 11 bits, which those of 8 bits and of subnormal scales are among.

    Exponents do not matter: the scale is a float16, so for |x| from 2^-100 on nothing under- or overflows.
    """
    significands = (np.arange(1024, 2048) / 1024).astype(np.float32)
    for start in range(0, 1024, 128):
        scale = significands[start : start + 128, None] * np.ones(1024, np.float32)
        x = significands[None, :] * np.ones((128, 1), np.float32)
        inverse = np.float32(1) / scale
        quotient = x * inverse
        corrected = fused_multiply_add(fused_multiply_add(-quotient, scale, x), inverse, quotient)
        assert np.array_equal(corrected, x / scale)


def test_the_emulated_step_rounds_once() -> None:
    one, tiny = np.float32([1.0]), np.float32([2**-30])
    assert fused_multiply_add(one, one, tiny)[0] == 1
    half = np.float32([2**-24])
    assert fused_multiply_add(one, one, half)[0] == 1  # a tie, to even
    assert fused_multiply_add(np.float32([1 + 2**-23]), half, one)[0] == np.float32(1 + 2**-23)  # just above it


def test_adding_the_rounder_rounds_half_to_even() -> None:
    x = np.concatenate([np.arange(0, 255.001, 1 / 8), [0.49999997, 2.5000002, 254.49998]]).astype(np.float32)
    total = x + np.float32(12582912.0)
    assert np.array_equal(total.view(np.int32) & 0xFF, np.rint(x).astype(np.int32))
    assert np.array_equal(total - np.float32(12582912.0), np.rint(x))


# ---- kernels


def test_every_kernel_compiles_without_spilling() -> None:
    try:
        nvrtc_version()
    except EnvironmentProblem as error:
        pytest.skip(str(error))
    specs = kv_cache.specs("sm_80")
    assert len(set(specs)) == len(specs) == 102
    for (spec, _), cubin in compile_all([(spec, "sm_80") for spec in specs]).items():
        assert cubin.resources.spill_bytes == cubin.resources.stack_bytes == 0, spec.label
        assert cubin.resources.registers <= 72, spec.label


def test_every_head_has_its_lanes() -> None:
    lanes = {
        d: dict(kv_cache.round_trip_spec(d, 4, torch.float16).defines)["LANES"] for d in (8, 64, 72, 128, 136, 256)
    }
    assert lanes == {8: 8, 64: 8, 72: 16, 128: 16, 136: 32, 256: 32}
    asked = {kv_cache.round_trip_spec(d, b, dtype) for d in range(8, 257, 8) for b in (4, 8) for dtype in DTYPES}
    rotated = {kv_cache.round_trip_spec(d, b, dtype, "hadamard") for d in ROTATED for b in (4, 8) for dtype in DTYPES}
    rotated |= {kv_cache.rotate_spec(d, dtype) for d in ROTATED for dtype in DTYPES}
    assert asked | rotated <= set(kv_cache.specs("sm_90"))
    assert [d for d in range(300) if kv_operands.rotation_fits(d)] == list(ROTATED)


# ---- operands

T, H, KVH, D = 3, 6, 2, 64


def operands() -> dict[str, Any]:
    cos, sin = tables(10, D)
    return {
        "query": torch.zeros(T, H, D).half(),
        "key": torch.zeros(T, KVH, D).half(),
        "value": torch.zeros(T, KVH, D).half(),
        "cos": cos,
        "sin": sin,
        "positions": torch.arange(T).int(),
        "kv_pages": torch.zeros(2, KVH, page_bytes(D, 4), dtype=torch.uint8),
        "slots": torch.arange(T),
        "bits": 4,
        "key_rotation": "hadamard",
    }


def check(given: dict[str, Any]) -> None:
    kv_operands.check_append(*(given[name] for name in ("key", "value", "kv_pages", "slots", "bits", "key_rotation")))
    kv_operands.check_rope(*(given[name] for name in ("query", "key", "cos", "sin", "positions")))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": torch.zeros(T, KVH, D)}, r"key: expected torch.float16 or torch.bfloat16 \[T, heads, D\], got .*32"),
        ({"key": torch.zeros(T, KVH * D).half()}, r"key: expected .* \[T, heads, D\], got torch.float16 \[3, 128\]"),
        ({"key": torch.zeros(T, KVH, 80).half()}, "head_dim is 80, a paged cache needs 64 or 128"),
        ({"bits": 16}, "bits is 16, a paged cache has 4 or 8"),
        ({"key_rotation": "random"}, "key_rotation is 'random', expected 'none' or 'hadamard'"),
        ({"value": torch.zeros(T, KVH, D).bfloat16()}, r"value: expected torch.float16 \[3, 2, 64\], got torch.bf"),
        ({"value": torch.zeros(T, 1, D).half()}, r"value: expected torch.float16 \[3, 2, 64\], got .* \[3, 1, 64\]"),
        ({"value": torch.zeros(T, KVH, D, device="meta").half()}, "value: expected it on cpu, got meta"),
        (
            {"value": torch.zeros(KVH, T, D).half().transpose(0, 1)},
            r"value: expected contiguous heads.* \[64, 192, 1\]",
        ),
        ({"key": torch.zeros(T, KVH * D + 4).half()[:, 4:].view(T, KVH, D)}, "key: expected contiguous heads, and tok"),
        ({"query": torch.zeros(T, H, 128).half()}, r"query: expected \[T, num_heads, D\] with T = 3 and D = 64"),
        ({"query": torch.zeros(T, H, D).bfloat16()}, "query: expected torch.float16"),
        ({"kv_pages": torch.zeros(2, KVH, 100).byte()}, r"kv_pages: expected .* with \[2, 4608\] at the end"),
        ({"kv_pages": torch.zeros(2, KVH, 4608)}, "kv_pages: expected torch.uint8"),
        ({"kv_pages": torch.zeros(4, KVH, 4608).byte()[::2]}, "kv_pages: expected contiguous memory"),
        ({"slots": torch.arange(T).int()}, r"slots: expected torch.int64 \[3\], got torch.int32 \[3\]"),
        ({"slots": torch.arange(2 * T)[::2]}, "slots: expected contiguous memory"),
        ({"positions": torch.arange(T)}, r"positions: expected torch.int32 \[3\], got torch.int64"),
        ({"cos": torch.zeros(10, D)}, r"cos: expected torch.float32 \[max_positions, 32\]"),
        ({"sin": torch.zeros(9, D // 2)}, r"sin: expected .*, the same for cos and sin, got torch.float32 \[9, 32\]"),
        ({"sin": torch.zeros(10, D // 2).half()}, "sin: expected torch.float32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    check(operands())
    with pytest.raises(ValueError, match=message):
        check(operands() | changed)


def test_parts_of_a_fused_buffer_are_taken() -> None:
    qkv = torch.zeros(T, H + 2 * KVH, D).half()
    query, key, value = qkv.split([H, KVH, KVH], dim=1)
    check(operands() | {"query": query, "key": key, "value": value})
    single = qkv[:1].as_strided((1, KVH, D), (7, D, 1), 0)  # the stride of a single token means nothing
    kv_operands.check_append(single, single, operands()["kv_pages"], torch.arange(1), 4)


def test_calls_that_are_too_large_are_refused() -> None:
    many = torch.zeros(1, 1, 64).half().expand(2**30, 1, 64)
    slots = torch.zeros(1, dtype=torch.int64).expand(2**30)
    with pytest.raises(ValueError, match="slots: expected contiguous"):
        kv_operands.check_append(many, many, torch.zeros(1, 1, 4608).byte(), slots, 4)
    with pytest.raises(ValueError, match=r"num_pages is 4294967296, .* split the call"):
        kv_operands._check_count("num_pages", 2**32)


@pytest.mark.parametrize(
    ("x", "bits", "message"),
    [
        (torch.zeros(2, 64), 4, "x: expected torch.float16 or torch.bfloat16"),
        (torch.zeros(2, 64).half(), 16, "bits is 16, expected 4 or 8"),
        (torch.zeros(2, 12).half(), 4, "x: D is 12, expected a multiple of 8 up to 256"),
        (torch.zeros(2, 264).half(), 4, "x: D is 264"),
        (torch.zeros(64, 8).half().t(), 4, "x: expected contiguous memory"),
        (torch.zeros(65).half()[1:], 4, "x: expected contiguous memory that begins at a multiple of 16 bytes"),
    ],
)
def test_round_trips_that_do_not_fit_are_refused(x: Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kv_operands.check_round_trip(x, bits)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 64), "x: expected torch.float16 or torch.bfloat16"),
        (torch.zeros(2, 96).half(), r"x: D is 96, but heads are rotated with D of \(64, 128, 256\)"),
        (torch.zeros(2, 32).half(), "x: D is 32, but heads are rotated with D of"),
        (torch.zeros(64, 64).half().t(), "x: expected contiguous memory"),
    ],
)
def test_rotations_that_do_not_fit_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kv_operands.check_rotate(x)
    with pytest.raises(ValueError, match=message):
        kv_operands.check_round_trip(x, 4, "hadamard")


def test_another_rotation_is_refused() -> None:
    with pytest.raises(ValueError, match="key_rotation is 'random', expected 'none' or 'hadamard'"):
        kv_operands.check_round_trip(torch.zeros(2, 64).half(), 4, "random")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"page_ids": torch.zeros(3, dtype=torch.int64)}, "page_ids: expected torch.int32"),
        ({"page_ids": torch.zeros(1, 3).int()}, r"page_ids: expected torch.int32 \[P\]"),
        ({"dtype": torch.float32}, "dtype: expected torch.float16 or torch.bfloat16"),
        ({"head_dim": 128}, "kv_pages: expected torch.uint8"),
        ({"bits": 5}, "bits is 5"),
    ],
)
def test_pages_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "kv_pages": operands()["kv_pages"],
        "page_ids": torch.zeros(3).int(),
        "head_dim": D,
        "bits": 4,
        "dtype": torch.float16,
    }
    kv_operands.check_gather(**given)
    with pytest.raises(ValueError, match=message):
        kv_operands.check_gather(**(given | changed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 5])
def test_fake_tensors_have_the_shapes_of_results(dtype: torch.dtype, tokens: int) -> None:
    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    qkv = empty(tokens, 10 * D)
    query, key, value = qkv.view(tokens, 10, D).split([H, KVH, KVH], dim=1)
    pages, slots = empty(7, KVH, page_bytes(D, 4), kind=torch.uint8), empty(tokens, kind=torch.int64)
    positions, table = empty(tokens, kind=torch.int32), empty(9, D // 2, kind=torch.float32)
    for rotation in ((), ("hadamard",)):
        assert torch.ops.qoq.append_kv(key, value, pages, slots, 4, *rotation) is None
        results = torch.ops.qoq.rope_append_kv(query, key, value, table, table, positions, pages, slots, 4, *rotation)
        for found, given in zip(results, (query, key, value), strict=True):
            assert (found.dtype, found.shape, found.is_contiguous()) == (dtype, given.shape, True)
        turned = torch.ops.qoq.rope_append(query, key, value, table, table, positions, pages, slots, 4, *rotation)
        assert (turned.dtype, turned.shape, turned.is_contiguous()) == (dtype, query.shape, True)
        assert torch.ops.qoq.kv_round_trip(key.contiguous(), 4, *rotation).shape == key.shape
    rotated = torch.ops.qoq.rotate_heads(query.contiguous())
    assert (rotated.dtype, rotated.shape) == (dtype, query.shape)
    ids = empty(tokens, kind=torch.int32)
    for found in torch.ops.qoq.gather_kv(pages, ids, D, 4, dtype):
        assert (found.dtype, tuple(found.shape)) == (dtype, (64 * tokens, KVH, D))
