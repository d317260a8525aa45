"""Hopper's GEMMs: bit for bit the sums and outputs that the reference defines, whatever the shape and the tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qoq.kernels.dispatch import GemmChoice, gemm_table, gemm_tile
from qoq.kernels.gemm_sm90 import run_gemm_sm90
from qoq.kernels.gemm_tiles import HOPPER, DecodeTile, Sm90Tile, SplitTile, WeightFormat
from qoq.kernels.launch import is_hopper, num_sms
from qoq.kernels.modules import QoQLinear
from qoq.kernels.tiles import tile_activations, tile_weights
from tests.kernels.gemm_cases import Case, assert_same, run_on_hopper

pytestmark = pytest.mark.gpu
FORMATS: tuple[WeightFormat, ...] = ("g128", "per_channel", "int8")
ODD_SHAPES = [(1, 32, 128), (3, 96, 256), (17, 160, 384), (33, 576, 640), (70, 192, 640), (130, 352, 1024)]
DTYPES = (torch.float16, torch.bfloat16)
TILES = {name: gemm_tile(name) for name in gemm_table()["tiles"]}
SCHEDULED = sorted(name for name, tile in TILES.items() if isinstance(tile, Sm90Tile))
SINGLE = sorted(name for name, tile in TILES.items() if isinstance(tile, DecodeTile | SplitTile))
EVERY = [(name, stream) for name in SCHEDULED for stream in (True, False)] + [(name, False) for name in SINGLE]


@pytest.fixture(autouse=True)
def hopper(gpu) -> None:
    if not is_hopper(torch.cuda.current_device()):
        pytest.skip("this GPU is no Hopper")


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("shape", ODD_SHAPES[:4], ids=str)
def test_small_sums_are_exact(weights, shape) -> None:
    case = Case(weights, *shape, seed=sum(shape))
    assert_same(run_on_hopper(case, torch.int32), case.acc())


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_outputs_are_exact(weights, dtype) -> None:
    case = Case(weights, 19, 96, 384, seed=1)
    assert_same(run_on_hopper(case, dtype), case.out(dtype))


@pytest.mark.parametrize(("tile", "stream"), EVERY)
def test_small_of_every_tile(tile, stream) -> None:
    """Shared: so little work that every block has one step of a tile."""
    case = Case("g128", 21, 96, 640, seed=7)
    choice = GemmChoice(gemm_tile(tile), stream, "test")
    assert_same(run_on_hopper(case, torch.bfloat16, choice), case.out(torch.bfloat16))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(("tile", "stream"), EVERY)
def test_every_tile_is_exact(weights, tile, stream) -> None:
    if isinstance(TILES[tile], DecodeTile | SplitTile) and not TILES[tile].fits(HOPPER, weights):
        pytest.skip("the kernel is not for these weights")
    choice = GemmChoice(gemm_tile(tile), stream, "test")
    for seed, shape in enumerate([*ODD_SHAPES, (300, 1056, 896), (5, 64, 8192)]):
        case = Case(weights, *shape, seed=seed, bias=seed % 2 == 0)
        assert_same(run_on_hopper(case, torch.int32, choice), case.acc())
        dtype = DTYPES[seed % 2]
        assert_same(run_on_hopper(case, dtype, choice), case.out(dtype))


@pytest.mark.parametrize("tile", SCHEDULED)
def test_whole_tiles_and_then_shared_ones_are_exact(tile) -> None:
    """More tiles than blocks run at once, and not a multiple of these."""
    case = Case("g128", 1100, 8192, 256, seed=8, bias=False)
    choice = GemmChoice(gemm_tile(tile), True, "test")
    share = choice.share(HOPPER, "g128", case.m, case.n, 256, num_sms(0))
    assert share.whole
    assert_same(run_on_hopper(case, torch.int32, choice), case.acc())
    assert_same(run_on_hopper(case, torch.bfloat16, choice), case.out(torch.bfloat16))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("m", [1, 5, 8, 16, 40, 64, 127, 200, 513, 1500])
def test_dispatched_kernels_are_exact_on_model_shapes(weights, m) -> None:
    for n, k in ((1536, 640), (4096, 1536), (6144, 4096)):
        case = Case(weights, m, n, k, seed=m, bias=False)
        assert_same(run_on_hopper(case, torch.float16), case.out(torch.float16))


def test_eight_thousand_tokens_are_exact() -> None:
    case = Case("g128", 8192, 288, 512, seed=2)
    assert_same(run_on_hopper(case, torch.int32), case.acc())


def test_chained_graphs_replay_the_same_bits() -> None:
    """Launches that overlap: each writes what the next one reads, over and over, in a graph."""
    case = Case("g128", 20, 2048, 2048, seed=12, bias=False)
    packed = {name: tensor.cuda() for name, tensor in case.operands.items()}
    tiles, s1 = tile_weights(packed), packed["s1_scales"]
    scales = torch.full((20,), 1e-3, device="cuda")
    x = torch.randn(20, 2048, device="cuda", dtype=torch.float16)
    torch.cuda.synchronize()

    def chain(choice: GemmChoice | None) -> Tensor:
        y = x
        for _ in range(4):
            act, act_scales, sums = torch.ops.qoq.quantize_activation(y, tiled=True)
            y = run_gemm_sm90("g128", act, act_scales * 0 + scales, sums, tiles, s1, None, None, torch.float16,
                              choice=choice)  # fmt: skip
            y = y.nan_to_num(0, 0, 0).clamp(-8, 8)
        return y

    import qoq.kernels.ops  # noqa: F401

    kernels = [(Sm90Tile(32, 2, 8, 2), True), (Sm90Tile(32, 2, 8, 2), False), (SplitTile(32, 1, 4, 2, 8, 1), False),
               (DecodeTile(24, 2, 8, 4, 1, 1), False), (DecodeTile(8, 4, 8, 2, 2, 1), False)]  # fmt: skip
    for tile, stream in kernels:
        choice = GemmChoice(tile, stream, "test")
        first = chain(choice).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(choice)
        for _ in range(5):
            out.fill_(7)
            graph.replay()
            assert torch.equal(out, first)


def test_launches_that_follow_each_other_directly_share_the_workspace() -> None:
    """Nothing between them: each may start before the one before has ended, on tiles that blocks share."""
    case = Case("g128", 20, 1024, 4096, seed=6, bias=False)
    packed = {name: tensor.cuda() for name, tensor in case.operands.items()}
    tiles, s1, act = tile_weights(packed), packed["s1_scales"], tile_activations(case.codes.cuda())
    scales, sums = case.scales.cuda(), case.sums.cuda()
    choice = GemmChoice(Sm90Tile(32, 1, 8, 3), True, "test")
    torch.cuda.synchronize()

    def launches() -> list[Tensor]:
        operands = ("g128", act, scales, sums, tiles, s1, None, None, torch.int32)
        return [run_gemm_sm90(*operands, choice=choice) for _ in range(20)]

    launches()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = launches()
    for _ in range(3):
        for out in outs:
            out.fill_(7)
        graph.replay()
        for out in outs:
            assert_same(out.cpu(), case.acc())


def test_same_bits_from_run_to_run() -> None:
    case = Case("g128", 100, 1024, 4096, seed=11)
    first = run_on_hopper(case, torch.float16)
    for stream in (True, False, True):
        choice = GemmChoice(gemm_tile("sm90-128x64"), stream, "test")
        assert torch.equal(run_on_hopper(case, torch.float16, choice), first)


@pytest.mark.parametrize("weights", ["g128", "per_channel"])
def test_a_module_runs_them_and_gives_its_weights_back(weights) -> None:
    case = Case(weights, 1, 192, 640, seed=4)
    linear = QoQLinear(576, 192, progressive=weights == "g128", has_bias=True, zero_domain="post_scale"
                       if weights == "g128" else "pre_scale")  # fmt: skip
    linear.load_state_dict(case.operands)
    linear.cuda()
    x = torch.randn(37, 576, dtype=torch.float16)
    before = linear(x.cuda())
    assert linear.qweight is None
    state = {name: tensor.cpu() for name, tensor in linear.state_dict().items()}
    assert state.keys() == case.operands.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, case.operands[name]), name
    assert torch.equal(linear(x.cuda()), before)
    linear.backend = "reference"
    assert_same(before.cpu(), linear(x.cuda()).cpu())
    linear.backend = "kernels"
    assert torch.equal(linear(x.cuda()), before)


def test_operands_that_do_not_fit_are_refused() -> None:
    case = Case("g128", 9, 64, 256, seed=5)
    packed = {name: tensor.cuda() for name, tensor in case.operands.items()}
    tiles = tile_weights(packed)
    act = tile_activations(case.codes.cuda())
    scales, sums, s1 = case.scales.cuda(), case.sums.cuda(), packed["s1_scales"]
    with pytest.raises(ValueError, match="act_tiles"):
        torch.ops.qoq.w4a8_gemm_sm90(act[:, :1].contiguous(), scales, sums, tiles, s1, None, None, torch.float16)
    with pytest.raises(ValueError, match="weight_tiles"):
        torch.ops.qoq.w4a8_gemm_sm90(act, scales, sums, tiles[..., :4096].contiguous(), s1, None, None, torch.float16)
    with pytest.raises(ValueError, match="act_sums"):
        torch.ops.qoq.w4a8_gemm_sm90(act, scales, sums[:-1], tiles, s1, None, None, torch.float16)
