"""The GEMM kernels against exact integer sums, bit for bit: odd M, N tails, padded K, extreme scales, every tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qoq.formats.arithmetic import QuantizedActivation, linear_forward, quantize_activation
from qoq.formats.packing import padded_in_features
from qoq.kernels.dispatch import GemmChoice, gemm_table, gemm_tile
from qoq.kernels.gemm import run_gemm
from qoq.kernels.gemm_tiles import GemmTile, WeightFormat
from qoq.kernels.launch import architecture, num_sms
from qoq.kernels.oracles import emulate_packed_codes, emulate_packed_level1, gemm_oracle
from tests.kernels.gemm_cases import Case, assert_same

pytestmark = pytest.mark.gpu
FORMATS: tuple[WeightFormat, ...] = ("g128", "per_channel", "int8")
ODD_SHAPES = [(1, 32, 128), (3, 96, 256), (17, 160, 128), (33, 576, 640), (70, 192, 640), (130, 352, 1024)]
DTYPES = (torch.float16, torch.bfloat16)
TILES = sorted(name for name in gemm_table()["tiles"] if isinstance(gemm_tile(name), GemmTile))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("shape", ODD_SHAPES[:4], ids=str)
def test_small_sums_are_exact(gpu, weights, shape) -> None:
    case = Case(weights, *shape, seed=sum(shape))
    assert_same(case.run(torch.int32), case.acc())


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_outputs_are_exact(gpu, weights, dtype) -> None:
    case = Case(weights, 19, 96, 384, seed=1)
    assert_same(case.run(dtype), case.out(dtype))


@pytest.mark.parametrize(("weights", "dtype"), [("g128", torch.float16), ("int8", torch.int32)], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_small_tiles_that_blocks_share_are_exact(gpu, tile, weights, dtype) -> None:
    """So little work that every block has one step of a tile: dispatch shares no tile of a small problem."""
    case = Case(weights, 21, 96, 640, seed=7)
    assert_same(case.run(dtype, GemmChoice(gemm_tile(tile), True, "test")), case.expected(dtype))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "tiles"])
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_is_exact(gpu, weights, tile, stream) -> None:
    choice = GemmChoice(gemm_tile(tile), stream, "test")
    for seed, shape in enumerate([*ODD_SHAPES, (300, 1056, 896)]):
        case = Case(weights, *shape, seed=seed, bias=seed % 2 == 0)
        assert_same(case.run(torch.int32, choice), case.acc())
        dtype = DTYPES[seed % 2]
        assert_same(case.run(dtype, choice), case.out(dtype))


@pytest.mark.parametrize("tile", TILES)
def test_whole_tiles_and_then_shared_ones_are_exact(gpu, tile) -> None:
    """More tiles than blocks run at once, and not a multiple of these."""
    case = Case("g128", 1100, 4096, 256, seed=8, bias=False)
    share = (choice := GemmChoice(gemm_tile(tile), True, "test")).share(
        architecture(0), "g128", case.m, case.n, 256, num_sms(0)
    )
    assert share.whole
    assert share.units_each + share.longer
    assert_same(case.run(torch.int32, choice), case.acc())
    assert_same(case.run(torch.bfloat16, choice), case.out(torch.bfloat16))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("m", [1, 5, 16, 40, 64, 127, 200, 513, 1500])
def test_dispatched_kernels_are_exact_on_model_shapes(gpu, weights, m) -> None:
    for n, k in ((1536, 640), (4096, 1536), (6144, 4096)):
        case = Case(weights, m, n, k, seed=m, bias=False)
        assert_same(case.run(torch.float16), case.out(torch.float16))


def test_oracle_agrees_with_the_kernel(gpu) -> None:
    case = Case("g128", 9, 64, 256, seed=5)
    level1 = emulate_packed_level1(*(case.operands[name] for name in ("qweight", "s2_scales", "s2_zeros")))
    exact = gemm_oracle(
        case.codes, case.scales, case.sums, level1, case.operands["s1_scales"], None, case.operands["bias"]
    )
    error = (case.run(torch.bfloat16).double() - exact).abs()
    bias = case.operands["bias"].double().abs()
    # Three float32 roundings, then bfloat16 (2**-9) of the product, of the bias and of their sum.
    assert bool((error <= (exact.abs() + bias) * 2**-7).all())
    chn = Case("per_channel", 9, 64, 256, seed=6)
    assert torch.equal(emulate_packed_codes(chn.operands["qweight"]).long(), chn.level1)


def test_operators_equal_the_reference_arithmetic(gpu) -> None:
    """quantize, multiply, scale: as `linear_forward` on the CPU, K = 576 padded to 640."""
    import qoq.kernels.ops  # noqa: F401

    generator = torch.Generator().manual_seed(3)
    for weights in ("g128", "per_channel"):
        linear = Case(weights, 1, 192, 640, seed=4)
        decoded = linear.decoded
        x = torch.randn(37, 576, generator=generator).to(torch.float16)
        padded = torch.nn.functional.pad(x, (0, padded_in_features(576) - 576))
        packed = {name: tensor.cuda() for name, tensor in linear.operands.items()}
        act: QuantizedActivation = quantize_activation(padded)
        y = torch.ops.qoq.w4a8_gemm(
            act.codes.cuda(),
            act.scales.cuda(),
            act.sums.cuda(),
            packed["qweight"],
            packed["s1_scales"],
            packed.get("s2_scales"),
            packed.get("s2_zeros"),
            packed.get("s1_szeros"),
            packed["bias"],
            torch.float16,
        )
        assert_same(y.cpu(), linear_forward(padded, decoded, act_bits=8))


def test_same_bits_from_run_to_run(gpu) -> None:
    case = Case("g128", 100, 1024, 4096, seed=11)
    first = case.run(torch.float16)
    shared = GemmChoice(gemm_tile("128x32"), True, "test")
    for choice in (None, shared, shared, None, shared):
        assert torch.equal(case.run(torch.float16, choice), first)


def test_graph_replays_and_leaves_the_workspace_clean(gpu) -> None:
    """With tiles that blocks share, whatever dispatch would choose."""
    case = Case("g128", 20, 1024, 2048, seed=12, bias=False)
    choice = GemmChoice(gemm_tile("128x32"), True, "test")
    codes, sums = case.codes.cuda(), case.sums.cuda()
    qweight, s2_scales, s2_zeros = (case.operands[name].cuda() for name in ("qweight", "s2_scales", "s2_zeros"))

    def call() -> Tensor:
        scales = (None, s2_scales, s2_zeros, None)
        return run_gemm("g128", codes, None, sums, qweight, *scales, None, case.n, torch.int32, choice=choice)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        out.fill_(7)
        graph.replay()
        assert_same(out.cpu(), case.acc())


def test_compiled_function_runs_the_operator(gpu) -> None:
    import qoq.kernels.ops  # noqa: F401

    case = Case("per_channel", 8, 64, 256, seed=13)
    codes, sums, qweight = case.codes.cuda(), case.sums.cuda(), case.operands["qweight"].cuda()

    @torch.compile(fullgraph=True)
    def doubled(codes: Tensor) -> Tensor:
        return torch.ops.qoq.w4a8_gemm_int32(codes, sums, qweight, None, None) * 2

    assert_same(doubled(codes).cpu(), case.acc() * 2)
