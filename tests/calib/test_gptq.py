"""GPTQ against the optimal brain surgeon it is a fast form of, its fallbacks, and what no rounding may break."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qoq.calib.moments import MomentObserver, input_of
from qoq.calib.round.gptq import Inputs, Moments, Rounded
from qoq.calib.round.gptq import gptq as gptq_of_inputs
from qoq.calib.round.grid import Grid
from qoq.calib.round.rtn import round_to_nearest
from qoq.formats.quantized_linear import INT8_MAX, INT8_MIN, QuantizedLinear

MODES = pytest.mark.parametrize("group_size", [128, None], ids=["g128", "per-channel"])
DAMPING = 0.01


def inputs(tokens: int, k: int, seed: int) -> Tensor:
    """Correlated, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    return mixed * torch.exp2(torch.randn(k, generator=generator))


def moments_of(x: Tensor) -> Moments:
    return Moments((x.double().t() @ x.double()) / len(x), len(x))


def weights(n: int, k: int, seed: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def gptq(
    weight: Tensor, bias: Tensor | None, group_size: int | None, moments: Moments, damping: float = DAMPING
) -> Rounded:
    return gptq_of_inputs(weight, bias, group_size, Inputs.of(moments, damping=damping))


def loss(linear: QuantizedLinear, weight: Tensor, x: Tensor) -> float:
    return float((x.double() @ (linear.dequantize() - weight).double().t()).square().mean())


def surgeon(weight: Tensor, grid: Grid, matrix: Any) -> Any:
    """Codes [N, K]: after each input is rounded, those left take the change that is best by the inverse of their H."""
    n, k = weight.shape
    s1 = grid.s1.double().numpy()[:, None]
    s2 = np.ones((n, 1)) if grid.s2 is None else grid.s2.double().numpy()
    zeros = grid.zeros.double().numpy()
    h = matrix.double().numpy()
    h = h + np.eye(k) * DAMPING * np.diag(h).mean()
    left = np.clip(weight.double().numpy() / s1, -grid.limit, grid.limit)
    codes = np.zeros((n, k))
    remaining = sorted(range(k), key=lambda column: -matrix[column, column])
    while remaining:
        column, others = remaining[0], remaining[1:]
        group = 0 if grid.s2 is None else column // 128
        scale, zero = s2[:, group], zeros[:, group]
        wanted = left[:, column]
        code = np.clip(np.round(np.clip(wanted, -grid.limit, grid.limit) / scale + zero), 0, 15)
        change = (code - zero) * scale - wanted
        codes[:, column] = code
        if others:
            # The best change d of the others minimizes (d, change) H (d, change)^T.
            best = np.linalg.solve(h[np.ix_(others, others)], h[np.ix_(others, [column])])[:, 0]
            left[:, others] -= change[:, None] * best
        remaining = others
    return codes


@MODES
def test_is_the_optimal_brain_surgeon(group_size: int | None) -> None:
    weight, x = weights(32, 256, 1), inputs(1024, 256, 2)
    moments = moments_of(x)
    found = gptq(weight, None, group_size, moments)
    assert found.fallback is None
    want = surgeon(weight, Grid.of(weight, group_size), moments.matrix)
    # float32 against float64: a value near the middle of two codes may fall on either side, and moves what follows.
    assert float((found.linear.codes.numpy() != want).mean()) < 0.01


@MODES
@pytest.mark.parametrize("k", [96, 320])
def test_is_better_than_nearest_on_text_it_did_not_see(k: int, group_size: int | None) -> None:
    weight = weights(64, k, 3)
    x = inputs(4096, k, 4)
    found = gptq(weight, None, group_size, moments_of(x[:2048]))
    assert found.fallback is None
    assert loss(found.linear, weight, x[2048:]) < 0.6 * loss(
        round_to_nearest(weight, None, group_size), weight, x[2048:]
    )
    assert torch.equal(found.linear.s1_scales, round_to_nearest(weight, None, group_size).s1_scales)


@MODES
def test_independent_inputs_leave_nothing_to_make_up_for(group_size: int | None) -> None:
    weight = weights(32, 256, 5)
    found = gptq(weight, None, group_size, Moments(torch.eye(256, dtype=torch.float64), 256))
    nearest = round_to_nearest(weight, None, group_size)
    assert torch.equal(found.linear.codes, nearest.codes)
    assert found.fallback == "GPTQ gains nothing on the calibration text"


@MODES
def test_inputs_that_are_always_zero_get_zero_weights(group_size: int | None) -> None:
    weight, x = weights(32, 200, 6), inputs(512, 200, 7)
    x[:, [3, 150, 199]] = 0
    linear = gptq(weight, torch.ones(32), group_size, moments_of(x)).linear
    assert not bool(linear.level1()[:, [3, 150, 199]].any())
    assert not bool(linear.level1()[:, 200:].any())
    assert bool(linear.level1()[:, :3].any())
    assert linear.bias is not None


@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([64, 130, 256]),
    rank=st.integers(1, 300),
    progressive=st.booleans(),
)
def test_codes_never_leave_the_grid(seed: int, k: int, rank: int, progressive: bool) -> None:
    """However badly conditioned the inputs are: `QuantizedLinear` checks its codes and int8."""
    generator = torch.Generator().manual_seed(seed)
    x = inputs(rank, k, seed).repeat(max(1, k // rank + 1), 1) * 10.0 ** float(
        torch.randint(-6, 6, (), generator=generator)
    )
    weight = torch.randn(32, k, generator=generator) * torch.exp2(torch.randn(32, 1, generator=generator) * 3) * 0.01
    weight[:, 0] *= 50
    linear = gptq(weight, None, 128 if progressive else None, moments_of(x)).linear
    level1 = linear.level1()
    assert INT8_MIN <= int(level1.min()) <= int(level1.max()) <= INT8_MAX
    assert (
        loss(linear, weight, x) <= loss(round_to_nearest(weight, None, 128 if progressive else None), weight, x) * 1.001
    )


@MODES
@pytest.mark.parametrize(
    ("matrix", "tokens", "reason"),
    [
        (torch.eye(128, dtype=torch.float64), 127, "127 calibration tokens for 128 inputs"),
        (torch.eye(128, dtype=torch.float64) - 2, 128, "not positive definite"),
        (torch.zeros(128, 128, dtype=torch.float64), 128, "not positive definite"),
    ],
    ids=["few", "indefinite", "silent"],
)
def test_falls_back_on_nearest(matrix: Tensor, tokens: int, reason: str, group_size: int | None) -> None:
    weight = weights(32, 128, 8)
    found = gptq(weight, None, group_size, Moments(matrix, tokens))
    assert found.fallback is not None
    assert reason in found.fallback
    assert torch.equal(found.linear.codes, round_to_nearest(weight, None, group_size).codes)


def test_more_damping_is_tried_where_the_moments_have_no_factor() -> None:
    """One negative eigenvalue of 0.05 times the mean of the diagonal: 0.01 and 0.03 are not enough, 0.1 is."""
    basis, _ = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))
    values = torch.linspace(0.5, 1.5, 128, dtype=torch.float64)
    values[0] = -0.05
    matrix = basis @ values.diag() @ basis.t()
    weight = weights(32, 128, 10)
    assert "definite" not in (gptq(weight, None, 128, Moments(matrix, 128)).fallback or "")
    assert "definite" in (gptq(weight, None, 128, Moments(matrix, 128), 1e-5).fallback or "")


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds float16"):
        gptq(weights(32, 128, 11) * 1e9, None, 128, Moments(torch.eye(128, dtype=torch.float64), 128))


