"""Attention of any number of new tokens a sequence over the paged KV4 or KV8 cache that already holds them.

Few new tokens of a sequence go through the decode kernel (`attention`), each as a row of its own. For more, pages are
dequantized into a bounded scratch for PyTorch's flash attention. Where that takes more than one call, because a
sequence needs more than one scratch or the GPU would be partly idle, the parts are merged by their log-sum-exp.
`extend_plan` decides.

    batch = prepare_extend(...)    once a step: lengths are planned on the host, and sent to the device in one copy
    run_extend(..., batch, ...)    in each layer: only launches
    extend_attention(...)          both in one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.kernels.attention import check_cache, run_decode
from qoq.kernels.extend_batch import (
    DEFAULT_SCRATCH_BYTES,
    DecodeCall,
    ExtendBatch,
    FlashBatch,
    FlashCall,
    FlashLoad,
    prepare_extend,
)
from qoq.kernels.kv_cache import run_gather
from qoq.kernels.kv_operands import check_gather
from qoq.kernels.layouts import PAGE_SIZE


def extend_attention(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    new_lens: Sequence[int],
    kv_lens: Sequence[int],
    scale: float,
    bits: int,
    window: int | None = None,
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
) -> Tensor:
    """`prepare_extend` and `run_extend` in one, for a single layer: [T, H, D] in query's dtype.

    Not for CUDA graphs: lengths are the host's.
    """
    check_cache(query, kv_pages, page_table, scale, bits, window or 0)
    batch = prepare_extend(
        new_lens,
        kv_lens,
        max_pages=page_table.shape[1],
        heads=query.shape[1],
        kv_heads=kv_pages.shape[1],
        head_dim=query.shape[2],
        device=query.device,
        window=window,
        scratch_bytes=scratch_bytes,
    )
    return run_extend(query, kv_pages, page_table, batch, scale, bits)


def run_extend(
    query: Tensor, kv_pages: Tensor, page_table: Tensor, batch: ExtendBatch, scale: float, bits: int
) -> Tensor:
    """Causal attention of new tokens to the cache that already holds them: [T, H, D] in query's dtype.

    query       float16 or bfloat16 [T, H, D], the new tokens of all sequences one after the other, after RoPE, and
                rotated if the cache's keys are
    page_table  int32 [B, max_pages];  kv_pages, bits as in `attention.paged_decode_attention`

    Only launches: nothing is sent to the device or waited for. Safe in CUDA graphs, after a first call outside; a
    replay reads query, kv_pages and page_table anew, lengths are those of `batch`, which must outlive the graph.
    Raises ValueError for operands of another form than `batch` was made for.
    """
    check_cache(query, kv_pages, page_table, scale, bits, batch.window)
    _check_batch(query, kv_pages, page_table, batch)
    scratch = _Scratch.of(kv_pages, page_table, batch, bits, query.dtype) if batch.flash else None
    if scratch is not None and batch.decode is None and len(batch.flash) == 1:  # all rows, without a copy
        return _attend(query, scratch, batch.flash[0], scale, batch.window)
    output = query.new_empty(query.shape)
    if batch.decode is not None:
        _run_decode_rows(output, query, kv_pages, page_table, batch.decode, scale, bits, batch.window)
    if scratch is not None:
        for part in batch.flash:
            part.rows.put(output, _attend(part.rows.of(query), scratch, part, scale, batch.window))
    return output


def merge_by_lse(values: Tensor, sums: Tensor) -> Tensor:
    """Attention over disjoint sets of keys as one: float32 [..., D].

    values [P, ..., D] is the attention over each of P sets, sums float32 [P, ...] its log-sum-exp. No set is empty.
    """
    return (values * sums.softmax(0).unsqueeze(-1)).sum(0)


def _check_batch(query: Tensor, kv_pages: Tensor, page_table: Tensor, batch: ExtendBatch) -> None:
    """Raise ValueError for operands, otherwise in order, that `batch` was not made for."""
    if query.shape[0] != batch.rows:
        raise ValueError(f"query: the new tokens of all sequences are {batch.rows}, got {query.shape[0]} rows")
    if tuple(page_table.shape) != (batch.sequences, batch.max_pages):
        raise ValueError(
            f"page_table: expected [{batch.sequences}, {batch.max_pages}], a row for each of the lengths, "
            f"got {list(page_table.shape)}"
        )
    found = (query.shape[1], kv_pages.shape[1], query.shape[2])
    expected = (batch.heads, batch.kv_heads, batch.head_dim)
    if found != expected:
        raise ValueError(f"the batch is for {expected} heads, KV heads and head_dim, got {found}")
    if query.device != batch.device:
        raise ValueError(f"query: expected it on {batch.device}, where the batch is, got {query.device}")


def _run_decode_rows(
    output: Tensor,
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    call: DecodeCall,
    scale: float,
    bits: int,
    window: int,
) -> None:
    """Write the rows that go through the decode kernel into output; without copies where they lie together."""
    if call.sequences is not None:
        page_table = page_table[:, : call.pages].index_select(0, call.sequences)
    out = call.rows.of(output) if call.rows.index is None else None
    values = run_decode(call.rows.of(query), kv_pages, page_table, call.kv_lens, scale, bits, window, out=out)
    if out is None:
        call.rows.put(output, values)


@dataclass(frozen=True)
class _Scratch:
    """Memory for dequantized pages [2, tokens, KV heads, D], and which pages the loads of a batch want, int32 [P]."""

    memory: Tensor
    kv_pages: Tensor
    page_ids: Tensor
    bits: int

    @staticmethod
    def of(kv_pages: Tensor, page_table: Tensor, batch: ExtendBatch, bits: int, dtype: torch.dtype) -> _Scratch:
        size = (2, batch.scratch_pages * PAGE_SIZE, batch.kv_heads, batch.head_dim)
        page_ids = page_table.view(-1).index_select(0, batch.places)
        return _Scratch(kv_pages.new_empty(size, dtype=dtype), kv_pages, page_ids, bits)

    def load(self, load: FlashLoad) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, KV heads, D] of the pages of a load, in place of those before."""
        key, value = self.memory[:, : load.num_pages * PAGE_SIZE]
        page_ids, head_dim = self.page_ids[load.pages], key.shape[2]
        check_gather(self.kv_pages, page_ids, head_dim, self.bits, key.dtype)
        run_gather(self.kv_pages, page_ids, head_dim, self.bits, (key, value))
        return key, value


