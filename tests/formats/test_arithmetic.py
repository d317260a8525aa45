"""The numbers of W4A8KV4 against numpy and against the integer oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qoq.formats.arithmetic import (
    IntegerWeight,
    dequantize_kv,
    integer_matmul,
    kv_round_trip,
    linear_forward,
    quantize_activation,
    quantize_channels,
    quantize_kv,
)
from qoq.formats.packing import pack_linear
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.kernels.oracles import emulate_packed_codes, emulate_packed_level1, gemm_oracle

MakeLinear = Callable[..., QuantizedLinear]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SEEDS = st.integers(0, 2**32 - 1)


def randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, spread: float = 0.0) -> Tensor:
    """Normal numbers; each row has its own size within 2**-spread .. 2**spread."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2((torch.rand(*shape[:-1], 1, generator=generator) * 2 - 1) * spread)
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


# ---- activations


def numpy_activation(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales): scale and quotient are float32 numbers, rounded from float64; ties go to the even code."""
    values = x.double().numpy()
    scales = (np.abs(values).max(axis=1) / 127).astype(np.float32)
    scales[scales == 0] = 1
    quotients = (values / scales[:, None].astype(np.float64)).astype(np.float32)
    return np.clip(np.rint(quotients), -127, 127).astype(np.int8), scales


def assert_activation_matches(x: Tensor) -> None:
    act = quantize_activation(x)
    codes, scales = numpy_activation(x)
    assert (act.codes.dtype, act.scales.dtype, act.sums.dtype) == (torch.int8, torch.float32, torch.int32)
    np.testing.assert_array_equal(act.scales.numpy(), scales)
    np.testing.assert_array_equal(act.codes.numpy(), codes)
    np.testing.assert_array_equal(act.sums.numpy(), codes.astype(np.int64).sum(axis=1))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 200), SEEDS, st.sampled_from(DTYPES), st.sampled_from((0.0, 12.0, 100.0)))
def test_activations_match_numpy(m: int, k: int, seed: int, dtype: torch.dtype, spread: float) -> None:
    x = randn((m, k), seed, dtype, spread)
    assert_activation_matches(torch.nan_to_num(x))  # float16 overflows at such spreads: to its largest number


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=8))
def test_any_float32_row_matches_numpy(row: list[float]) -> None:
    assert_activation_matches(torch.tensor([row]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_channels_match_numpy(dtype: torch.dtype) -> None:
    """Codes of scales that were rounded to float16; channels of zeros, of one value, and too small for a scale."""
    weight = (torch.randn(9, 37, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weight[1], weight[2], weight[3] = 0.0, 0.5, 1e-7
    found = quantize_channels(weight)
    x = weight.float().numpy()
    scales = (np.abs(x).max(axis=1) / np.float32(127)).astype(np.float16).astype(np.float32)
    usable = scales > 0
    assert usable.sum() == 7
    codes = np.zeros_like(x)
    codes[usable] = np.clip(np.rint(x[usable] / scales[usable, None]), -127, 127)
    assert np.array_equal(found.values.numpy(), codes.astype(np.int8))
    assert np.array_equal(found.s1_scales.numpy(), np.where(usable, scales, 1.0))
    assert np.abs(found.dequantize().numpy() - x)[usable].max() <= 0.51 * scales[usable].max()


def test_ties_go_to_the_even_code() -> None:
    act = quantize_activation(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]]))
    assert act.scales.tolist() == [1.0]
    assert act.codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert act.sums.tolist() == [127 + 2 + 2 - 2 - 2 + 126]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_zeros_has_scale_one(dtype: torch.dtype) -> None:
    act = quantize_activation(torch.tensor([[0.0, -0.0], [1.0, -2.0]], dtype=dtype))
    assert act.scales[0] == 1
    assert act.codes[0].tolist() == [0, 0]
    assert act.sums[0] == 0
    assert act.codes[1, 1] == -127


def test_a_token_too_small_for_a_scale_is_one_of_zeros() -> None:
    act = quantize_activation(torch.tensor([[1e-45, 0.0, -1e-45], [2.6e-43, 0.0, -2.6e-43]]))
    assert act.scales[0] == 1
    assert act.codes[0].tolist() == [0, 0, 0]
    assert act.scales[1] == 2.0**-149  # rounded down from 1.46 times that, so that the codes are clamped
    assert act.codes[1].tolist() == [127, 0, -127]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_do_not_overflow(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    act = quantize_activation(torch.tensor([[largest, -largest, largest / 2]], dtype=dtype))
    assert act.codes[0, :2].tolist() == [127, -127]
    assert math.isfinite(float(act.scales[0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["pre_scale", "per_channel"])
def test_a_number_that_is_none_reaches_the_output_of_its_token_alone(
    make_linear: MakeLinear, mode: str, bad: float
) -> None:
    weight = IntegerWeight.decode(make_linear(mode, 32, 128, 0))
    x = torch.ones(2, 128)
    x[0, 5] = bad
    y = linear_forward(x, weight, act_bits=8)
    assert not torch.isfinite(y[0]).any()
    assert torch.isfinite(y[1]).all()


# ---- the integer product


@pytest.mark.parametrize("k", [1, 127, 1024, 1025, 5000])
@pytest.mark.parametrize(("act", "weight"), [(127, -128), (-127, -128), (127, 127), (-127, 127)])
def test_the_largest_sums_are_exact(k: int, act: int, weight: int) -> None:
    product = integer_matmul(torch.full((3, k), act, dtype=torch.int8), torch.full((4, k), weight, dtype=torch.int8))
    assert product.dtype == torch.int32
    assert torch.equal(product, torch.full((3, 4), act * weight * k, dtype=torch.int32))


@pytest.mark.parametrize("k", [1042, 2048, 4098])
def test_odd_sums_past_two_to_the_24_are_exact(k: int) -> None:
    """float32 counts only every second integer there."""
    acts, weights = (torch.full((1, k), 127, dtype=torch.int8) for _ in range(2))
    weights[0, -1] = 0
    assert integer_matmul(acts, weights).item() == 127 * 127 * (k - 1)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 5), st.integers(1, 5), st.sampled_from((1, 2, 127, 1023, 1024, 1025, 3000)), SEEDS)
def test_random_products_are_exact(m: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randint(-127, 128, (m, k), generator=generator)
    weights = torch.randint(-128, 128, (n, k), generator=generator)
    product = integer_matmul(acts.to(torch.int8), weights.to(torch.int8))
    assert torch.equal(product.long(), acts @ weights.t())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (16, 32, 128), (17, 33, 130), (40, 8, 5000)])
def test_products_on_a_gpu_are_exact(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    acts, weights = torch.randint(-127, 128, (m, k)), torch.randint(-128, 128, (n, k))
    product = integer_matmul(acts.to(torch.int8).cuda(), weights.to(torch.int8).cuda())
    assert torch.equal(product.cpu().long(), acts @ weights.t())


def test_no_inputs_make_no_product() -> None:
    with pytest.raises(ValueError, match="K must be at least 1"):
        integer_matmul(torch.zeros(2, 0, dtype=torch.int8), torch.zeros(3, 0, dtype=torch.int8))


# ---- the linear layer


def oracle_of(linear: QuantizedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, bound) float64 [M, N]: the exact result from the packed bytes, and how far float32 and one store may be.

    Before the store: at most four float32 roundings of each of the two terms and one of their difference. The store
    rounds y, the bias and their sum to x's dtype.
    """
    packed = pack_linear(linear)
    if linear.is_progressive:
        weight = emulate_packed_level1(packed["qweight"], packed["s2_scales"], packed["s2_zeros"])
    else:
        weight = emulate_packed_codes(packed["qweight"])
    weight = weight[:, : linear.in_features]
    codes, scales = (torch.from_numpy(array) for array in numpy_activation(x))
    sums = codes.long().sum(dim=1)
    szeros = packed.get("s1_szeros")
    product = gemm_oracle(codes, scales, sums, weight, packed["s1_scales"])
    plain = gemm_oracle(codes, scales, sums, weight, packed["s1_scales"], szeros)
    y = gemm_oracle(codes, scales, sums, weight, packed["s1_scales"], szeros, packed.get("bias"))
    bound = 2.0**-24 * (4 * product.abs() + 4 * (plain - product).abs() + plain.abs())
    info = torch.finfo(x.dtype)
    stored = plain.abs() if linear.bias is None else plain.abs() + linear.bias.double().abs() + y.abs()
    return y, bound + info.eps / 2 * (stored + bound) * 1.01 + info.smallest_normal * info.eps


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(("pre_scale", "post_scale", "per_channel")),
    st.integers(1, 4),
    st.sampled_from((1, 100, 128, 200, 1100)),
    st.booleans(),
    st.sampled_from(DTYPES),
    SEEDS,
)
def test_linear_forward_matches_the_integer_oracle(
    make_linear: MakeLinear, mode: str, m: int, in_features: int, has_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    linear = make_linear(mode, 32, in_features, seed, has_bias=has_bias)
    linear = replace(linear, s1_scales=linear.s1_scales.clamp(max=2**-5))  # float16 outputs stay finite
    x = randn((m, in_features), seed, dtype, spread=1.0)
    y = linear_forward(x, IntegerWeight.decode(linear), act_bits=8)
    expected, bound = oracle_of(linear, x)
    assert y.dtype == dtype
    error = (y.double() - expected).abs()
    assert bool((error <= bound).all()), f"error / bound up to {float((error / bound).max())}"


def test_progressive_outputs_are_one_product_of_three_float32_numbers(make_linear: MakeLinear) -> None:
    """Kernels may be held to the last bit: the scales are multiplied first, then the sum, then one rounding."""
    linear = make_linear("pre_scale", 32, 5000, 4)
    x = randn((8, 5000), 4)
    act = quantize_activation(x)
    acc = (act.codes.long() @ linear.level1()[:, :5000].long().t()).numpy()
    scale = act.scales.numpy()[:, None] * linear.s1_scales.numpy().astype(np.float32)
    expected = acc.astype(np.float32) * scale
    np.testing.assert_array_equal(linear_forward(x, IntegerWeight.decode(linear), act_bits=8).numpy(), expected)


@pytest.mark.parametrize("mode", ["pre_scale", "post_scale", "per_channel"])
def test_sixteen_bit_activations_meet_the_decoded_weight(make_linear: MakeLinear, mode: str) -> None:
    linear = make_linear(mode, 32, 200, 1, has_bias=True)
    weight = IntegerWeight.decode(linear)
    x = randn((3, 200), 2)
    assert torch.equal(weight.dequantize(), linear.dequantize())
    expected = x.double() @ linear.dequantize().double().t() + linear.bias.double()
    error = (linear_forward(x, weight, act_bits=16).double() - expected).abs()
    assert bool((error <= 2.0**-24 * 200 * (x.abs() @ linear.dequantize().abs().t() + 1)).all())


@pytest.mark.parametrize("act_bits", [8, 16])
def test_leading_axes_are_kept_even_when_empty(make_linear: MakeLinear, act_bits: int) -> None:
    weight = IntegerWeight.decode(make_linear("per_channel", 32, 100, 0, has_bias=True))
    x = randn((2, 3, 100), 0, torch.bfloat16)
    y = linear_forward(x, weight, act_bits=act_bits)
    assert tuple(y.shape) == (2, 3, 32)
    assert torch.equal(y[1, 2], linear_forward(x[1, 2], weight, act_bits=act_bits))
    assert tuple(linear_forward(x[:, :0], weight, act_bits=act_bits).shape) == (2, 0, 32)


@pytest.mark.parametrize("act_bits", [0, 4, 32])
def test_other_activations_are_refused(make_linear: MakeLinear, act_bits: int) -> None:
    weight = IntegerWeight.decode(make_linear("pre_scale", 32, 100, 0))
    with pytest.raises(ValueError, match=f"act_bits must be 8 or 16, got {act_bits}"):
        linear_forward(torch.ones(1, 100), weight, act_bits=act_bits)


def test_columns_of_padding_change_nothing(make_linear: MakeLinear) -> None:
    linear = make_linear("post_scale", 32, 140, 3)
    legal = linear.codes[:, 139:140]  # of the same group
    changed = replace(linear, codes=torch.cat((linear.codes[:, :140], legal.expand(32, 116)), dim=1))
    assert not torch.equal(changed.codes, linear.codes)
    x = randn((2, 140), 3)
    before, after = (linear_forward(x, IntegerWeight.decode(w), act_bits=8) for w in (linear, changed))
    assert torch.equal(before, after)


# ---- keys and values


def kv_error_bound(x: Tensor, bits: int) -> Tensor:
    """What the scale and zero as stored allow, float64 [..., 1]: half a step, and what the clamp to the codes cuts off.

    A code is clamped where the float16 scale fell short of (max - min) / levels or the float16 zero moved the range.
    """
    kv = quantize_kv(x, 4 if bits == 4 else 8)
    values, scales, zeros = x.double(), kv.scales.double(), kv.zeros.double()
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    shift = (zeros + low / scales).abs()
    short = ((high - low) / scales - (2**bits - 1)).clamp(min=0)
    float32 = 2.0**-22 * (values.abs().amax(dim=-1, keepdim=True) / scales + zeros.abs() + 16)
    return scales * (0.5 + shift + short + float32)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from((4, 8)),
    st.sampled_from(DTYPES),
    st.sampled_from((1, 2, 64, 128)),
    st.sampled_from((0.0, 1.0, -30.0, 1000.0, -30000.0)),
    st.sampled_from((0.0, 4.0, 20.0)),
    SEEDS,
)
def test_kv_codes_are_in_range_and_errors_within_half_a_step_and_the_clamp(
    bits: int, dtype: torch.dtype, head_dim: int, offset: float, spread: float, seed: int
) -> None:
    x = torch.nan_to_num(randn((2, 3, head_dim), seed, torch.float32, spread).add(offset).to(dtype))
    kv = quantize_kv(x, 4 if bits == 4 else 8)
    assert (kv.codes.dtype, kv.scales.dtype, kv.zeros.dtype) == (torch.uint8, torch.float16, torch.float16)
    assert tuple(kv.codes.shape) == tuple(x.shape)
    assert tuple(kv.scales.shape) == tuple(kv.zeros.shape) == (2, 3, 1)
    assert int(kv.codes.max()) <= 2**bits - 1
    assert bool((kv.scales > 0).all())
    assert bool(torch.isfinite(kv.scales).all())
    assert bool(torch.isfinite(kv.zeros).all())
    decoded = dequantize_kv(kv)
    assert bool(((decoded.double() - x.double()).abs() <= kv_error_bound(x, bits)).all())
    returned = kv_round_trip(x, bits)
    assert returned.dtype == dtype
    assert torch.equal(returned, decoded.to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_ordinary_keys_no_error_exceeds_half_a_step_and_float16(bits: int, dtype: torch.dtype) -> None:
    """Here the bound is told from the data alone: scale and zero each carry one float16 rounding."""
    x = randn((200, 128), 7, dtype, spread=6.0)
    values = x.double()
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    levels = 2**bits - 1
    step = (high - low) / levels
    half = 2.0**-11
    bound = step * (1 + half) * (0.5 + half * (-low / step).abs() * (1 + 2 * half) + 2 * levels * half)
    error = (dequantize_kv(quantize_kv(x, 4 if bits == 4 else 8)).double() - values).abs()
    assert bool((error <= bound * (1 + 1e-5)).all())


def test_keys_on_the_grid_come_back_exactly() -> None:
    codes = torch.arange(16.0).repeat(3, 8)
    scales = torch.tensor([[0.25], [1.0], [3.5]])
    x = (codes - torch.tensor([[0.0], [7.5], [100.25]])) * scales
    kv = quantize_kv(x, 4)
    assert torch.equal(kv.codes, codes.to(torch.uint8))
    assert torch.equal(kv.scales.float(), scales)
    assert kv.zeros.flatten().tolist() == [0.0, 7.5, 100.25]  # not rounded to integers
    assert torch.equal(kv_round_trip(x, 4), x)


@settings(deadline=None, max_examples=100)
@given(st.floats(width=16, allow_nan=False, allow_infinity=False), st.sampled_from((4, 8)), st.integers(1, 130))
def test_constant_heads_come_back_exactly(value: float, bits: int, head_dim: int) -> None:
    x = torch.full((2, head_dim), value, dtype=torch.float16)
    assert torch.equal(kv_round_trip(x, bits), x)
    assert torch.equal(kv_round_trip(x.float(), bits), x.float())


def test_a_head_whose_scale_vanishes_in_float16_comes_back_as_a_constant() -> None:
    x = torch.tensor([[1.0, 1.0 + 2**-23]])
    kv = quantize_kv(x, 4)
    assert kv.scales.tolist() == [[1.0]]
    assert kv_round_trip(x, 4).tolist() == [[1.0, 1.0]]


def test_a_zero_beyond_float16_makes_the_head_constant() -> None:
    """Only float32 can hold such a head; it keeps its offset."""
    x = torch.tensor([[1000.0, 1000.001], [-1000.0, -1000.001]])
    kv = quantize_kv(x, 4)
    assert kv.scales.flatten().tolist() == [1.0, 1.0]
    assert kv.zeros.flatten().tolist() == [-1000.0, 1000.0]
    assert kv.codes.tolist() == [[0, 0], [0, 0]]


@settings(deadline=None, max_examples=30)
@given(st.floats(1.0, 60000.0), st.integers(1, 8), SEEDS)
def test_no_float16_head_reaches_the_clamp_of_its_zero(offset: float, ulps: int, seed: int) -> None:
    """At least one unit in the last place apart, float16 values have |zero| <= 15 * 2048."""
    base = torch.tensor(offset).half()
    steps = torch.randint(0, ulps + 1, (1, 64), generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    x = (base.view(torch.int16) + steps - ulps).view(torch.float16)
    for signed in (x, -x):
        assert float(quantize_kv(signed, 4).zeros.abs().max()) <= max(15 * 2048, offset)


def test_sixteen_bits_leave_keys_alone() -> None:
    x = randn((2, 64), 0, torch.bfloat16)
    assert kv_round_trip(x, 16) is x


@pytest.mark.parametrize("bits", [0, 2, 5, 32])
def test_other_cache_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"kv_bits must be 4, 8 or 16, got {bits}"):
        kv_round_trip(torch.ones(1, 64), bits)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(DTYPES), st.sampled_from((0.0, 1.0, -10.0, 100.0)), SEEDS)
