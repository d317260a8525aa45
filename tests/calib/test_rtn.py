"""Round to nearest against a row-by-row numpy oracle, on the progressive grid and per channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.calib.round.grid import scales_float16
from qoq.calib.round.rtn import round_to_nearest
from qoq.formats.arithmetic import IntegerWeight, linear_forward
from qoq.formats.packing import pack_linear, unpack_linear
from qoq.formats.quantized_linear import PROTECTIVE_QMAX, QuantizedLinear, ZeroPoints

Oracle = Callable[..., Any]
MODES = pytest.mark.parametrize("group_size", [128, None], ids=["g128", "per-channel"])
SEEDS = st.integers(0, 2**32 - 1)
TINY = 2.0**-24


def random_weight(seed: int, n: int, k: int) -> Tensor:
    """Rows of very different sizes and kinds: plain, with an outlier, one-sided, sparse, constant, subnormal, zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight *= torch.exp2(torch.rand(n, 1, generator=generator) * 25 - 20)
    for row in range(n):
        kind = row % 7
        if kind == 1:
            weight[row, int(torch.randint(0, k, (), generator=generator))] *= 60
        elif kind == 2:
            weight[row] = weight[row].abs() + 1e-3
        elif kind == 3:
            weight[row] = -weight[row].abs() * (torch.rand(k, generator=generator) < 0.1)
        elif kind == 4:
            weight[row] = weight[row, 0]
        elif kind == 5:
            weight[row] *= 1e-9
        elif kind == 6:
            weight[row] = 0
    return weight


def assert_equals_oracle(weight: Tensor, linear: QuantizedLinear, oracle: Oracle, group_size: int | None) -> None:
    want = oracle(weight.double().numpy(), progressive=group_size is not None)
    np.testing.assert_array_equal(linear.s1_scales.numpy(), want.s1)
    if group_size is not None:
        assert linear.s2_scales is not None
        np.testing.assert_array_equal(linear.s2_scales.numpy(), want.s2)
    np.testing.assert_array_equal(linear.zeros.values.numpy(), want.zeros)
    np.testing.assert_array_equal(linear.codes.numpy(), want.codes)
    np.testing.assert_allclose(linear.dequantize().numpy(), want.dequantize(weight.shape[1]), rtol=1e-6, atol=0)


# ---- against the oracle


@MODES
@pytest.mark.parametrize("shape", [(64, 256), (32, 128), (32, 200), (32, 1), (96, 129), (32, 640)], ids=str)
def test_equals_the_oracle(shape: tuple[int, int], group_size: int | None, oracle: Oracle) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02
    assert_equals_oracle(weight, round_to_nearest(weight, None, group_size), oracle, group_size)


@MODES
@given(seed=SEEDS, k=st.sampled_from([64, 128, 200, 256]))
def test_equals_the_oracle_for_rows_of_every_kind(seed: int, k: int, group_size: int | None, oracle: Oracle) -> None:
    weight = random_weight(seed, 32, k)
    assert_equals_oracle(weight, round_to_nearest(weight, None, group_size), oracle, group_size)


def test_worked_figures() -> None:
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(64, 256)).to(torch.float16).float()
    linear = round_to_nearest(weight, None, 128)
    assert linear.s2_scales is not None
    assert float(linear.s1_scales[0]) == pytest.approx(5.736e-4, rel=1e-4)
    assert linear.s2_scales[0].tolist() == [14, 9]
    assert isinstance(linear.zeros, ZeroPoints)
    assert linear.zeros.values[0].tolist() == [7, 7]
    assert linear.codes[0, :8].tolist() == [4, 4, 6, 6, 9, 9, 6, 2]
    assert linear.level1()[0, :8].tolist() == [-42, -42, -14, -14, 28, 28, -14, -70]
    assert (int(linear.s2_scales.min()), int(linear.s2_scales.max())) == (9, 16)
    assert (int(linear.zeros.values.min()), int(linear.zeros.values.max())) == (6, 10)
    assert (int(linear.level1().min()), int(linear.level1().max())) == (-120, 120)
    stored = linear.dequantize().to(torch.float16).float()
    assert float((stored - weight).double().square().mean()) == pytest.approx(4.125e-6, rel=1e-3)


def test_ties_round_to_even() -> None:
    # s1 = 1: the row's largest value is 119. The second group spans 0..30, so s2 = 2 and odd values are ties.
    weight = torch.zeros(32, 256)
    weight[:, 0] = 119
    weight[:, 128:159] = torch.arange(31.0)
    linear = round_to_nearest(weight, None, 128)
    assert linear.s2_scales is not None
    assert linear.s2_scales[0].tolist() == [8, 2]
    assert linear.codes[0, 128:159].tolist() == [round(value / 2) for value in range(31)]


