"""The attention backend of vLLM that keeps keys and values in our pages, and attends to them with our kernels.

What vLLM's block manager does with pages (prefix caching, chunked prefill, preemption) goes through their numbers and
through slots, which mean the same to both: slot = 64 * page + place, and a negative slot is for a token that goes
nowhere.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl

import qoq.kernels.ops  # noqa: F401  (registers the operators)
from qoq.kernels.attention import run_decode
from qoq.kernels.extend import run_extend
from qoq.kernels.extend_batch import DEFAULT_SCRATCH_BYTES
from qoq.kernels.layouts import HEAD_DIMS, PAGE_SIZE
from qoq.kernels.vllm.cache import CACHE_TYPES, PAGES_HOLD, REMEDY, bits_of, cache_shape
from qoq.kernels.vllm.config import QoQConfig
from qoq.kernels.vllm.interface import current_quantization, logger
from qoq.kernels.vllm.metadata import QoQMetadata, QoQMetadataBuilder
from qoq.recipes.errors import InputError, raise_problems

_PARTS = 4
"""How many tensors of the size of the queries attention of many new tokens may hold beside the scratch, at a time."""


class QoQAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """What vLLM asks before it chooses a backend, and the form of the cache's memory."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(CACHE_TYPES.values())
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # a member of vLLM's list, which is closed

    @staticmethod
    def get_impl_cls() -> type[QoQAttention]:
        return QoQAttention

    @staticmethod
    def get_builder_cls() -> type[QoQMetadataBuilder]:
        return QoQMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int]:
        return [PAGE_SIZE]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """(pages, KV heads, 64, bytes of a token). Raises InputError for blocks or a cache that are not ours."""
        bits = bits_of(cache_dtype_str)
        if bits is None or block_size != PAGE_SIZE:
            raise InputError(
                f"blocks of {block_size} tokens of type {cache_dtype_str}, expected {PAGE_SIZE} of "
                f"{' or '.join(CACHE_TYPES.values())}"
            )
        return cache_shape(num_blocks, num_kv_heads, head_size, bits)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (capability.major, capability.minor) >= (8, 0)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # who moves pages between servers may cut them by heads, in an order that is not ours


class QoQAttention(AttentionImpl):  # type: ignore[misc]
    """Attention of one layer on this GPU's heads. Raises InputError for a layer that our kernels cannot serve."""

    supports_dcp: bool = False
    supports_pcp: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.window = sliding_window or 0
        self.kv_cache_dtype = kv_cache_dtype
        bits = bits_of(kv_cache_dtype)
        unserved = {
            "ALiBi": alibi_slopes is not None,
            "a soft cap of logits": bool(logits_soft_cap),
            "the KV cache of another layer": kv_sharing_target_layer_name is not None,
            "context parallelism": self.dcp_world_size > 1 or self.pcp_world_size > 1,
            f"attention of type {attn_type}": attn_type != "decoder",
            **{name: value is not None for name, value in others.items()},
        }
        problems = [f"{name}: it is not part of qoq's attention" for name, asked in unserved.items() if asked]
        if bits is None:
            problems.append(f"KV cache of type {kv_cache_dtype}: expected {' or '.join(CACHE_TYPES.values())}")
        if head_size not in HEAD_DIMS:
            problems.append(f"heads of {head_size} values: {PAGES_HOLD}")
        raise_problems("qoq's attention cannot serve a layer of this model", problems, remedy=REMEDY)
        self.bits = bits or 0
        quantization = current_quantization()
        self.key_rotation = quantization.checkpoint.key_rotation if isinstance(quantization, QoQConfig) else "none"
        self.memory_fits = False
        """Whether vLLM was seen to set aside our bytes (`cache.fit_memory`)."""
        self._told = 0

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor | None
    ) -> None:
        """Write keys and values [T, KV heads, D] after RoPE to int64 slots [T]; None, where there is no cache yet."""
        if slot_mapping is None:
            return
        count = min(len(slot_mapping), len(key))
        torch.ops.qoq.append_kv(
            key[:count], value[:count], self._pages(kv_cache), slot_mapping[:count], self.bits, self.key_rotation
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: QoQMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fill output [T, heads, D], contiguous, from query [T, heads, D] after RoPE and what the cache holds.

        Keys and values of the new tokens are in the cache already. Padded rows are zeros; all rows are where there is
        no metadata, in vLLM's run that measures memory.
        """
        if output_scale is not None or output_block_scale is not None:
            raise InputError("qoq's attention does not quantize its output")
        if attn_metadata is None:
            self._reserve(query)
            return output.zero_()
        pages = self._pages(kv_cache)
        query = query[: attn_metadata.rows]
        if self.key_rotation != "none":
            query = torch.ops.qoq.rotate_heads(query.contiguous())
        decode, extend = attn_metadata.decode, attn_metadata.extend
        if decode is not None:
            rows = slice(decode.rows)
            run_decode(
                query[rows],
                pages,
                decode.page_table,
                decode.kv_lens,
                self.scale,
                self.bits,
                self.window,
                out=output[rows],
            )
        if extend is not None:
            rows = slice(extend.first, extend.end)
            batch = extend.batches[self.window]
            output[rows] = run_extend(query[rows], pages, extend.page_table, batch, self.scale, self.bits)
        if len(output) > attn_metadata.rows:
            output[attn_metadata.rows :].zero_()
        return output

    def _pages(self, kv_cache: Tensor) -> Tensor:
        """vLLM's memory as uint8 [pages, KV heads, page bytes]. Raises InputError where pages do not lie together."""
        expected = cache_shape(len(kv_cache), self.num_kv_heads, self.head_size, self.bits)
        if tuple(kv_cache.shape) != expected or kv_cache.element_size() != 1 or not kv_cache.is_contiguous():
            raise InputError(
                f"the KV cache is {kv_cache.dtype} {list(kv_cache.shape)} with strides {list(kv_cache.stride())}, "
                f"expected contiguous bytes {list(expected)}",
                remedy="leave out what makes vLLM pad blocks or share them between caches",
            )
        if self._told != len(kv_cache):
            self._tell(len(kv_cache))
        return kv_cache.view(torch.uint8).view(*expected[:2], -1)

    def _tell(self, pages: int) -> None:
        """Once for all layers, and again when the cache is made anew with another size."""
        self._told = pages
        logger.info_once(
            "qoq: KV cache of %d bits, key rotation %s: %d pages of %d tokens (%d tokens) with %d KV heads of %d on "
            "each GPU",
            self.bits,
            self.key_rotation,
            pages,
            PAGE_SIZE,
            pages * PAGE_SIZE,
            self.num_kv_heads,
            self.head_size,
        )

    def _reserve(self, query: Tensor) -> None:
        """Take the memory that attention of many new tokens takes for a moment, so that vLLM leaves room for it."""
        if query.is_cuda and not torch.cuda.is_current_stream_capturing():
            query.new_empty(DEFAULT_SCRATCH_BYTES + _PARTS * query.numel() * query.element_size(), dtype=torch.uint8)