def test_a_second_trip_through_the_cache(dtype: torch.dtype, offset: float, seed: int) -> None:
    """In float32 a second trip changes nothing. In 16 bits the rounding of the values can move scale and zero by their
    last bits, so that the values may drift by a fraction of a step, but every code stays.
    """
    x = (randn((50, 64), seed, torch.float32, 4.0) + offset * randn((50, 1), seed).sign()).to(dtype)
    first = quantize_kv(x, 4)
    full = (first.codes.amin(dim=1) == 0) & (first.codes.amax(dim=1) == 15)
    once = kv_round_trip(x, 4)
    second = quantize_kv(once, 4)
    twice = kv_round_trip(once, 4)
    assert torch.equal(second.codes[full], first.codes[full])
    if dtype == torch.float32:
        assert torch.equal(twice[full], once[full])
    drift = (twice.double() - once.double()).abs() / first.scales.double()
    assert float(drift[full].max()) <= 0.5


@pytest.mark.parametrize(("offset", "spread"), [(5.0, 1e-6), (5.0, 1e-4), (30.0, 1e-3), (-30.0, 1e-3), (1000.0, 1e-3)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_nearly_constant_float32_head_keeps_its_offset(offset: float, spread: float, bits: int) -> None:
    """Its zero would leave float16, so it is stored as a constant head."""
    head = offset + spread * torch.linspace(-1, 1, 64)[None]
    assert float((kv_round_trip(head, bits) - head).abs().max()) <= 2 * spread + abs(offset) * 2**-11


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_that_is_not_finite_does_not_become_finite(bad: float, bits: int) -> None:
    heads = torch.randn(3, 64)
    heads[1, 7] = bad
    decoded = kv_round_trip(heads, bits)
    assert bool(torch.isnan(decoded[1]).all())
    assert bool(torch.isfinite(decoded[[0, 2]]).all())
