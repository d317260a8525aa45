"""Searched scales and zeros: never worse than those of the range, close to the best there are, and always legal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.calib.round.gptq import Inputs, Moments, gptq
from qoq.calib.round.grid import Grid
from qoq.calib.round.grid_search import search_grid
from qoq.calib.round.rtn import round_to_nearest
from qoq.formats.quantized_linear import INT8_MAX, INT8_MIN, S2Offsets

MODES = pytest.mark.parametrize("group_size", [128, None], ids=["g128", "per-channel"])


def weights(n: int, k: int, seed: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def error(grid: Grid, weight: Tensor, importance: Tensor) -> Tensor:
    """Weighted squared error of each row [N], float64."""
    values = grid.linear(grid.nearest(grid.units(weight)), None, weight.shape[1]).dequantize()
    return ((values - weight).double().square() * importance.double()).sum(dim=1)


@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([40, 128, 200, 300]),
    progressive=st.booleans(),
    one_sided=st.booleans(),
)
def test_never_worse_than_the_range(seed: int, k: int, progressive: bool, one_sided: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, k, generator=generator) * torch.exp2(torch.randn(32, 1, generator=generator) * 4)
    weight[::5, 0] *= 30
    if one_sided:
        weight = weight.abs()
    importance = torch.exp2(torch.randn(k, generator=generator) * 3)
    group_size = 128 if progressive else None
    grid = search_grid(weight, group_size, importance)
    assert bool(
        (error(grid, weight, importance) <= error(Grid.of(weight, group_size), weight, importance) * 1.001).all()
    )
    level1 = grid.linear(grid.nearest(grid.units(weight)), None, k).level1()
    assert INT8_MIN <= int(level1.min()) <= int(level1.max()) <= INT8_MAX


def test_is_close_to_the_best_grid_of_all() -> None:
    """Every level-2 scale with every zero, for each group."""
    weight, importance = weights(32, 256, 1), torch.rand(256, generator=torch.Generator().manual_seed(2))
    grid = search_grid(weight, 128, importance)
    found = error(grid, weight, importance)
    units = grid.units(weight).double().numpy().reshape(32, 2, 128)
    per_input = importance.double().numpy().reshape(2, 128)
    best = np.full((32, 2), np.inf)
    for s2 in range(1, 17):
        for zero in range(16):
            values = (np.clip(np.round(units / s2 + zero), 0, 15) - zero) * s2
            best = np.minimum(best, ((values - units) ** 2 * per_input).sum(axis=2))
    want = best.sum(axis=1) * grid.s1.double().numpy() ** 2
    assert float((found.numpy() / want).max()) < 1.05
    assert float((found.numpy() / want).min()) > 0.999


@MODES
def test_gains_on_weights_without_outliers(group_size: int | None) -> None:
    weight, even = weights(64, 512, 3), torch.ones(512)
    gain = (
        error(search_grid(weight, group_size, None), weight, even).sum()
        / error(Grid.of(weight, group_size), weight, even).sum()
    )
    assert float(gain) < (0.93 if group_size else 0.8)


@MODES
def test_what_matters_more_is_kept_better(group_size: int | None) -> None:
    weight, importance = weights(64, 256, 4), torch.ones(256)
    importance[:32] = 100
    both = [search_grid(weight, group_size, given) for given in (None, importance)]
    only = torch.zeros(256)
    only[:32] = 1
    plain, weighted = (float(error(grid, weight, only).sum()) for grid in both)
    assert weighted < 0.95 * plain


@MODES
def test_zeros_and_padding_stay_zero(group_size: int | None) -> None:
    weight = weights(32, 200, 5)
    weight[:, ::3] = 0
    weight[7] = 0
    linear = round_to_nearest(weight, None, group_size, search=True)
    level1 = linear.level1()
    assert not bool(level1[:, :200:3].any())
    assert not bool(level1[:, 200:].any())
    assert not bool(level1[7].any())
    assert float(linear.s1_scales[7]) == 1.0


@MODES
def test_gptq_starts_from_the_searched_grid(group_size: int | None) -> None:
    weight = weights(32, 256, 6)
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(7)) * torch.linspace(0.1, 3, 256)
    x = x + 2 * x.roll(1, dims=1)
    inputs = Inputs.of(Moments(x.double().t() @ x.double() / len(x), len(x)), damping=0.01)
    losses = []
    for search in (False, True):
        linear = gptq(weight, None, group_size, inputs, search=search).linear
        losses.append(float((x.double() @ (linear.dequantize() - weight).double().t()).square().mean()))
        zeros = search_grid(weight, group_size, inputs.cost).zeros
        assert torch.equal(linear.zeros.values.float(), zeros) == search
    assert losses[1] < losses[0]


@MODES
def test_a_grid_decodes_as_the_layer_does(group_size: int | None) -> None:
    weight = weights(32, 200, 9) * torch.exp2(torch.arange(32.0) - 16).unsqueeze(1)
    grid = search_grid(weight, group_size, None)
    codes = grid.nearest(grid.units(weight))
    decoded = grid.linear(codes, None, 200).dequantize()
    assert torch.equal(grid.weight(codes)[:, :200], decoded)


# ---- zeros between codes


@pytest.mark.parametrize("search", [False, True])
def test_post_scale_zeros_are_whole_level_1_units(search: bool) -> None:
    """By range as in deepcompressor's quantizer (Z = round(-min)); searched, with less error than pre-scale zeros."""
    weight = weights(64, 256, 11) + 0.004
    linear = round_to_nearest(weight, None, 128, search=search, zero_domain="post_scale")
    assert isinstance(linear.zeros, S2Offsets)
    assert linear.s2_scales is not None
    offsets, s2 = linear.zeros.values.long(), linear.s2_scales.long()
    assert bool((offsets % s2 != 0).any()), "zeros that no code decodes to"
    units = (weight / linear.s1_scales.float()[:, None]).clamp(-119, 119).view(64, 2, 128)
    if not search:
        assert torch.equal(offsets, torch.round(-units.amin(dim=2).clamp(max=0)).clamp(max=240).long())
    for n in range(0, 64, 9):
        for group in range(2):
            for k in range(0, 128, 17):
                steps = (float(units[n, group, k]) + int(offsets[n, group])) / int(s2[n, group])
                assert abs(int(linear.codes[n, group * 128 + k]) - min(max(steps, 0), 15)) <= 0.5 + 1e-4
    errors = [
        float((round_to_nearest(weight, None, 128, search=search, zero_domain=domain).dequantize() - weight).norm())
        for domain in ("post_scale", "pre_scale")
    ]
    assert errors[0] < errors[1] if search else errors[0] < 1.1 * errors[1]


