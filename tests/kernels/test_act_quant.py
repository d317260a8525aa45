"""Activation quantization on the CPU: the oracles against the definition and PyTorch, the kernel's arithmetic replayed,
the shapes of blocks, the checks of operands, fake tensors, and that every kernel compiles without spilling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qoq.formats.arithmetic import quantize_activation
from qoq.formats.packing import padded_in_features
from qoq.kernels import act_quant
from qoq.kernels.act_oracles import add_oracle, quantize_oracle, rms_norm_oracle, round_to, silu_mul_oracle
from qoq.kernels.compiler import compile_all, nvrtc_version
from qoq.recipes.errors import EnvironmentProblem

DTYPES = (torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")


def random_rows(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of very different sizes; every fourth has values a thousand times larger in some columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator, dtype=torch.float64)
    x[::4] *= torch.where(torch.rand(k, generator=generator) < 0.02, 1000.0, 1.0)
    return (x * 10 ** (torch.rand(m, 1, generator=generator) * 5 - 4)).to(dtype)


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every finite number of a 16-bit dtype."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[torch.isfinite(x)]


def places_apart(found: Tensor, expected: Tensor) -> Tensor:
    """How many numbers of their 16-bit dtype lie between two tensors, element by element."""
    found, expected = (x.contiguous().view(torch.int16).int() for x in (found, expected))
    found, expected = (torch.where(x < 0, -(x & 0x7FFF), x) for x in (found, expected))
    return (found - expected).abs()


# ---- oracles


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_rounding_agrees_with_pytorch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-150, 130, (200_000,), generator=generator)
    values = torch.ldexp(torch.rand(200_000, generator=generator) + 1, exponents)  # float32, as PyTorch rounds from it
    values = torch.cat([values, -values, torch.tensor([0.0, -0.0, INF, -INF, 65519.9, 65520.0, 3.4e38])])
    rounded = torch.from_numpy(round_to(values.double().numpy(), dtype))
    assert torch.equal(rounded, values.to(dtype).double())
    assert np.isnan(round_to(np.array([NAN]), dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_oracle_is_the_definition(dtype: torch.dtype) -> None:
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rows = torch.zeros(8, 200)
    rows[1, 3] = smallest
    rows[2, :2] = torch.tensor([largest, -largest])
    rows[3, 7] = -smallest * 3
    rows[4] = torch.arange(200) / 2 - 36.5
    rows[4, 0] = 127.0  # scale 1: every second value is a tie
    rows[5] = rows[4] * 2**-12
    rows[6], rows[6, 9] = smallest, -largest
    x = torch.cat([rows.to(dtype), random_rows(200, 200, dtype)])
    expected = quantize_activation(x)
    for found, wanted in zip(quantize_oracle(x), (expected.codes, expected.scales, expected.sums), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_amax_gives_the_defined_scale(dtype: torch.dtype) -> None:
    x = all_numbers(dtype).unsqueeze(1)
    codes, scales, _ = quantize_oracle(x)
    expected = quantize_activation(x)
    assert torch.equal(scales, expected.scales)
    assert torch.equal(codes, expected.codes)


def test_numbers_that_are_none_reach_the_scale() -> None:
    x = torch.tensor([[1, NAN, 2], [1, -INF, 2], [INF, NAN, 0], [1, 2, 127]], dtype=torch.float16)
    codes, scales, sums = quantize_oracle(x)
    assert torch.equal(codes, torch.tensor([[0] * 3] * 3 + [[1, 2, 127]], dtype=torch.int8))
    for found in (scales, quantize_activation(x).scales):
        assert torch.nan_to_num(found, 5, 6, 7).tolist() == [5, 6, 5, 1]
    assert sums.tolist() == [0, 0, 0, 130]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_norm_oracles_agree_with_transformers(dtype: torch.dtype) -> None:
    """PyTorch computes in float32: its rounding to 16 bits falls on the other side once in a while."""
    gate_up = random_rows(100, 512, dtype, seed=2).clamp(min=-80)  # exp(89) is beyond float32
    gate, up = gate_up.chunk(2, dim=1)
    apart = places_apart(silu_mul_oracle(gate_up).to(dtype), torch.nn.functional.silu(gate) * up)
    assert int(apart.max()) <= 2
    assert (apart > 0).float().mean() < 2e-3

    x, residual = random_rows(100, 512, dtype, seed=3), random_rows(100, 512, dtype, seed=4)
    assert torch.equal(add_oracle(x, residual).to(dtype), x + residual)

    norm = LlamaRMSNorm(512, eps=1e-5)
    norm.weight = torch.nn.Parameter(random_rows(1, 512, dtype, seed=5)[0], requires_grad=False)
    apart = places_apart(rms_norm_oracle(x, norm.weight, 1e-5).to(dtype), norm(x))
    assert int(apart.max()) <= 2
    assert (apart > 0).float().mean() < 2e-3


# ---- the kernel's arithmetic, replayed


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c with one rounding.

    The product is exact in float64; its sum with c is rounded to odd there, so that the rounding to float32 that
    follows cannot see a tie that is none (Boldo and Melquiond, 2008).
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    back = total - product
    rest = (product - (total - back)) + (c - back)
    is_even = (total.view(np.int64) & 1) == 0
    odd = np.where((rest != 0) & is_even, np.nextafter(total, np.where(rest > 0, np.inf, -np.inf)), total)
    return odd.astype(np.float32)


def kernel_codes(x: np.ndarray, amax: np.ndarray) -> np.ndarray:
    """`Scale` of sm80/act_quant.cu, step by step, for float32 x and the amax of its row."""
    one, rounder = np.float32(1), np.float32(12582912)
    value = amax / np.float32(127)
    value = np.where(value == 0, one, value)
    lift = np.where(value < np.float32(2.0**-100), np.float32(2.0**100), one)
    lifted, x = value * lift, x * lift
    inverse = one / lifted
    quotient = x * inverse
    rest = fused_multiply_add(-quotient, np.broadcast_to(lifted, x.shape), x)
    corrected = fused_multiply_add(rest, np.broadcast_to(inverse, x.shape), quotient)
    return (corrected + rounder).view(np.int32).astype(np.int8)  # the low byte


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.float16, [0]), (torch.bfloat16, [-126, -125, -101, -100, -99, -94, -93, -92, -30, 0, 100, 127])],
    ids=str,
)
def test_reciprocal_and_correction_equal_division_for_every_pair(dtype: torch.dtype, exponents: list[int]) -> None:
    """Every x and amax, up to a common power of two, which changes nothing above scale 2**-100.

    |x| < amax / 256 has code 0 whatever the last places of the quotient are.
    """
    places = 11 if dtype == torch.float16 else 8
    significands = np.arange(1 << (places - 1), 1 << places, dtype=np.float32)
    shifts = np.arange(9)
    for exponent in exponents:
        unit = exponent - places + 1
        with np.errstate(under="ignore"):
            x = np.ldexp(significands[None, :], unit - shifts[:, None]).astype(np.float32).ravel()
        x = torch.from_numpy(x).to(dtype).float().numpy()  # subnormal numbers have fewer places
        for chunk in np.array_split(np.ldexp(significands, unit).astype(np.float32), max(1, len(significands) // 64)):
            amax = chunk[:, None]
            rows = np.minimum(x[None, :], amax)
            expected = np.rint(rows / (amax / np.float32(127)))
            assert expected.max() == 127
            for sign in (1, -1):
                assert np.array_equal(kernel_codes(rows * np.float32(sign), amax), (sign * expected).astype(np.int8))


def test_subnormal_rows_of_bfloat16_are_lifted() -> None:
    numbers = all_numbers(torch.bfloat16).float()
    tiny = numbers[(numbers > 0) & (numbers < 2.0**-120)].numpy()
    amax = tiny[:, None]
    rows = np.minimum(tiny[None, :], amax)
    assert np.array_equal(kernel_codes(rows, amax), np.rint(rows / (amax / np.float32(127))).astype(np.int8))


# ---- blocks


def test_every_row_fits_its_threads() -> None:
    for k in range(8, act_quant.MAX_K + 1, 8):
        shape = act_quant.row_shape(k)
        assert 32 * shape.warps * shape.vectors * 8 >= padded_in_features(k)
        assert shape.threads <= (128 if shape.rows > 1 else 832 if shape.vectors > 4 else 1024)
        assert shape.warps == 1 or shape.rows == 1


def test_specs_hold_every_kernel_that_can_be_asked_for() -> None:
    offered = {spec.defines for spec in act_quant.specs("sm_90")}
    asked = {
        act_quant.spec(operation, dtype, act_quant.row_shape(k)).defines
        for operation in act_quant.OPERATIONS
        for dtype in DTYPES
        for k in range(8, act_quant.max_k(operation) + 1, 8)
    }
    tiled = {
        act_quant.spec("plain", dtype, act_quant.row_shape(k), tiled=True).defines
        for dtype in DTYPES
        for k in range(8, act_quant.MAX_K + 1, 8)
    }
    assert offered == asked | tiled
    assert {spec.defines for spec in act_quant.specs("sm_80")} == asked
    assert len(act_quant.specs("sm_90")) == len(offered)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_kernel_compiles_without_spilling(arch: str) -> None:
    try:
        nvrtc_version()
    except EnvironmentProblem as error:
        pytest.skip(str(error))
    cubins = compile_all((spec, arch) for spec in act_quant.specs(arch))
    for (spec, _), cubin in cubins.items():
        assert cubin.resources.spill_bytes == 0, spec.label
        assert cubin.resources.stack_bytes == 0, spec.label
        assert cubin.resources.registers * spec.threads <= 65536, spec.label


# ---- operands


X = torch.zeros(3, 64, dtype=torch.float16)
W = torch.ones(64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("operation", "changed", "message"),
    [
        (
            "plain",
            {"x": X.float()},
            r"x: expected torch.float16 or torch.bfloat16 \[M, K\], got torch.float32 \[3, 64\]",
        ),
        ("plain", {"x": X[0]}, r"x: expected .* \[M, K\], got torch.float16 \[64\]"),
        ("plain", {"x": X[:, :60].contiguous()}, "x: K is 60, expected a multiple of 8 from 8 to 53248"),
        ("plain", {"x": X[:, :0]}, "x: K is 0, "),
        ("plain", {"x": X.new_empty(0, 53256)}, "x: K is 53256, "),
        ("plain", {"x": X.t().contiguous().t()}, r"x: expected contiguous rows .* got strides \[1, 3\]"),
        ("plain", {"x": X.view(-1)[4:132].view(2, 64)}, "x: expected contiguous rows that begin at multiples of 16"),
        ("plain", {"x": torch.zeros(3, 68, dtype=torch.float16)[:, :64]}, r"strides \[68, 1\]"),
        (
            "silu_mul",
            {"x": torch.zeros(3, 63, dtype=torch.float16)},
            r"gate_up: expected .* \[M, 2 K\], got .* \[3, 63\]",
        ),
        ("silu_mul", {"x": torch.zeros(3, 24, dtype=torch.float16)}, "gate_up: K is 12, "),
        ("rms_norm", {"x": X.new_empty(0, 40000)}, "x: K is 40000, expected a multiple of 8 from 8 to 16384"),
        ("rms_norm", {"weight": W[:32]}, r"weight: expected torch.float16 \[64\], got torch.float16 \[32\]"),
        ("rms_norm", {"weight": W.bfloat16()}, r"weight: expected torch.float16 \[64\], got torch.bfloat16 \[64\]"),
        ("rms_norm", {"weight": W.to("meta")}, "weight: expected it on cpu, got meta"),
        ("rms_norm", {"weight": W.repeat(2)[::2]}, "weight: expected contiguous rows"),
        ("rms_norm", {"eps": -1e-6}, "eps: expected a number from 0 on, got -1e-06"),
        ("rms_norm", {"eps": NAN}, "eps: expected a number from 0 on, got nan"),
        (
            "add_rms_norm",
            {"residual": X[:2]},
            r"residual: expected torch.float16 \[3, 64\], got torch.float16 \[2, 64\]",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(operation: str, changed: dict[str, object], message: str) -> None:
    operands: dict[str, object] = {"x": X}
    if operation.endswith("rms_norm"):
        operands |= {"weight": W, "eps": 1e-6}
    if operation == "add_rms_norm":
        operands["residual"] = X
    assert act_quant.check_operands(operation, **operands) == (32 if operation == "silu_mul" else 64)
    with pytest.raises(ValueError, match=message):
        act_quant.check_operands(operation, **(operands | changed))


def test_rows_of_a_larger_tensor_are_taken() -> None:
    wide = torch.zeros(3, 96, dtype=torch.bfloat16)
    assert act_quant.check_operands("plain", wide[:, 16:80]) == 64
    assert act_quant.check_operands("plain", wide[:1, :64]) == 64
    assert act_quant.check_operands("plain", wide[:0]) == 96


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [0, 5])
def test_fake_tensors_have_the_shapes_of_results(dtype: torch.dtype, m: int) -> None:
    x, weight = torch.empty(m, 576, dtype=dtype, device="meta"), torch.empty(576, dtype=dtype, device="meta")
    operators = torch.ops.qoq
    results = [
        operators.quantize_activation(x),
        operators.silu_mul_quantize(torch.empty(m, 2 * 576, dtype=dtype, device="meta")),
        operators.rms_norm_quantize(x, weight, 1e-6),
        operators.add_rms_norm_quantize(x, x, weight, 1e-6),
    ]
    for codes, scales, sums, *added in results:
        assert (codes.dtype, tuple(codes.shape)) == (torch.int8, (m, 640))
        assert (scales.dtype, tuple(scales.shape)) == (torch.float32, (m,))
        assert (sums.dtype, tuple(sums.shape)) == (torch.int32, (m,))
        assert all((t.dtype, tuple(t.shape)) == (dtype, (m, 576)) for t in added)
    assert [len(result) for result in results] == [3, 3, 3, 4]
