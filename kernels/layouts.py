"""Where each byte of a KV page goes: one layout for every architecture, made for the tensor cores' operands.

A pool of pages is kv_pages uint8 [num_pages, num_kv_heads, page_bytes]. A page has PAGE_SIZE = 64 tokens, as two
sub-blocks of 32 that lie one after the other. For head_dim D of 64 or 128, and 4 or 8 bits, a sub-block is

    key codes     32 * D * bits / 8 bytes
    value codes   as many
    entries       256 bytes: entry 8 * tile + g (16 bytes) holds float16 {key scale, key zero, value scale, value zero}
                  of token 16 * tile + g, then of token 16 * tile + g + 8

that is 4352 bytes for D = 128 with 4 bits. Codes are in the order of the A operands of mma.m16n8k16, tokens on M for
keys and dimensions on M for values. They come as chunks of 512 bytes, the same number for each tile of 16 tokens, one
tile after the other; bytes 16 * lane .. 16 * lane + 15 of a chunk are a lane's, lane = 4 g + t. With 4 bits, a lane's
piece is four 32-bit words (little endian), each one operand of 8 codes; with 8 bits it is two pairs of words. Operands
are numbered along the chunks of a tile: `step` 0 .. D/16 - 1. In a word, bits 0-3 are nibble 0, and so on.

Keys. Operand `step` of a lane has dimensions d = (step/2) * 32 + t * 8 + (step % 2) * 4 to d + 3 of tokens
r0 = 16 * tile + g and r1 = r0 + 8 (the order in which a product runs over the dimensions is free; this one lets a query
be loaded by 16 bytes).
    4 bits: nibbles 0, 4 are (r0; d, d+1); nibbles 1, 5 (r0; d+2, d+3); nibbles 2, 6 (r1; d, d+1); 3, 7 (r1; d+2, d+3)
    8 bits: word 0 is token r0, word 1 token r1; bytes 0, 2 are dimensions d, d+1, bytes 1, 3 are d+2, d+3
Values. Operand `step` of a lane has dimensions d0 = (D/8) * g + 2 * step and d1 = d0 + 1 of tokens 16 * tile + u,
u in {2t, 2t+1, 2t+8, 2t+9}.
    4 bits: byte 0 is token 2t, byte 1 token 2t+8, byte 2 token 2t+1, byte 3 token 2t+9; d0 in the low half, d1 above
    8 bits: word 0 is d0, word 1 is d1; bytes as above

So masks of a word, as it is or shifted by 8 bits, are the operands as float16 subnormal numbers: no code is converted.
A byte never holds codes of two tokens: tokens are appended without reading what is there.
The same addresses on the device: cuda/common/kv_page.cuh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV

PAGE_SIZE = 64
BLOCK_TOKENS = 32
HEAD_DIMS = (64, 128)
KV_BITS = (4, 8)
_ENTRY_BYTES = 16 * 16
"""Scales and zeros of a sub-block."""

# Axes of codes within a page, most significant first, as (letter, size); sizes left out depend on D.
# Tokens: s sub-block, i tile, h half, then g for keys, t and p (which of two neighbours) for values.
# Dimensions: of keys c chunk, b step % 4 / 2, t, q step % 2, n and m the upper and lower bit of the last four;
# of values g, c chunk, k step within the chunk, m the lowest bit. Nibbles of a byte are the last axis.
_KEY_AXES = {"tokens": "s i h g", "dims": "c b t q n m"}
_VALUE_AXES = {"tokens": "s i h t p", "dims": "g c k m"}
_KEY_ORDER = {4: "s i c g t b q m h n", 8: "s i c b g t q h m n"}
_VALUE_ORDER = {4: "s i c g t k p h m", 8: "s i c g t k m p h"}


def check_page_shape(head_dim: int, bits: int) -> None:
    """Raise ValueError where there is no page layout for head_dim and bits."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim}, a paged cache needs 64 or 128")
    if bits not in KV_BITS:
        raise ValueError(f"bits is {bits}, a paged cache has 4 or 8")


def block_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a sub-block: 32 tokens of one KV head, keys and values."""
    check_page_shape(head_dim, bits)
    return 2 * _code_bytes(head_dim, bits) + _ENTRY_BYTES


def page_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a page: 64 tokens of one KV head, keys and values."""
    return PAGE_SIZE // BLOCK_TOKENS * block_bytes(head_dim, bits)


def pack_pages(keys: QuantizedKV, values: QuantizedKV, bits: int) -> Tensor:
    """Pages uint8 [pages, kv_heads, page_bytes] of keys and values: codes [pages, kv_heads, 64, D], scales and zeros
    [pages, kv_heads, 64, 1]."""
    pages, heads, _, head_dim = keys.codes.shape
    check_page_shape(head_dim, bits)
    for name, kv in (("keys", keys), ("values", values)):
        _check_logical(name, kv, (pages, heads, PAGE_SIZE, head_dim), bits)
    parts = [
        _pack_codes(keys.codes, _KEY_AXES, _KEY_ORDER[bits], bits),
        _pack_codes(values.codes, _VALUE_AXES, _VALUE_ORDER[bits], bits),
        _pack_entries(keys, values),
    ]
    return torch.cat(parts, dim=-1).reshape(pages, heads, page_bytes(head_dim, bits))


