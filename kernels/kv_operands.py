"""What the KV cache kernels can take: checks of operands, before anything is launched."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from qoq.kernels.layouts import KV_BITS, check_page_shape, page_bytes
from qoq.recipes.schema import KeyRotation

FORMATS = (torch.float16, torch.bfloat16)
KEY_ROTATIONS: tuple[KeyRotation, ...] = get_args(KeyRotation)
VECTOR = 8
"""Values of a head that a thread has."""
LANES = (8, 16, 32)
"""Threads that may share a head where there is no page layout."""
MAX_ROUND_TRIP_DIM = VECTOR * LANES[-1]
"""The largest head_dim of `kv_round_trip`."""
_ROTATED_DIMS = tuple(VECTOR * lanes for lanes in LANES)
_MAX_INDEX = 2**31 - 1024
"""Heads and blocks are counted in int32, with the last block's spare threads."""
_MAX_STRIDE = 2**31 - 1


def check_append(
    key: Tensor, value: Tensor, kv_pages: Tensor, slots: Tensor, bits: int, key_rotation: str = "none"
) -> None:
    """Raise ValueError for operands of `append_kv` that the kernel cannot take."""
    _check_rotation(key_rotation)
    _check_heads("key", key, key.dtype, None, key.device)
    tokens, num_kv_heads, head_dim = key.shape
    check_page_shape(head_dim, bits)
    _check_heads("value", value, key.dtype, (tokens, num_kv_heads, head_dim), key.device)
    _check_pages(kv_pages, (num_kv_heads, page_bytes(head_dim, bits)), key.device)
    _check_vector("slots", slots, torch.int64, tokens, key.device)
    _check_count("tokens * heads", 2 * tokens * num_kv_heads)