# ---- moments


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(self.a(x) * self.b(x))
        return result


def test_a_block_is_run_as_far_as_the_input_that_is_asked_for() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 6)
    runs = []
    block.c.register_forward_hook(lambda *_: runs.append("c"))
    with torch.no_grad():
        assert input_of(block, "a", lambda: block(x)) is x
        torch.testing.assert_close(input_of(block, "c", lambda: block(x)), block.a(x) * block.b(x))
    assert not runs
    assert not block.a._forward_pre_hooks
    with pytest.raises(RuntimeError, match="did not run c"):
        input_of(block, "c", lambda: block.a(x))


def test_moments_are_those_of_the_inputs() -> None:
    batches = [inputs(10, 6, 1).view(2, 5, 6), inputs(7, 6, 2).view(1, 7, 6)]
    others = [x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) for x in batches]
    observer = MomentObserver()
    for x, other in zip(batches, others, strict=True):
        observer.add(x, other)
    found = observer.moments()
    seen, meant = (torch.cat([x.flatten(0, 1) for x in of]).double() for of in (batches, others))
    assert found.tokens == 17
    torch.testing.assert_close(found.matrix, seen.t() @ seen / 17, rtol=1e-5, atol=1e-6)
    assert found.shift is not None
    torch.testing.assert_close(found.shift, (meant - seen).t() @ seen / 17, rtol=1e-4, atol=1e-6)


