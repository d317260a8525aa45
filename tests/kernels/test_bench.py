"""What a benchmark counts: bytes, operations, limits, and sums over a layer."""

from __future__ import annotations

import pytest
import torch

from qoq.formats.packing import packed_shapes
from qoq.kernels.bench import GEMM_VARIANTS, GemmReport, GemmResult, Rates, gemm_bytes, gemm_kernels
from qoq.kernels.random_weights import random_act_codes
from qoq.kernels.roofline import Roofline
from qoq.kernels.timing import Timing
from qoq.recipes.shapes import find_shape

ROOFLINE = Roofline(read_gb_s=2000.0, tops={"8-bit": 1000.0, "fp16": 500.0})
TEN_US = Timing(median_us=10.0, low_us=9.0, high_us=11.0, samples=20, calls=100)


@pytest.mark.parametrize(("variant", "progressive"), [("w4a8-g128", True), ("w4a8-chn", False)])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (960, 576)])
def test_bytes_are_those_of_the_tensors(variant: str, progressive: bool, n: int, k: int) -> None:
    m = 3
    shapes = packed_shapes(n, k, progressive=progressive, has_bias=False).values()
    weight = sum(torch.empty(shape, dtype=dtype).nbytes for dtype, shape in shapes)
    inputs = sum(tensor.nbytes for tensor in random_act_codes(m, k, generator=torch.Generator().manual_seed(0)))
    assert gemm_bytes(variant, m, n, k) == weight + inputs + 2 * m * n


def test_four_bits_read_a_quarter() -> None:
    assert gemm_bytes("fp16", 1, 4096, 4096) / gemm_bytes("w4a8-chn", 1, 4096, 4096) == pytest.approx(4, rel=0.01)


def test_rates_against_the_roofline() -> None:
    memory_bound = Rates.of(TEN_US, operations=1e6, nbytes=10_000_000, kind="8-bit", roofline=ROOFLINE)
    assert (memory_bound.gb_s, memory_bound.roof_percent) == (1000.0, 50.0)
    compute_bound = Rates.of(TEN_US, operations=8e9, nbytes=1, kind="8-bit", roofline=ROOFLINE)
    assert (compute_bound.tops, compute_bound.roof_percent) == (800.0, pytest.approx(80.0))
    assert ROOFLINE.floor_us(nbytes=2_000_000, operations=1e12, kind="unknown") == pytest.approx(1.0)


def test_a_layer_is_the_sum_of_its_products_or_nothing() -> None:
    rates = Rates(1.0, 1.0, 1.0)
    report = GemmReport([GemmResult(gemm, 1, 32, 128, "fp16", TEN_US, rates) for gemm in ("qkv", "o")])
    assert report.layer_us(1, "fp16", ["qkv", "o"]) == 20.0
    assert report.layer_us(1, "fp16", ["qkv", "o", "down"]) is None
    assert report.layer_us(2, "fp16", ["qkv"]) is None


def test_the_kernels_to_compile_are_those_of_dispatch() -> None:
    gemms = find_shape("smollm2-135m").layer_gemms()
    specs = gemm_kernels(gemms, [1, 4096], GEMM_VARIANTS, "sm_90")
    assert {spec.source for spec in specs} == {"sm90/gemm.cu", "sm90/gemm_decode.cu"}
    assert {dict(spec.defines)["WEIGHT_FORMAT"] for spec in specs} == {0, 1, 2}
    assert {spec.source for spec in gemm_kernels(gemms, [1, 4096], GEMM_VARIANTS, "sm_89")} == {"sm80/gemm.cu"}
    assert gemm_kernels(gemms, [1], ["fp16"], "sm_90") == []
