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
from qoq.kernels.tiles import activation_tiles_shape
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


def kernel_scale(amax: np.ndarray) -> np.ndarray:
    """`divided_by_127` of sm80/act_quant.cu, for amax from its smallest scale on."""
    inverse, divisor = np.float32(1) / np.float32(127), np.full_like(amax, 127)
    quotient = amax * inverse
    rest = fused_multiply_add(-quotient, divisor, amax)
    return fused_multiply_add(rest, np.full_like(amax, inverse), quotient)


def kernel_codes(x: np.ndarray, amax: np.ndarray, ulps: int = 0) -> np.ndarray:
    """`Scale` of sm80/act_quant.cu, step by step, for float32 x and the amax of its row.

    The reciprocal is an approximation, off by some ulps.
    """
    one, rounder = np.float32(1), np.float32(12582912)
    value = amax / np.float32(127)
    value = np.where(value == 0, one, value)
    lift = np.where(value < 2.0**-100, np.float32(2.0**100), np.where(value > 2.0**80, np.float32(2.0**-60), one))
    lifted, x = value * lift, x * lift
    inverse = ((one / lifted).view(np.int32) + ulps).view(np.float32)
    rest = fused_multiply_add(-inverse, lifted, np.ones_like(lifted)) * inverse
    quotient = fused_multiply_add(x, np.broadcast_to(inverse, x.shape), x * rest)
    return (quotient + rounder).view(np.int32).astype(np.int8)  # the low byte


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_amax_is_divided_as_by_a_division(dtype: torch.dtype) -> None:
    numbers = all_numbers(dtype).float().numpy()
    amax = numbers[numbers >= 2.0**-100]
    assert np.array_equal(kernel_scale(amax), amax / np.float32(127))


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.float16, [0]), (torch.bfloat16, [-126, -125, -101, -100, -99, -94, -93, -92, -30, 0, 100, 127])],
    ids=str,
)
def test_both_parts_of_a_reciprocal_equal_division_for_every_pair(dtype: torch.dtype, exponents: list[int]) -> None:
    """Every x and amax, up to a common power of two, which changes nothing between the smallest and largest scale.

    |x| < amax / 256 has code 0 whatever the last places of the quotient are. The reciprocal may be off by an ulp.
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
            for sign, ulps in ((1, -1), (1, 0), (1, 1), (-1, 0)):
                codes = kernel_codes(rows * np.float32(sign), amax, ulps)
                assert np.array_equal(codes, (sign * expected).astype(np.int8))


def test_subnormal_rows_of_bfloat16_are_lifted() -> None:
    numbers = all_numbers(torch.bfloat16).float()
    tiny = numbers[(numbers > 0) & (numbers < 2.0**-120)].numpy()
    amax = tiny[:, None]
    rows = np.minimum(tiny[None, :], amax)
    assert np.array_equal(kernel_codes(rows, amax), np.rint(rows / (amax / np.float32(127))).astype(np.int8))


# ---- blocks


NUMBERS = (1, 4, 5, 16, 32, 33, 64, 65, 383, 384, 1023, 1024, 8191, 8192, 100_000)
"""Of rows: around all that shapes depend on."""


def asked(operation: str, dtype: torch.dtype, *, hopper: bool) -> dict[tuple[tuple[str, int], ...], int]:
    """Kernels for any K and number of rows, and the largest block that each is launched with."""
    found: dict[tuple[tuple[str, int], ...], int] = {}
    for tiled in (False, True) if hopper else (False,):
        for k in range(8, act_quant.max_k(operation) + 1, 128 if hopper else 8):
            for rows in NUMBERS:
                shape = act_quant.row_shape(operation, k, rows=rows, tiled=tiled, hopper=hopper)
                spec = act_quant.spec(operation, dtype, shape, k, tiled=tiled)
                found[spec.defines] = max(found.get(spec.defines, 0), spec.threads)
    return found


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("operation", act_quant.OPERATIONS)
def test_every_row_fits_its_threads(operation: str, hopper: bool) -> None:
    for k in range(8, act_quant.max_k(operation) + 1, 8):
        k_pad = padded_in_features(k)
        for rows in NUMBERS:
            shape = act_quant.row_shape(operation, k, rows=rows, tiled=hopper, hopper=hopper)
            warps = shape.warps * shape.blocks
            assert 32 * warps * shape.vectors * 8 >= k_pad
            few = operation.endswith("rms_norm") and shape.vectors > 2
            assert shape.threads <= (128 if shape.rows > 1 else 832 if shape.vectors > 4 else 512 if few else 1024)
            assert shape.rows == 1 or shape.warps == shape.blocks == shape.turns == 1
            slots = warps * (shape.vectors if operation.endswith("rms_norm") else 1)  # of `Board` in the kernel
            assert shape.rows > 1 or (slots <= 64 and (shape.blocks > 1 or warps <= 32))
            assert hopper or shape.blocks == shape.turns == 1
            assert shape.turns == 1 or shape.blocks == 1
            assert act_quant.spec(operation, torch.float16, shape, k, tiled=hopper).shared_bytes <= 232448
            assert shape.grid(rows) * shape.rows * shape.turns >= rows * shape.blocks


@pytest.mark.parametrize("operation", act_quant.OPERATIONS)
def test_orders_of_sums_depend_on_k_alone(operation: str) -> None:
    """Sums of squares go by 256 columns: in a warp that has the row, one after the other, else as `total` adds them."""
    for k in (8, 1024, 1032, 4096, 16384):
        shapes = [
            act_quant.row_shape(operation, k, rows=rows, tiled=tiled, hopper=hopper)
            for rows in NUMBERS
            for tiled in (False, True)
            for hopper in (False, True)
        ]
        assert len({shape.rows > 1 for shape in shapes}) == 1


@pytest.mark.parametrize("hopper", [False, True])
def test_specs_hold_every_kernel_that_can_be_asked_for(hopper: bool) -> None:
    specs = act_quant.specs("sm_90" if hopper else "sm_80")
    wanted: dict[tuple[tuple[str, int], ...], int] = {}
    for operation in act_quant.OPERATIONS:
        for dtype in DTYPES:
            wanted |= asked(operation, dtype, hopper=hopper)
    assert {spec.defines: spec.threads for spec in specs} == wanted
    assert len(specs) == len(wanted)


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
    gate_up = torch.empty(m, 2 * 576, dtype=dtype, device="meta")
    for options, shape in (({}, (m, 640)), ({"tiled": True}, activation_tiles_shape(m, 640))):
        results = [
            operators.quantize_activation(x, **options),
            operators.silu_mul_quantize(gate_up, **options),
            operators.rms_norm_quantize(x, weight, 1e-6, **options),
            operators.add_rms_norm_quantize(x, x, weight, 1e-6, **options),
        ]
        for codes, scales, sums, *added in results:
            assert (codes.dtype, tuple(codes.shape)) == (torch.int8, shape)
            assert (scales.dtype, tuple(scales.shape)) == (torch.float32, (m,))
            assert (sums.dtype, tuple(sums.shape)) == (torch.int32, (m,))
            assert all((t.dtype, tuple(t.shape)) == (dtype, (m, 576)) for t in added)
        assert [len(result) for result in results] == [3, 3, 3, 4]
