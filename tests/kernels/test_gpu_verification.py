"""`qoq verify` on the kernels: a right kernel passes, one wrong element is reported with place and both values.

The operators are stand-ins on the CPU that compute the right numbers, but for the defects that a test asks for.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qoq.kernels import gpu_verification, kv_verification
from qoq.kernels.gpu_verification import ROWS, check_linear_kernels, check_quantizer, extreme_act_codes
from qoq.kernels.random_weights import random_packed_linear
from qoq.kernels.verification import emulate_weight

CPU = torch.device("cpu")
N, K = 64, 320


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_verification, "ROWS", (1, 3, 17))


def linear(*, progressive: bool = True, has_bias: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    packed = random_packed_linear(N, K, progressive=progressive, generator=torch.Generator().manual_seed(0))
    if has_bias:
        packed["bias"] = torch.randn(N, generator=torch.Generator().manual_seed(1)).half()
    return packed, emulate_weight(packed)


@pytest.mark.parametrize("progressive", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_right_kernels_pass(cpu_operators: Any, progressive: bool, has_bias: bool, seed: int) -> None:
    packed, emulated = linear(progressive=progressive, has_bias=has_bias)
    check = check_linear_kernels("up_proj", packed, emulated, in_features=K, device=CPU, seed=seed)
    assert check.problems == ()
    assert check.compared == 3 * (1 + 3 + 17) * N


def test_a_wrong_sum_is_told_with_its_place_and_both_values(cpu_operators: Any) -> None:
    cpu_operators.defects["w4a8_gemm_int32"] = lambda sums: sums[0, 0].add_(1)
    packed, emulated = linear()
    problems = check_linear_kernels("layers.3.up_proj", packed, emulated, in_features=K, device=CPU).problems
    assert len(problems) == 3
    codes, _ = extreme_act_codes(max(ROWS), K, device=CPU, seed=0)
    expected = int(codes[0].long() @ emulated[0].long())
    assert problems[0].startswith(f"layers.3.up_proj: int32, M = 1: sum [0, 0] is {expected + 1}, expected {expected}")


def test_an_output_two_steps_off_is_told(cpu_operators: Any) -> None:
    def two_steps_up(y: torch.Tensor) -> None:
        if y.dtype == torch.float16:
            up = torch.full_like(y[:, 7], math.inf)
            y[:, 7] = y[:, 7].nextafter(up).nextafter(up)

    cpu_operators.defects["w4a8_gemm"] = two_steps_up
    packed, emulated = linear()
    problems = check_linear_kernels("up_proj", packed, emulated, in_features=K, device=CPU).problems
    assert problems
    assert all("torch.float16" in problem and ", 7] is" in problem for problem in problems)


def test_many_differences_are_told_by_a_few(cpu_operators: Any) -> None:
    packed, emulated = linear()
    problems = check_linear_kernels("up_proj", packed, emulated + 1, in_features=K, device=CPU).problems
    assert len(problems) <= 3 * 3 * 3
    assert "more of" in problems[-1]


def test_activations_hold_the_extremes() -> None:
    codes, sums = extreme_act_codes(20, 192, device=CPU, seed=0)
    assert codes.shape == (20, 256)
    assert not codes[:, 192:].any()
    assert {row.tolist()[0] for row in codes[1:4, :192].unique(dim=1)} == {127, 0, -127}
    assert sums[1:4].tolist() == [127 * 192, 0, -127 * 192]
    assert sums[5] == codes[5, 191] == -127
    assert codes[6].abs().unique().tolist() in ([0, 127], [127])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_quantizer_is_compared(cpu_operators: Any, dtype: torch.dtype) -> None:
    assert check_quantizer(192, dtype, device=CPU).problems == ()
    cpu_operators.defects["quantize_activation"] = lambda codes: codes[0, 0].add_(1)
    (problem,) = check_quantizer(192, dtype, device=CPU).problems
    assert "codes [0, 0] is 1, expected 0" in problem


def test_attention_of_the_oracle_is_that_of_torch() -> None:
    random = torch.Generator().manual_seed(0)
    batch, tokens = len(kv_verification._LENS), 512
    query = torch.randn(batch, 6, 64, generator=random, dtype=torch.float64)
    key, value = (torch.randn(batch, tokens, 2, 64, generator=random, dtype=torch.float64) for _ in range(2))
    for window in (None, 33):
        found = kv_verification._attend(query, key, value, 0.125, window)
        for i, length in enumerate(kv_verification._LENS):
            first = max(0, length - (window or tokens))
            if length == 0:
                assert not found[i].any()
                continue
            expected = torch.nn.functional.scaled_dot_product_attention(
                query[i, None, :, None],
                key[i, None, first:length].transpose(1, 2),
                value[i, None, first:length].transpose(1, 2),
                scale=0.125,
                enable_gqa=True,
            )
            assert torch.allclose(found[i], expected[0, :, 0], rtol=1e-10, atol=1e-12)