def unpack_pages(kv_pages: Tensor, head_dim: int, bits: int) -> tuple[QuantizedKV, QuantizedKV]:
    """Keys and values of pages uint8 [pages, kv_heads, page_bytes]: the inverse of `pack_pages`."""
    expected = page_bytes(head_dim, bits)
    if kv_pages.dtype != torch.uint8 or kv_pages.ndim != 3 or kv_pages.shape[2] != expected:
        raise ValueError(
            f"kv_pages: expected torch.uint8 [pages, kv_heads, {expected}], got {kv_pages.dtype} {list(kv_pages.shape)}"
        )
    pages, heads = kv_pages.shape[:2]
    blocks = kv_pages.reshape(pages, heads, PAGE_SIZE // BLOCK_TOKENS, block_bytes(head_dim, bits))
    size = _code_bytes(head_dim, bits)
    key_codes, value_codes, entries = blocks.split([size, size, _ENTRY_BYTES], dim=-1)
    numbers = entries.contiguous().view(torch.float16).reshape(pages, heads, 2, 2, 8, 2, 4)  # s i g h number
    numbers = numbers.transpose(4, 5).reshape(pages, heads, PAGE_SIZE, 4)
    return (
        QuantizedKV(
            _unpack_codes(key_codes, _KEY_AXES, _KEY_ORDER[bits], head_dim, bits),
            numbers[..., 0:1].contiguous(),
            numbers[..., 1:2].contiguous(),
        ),
        QuantizedKV(
            _unpack_codes(value_codes, _VALUE_AXES, _VALUE_ORDER[bits], head_dim, bits),
            numbers[..., 2:3].contiguous(),
            numbers[..., 3:4].contiguous(),
        ),
    )


def _code_bytes(head_dim: int, bits: int) -> int:
    """Of the keys, or of the values, of a sub-block."""
    return BLOCK_TOKENS * head_dim * bits // 8


def _axis_sizes(head_dim: int, bits: int) -> dict[str, int]:
    """Sizes of the axes of keys and of values; b (keys) and k (values) are the steps that share a chunk."""
    steps_of_chunk = 4 if bits == 4 else 2
    sizes = dict.fromkeys("sihpqnm", 2) | {"g": 8, "t": 4}
    chunks = head_dim // 16 // steps_of_chunk
    return sizes | {"c": chunks, "b": steps_of_chunk // 2, "k": steps_of_chunk}


def _pack_codes(codes: Tensor, axes: dict[str, str], order: str, bits: int) -> Tensor:
    """Codes [pages, kv_heads, 64, D] as bytes [pages, kv_heads, 2, bytes of a sub-block's keys or values]."""
    pages, heads, _, head_dim = codes.shape
    logical = f"{axes['tokens']} {axes['dims']}".split()
    sizes = _axis_sizes(head_dim, bits)
    places = [2 + logical.index(axis) for axis in order.split()]
    ordered = codes.reshape(pages, heads, *(sizes[axis] for axis in logical)).permute(0, 1, *places)
    if bits == 4:
        ordered = ordered[..., 0] | ordered[..., 1] << 4
    return ordered.reshape(pages, heads, 2, -1)


def _unpack_codes(packed: Tensor, axes: dict[str, str], order: str, head_dim: int, bits: int) -> Tensor:
    pages, heads = packed.shape[:2]
    logical = f"{axes['tokens']} {axes['dims']}".split()
    sizes = _axis_sizes(head_dim, bits)
    if bits == 4:
        packed = torch.stack([packed & 0xF, packed >> 4], dim=-1)
    stored = order.split()
    places = [2 + stored.index(axis) for axis in logical]
    codes = packed.reshape(pages, heads, *(sizes[axis] for axis in stored)).permute(0, 1, *places)
    return codes.reshape(pages, heads, PAGE_SIZE, head_dim)


def _pack_entries(keys: QuantizedKV, values: QuantizedKV) -> Tensor:
    """Bytes [pages, kv_heads, 2, 256] of the scales and zeros."""
    pages, heads = keys.codes.shape[:2]
    numbers = torch.cat([keys.scales, keys.zeros, values.scales, values.zeros], dim=-1)
    ordered = numbers.reshape(pages, heads, 2, 2, 2, 8, 4).transpose(4, 5).contiguous()  # s i h g number
    return ordered.view(torch.uint8).reshape(pages, heads, 2, _ENTRY_BYTES)


def _check_logical(name: str, kv: QuantizedKV, shape: tuple[int, ...], bits: int) -> None:
    one = (*shape[:3], 1)
    expected = [("codes", kv.codes, torch.uint8, shape)]
    expected += [("scales", kv.scales, torch.float16, one), ("zeros", kv.zeros, torch.float16, one)]
    for part, tensor, dtype, wanted in expected:
        if tensor.dtype != dtype or tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}.{part}: expected {dtype} {list(wanted)}, got {tensor.dtype} {list(tensor.shape)}")
    if bits == 4 and kv.codes.numel() and int(kv.codes.max()) > 15:
        raise ValueError(f"{name}.codes: {int(kv.codes.max())} does not fit 4 bits")
