"""Operands of the Hopper kernels: weights re-packed once on the GPU, activations as their quantizer writes them.

Weights are uint8 [ceil(N/128), K/128, 2, block]: blocks of 64 channels by 128 inputs, N padded to a multiple of 128
with zeros. 4-bit weights: a block is 4 units of 16 channels, each 1024 bytes of codes and, of progressive weights, 32
bytes of scales, so that any number of units is a piece. In unit w, channel = 8 h + g and input = 64 u + 32 s + 16 c +
4 t + i:
    codes   byte 512 u + 16 (4 g + t) + 4 (2 c + h) + i, in the low half for s = 0 and the high one for s = 1: the 16
            bytes that lane 4 g + t of warp w reads hold the A operands of wgmma m64k32 (and of mma m16n8k32)
    scales  4 g + 2 h: the bytes s2 and zero of channel 8 h + g, where zero is the level-1 offset, 0 .. 240 (minus the
            byte on disk, mod 256)
int8 weights: a block is 8192 bytes, as activations, 8 channels after the other; see below.
Activations are int8 [K/128, ceil(M/8), 8, 8, 16]: for 128 inputs and 8 tokens, 8 pieces of 16 inputs, and in a piece
the 16 bytes of each token: the core matrices of wgmma, without a swizzle (PTX ISA, "Shared Memory Matrix Layout").
Tokens past M are not read into any result. The same addresses on the device: cuda/sm90/gemm_weights.cuh and
cuda/sm80/act_quant.cu.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qoq.formats.packing import pack_qweight, pack_s2, unpack_qweight, unpack_s2
from qoq.recipes.schema import GROUP_SIZE

PAIR_CHANNELS = 128
"""Blocks of weights lie in pairs of so many channels."""
_BLOCK_CHANNELS = 64
_UNITS = 4
_CODE_BYTES = 1024
"""Of a unit."""
_SCALE_BYTES = 32
_TOKENS = 8
_PIECE = 16
# Axes: p and r the pair of blocks and which of the two, b the group of 128 inputs; the rest as above.
_LOGICAL_CODES = "p r w h g b u s c t i"
_STORED_CODES = "p b r w u g t c h i s"
_SIZES = {"r": 2, "w": 4, "h": 2, "g": 8, "u": 2, "s": 2, "c": 2, "t": 4, "i": 4}


def tile_weights(packed: Mapping[str, Tensor]) -> Tensor:
    """Weights as above from the tensors of a checkpoint (`formats.packing`): with s2_scales progressive ones."""
    codes = _padded(unpack_qweight(packed["qweight"]))
    n, k = codes.shape
    pairs, groups = n // PAIR_CHANNELS, k // GROUP_SIZE
    ordered = _reorder(codes, _LOGICAL_CODES, _STORED_CODES, pairs, groups)
    units = (ordered[..., 0] | ordered[..., 1] << 4).reshape(pairs, groups, 2, _UNITS, _CODE_BYTES)
    if "s2_scales" not in packed:
        return units.reshape(pairs, groups, 2, -1)
    scales = _padded(unpack_s2(packed["s2_scales"]).view(torch.uint8))
    offsets = _padded(unpack_s2(packed["s2_zeros"]).neg().view(torch.uint8))
    both = torch.stack([scales, offsets], dim=-1).view(pairs, 2, 4, 2, 8, groups, 2)  # p r w h g b value
    scaled = [units, both.permute(0, 5, 1, 2, 4, 3, 6).reshape(pairs, groups, 2, _UNITS, _SCALE_BYTES)]
    return torch.cat(scaled, dim=-1).view(pairs, groups, 2, -1)


def untile_weights(tiles: Tensor, out_features: int) -> dict[str, Tensor]:
    """The inverse of `tile_weights`: qweight and, of progressive weights, s2_scales and s2_zeros."""
    pairs, groups = tiles.shape[:2]
    units = tiles.view(pairs, groups, 2, _UNITS, -1)
    codes = units[..., :_CODE_BYTES]
    halves = torch.stack([codes & 0xF, codes >> 4], dim=-1)
    logical = _reorder(halves, _STORED_CODES, _LOGICAL_CODES, pairs, groups)
    packed = {"qweight": pack_qweight(logical.reshape(pairs * PAIR_CHANNELS, -1)[:out_features].contiguous())}
    if units.shape[-1] > _CODE_BYTES:
        both = units[..., _CODE_BYTES:].reshape(pairs, groups, 2, 4, 8, 2, 2).permute(6, 0, 2, 3, 5, 4, 1)
        scales, offsets = both.reshape(2, pairs * PAIR_CHANNELS, groups)[:, :out_features]
        packed["s2_scales"] = pack_s2(scales.contiguous().view(torch.int8))
        packed["s2_zeros"] = pack_s2(offsets.contiguous().view(torch.int8).neg())
    return packed


def tile_int8_weights(weight: Tensor) -> Tensor:
    """Weights as above from int8 [N, K], K a multiple of 128."""
    rows = _padded(weight.view(torch.uint8))
    pairs, groups = rows.shape[0] // PAIR_CHANNELS, rows.shape[1] // GROUP_SIZE
    pieces = rows.view(pairs, 2, 8, _TOKENS, groups, GROUP_SIZE // _PIECE, _PIECE)
    return pieces.permute(0, 4, 1, 2, 5, 3, 6).reshape(pairs, groups, 2, _BLOCK_CHANNELS * GROUP_SIZE)


def tile_activations(act_codes: Tensor) -> Tensor:
    """Activations as above from int8 [M, K], K a multiple of 128; tokens that fill the last eight are zeros."""
    m, k = act_codes.shape
    padded = torch.nn.functional.pad(act_codes, (0, 0, 0, -m % _TOKENS))
    return padded.view(-1, _TOKENS, k // GROUP_SIZE, GROUP_SIZE // _PIECE, _PIECE).permute(2, 0, 3, 1, 4).contiguous()


def untile_activations(tiles: Tensor, tokens: int) -> Tensor:
    """The inverse of `tile_activations`."""
    groups, eights = tiles.shape[:2]
    return tiles.permute(1, 3, 0, 2, 4).reshape(eights * _TOKENS, groups * GROUP_SIZE)[:tokens].contiguous()


def activation_tiles_shape(tokens: int, in_features: int) -> tuple[int, ...]:
    """Of activations as above; in_features is a multiple of 128."""
    return (in_features // GROUP_SIZE, -(-tokens // _TOKENS), GROUP_SIZE // _PIECE, _TOKENS, _PIECE)


def _padded(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % PAIR_CHANNELS))


def _reorder(codes: Tensor, order: str, wanted: str, pairs: int, groups: int) -> Tensor:
    """Codes with the axes of `order` in any shape, as a tensor with the axes of `wanted`."""
    sizes = _SIZES | {"p": pairs, "b": groups}
    axes = order.split()
    return codes.reshape([sizes[axis] for axis in axes]).permute([axes.index(axis) for axis in wanted.split()])