def check_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Raise ValueError for operands of `rope_append_kv`, otherwise fit for `append_kv`, that the kernel cannot take."""
    tokens, num_kv_heads, head_dim = key.shape
    if query.ndim != 3 or query.shape[0] != tokens or query.shape[2] != head_dim:
        raise ValueError(
            f"query: expected [T, num_heads, D] with T = {tokens} and D = {head_dim}, got {list(query.shape)}"
        )
    _check_heads("query", query, key.dtype, None, key.device)
    _check_count("tokens * heads", tokens * (query.shape[1] + 2 * num_kv_heads))
    _check_vector("positions", positions, torch.int32, tokens, key.device)
    for name, table in (("cos", cos), ("sin", sin)):
        shape = (cos.shape[0] if cos.ndim else 0, head_dim // 2)
        if table.dtype != torch.float32 or tuple(table.shape) != shape:
            raise ValueError(
                f"{name}: expected torch.float32 [max_positions, {head_dim // 2}], the same for cos and sin, "
                f"got {table.dtype} {list(table.shape)}"
            )
        _check_memory(name, table, key.device)


def round_trip_fits(head_dim: int) -> bool:
    """Whether `kv_round_trip` takes heads of this size."""
    return head_dim % VECTOR == 0 and 0 < head_dim <= MAX_ROUND_TRIP_DIM


def rotation_fits(head_dim: int) -> bool:
    """Whether the kernels rotate heads of this size: 64, 128 or 256."""
    return head_dim in _ROTATED_DIMS


def check_round_trip(x: Tensor, bits: int, key_rotation: str = "none") -> None:
    """Raise ValueError for operands of `kv_round_trip` that the kernel cannot take."""
    _check_rotation(key_rotation)
    if bits not in KV_BITS:
        raise ValueError(f"bits is {bits}, expected 4 or 8")
    _check_format(x)
    if not round_trip_fits(x.shape[-1]):
        raise ValueError(f"x: D is {x.shape[-1]}, expected a multiple of {VECTOR} up to {MAX_ROUND_TRIP_DIM}")
    if key_rotation != "none":
        _check_rotated_dim(x)
    _check_memory("x", x, x.device)
    _check_count("heads", x.numel() // x.shape[-1])


def check_rotate(x: Tensor) -> None:
    """Raise ValueError for operands of `rotate_heads` that the kernel cannot take."""
    _check_format(x)
    _check_rotated_dim(x)
    _check_memory("x", x, x.device)
    _check_count("heads", x.numel() // x.shape[-1])


def check_gather(kv_pages: Tensor, page_ids: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> None:
    """Raise ValueError for operands of `gather_kv` that the kernel cannot take."""
    check_page_shape(head_dim, bits)
    if dtype not in FORMATS:
        raise ValueError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}")
    num_kv_heads = kv_pages.shape[1] if kv_pages.ndim == 3 else 0
    _check_pages(kv_pages, (num_kv_heads, page_bytes(head_dim, bits)), kv_pages.device)
    if page_ids.ndim != 1:
        raise ValueError(f"page_ids: expected torch.int32 [P], got {page_ids.dtype} {list(page_ids.shape)}")
    _check_vector("page_ids", page_ids, torch.int32, page_ids.shape[0], kv_pages.device)
    _check_count("pages * heads", page_ids.shape[0] * num_kv_heads)


def _check_rotation(key_rotation: str) -> None:
    if key_rotation not in KEY_ROTATIONS:
        raise ValueError(f"key_rotation is {key_rotation!r}, expected {' or '.join(map(repr, KEY_ROTATIONS))}")


def _check_format(x: Tensor) -> None:
    if x.dtype not in FORMATS or x.ndim == 0:
        raise ValueError(f"x: expected torch.float16 or torch.bfloat16 [..., D], got {x.dtype} {list(x.shape)}")


def _check_rotated_dim(x: Tensor) -> None:
    if not rotation_fits(x.shape[-1]):
        raise ValueError(f"x: D is {x.shape[-1]}, but heads are rotated with D of {_ROTATED_DIMS}")


def _check_heads(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None, device: torch.device) -> None:
    """Heads of a token contiguous, tokens and the whole at multiples of 16 bytes; `shape` None: any of three axes."""
    if x.dtype not in FORMATS or x.dtype != dtype or x.ndim != 3 or shape not in (None, tuple(x.shape)):
        wanted = "[T, heads, D]" if shape is None else str(list(shape))
        kind = str(dtype) if dtype in FORMATS else "torch.float16 or torch.bfloat16"
        raise ValueError(f"{name}: expected {kind} {wanted}, got {x.dtype} {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {x.device}")
    heads, head_dim = x.shape[1:]
    stride = token_stride(x)
    heads_lie_together = x.stride(2) == 1 and (heads <= 1 or x.stride(1) == head_dim)
    if not heads_lie_together or stride % VECTOR or not 0 <= stride <= _MAX_STRIDE or x.data_ptr() % 16:
        raise ValueError(
            f"{name}: expected contiguous heads, and tokens that begin at multiples of 16 bytes, "
            f"got strides {list(x.stride())} (call .contiguous())"
        )


def _check_pages(kv_pages: Tensor, rest: tuple[int, int], device: torch.device) -> None:
    if kv_pages.dtype != torch.uint8 or tuple(kv_pages.shape[1:]) != rest:
        raise ValueError(
            f"kv_pages: expected torch.uint8 [num_pages, num_kv_heads, page bytes] with {list(rest)} at the end, "
            f"got {kv_pages.dtype} {list(kv_pages.shape)}"
        )
    _check_memory("kv_pages", kv_pages, device)
    _check_count("num_pages", kv_pages.shape[0])


def _check_vector(name: str, x: Tensor, dtype: torch.dtype, length: int, device: torch.device) -> None:
    if x.dtype != dtype or tuple(x.shape) != (length,):
        raise ValueError(f"{name}: expected {dtype} [{length}], got {x.dtype} {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {x.device}")
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected contiguous memory, got strides {list(x.stride())} (call .contiguous())")


def _check_memory(name: str, x: Tensor, device: torch.device) -> None:
    """Contiguous, from a multiple of 16 bytes on."""
    if x.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {x.device}")
    if not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(
            f"{name}: expected contiguous memory that begins at a multiple of 16 bytes, "
            f"got strides {list(x.stride())} (call .contiguous() or .clone())"
        )


def _check_count(name: str, count: int) -> None:
    if count > _MAX_INDEX:
        raise ValueError(f"{name} is {count}, expected at most {_MAX_INDEX}: split the call")


def token_stride(x: Tensor) -> int:
    """Values from a token to the next; a single token has none, whatever its tensor says."""
    return x.stride(0) if x.shape[0] > 1 else 0