# ---- properties


@MODES
@given(seed=SEEDS)
def test_padding_decodes_to_zero(seed: int, group_size: int | None) -> None:
    linear = round_to_nearest(random_weight(seed, 32, 131), None, group_size)
    assert linear.codes.shape == (32, 256)
    assert linear.in_features == 131
    assert bool((linear.level1()[:, 131:] == 0).all())


@MODES
def test_zero_weights_decode_to_exactly_zero(group_size: int | None) -> None:
    linear = round_to_nearest(torch.zeros(32, 200), None, group_size)
    assert linear.s1_scales.tolist() == [1.0] * 32
    assert not bool(linear.dequantize().any())
    assert not bool(round_to_nearest(-torch.zeros(32, 200), None, group_size).dequantize().any())


def test_zeros_among_weights_stay_exactly_zero() -> None:
    weight = random_weight(1, 32, 256)
    weight[:, ::3] = 0
    assert not bool(round_to_nearest(weight, None, 128).dequantize()[:, ::3].any())


@MODES
@pytest.mark.parametrize("size", [1e-9, 1e-8, 1e-7, 1e-6, 7.09e-6, 1e-5, 1e-40])
def test_tiny_rows(size: float, group_size: int | None) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    weight *= size / weight.abs().amax(dim=1, keepdim=True)
    linear = round_to_nearest(weight, None, group_size)
    error = (linear.dequantize() - weight).abs().max()
    # Half a step of the larger of float16's smallest scale and the ideal one, which off by half if subnormal.
    levels = 15 if group_size is None else 7.4
    assert float(error) <= max(8.5 * TINY, 2.1 * size / levels)


@MODES
def test_a_huge_row_is_refused_by_number(group_size: int | None) -> None:
    weight = torch.ones(32, 128)
    weight[7, 5] = 1e7
    weight[9, 5] = 2e7
    with pytest.raises(ValueError, match=r"channel 9 spans 2e\+07: its scale exceeds float16"):
        round_to_nearest(weight, None, group_size)


@MODES
def test_the_largest_rows_that_fit(group_size: int | None) -> None:
    levels = 15 if group_size is None else PROTECTIVE_QMAX
    weight = torch.zeros(32, 128)
    weight[:, 3] = 65504.0 * levels
    linear = round_to_nearest(weight, None, group_size)
    assert linear.s1_scales.tolist() == [65504.0] * 32
    assert float(linear.dequantize()[0, 3]) == pytest.approx(65504.0 * levels, rel=0.01)


def test_one_outlier_costs_its_own_row_only() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    spoilt = weight.clone()
    spoilt[3, 10] = 40.0
    plain, other = round_to_nearest(weight, None, 128), round_to_nearest(spoilt, None, 128)
    rows = [row for row in range(32) if row != 3]
    assert torch.equal(plain.codes[rows], other.codes[rows])
    assert float(other.dequantize()[3, 10]) == pytest.approx(40.0, rel=0.01)


@MODES
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_sided_groups(sign: float, group_size: int | None) -> None:
    """Ranges are widened to contain 0, so that zeros stay on the code grid."""
    weight = sign * (1 + torch.rand(32, 256, generator=torch.Generator().manual_seed(0)))
    linear = round_to_nearest(weight, None, group_size)
    assert bool((linear.zeros.values == (0 if sign > 0 else 15)).all())
    assert float((linear.dequantize() - weight).abs().max()) <= 2.0 / 15


@MODES
@given(seed=SEEDS, power=st.integers(-5, 5))
def test_codes_do_not_change_with_a_power_of_two(seed: int, power: int, group_size: int | None) -> None:
    weight = torch.randn(32, 200, generator=torch.Generator().manual_seed(seed))
    plain = round_to_nearest(weight, None, group_size)
    scaled = round_to_nearest(weight * 2.0**power, None, group_size)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.zeros.values, scaled.zeros.values)
    assert torch.equal(plain.s1_scales.float() * 2.0**power, scaled.s1_scales.float())


