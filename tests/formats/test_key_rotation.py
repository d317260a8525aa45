"""The rotation of queries and keys against matrices made by Kronecker products in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qoq.formats.arithmetic import as_attended, kv_round_trip, rotate_heads, rotates

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def matrix(order: int) -> Any:
    """Sylvester's Hadamard matrix, int64 [order, order]."""
    found = np.ones((1, 1), dtype=np.int64)
    while len(found) < order:
        found = np.kron(np.array([[1, 1], [1, -1]]), found)
    return found


def heads(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random values, a few channels much larger than the others."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., :: max(1, shape[-1] // 3)] *= 40
    return x


# ---- the definition


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_a_product_with_the_matrix(dtype: torch.dtype, order: int) -> None:
    x = heads((5, 3, order)).to(dtype)
    before = x.clone()
    got = rotate_heads(x, "hadamard")
    assert (got.dtype, got.shape) == (dtype, x.shape)
    assert torch.equal(x, before)
    want = x.double().numpy() @ matrix(order) / np.sqrt(order)
    # Of the sums, log2(order) roundings to float32 and one for the scale; then one to the dtype.
    size = np.abs(x.double().numpy()).sum(axis=-1, keepdims=True) / np.sqrt(order)
    bound = size * 10 * 2.0**-24 + np.abs(want) * torch.finfo(dtype).eps / 2 * 1.01
    assert (np.abs(got.double().numpy() - want) <= bound).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_sums_are_exact_only_scale_and_dtype_round(dtype: torch.dtype, order: int) -> None:
    """Integers, whose sums float32 holds: every bit is known, that of 1 / sqrt(128) in float32 too."""
    x = torch.randint(-200, 201, (7, order), generator=torch.Generator().manual_seed(order)).to(dtype)
    sums = x.double().numpy() @ matrix(order)
    scale = np.float32(1 / np.sqrt(np.float64(order)))
    want = torch.from_numpy(sums.astype(np.float32) * scale).to(dtype)
    assert torch.equal(rotate_heads(x, "hadamard"), want)


def test_scales_are_those_that_kernels_have_as_constants() -> None:
    """kernels/cuda/common/hadamard.cuh."""
    for order, bits in ((64, 0x3E000000), (128, 0x3DB504F3), (256, 0x3D800000)):
        x = torch.zeros(order)
        x[0] = 1
        assert rotate_heads(x, "hadamard").view(torch.int32).unique().tolist() == [bits]


def test_sums_are_rounded_in_a_fixed_order() -> None:
    """Neighbours first: 1 and -1 are gone before 2^-30 comes, which would not survive beside 1."""
    x = torch.zeros(64)
    x[0], x[1], x[2] = 1, -1, 2.0**-30
    assert rotate_heads(x, "hadamard")[0] == 2.0**-33
    x[1], x[2] = 2.0**-30, -1
    assert rotate_heads(x, "hadamard")[0] == 0


@pytest.mark.parametrize("order", ORDERS)
def test_it_is_orthogonal_and_its_own_inverse(order: int) -> None:
    r = rotate_heads(torch.eye(order), "hadamard").double()
    assert torch.equal(r, r.t())
    assert torch.allclose(r @ r, torch.eye(order, dtype=torch.float64), atol=1e-6)
    assert torch.equal(r.sign().long(), torch.from_numpy(matrix(order)))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), order=st.sampled_from(ORDERS), tokens=st.integers(1, 5))
def test_scores_and_norms_are_kept(seed: int, order: int, tokens: int) -> None:
    query, key = heads((tokens, order), seed), heads((tokens, order), seed + 1)
    turned = [rotate_heads(x, "hadamard").double() for x in (query, key)]
    want = query.double() @ key.double().t()
    size = query.double().norm(dim=1)[:, None] * key.double().norm(dim=1)
    assert ((turned[0] @ turned[1].t() - want).abs() <= 1e-6 * size).all()
    assert torch.allclose(turned[1].norm(dim=1), key.double().norm(dim=1), rtol=1e-5)


