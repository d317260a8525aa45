"""What a QuantizedLinear refuses, what it decodes to, and why the protective range is 119."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qoq.formats.quantized_linear import (
    CODE_MAX,
    INT8_MAX,
    INT8_MIN,
    PROTECTIVE_QMAX,
    S2_MAX,
    QuantizedLinear,
    S2Offsets,
    ZeroPoints,
)

MakeLinear = Callable[..., QuantizedLinear]
Round = Callable[[Tensor], Tensor]


def bytes_of(value: int, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.uint8)


def halves(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float16)


def progressive(**changes: Any) -> QuantizedLinear:
    fields: dict[str, Any] = {
        "codes": bytes_of(8, 2, 256),
        "s1_scales": halves(0.5, 2),
        "s2_scales": bytes_of(4, 2, 2),
        "zeros": ZeroPoints(bytes_of(7, 2, 2)),
        "bias": halves(1.0, 2),
        "in_features": 200,
    }
    return QuantizedLinear(**(fields | changes))


def per_channel(**changes: Any) -> QuantizedLinear:
    return progressive(**({"s2_scales": None, "zeros": ZeroPoints(bytes_of(7, 2, 1))} | changes))


# ---- refusals

NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("make", [progressive, per_channel])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": bytes_of(8, 2)}, r"codes must be \[N, K\], got shape \[2\]"),
        ({"codes": bytes_of(8, 2, 200)}, "codes have 200 columns, expected 200 rounded up to a multiple of 128"),
        ({"codes": bytes_of(8, 2, 384)}, "codes have 384 columns, expected 200 rounded up"),
        ({"in_features": 128}, "codes have 256 columns, expected 128 rounded up"),
        ({"in_features": 257}, "codes have 256 columns, expected 257 rounded up"),
        ({"codes": bytes_of(8, 2, 0), "in_features": 0}, "codes have 0 columns, expected 0 rounded up"),
        ({"codes": bytes_of(8, 2, 0), "in_features": -5}, "codes have 0 columns, expected -5 rounded up"),
        ({"codes": bytes_of(8, 2, 256).to(torch.int8)}, "codes: expected torch.uint8 .* got torch.int8"),
        ({"codes": bytes_of(16, 2, 256)}, r"codes: values 16..16, expected 0..15"),
        ({"codes": bytes_of(255, 2, 256)}, r"codes: values 255..255, expected 0..15"),
        ({"s1_scales": torch.ones(2)}, r"s1_scales: expected torch.float16 \[2\], got torch.float32 \[2\]"),
        ({"s1_scales": torch.ones(2, dtype=torch.bfloat16)}, "s1_scales: expected torch.float16"),
        ({"s1_scales": halves(1.0, 2, 1)}, r"s1_scales: expected torch.float16 \[2\], got torch.float16 \[2, 1\]"),
        ({"s1_scales": halves(1.0, 3)}, r"s1_scales: expected torch.float16 \[2\], got torch.float16 \[3\]"),
        ({"s1_scales": torch.tensor([1.0, 0.0]).half()}, r"s1_scales\[1\] = 0.0, expected a finite number > 0"),
        ({"s1_scales": torch.tensor([-1.0, 1.0]).half()}, r"s1_scales\[0\] = -1.0, expected a finite number > 0"),
        *[
            ({"s1_scales": torch.tensor([1.0, bad]).half()}, rf"s1_scales\[1\] = {bad}, expected a finite number")
            for bad in NOT_FINITE
        ],
        ({"bias": torch.ones(2)}, "bias: expected torch.float16"),
        ({"bias": halves(1.0, 1)}, r"bias: expected torch.float16 \[2\]"),
        *[({"bias": torch.tensor([1.0, bad]).half()}, "bias holds a NaN or an infinity") for bad in NOT_FINITE],
    ],
)
def test_both_grids_refuse(make: Callable[..., QuantizedLinear], changes: dict[str, Any], message: str) -> None:
    make()
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s2_scales": bytes_of(0, 2, 2)}, r"s2_scales: values 0..0, expected 1..16"),
        ({"s2_scales": bytes_of(17, 2, 2)}, r"s2_scales: values 17..17, expected 1..16"),
        ({"s2_scales": bytes_of(4, 2, 1)}, r"s2_scales: expected torch.uint8 \[2, 2\], got torch.uint8 \[2, 1\]"),
        ({"s2_scales": bytes_of(4, 2, 2).to(torch.int8)}, "s2_scales: expected torch.uint8 .* got torch.int8"),
        ({"zeros": ZeroPoints(bytes_of(16, 2, 2))}, r"zero_points: values 16..16, expected 0..15"),
        ({"zeros": ZeroPoints(bytes_of(7, 2, 1))}, r"zero_points: expected torch.uint8 \[2, 2\]"),
        ({"zeros": ZeroPoints(torch.full((2, 2), 7.0))}, "zero_points: expected torch.uint8"),
        ({"zeros": S2Offsets(bytes_of(241, 2, 2))}, r"s2_offsets: values 241..241, expected 0..240"),
        ({"zeros": S2Offsets(bytes_of(28, 2, 1))}, r"s2_offsets: expected torch.uint8 \[2, 2\]"),
        ({"zeros": S2Offsets(bytes_of(28, 2, 2).to(torch.int8))}, "s2_offsets: expected torch.uint8 .* got torch.int8"),
    ],
)
def test_the_progressive_grid_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        progressive(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zeros": ZeroPoints(bytes_of(16, 2, 1))}, r"zero_points: values 16..16, expected 0..15"),
        ({"zeros": ZeroPoints(bytes_of(7, 2, 2))}, r"zero_points: expected torch.uint8 \[2, 1\], got .* \[2, 2\]"),
        ({"zeros": S2Offsets(bytes_of(28, 2, 1))}, "S2Offsets need the progressive grid"),
        ({"s1_scales": torch.tensor([1.0, 9360.0]).half()}, r"zero_points\[1\] \* s1_scales\[1\] = 7 \* 9360 leaves"),
    ],
)
def test_one_level_per_channel_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_channel(**changes)


@pytest.mark.parametrize(
    ("legal", "code", "s2", "zeros", "level1"),
    [
        (7, 15, 16, ZeroPoints(bytes_of(7, 2, 2)), 128),
        (0, 15, 9, ZeroPoints(bytes_of(0, 2, 2)), 135),
        (12, 0, 11, ZeroPoints(bytes_of(12, 2, 2)), -132),
        (7, 15, 16, S2Offsets(bytes_of(112, 2, 2)), 128),
        (15, 0, 1, S2Offsets(bytes_of(129, 2, 2)), -129),
        (15, 0, 16, S2Offsets(bytes_of(240, 2, 2)), -240),
    ],
)
def test_level1_weights_that_leave_int8_are_refused(
    legal: int, code: int, s2: int, zeros: ZeroPoints | S2Offsets, level1: int
) -> None:
    codes = bytes_of(legal, 2, 256)
    progressive(codes=codes, s2_scales=bytes_of(s2, 2, 2), zeros=zeros)
    codes[1, 130] = code
    message = rf"level-1 weight \[1, 130\] = {level1} leaves int8 \(1 such weights; every code \* s2 - zero must be in"
    with pytest.raises(ValueError, match=message):
        progressive(codes=codes, s2_scales=bytes_of(s2, 2, 2), zeros=zeros)


def test_the_extremes_of_int8_are_legal() -> None:
    codes = bytes_of(8, 2, 256)
    codes[0, 0], codes[1, 255] = 15, 0
    linear = progressive(codes=codes, s2_scales=bytes_of(16, 2, 2), zeros=S2Offsets(bytes_of(113, 2, 2)))
    assert (int(linear.level1().max()), int(linear.level1().min())) == (INT8_MAX, -113)
    linear = progressive(codes=codes, s2_scales=bytes_of(16, 2, 2), zeros=S2Offsets(bytes_of(128, 2, 2)))
    assert (int(linear.level1().max()), int(linear.level1().min())) == (112, INT8_MIN)


def test_fields_cannot_be_replaced_by_illegal_ones() -> None:
    with pytest.raises(ValueError, match="leaves int8"):
        replace(progressive(), s2_scales=bytes_of(16, 2, 2), codes=bytes_of(15, 2, 256))


# ---- decoding


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(("pre_scale", "post_scale", "per_channel")),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
)
def test_weights_decode_by_their_definition(
    make_linear: MakeLinear, mode: str, n: int, in_features: int, seed: int
) -> None:
    linear = make_linear(mode, n, in_features, seed)
    level1, weight = linear.level1(), linear.dequantize()
    assert level1.dtype == torch.int16
    assert weight.dtype == torch.float32
    assert tuple(weight.shape) == (n, in_features)
    assert linear.out_features == n
    for row in {0, n - 1}:
        for column in {0, in_features // 2, in_features - 1}:
            group = 0 if mode == "per_channel" else column // 128
            code, zero = int(linear.codes[row, column]), int(linear.zeros.values[row, group])
            s2 = 1 if linear.s2_scales is None else int(linear.s2_scales[row, group])
            integer = code * s2 - (zero if mode == "post_scale" else zero * s2)
            assert int(level1[row, column]) == integer
            s1 = float(linear.s1_scales[row])
            if mode == "per_channel":  # the kernel's zero term is rounded to float16 once
                szero = float(torch.tensor(zero * s1, dtype=torch.float64).to(torch.float16))
                assert float(linear.s1_szeros()[row]) == szero
                assert float(weight[row, column]) == pytest.approx(code * s1 - szero, rel=1e-6)
            else:
                assert float(weight[row, column]) == integer * s1  # exact: 8 bits times 11


def test_only_per_channel_linears_have_szeros() -> None:
    with pytest.raises(ValueError, match="the progressive grid has no s1_szeros"):
        progressive().s1_szeros()


# ---- the protective range


def half_away(x: Tensor) -> Tensor:
    """Round half away from zero, as many a GPU kernel does."""
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


def level2(u: Tensor, low: Tensor, high: Tensor, domain: str, rounding: Round) -> tuple[Tensor, Tensor, Tensor]:
    """Round-to-nearest level 2 of u in a group that spans low <= 0 <= high: (level-1 weights, code * s2, s2)."""
    s2 = rounding((high - low) / CODE_MAX).clamp(min=1)
    if domain == "pre_scale":
        zero = rounding(-low / s2).clamp(0, CODE_MAX)
        codes = rounding(u / s2 + zero).clamp(0, CODE_MAX)
        offset = zero * s2
    else:
        offset = rounding(-low)
        codes = rounding((u + offset) / s2).clamp(0, CODE_MAX)
    return codes * s2 - offset, codes * s2, s2


def reach(bound: float, domain: str, rounding: Round) -> tuple[int, int, int, int]:
    """(lowest, highest level-1 weight, largest code * s2, largest s2) over every group within [-bound, bound].

    Every group: each pair of ends on a grid of quarters (so that every tie of the two roundings occurs), the ends
    themselves as u, and a grid of values between them.
    """
    ends = torch.arange(int(4 * bound) + 1, dtype=torch.float64) / 4
    low, high = -ends.unsqueeze(1), ends.unsqueeze(0)
    inside = [low + (high - low) * i / 8 for i in range(9)]
    levels, products, scales = zip(*(level2(u, low, high, domain, rounding) for u in inside), strict=True)
    return (
        int(min(x.min() for x in levels)),
        int(max(x.max() for x in levels)),
        int(max(x.max() for x in products)),
        int(max(x.max() for x in scales)),
    )


@pytest.mark.parametrize("rounding", [torch.round, half_away])
@pytest.mark.parametrize("domain", ["pre_scale", "post_scale"])
def test_within_119_level2_never_leaves_int8(domain: str, rounding: Round) -> None:
    lowest, highest, product, s2 = reach(PROTECTIVE_QMAX, domain, rounding)
    assert lowest > INT8_MIN
    assert highest <= INT8_MAX - 1
    assert product <= CODE_MAX * S2_MAX == 240
    assert s2 == S2_MAX == round(2 * PROTECTIVE_QMAX / CODE_MAX)


def test_at_120_pre_scale_zeros_leave_int8() -> None:
    """120 / 16 is a tie: rounded away from zero it is 8 * 16 = 128, which wraps; half to even just escapes it."""
    assert reach(120, "pre_scale", half_away)[:2] == (-126, 128)
    assert reach(120, "pre_scale", torch.round)[:2] == (-128, 126)
    assert reach(120.5, "pre_scale", torch.round)[:2] == (-128, 128)


def test_past_120_post_scale_zeros_leave_int8_too() -> None:
    assert reach(120, "post_scale", torch.round)[:2] == (-120, 127)
    assert reach(121, "post_scale", torch.round)[1] == 128


def test_rounding_moves_a_weight_by_half_a_step_at_most() -> None:
    """The proof for every real u, of which the groups above are samples: whatever legal s2 and zero were chosen (by a
    clip search, say), rounding moves u by at most s2 / 2 <= 8, and clamping a code moves it towards zero or past it.
    """
    u = torch.arange(-4 * PROTECTIVE_QMAX, 4 * PROTECTIVE_QMAX + 1, dtype=torch.float64) / 4
    for s2 in range(1, S2_MAX + 1):
        offsets = torch.arange(CODE_MAX * s2 + 1, dtype=torch.float64).unsqueeze(1)
        for rounding in (torch.round, half_away):
            level1 = rounding((u + offsets) / s2).clamp(0, CODE_MAX) * s2 - offsets
            assert float((level1.abs() - u.abs())[level1 * u > 0].max()) <= s2 / 2
            assert float(level1.min()) >= -PROTECTIVE_QMAX - 8
            assert float(level1.max()) <= PROTECTIVE_QMAX + 8 == INT8_MAX


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(("pre_scale", "post_scale")), st.integers(0, 2**32 - 1), st.floats(0, 6))
def test_no_quantized_weight_is_refused(domain: str, seed: int, tail: float) -> None:
    """From floats with tails of any weight through s1, the clamp and level 2 to the checks of the dataclass."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 256, generator=generator)
    weight = weight * torch.exp(tail * torch.randn(8, 256, generator=generator))
    s1 = (weight.abs().amax(dim=1) / PROTECTIVE_QMAX).clamp(2**-24, 65504).to(torch.float16)
    u = (weight / s1.float().unsqueeze(1)).clamp(-PROTECTIVE_QMAX, PROTECTIVE_QMAX).view(8, 2, 128)
    low, high = u.amin(dim=2, keepdim=True).clamp(max=0), u.amax(dim=2, keepdim=True).clamp(min=0)
    levels, products, s2 = level2(u, low, high, domain, torch.round)
    offsets = products - levels
    zeros = offsets[..., 0]
    linear = QuantizedLinear(
        codes=(products / s2).view(8, 256).to(torch.uint8),
        s1_scales=s1,
        s2_scales=s2[..., 0].to(torch.uint8),
        zeros=(
            ZeroPoints((zeros / s2[..., 0]).to(torch.uint8))
            if domain == "pre_scale"
            else S2Offsets(zeros.to(torch.uint8))
        ),
        bias=None,
        in_features=256,
    )
    assert torch.equal(linear.level1().float(), levels.view(8, 256))
