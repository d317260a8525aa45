"""The paged KV cache of a model, and attention over it: what differs between the kernels and the reference arithmetic.

    kernel_cache     4 or 8 bits on the CUDA kernels
    lane_cache       16 bits by PyTorch's attention
    reference_cache  4, 8 or 16 bits by the reference arithmetic on any device, in pages of the same layout

A step comes in one of two forms. DecodeStep: a row a sequence, each with one new token; all of it is on the device, so
that a CUDA graph can replay it. ExtendStep: several new tokens of some sequences, one after the other, with lengths
that the host knows. Keys and values of the new tokens are written first, then attended to as the cache gives them back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.kernels.layouts import PAGE_SIZE, page_bytes
from qoq.kernels.runtime.config import RuntimeConfig


@dataclass(frozen=True)
class DecodeStep:
    """One new token for each row; a row that runs nothing has the cache's `idle_slot` and `idle_len`.

    positions int32 [B], slots int64 [B], kv_lens int32 [B] (the new token included), page_table int32 [B, max_pages]
    """

    positions: Tensor
    slots: Tensor
    kv_lens: Tensor
    page_table: Tensor


@dataclass(frozen=True)
class ExtendStep:
    """new_lens new tokens of sequences that then have kv_lens: positions int32 [T], slots int64 [T] on the device,
    page_table int32 [S, max_pages]."""

    positions: Tensor
    slots: Tensor
    page_table: Tensor
    new_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]


Step = DecodeStep | ExtendStep
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, query, key, value): [T, H, D] of query [T, H, D] and key and value [T, KV heads, D], before RoPE."""


class KVCache(ABC):
    """Pages of `page_size` tokens for every layer.

    idle_slot, idle_len   what rows of a decode step have that run nothing
    """

    page_size: int = PAGE_SIZE
    idle_slot: int = -1
    idle_len: int = 0

    @abstractmethod
    def begin(self, step: Step) -> Attend:
        """Attention of a step; what all layers share is done here."""


def page_nbytes(config: RuntimeConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of a page in all layers; dtype is that of a 16-bit cache."""
    heads = config.num_layers * config.num_kv_heads
    if config.kv_bits == 16:
        return heads * 2 * page_size * config.head_dim * dtype.itemsize
    return heads * page_bytes(config.head_dim, config.kv_bits)


class RopeTables:
    """cos and sin [max_positions, 1, D] in the dtype of queries and keys, as transformers rounds them."""

    def __init__(self, config: RuntimeConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._cos, self._sin = (
            torch.cat([table, table], dim=1).to(device, dtype).unsqueeze(1) for table in (config.cos, config.sin)
        )

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Those of positions [T]: [T, 1, D]."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)