def test_it_comes_after_rope() -> None:
    """RoPE and the rotation do not commute: before RoPE it would change the scores."""
    tokens, order = 9, 64
    angles = torch.arange(tokens).float()[:, None] / 100 ** (torch.arange(order // 2) / (order // 2))
    cos, sin = (torch.cat((table, table), dim=-1)[None] for table in (angles.cos(), angles.sin()))
    query, key = heads((1, 1, tokens, order), 1), heads((1, 1, tokens, order), 2)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return q.double() @ k.double().mT

    plain = scores(*apply_rotary_pos_emb(query, key, cos, sin))
    after = scores(*(rotate_heads(x, "hadamard") for x in apply_rotary_pos_emb(query, key, cos, sin)))
    before = scores(*apply_rotary_pos_emb(*(rotate_heads(x, "hadamard") for x in (query, key)), cos, sin))
    assert float((after - plain).norm() / plain.norm()) < 1e-5
    assert float((before - plain).norm() / plain.norm()) > 0.1


# ---- values out of the ordinary


def test_views_and_empty_tensors() -> None:
    x = heads((4, 6, 64)).transpose(0, 1)
    assert torch.equal(rotate_heads(x, "hadamard"), rotate_heads(x.contiguous(), "hadamard"))
    assert rotate_heads(torch.zeros(0, 3, 128), "hadamard").shape == (0, 3, 128)
    assert torch.equal(rotate_heads(x[0, 0], "hadamard"), rotate_heads(x, "hadamard")[0, 0])


def test_what_is_not_finite_reaches_the_whole_head() -> None:
    x = torch.ones(4, 64, dtype=torch.float16)
    x[1, 5], x[2, 9] = torch.nan, torch.inf
    turned = rotate_heads(x, "hadamard")
    assert turned.isfinite().all(dim=1).tolist() == [True, False, False, True]
    assert not turned[1:3].isfinite().any()
    large = torch.full((1, 64), 60000.0, dtype=torch.float16)  # longer than float16 reaches
    assert rotate_heads(large, "hadamard")[0, :2].tolist() == [torch.inf, 0.0]


def test_what_cannot_be_rotated_is_refused() -> None:
    assert [order for order in range(-2, 300) if rotates(order)] == list(ORDERS)
    with pytest.raises(ValueError, match="heads of 96 values cannot be rotated, their number must be a power of two"):
        rotate_heads(torch.zeros(2, 96), "hadamard")
    with pytest.raises(ValueError, match="key_rotation must be none or hadamard, got 'random'"):
        rotate_heads(torch.zeros(2, 64), "random")  # type: ignore[arg-type]


# ---- with the cache


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_sees_rotated_queries_and_keys_and_plain_values(dtype: torch.dtype, bits: int) -> None:
    query, key, value = (heads((2, 3, 64), seed).to(dtype) for seed in range(3))
    q, k, v = as_attended(query, key, value, kv_bits=bits, key_rotation="hadamard")
    assert torch.equal(q, rotate_heads(query, "hadamard"))
    assert torch.equal(k, kv_round_trip(rotate_heads(key, "hadamard"), bits))
    assert torch.equal(v, kv_round_trip(value, bits))
    plain = as_attended(query, key, value, kv_bits=bits, key_rotation="none")
    assert plain[0] is query
    assert torch.equal(plain[1], kv_round_trip(key, bits))
    assert torch.equal(plain[2], v)


def test_sixteen_bits_rotate_nothing() -> None:
    given_ = tuple(heads((2, 96), seed) for seed in range(3))
    found = as_attended(*given_, kv_bits=16, key_rotation="hadamard")
    assert all(a is b for a, b in zip(found, given_, strict=True))
    assert rotate_heads(given_[0], "none") is given_[0]


def test_outlier_channels_of_keys_cost_less() -> None:
    query, key = torch.randn(200, 128, generator=torch.Generator().manual_seed(4)), heads((200, 128), 5)
    want = query @ key.t()

    def error(rotation: Any) -> float:
        q, k, _ = as_attended(query, key, key, kv_bits=4, key_rotation=rotation)
        return float((q @ k.t() - want).norm() / want.norm())

    plain, turned = error("none"), error("hadamard")
    assert turned < 0.75 * plain
    # One channel alone: all of a scale's range is spent on it.
    key = torch.randn(200, 128, generator=torch.Generator().manual_seed(6))
    key[:, 7] *= 100
    query[:, 7] /= 100
    want = query @ key.t()
    assert error("hadamard") < 0.5 * error("none")