@given(seed=st.integers(0, 2**32 - 1), search=st.booleans())
def test_post_scale_zeros_never_leave_int8(seed: int, search: bool) -> None:
    """Whatever the weights: `QuantizedLinear` refuses what does."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randn(32, 2, 1, generator=generator) * 3)
    centres = torch.randn(32, 2, 1, generator=generator) * 2
    weight = ((torch.randn(32, 2, 128, generator=generator) + centres) * sizes * 0.01).view(32, 256)
    weight[:, ::50] *= 30
    linear = round_to_nearest(weight, None, 128, search=search, zero_domain="post_scale")
    level1 = linear.level1()
    assert INT8_MIN <= int(level1.min()) <= int(level1.max()) <= INT8_MAX
    assert isinstance(linear.zeros, S2Offsets)
    assert int(linear.zeros.values.max()) <= 240


@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([40, 128, 300]), search=st.booleans())
def test_symmetric_groups_are_int4_times_a_scale(seed: int, k: int, search: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, k, generator=generator) * torch.exp2(torch.randn(32, 1, generator=generator) * 4)
    weight[::5, 0] *= -30
    weight[1] = 0
    linear = round_to_nearest(weight, None, 128, search=search, symmetric=True)
    assert bool((linear.zeros.values == 8).all())
    assert linear.s2_scales is not None
    scales = linear.s1_scales.float().unsqueeze(1) * linear.s2_scales.float()
    int4 = linear.codes.float() - 8
    values = (int4.view(32, -1, 128) * scales.unsqueeze(2)).view(32, -1)
    assert torch.equal(values[:, :k], linear.dequantize())
    assert not bool(values[:, k:].any())
    # Half a step, at the largest weights too; and what float16 rounds of the scale of a row.
    off = (linear.dequantize() - weight).abs() / scales.repeat_interleave(128, dim=1)[:, :k]
    assert search or float(off.max()) < 0.51


def test_symmetric_search_finds_the_best_scale() -> None:
    weight = weights(32, 256, 5)
    grid = search_grid(weight, 128, None, symmetric=True)
    units = grid.units(weight).double().numpy().reshape(32, 2, 128)
    best = np.full((32, 2), np.inf)
    for s2 in range(1, 17):
        values = (np.clip(np.round(units / s2), -8, 7)) * s2
        best = np.minimum(best, ((values - units) ** 2).sum(axis=2))
    want = best.sum(axis=1) * grid.s1.double().numpy() ** 2
    assert float((error(grid, weight, torch.ones(256)).numpy() / want).max()) < 1.001