def _attend(query: Tensor, scratch: _Scratch, batch: FlashBatch, scale: float, window: int) -> Tensor:
    """[T, H, D] of the query's rows of a batch."""
    rows, heads, head_dim = query.shape
    by_kv_head = query.view(rows, scratch.kv_pages.shape[1], -1, head_dim)
    parts: list[tuple[Tensor, Tensor]] = []
    for load in batch.loads:
        if len(parts) > 1:
            values, sums = _joined(parts)
            parts = [(merge_by_lse(values, sums).unsqueeze(0), sums.logsumexp(0, keepdim=True))]
        key, value = scratch.load(load)
        for call in load.calls:
            run = flash_packed if call.parts else flash_plain
            parts.append(run(by_kv_head, key, value, call, scale, window if call.causal else 0))
    values = parts[0][0].squeeze(0) if len(parts) == 1 else merge_by_lse(*_joined(parts))
    return values.reshape(rows, heads, head_dim).to(query.dtype)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([values for values, _ in parts]), torch.cat([sums for _, sums in parts])


def flash_plain(
    query: Tensor, key: Tensor, value: Tensor, call: FlashCall, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Of query [T, KV heads, share, D]: values [1, T, KV heads, share, D] and log-sum-exps [1, T, KV heads, share]."""
    values, sums = _flash(query.flatten(1, 2), key, value, call, scale, window)
    return values.view(1, *query.shape), sums.view(query.shape[1], query.shape[2], -1).permute(2, 0, 1).unsqueeze(0)


def flash_packed(
    query: Tensor, key: Tensor, value: Tensor, call: FlashCall, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """The same of each part of the keys: [parts, ...]. Flash attention sees rows (part, T, share) of KV heads."""
    rows, kv_heads, share, head_dim = query.shape
    packed = query.transpose(1, 2).expand(call.parts, -1, -1, -1, -1).reshape(-1, kv_heads, head_dim)
    values, sums = _flash(packed, key, value, call, scale, window)
    values = values.view(call.parts, rows, share, kv_heads, head_dim).transpose(2, 3)
    return values, sums.view(kv_heads, call.parts, rows, share).permute(1, 2, 0, 3)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, call: FlashCall, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention of query [T, heads, D]: the same, and the log-sum-exp float32 [heads, T]."""
    output, sums, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        call.row_ends,
        call.key_starts,
        call.max_rows,
        call.max_keys,
        0.0,
        call.causal,
        False,
        scale=scale,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
        seqused_k=call.key_lens,
    )
    return output, sums
