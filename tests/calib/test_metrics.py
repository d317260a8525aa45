"""Relative errors against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.calib.metrics import RelativeError, relative_error

SEEDS = st.integers(0, 2**32 - 1)


def pair(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(shape, generator=generator)
    return exact + 0.1 * torch.randn(shape, generator=generator), exact


def oracle(approximate: Tensor, exact: Tensor) -> float:
    a, e = approximate.double().numpy().ravel(), exact.double().numpy().ravel()
    return math.sqrt(math.fsum((a - e) ** 2)) / math.sqrt(math.fsum(e**2))


@given(seed=SEEDS)
def test_one_pair(seed: int) -> None:
    approximate, exact = pair(seed, 7, 33)
    assert relative_error(approximate, exact) == pytest.approx(oracle(approximate, exact), rel=1e-6)


@given(seed=SEEDS, cuts=st.lists(st.integers(1, 63), unique=True, max_size=5))
def test_many_pairs_count_as_one(seed: int, cuts: list[int]) -> None:
    approximate, exact = pair(seed, 64, 9)
    error = RelativeError()
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 64], strict=True):
        error.update(approximate[start:stop], exact[start:stop])
    assert error.value == pytest.approx(oracle(approximate, exact), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    approximate, exact = (tensor.to(dtype) for tensor in pair(0, 40, 40))
    assert relative_error(approximate, exact) == pytest.approx(oracle(approximate, exact), rel=1e-5)


def test_edges() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert RelativeError().value == 0.0
    assert relative_error(zero, zero) == 0.0
    assert relative_error(one, one) == 0.0
    assert relative_error(zero, one) == 1.0
    assert relative_error(one, zero) == math.inf
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.ones(1)))


def test_many_small_errors_are_not_lost() -> None:
    exact = torch.ones(3_000_000)
    assert relative_error(exact + 1e-3, exact) == pytest.approx(1e-3, rel=1e-3)
    assert oracle(exact + 1e-3, exact) == pytest.approx(relative_error(exact + 1e-3, exact), rel=1e-9)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_squares_neither_vanish_nor_overflow(size: float) -> None:
    approximate, exact = pair(1, 50)
    assert relative_error(approximate * size, exact * size) == pytest.approx(oracle(approximate, exact), rel=1e-5)


def test_arguments_are_left_alone() -> None:
    approximate, exact = pair(2, 5)
    before = approximate.clone(), exact.clone()
    relative_error(approximate, exact)
    assert torch.equal(approximate, before[0])
    assert torch.equal(exact, before[1])
    assert np.isfinite(approximate.numpy()).all()