@MODES
@given(seed=SEEDS, k=st.sampled_from([128, 200, 384]))
def test_error_bounds(seed: int, k: int, group_size: int | None) -> None:
    """Half a step wherever the codes reach; where they end, no further than the range sticks out of them."""
    weight = random_weight(seed, 32, k)
    linear = round_to_nearest(weight, None, group_size)
    s1 = linear.s1_scales.double()[:, None]
    if group_size is None:
        step, reach = s1, s1  # a rounded zero may leave half a step at one end, and rounding s1 some of the other
        slack = linear.s1_szeros().double()[:, None] * 2.0**-11 + TINY  # s1_szeros is stored as float16
    else:
        assert linear.s2_scales is not None
        s2 = linear.s2_scales.double().repeat_interleave(128, dim=1)[:, :k]
        step = s1 * s2
        reach = s1 * (7.5 + s2)  # s2 is rounded, so 15 of them may be 7.5 short of the range
        slack = torch.where(s1 < 2.0**-14, 0.5, 119 * 2.0**-11) * s1  # s1 was rounded down, and level 1 clamped
    error = (linear.dequantize().double() - weight.double()).abs()
    inside = (linear.codes[:, :k] > 0) & (linear.codes[:, :k] < 15)
    slack = slack + 1e-5 * step
    assert bool((error <= step / 2 + slack)[inside].all())
    assert bool((error <= reach + slack).all())


@given(seed=SEEDS)
def test_level1_never_leaves_its_range(seed: int) -> None:
    """Integer-valued extremes are where a group's rounding reaches furthest: 119 plus half of s2 at most."""
    generator = torch.Generator().manual_seed(seed)
    n = 64
    low = torch.randint(-119, 1, (n, 1), generator=generator).float()
    high = torch.randint(0, 120, (n, 1), generator=generator).float()
    weight = low + torch.rand(n, 256, generator=generator) * (high - low)
    weight[:, 0:1], weight[:, 1:2], weight[:, 130:131] = low, high, 119.0
    level1 = round_to_nearest(weight * 0.0123, None, 128).level1()
    assert -127 <= int(level1.min())
    assert int(level1.max()) <= 127


def test_every_pair_of_integer_ends_stays_in_int8() -> None:
    pairs = [(low, high) for low in range(-119, 1) for high in range(120)]
    weight = torch.zeros(len(pairs), 256)
    weight[:, 0] = torch.tensor([low for low, _ in pairs])
    weight[:, 1] = torch.tensor([high for _, high in pairs])
    weight[:, 128] = 119
    level1 = round_to_nearest(weight, None, 128).level1()
    assert int(level1.abs().max()) <= 127


@MODES
@given(seed=SEEDS)
def test_rounding_again_changes_little(seed: int, group_size: int | None) -> None:
    """A decoded weight is on the grid: a second rounding moves it by far less than the first one did."""
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(seed))
    first = round_to_nearest(weight, None, group_size).dequantize()
    again = round_to_nearest(first, None, group_size).dequantize()
    assert float((again - first).norm()) <= float((first - weight).norm())


# ---- the rest of the linear


@MODES
def test_the_weight_is_left_alone(group_size: int | None) -> None:
    weight, bias = torch.randn(32, 128), torch.randn(32)
    before = weight.clone(), bias.clone()
    round_to_nearest(weight, bias, group_size)
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])


@MODES
def test_the_bias_is_rounded_to_float16(group_size: int | None) -> None:
    bias = torch.linspace(-3, 3, 32)
    linear = round_to_nearest(torch.randn(32, 128), bias, group_size)
    assert linear.bias is not None
    assert torch.equal(linear.bias, bias.to(torch.float16))
    assert round_to_nearest(torch.randn(32, 128), None, group_size).bias is None


def test_a_bias_beyond_float16_is_refused() -> None:
    bias = torch.zeros(32)
    bias[4] = 70000.0
    with pytest.raises(ValueError, match="bias"):
        round_to_nearest(torch.randn(32, 128), bias, 128)


@MODES
def test_survives_packing(group_size: int | None) -> None:
    weight = random_weight(5, 64, 200)
    linear = round_to_nearest(weight, torch.randn(64), group_size)
    again = unpack_linear(pack_linear(linear), in_features=200, zero_domain="pre_scale")
    assert torch.equal(again.codes, linear.codes)
    assert torch.equal(again.dequantize(), linear.dequantize())


@MODES
def test_serves_what_it_decodes_to(group_size: int | None) -> None:
    linear = round_to_nearest(torch.randn(32, 200), None, group_size)
    x = torch.randn(5, 200)
    exact = x.double() @ linear.dequantize().double().T
    served = linear_forward(x, IntegerWeight.decode(linear), act_bits=16)
    assert torch.allclose(served.double(), exact, rtol=1e-4, atol=1e-4)


def test_scales_are_the_nearest_float16_or_one_above() -> None:
    ranges = torch.exp2(torch.linspace(-40, 19.9, 4001))
    for levels in (15, 119):
        scales = scales_float16(ranges, levels)
        assert bool((scales > 0).all())
        assert bool((ranges.double() / scales.double() <= levels + 0.5).all())
        nearest = (ranges / levels).to(torch.float16)
        normal = nearest >= 2.0**-14
        assert torch.equal(scales[normal], nearest[normal])
        assert bool((scales.float() - (ranges / levels) <= TINY).all() | normal.any())
