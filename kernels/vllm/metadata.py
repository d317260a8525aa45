"""A step as vLLM schedules it, brought into the form that our kernels take, once for all layers of a kind.

Sequences with one new token come first, and go through the decode kernel: nothing of them is read on the host, so that
a CUDA graph can replay them. The others are planned on the host (`extend_batch`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

import qoq.kernels.ops  # noqa: F401  (registers the operators)
from qoq.kernels.attention import run_decode
from qoq.kernels.extend_batch import ExtendBatch, prepare_extend
from qoq.kernels.kv_cache import MANY_TOKENS
from qoq.kernels.layouts import PAGE_SIZE, page_bytes
from qoq.kernels.vllm.interface import attention_of, host_lens, logger
from qoq.recipes.errors import InputError


@dataclass(frozen=True)
class DecodeRows:
    """The first `rows` queries, one of each sequence: page_table int32 [rows, max_pages], kv_lens int32 [rows].

    Both are vLLM's own memory, which it fills again before it replays a CUDA graph. A padded row has length 0.
    """

    rows: int
    page_table: Tensor
    kv_lens: Tensor


@dataclass(frozen=True)
class ExtendRows:
    """The queries from `first` to `end` of sequences with several new tokens, whose pages are page_table int32
    [S, max_pages]; planned for each window that a layer has (0: none)."""

    first: int
    end: int
    page_table: Tensor
    batches: Mapping[int, ExtendBatch]


@dataclass(frozen=True)
class QoQMetadata(AttentionMetadata):  # type: ignore[misc]
    """What attention of a step needs; rows of neither kind are padding."""

    decode: DecodeRows | None
    extend: ExtendRows | None

    @property
    def rows(self) -> int:
        """Queries that are attended for."""
        if self.extend is not None:
            return self.extend.end
        return 0 if self.decode is None else self.decode.rows


class QoQMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Builds the metadata of each step for layers with one cache of vLLM's block manager.

    Raises InputError for layers or blocks that our pages cannot hold.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        if kv_cache_spec.block_size != PAGE_SIZE:
            raise InputError(f"vLLM's blocks have {kv_cache_spec.block_size} tokens, expected {PAGE_SIZE}")
        layers = attention_of(vllm_config, layer_names)
        self.windows = sorted({layer.window for layer in layers})
        forms = {(layer.num_heads, layer.num_kv_heads, layer.head_size) for layer in layers}
        if len(forms) != 1:
            raise InputError(f"layers with one cache have different heads, KV heads and head sizes: {sorted(forms)}")
        ((self.heads, self.kv_heads, self.head_dim),) = forms
        if device.type == "cuda":
            _load_kernels(layers[0], vllm_config.model_config.dtype, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> QoQMetadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise InputError("attention to later tokens was asked for; qoq's is causal")
        sequences, _, tokens, _ = split_decodes_and_prefills(batch, decode_threshold=1)
        rows = min(sequences, tokens)  # padding may have made either of them larger
        table, lens = batch.block_table_tensor, batch.seq_lens
        decode = DecodeRows(rows, table[:rows], lens[:rows]) if rows else None
        new_lens, kv_lens = host_lens(batch, sequences)
        if not new_lens:
            return QoQMetadata(decode, None)
        if max(kv_lens) > table.shape[1] * PAGE_SIZE:
            # No request is so long; vLLM's warm-up is, which shares the tokens of a step between few sequences.
            logger.warning_once(
                "qoq: a step with sequences longer than max_model_len is taken for vLLM's warm-up: no attention"
            )
            return QoQMetadata(decode, None)
        batches = {
            window: prepare_extend(
                new_lens,
                kv_lens,
                max_pages=table.shape[1],
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                device=table.device,
                window=window,
            )
            for window in self.windows
        }
        pages = table[sequences : sequences + len(new_lens)]
        return QoQMetadata(decode, ExtendRows(tokens, tokens + sum(new_lens), pages, batches))


def _load_kernels(layer: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Run each kernel once: a kernel cannot be loaded, nor its memory made, while a CUDA graph is captured."""
    shape = (1, layer.num_kv_heads, page_bytes(layer.head_size, layer.bits))
    pages = torch.zeros(shape, dtype=torch.uint8, device=device)
    key = torch.zeros(1, layer.num_kv_heads, layer.head_size, dtype=dtype, device=device)
    query = torch.zeros(1, layer.num_heads, layer.head_size, dtype=dtype, device=device)
    slots, one = (torch.full((1,), value, dtype=kind, device=device) for value, kind in _ONE_TOKEN)
    page = torch.zeros(1, dtype=torch.int32, device=device)
    for tokens in (1, MANY_TOKENS):  # one is written, many have kernels of their own and go nowhere
        keys, places = key.expand(tokens, -1, -1).contiguous(), slots.expand(tokens).contiguous()
        torch.ops.qoq.append_kv(keys, keys, pages, places - int(tokens > 1), layer.bits, layer.key_rotation)
    torch.ops.qoq.gather_kv(pages, page, layer.head_size, layer.bits, dtype)
    if layer.key_rotation != "none":
        torch.ops.qoq.rotate_heads(query)
    run_decode(query, pages, page.view(1, 1), one, layer.scale, layer.bits, layer.window)


_ONE_TOKEN = ((0, torch.int64), (1, torch.int32))
"""Slot and length of the only token, with their types."""