def test_inputs_that_are_not_finite_are_refused() -> None:
    observer = MomentObserver()
    observer.add(torch.full((1, 3, 6), torch.inf))
    with pytest.raises(ValueError, match="NaN or infinite"):
        observer.moments()


# ---- towards the float model


@MODES
def test_the_weight_that_is_rounded_fits_the_float_model_best(group_size: int | None) -> None:
    """Against least squares by numpy, on inputs that the layers before have changed."""
    weight, exact = weights(32, 96, 20), inputs(2048, 96, 21)
    served = exact @ torch.diag(torch.linspace(0.7, 1.2, 96)) + 0.05 * inputs(2048, 96, 22)
    observer = MomentObserver()
    observer.add(served, exact)
    found = Inputs.of(observer.moments(), damping=1e-6)
    want = np.linalg.lstsq(served.double().numpy(), (exact @ weight.t()).double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.wanted(weight).numpy(), want, atol=1e-3 * np.abs(want).max())
    towards = gptq_of_inputs(weight, None, group_size, found).linear
    alone = gptq(weight, None, group_size, Moments(found.moments.matrix, 2048))
    errors = [
        float((served @ linear.dequantize().t() - exact @ weight.t()).square().mean())
        for linear in (towards, alone.linear)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_damping_follows_the_number_of_tokens() -> None:
    """auto: 1.5 K / tokens, and never less than 0.005."""
    x = inputs(4096, 128, 23)
    matrix = moments_of(x).matrix
    for tokens, share in ((1024, 0.1875), (4096, 0.046875), (10**6, 0.005)):
        auto, fixed = (Inputs.of(Moments(matrix, tokens), damping=damping) for damping in ("auto", share))
        assert auto.factor is not None
        assert fixed.factor is not None
        torch.testing.assert_close(auto.factor, fixed.factor, rtol=0, atol=0)


def test_the_cost_of_an_error_is_what_compensation_leaves_of_it() -> None:
    """By the Schur complement: the loss of one input's change after the best change of those that come later."""
    x = inputs(2048, 128, 24)
    found = Inputs.of(moments_of(x), damping=DAMPING)
    h = moments_of(x).matrix.numpy()
    h = h + np.eye(128) * DAMPING * np.diag(h).mean()
    order = found.order.tolist()
    for place in (0, 5, 64, 127):
        later = order[place + 1 :]
        own = h[order[place], order[place]]
        if later:
            cross = h[np.ix_(later, [order[place]])][:, 0]
            own -= cross @ np.linalg.solve(h[np.ix_(later, later)], cross)
        assert float(found.cost[order[place]]) == pytest.approx(own, rel=1e-3)
