"""Operands of the Hopper kernels: every code is where the kernels look for it, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.formats.packing import pack_linear, unpack_qweight, unpack_s2
from qoq.kernels.gemm_tiles import WEIGHT_FORMATS, weight_block_bytes
from qoq.kernels.random_weights import random_packed_linear
from qoq.kernels.tiles import (
    activation_tiles_shape,
    tile_activations,
    tile_int8_weights,
    tile_weights,
    untile_activations,
    untile_weights,
)
from tests.kernels.gemm_cases import Case

PROGRESSIVE = pytest.mark.parametrize("progressive", [True, False], ids=["g128", "chn"])


def packed_linear(n: int, k: int, progressive: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    return random_packed_linear(n, k, progressive=progressive, generator=torch.Generator().manual_seed(seed))


@PROGRESSIVE
def test_fragments_of_wgmma_are_the_words_that_a_lane_reads(progressive: bool) -> None:
    """PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk32": register i of lane 4 g + t in warp w holds row
    16 w + g + 8 (i % 2) and columns 4 t + 16 (i / 2) to + 3, the first column in the lowest byte."""
    packed = packed_linear(192, 256, progressive)
    codes, tiles = unpack_qweight(packed["qweight"]), tile_weights(packed)
    assert tiles.shape == (2, 2, 2, weight_block_bytes("g128" if progressive else "per_channel"))
    sizes, unit = torch.tensor([3, 2, 4, 32, 4, 4]), 1056 if progressive else 1024
    for block, group, warp, lane, register, step in (torch.randint(0, 1 << 20, (400, 6)) % sizes).tolist():
        at = warp * unit + 512 * (step // 2) + 16 * lane + 4 * register
        word = tiles[block // 2, group, block % 2, at : at + 4].to(torch.int32)
        fragment = word >> 4 if step % 2 else word & 15
        row = 64 * block + 16 * warp + lane // 4 + 8 * (register % 2)
        column = 128 * group + 32 * step + 4 * (lane % 4) + 16 * (register // 2)
        assert fragment.tolist() == codes[row, column : column + 4].tolist()


def test_scales_and_offsets_are_those_of_the_lanes_channels() -> None:
    packed = packed_linear(320, 384, True)
    scales, zeros = unpack_s2(packed["s2_scales"]), unpack_s2(packed["s2_zeros"])
    tiles = tile_weights(packed)
    for channel in range(320):
        block, row = channel // 64, channel % 64
        at = 1056 * (row // 16) + 1024 + 4 * (row % 8) + 2 * (row % 16 // 8)
        for group in range(3):
            scale, offset = tiles[block // 2, group, block % 2, at : at + 2].tolist()
            assert scale == int(scales[channel, group])
            assert offset == -int(zeros[channel, group]) % 256


@PROGRESSIVE
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 1000))
def test_weights_come_back(progressive: bool, stripes: int, groups: int, seed: int) -> None:
    packed = packed_linear(32 * stripes, 128 * groups, progressive, seed)
    back = untile_weights(tile_weights(packed), 32 * stripes)
    assert back.keys() == packed.keys() - {"s1_scales", "s1_szeros"}
    for name, tensor in back.items():
        assert tensor.dtype == packed[name].dtype
        assert torch.equal(tensor, packed[name]), name


def test_post_scale_offsets_come_back() -> None:
    """Offsets that are no multiple of the scale, up to 240."""
    case = Case("g128", 1, 96, 256, seed=3)
    packed = pack_linear(case.linear)
    back = untile_weights(tile_weights(packed), 96)
    assert all(torch.equal(back[name], packed[name]) for name in back)


def test_channels_that_fill_a_pair_are_zeros() -> None:
    tiles = tile_weights(packed_linear(160, 128, True))
    assert tiles.shape[0] == 2
    assert not tiles[1, :, 1].any()
    assert tiles[1, :, 0].any()


@given(st.integers(1, 40), st.integers(1, 4))
def test_core_matrices_of_activations(m: int, groups: int) -> None:
    """PTX ISA, "Shared Memory Matrix Layout": 8 rows of 16 bytes, one after the other."""
    codes = torch.randint(-127, 128, (m, 128 * groups), dtype=torch.int8)
    tiles = tile_activations(codes)
    assert tiles.shape == activation_tiles_shape(m, 128 * groups)
    assert torch.equal(untile_activations(tiles, m), codes)
    flat, eights = tiles.flatten(), -(-m // 8)
    for token, column in ((0, 0), (m - 1, 128 * groups - 1), (m // 2, 77), (m - 1, 16)):
        at = (column // 128 * eights + token // 8) * 1024 + column % 128 // 16 * 128 + token % 8 * 16 + column % 16
        assert int(flat[at]) == int(codes[token, column])


def test_int8_weights_are_laid_out_as_activations() -> None:
    weight = torch.randint(-128, 128, (96, 256), dtype=torch.int8)
    tiles = tile_int8_weights(weight)
    assert tiles.shape == (1, 2, 2, weight_block_bytes("int8"))
    for group in range(2):
        block = tiles[0, group, 0].view(torch.int8).view(1, 8, 8, 8, 16)
        assert torch.equal(untile_activations(block, 64), weight[:64, 128 * group : 128 * (group + 1)])
    assert not tiles[0, :, 1, 4096:].any()


def test_every_format_has_a_block() -> None:
    assert {weights: weight_block_bytes(weights) for weights in WEIGHT_FORMATS} == {
        "g128": 64 * 128 // 2 + 2 * 64,
        "per_channel": 64 * 128 // 2,
        "int8": 64 * 128,
    }
