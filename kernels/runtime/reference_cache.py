"""The KV cache by the reference arithmetic, on any device: the pages of the kernels, exact attention over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV, dequantize_kv, quantize_kv, rotate_heads
from qoq.kernels.layouts import PAGE_SIZE, pack_pages, page_bytes, unpack_pages
from qoq.kernels.runtime.attention import Attend, DecodeStep, KVCache, RopeTables, Step
from qoq.kernels.runtime.config import RuntimeConfig
from qoq.kernels.runtime.elementwise import apply_rope

_ROWS_AT_ONCE = 256
"""Rows of scores that are held, for all keys in float64."""


class ReferenceCache(KVCache):
    """4, 8 or 16 bits: each step of `formats.arithmetic`, and sums over keys in float64.

    So a token's attention does not depend on how tokens were cut into steps, up to one rounding in 2^29.
    """

    def __init__(self, config: RuntimeConfig, num_pages: int, device: torch.device, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        heads, head_dim = config.num_kv_heads, config.head_dim
        if config.kv_bits == 16:
            size: tuple[int, ...] = (config.num_layers, 2, num_pages, heads, PAGE_SIZE, head_dim)
            self._pages = torch.zeros(size, dtype=dtype, device=device)
        else:
            size = (config.num_layers, num_pages, heads, page_bytes(head_dim, config.kv_bits))
            self._pages = torch.zeros(size, dtype=torch.uint8, device=device)
        self._rope = RopeTables(config, device, dtype)

    def begin(self, step: Step) -> Attend:
        config = self._config
        cos, sin = self._rope.rows(step.positions)
        sequences = _sequences(step)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rotation = config.key_rotation
            query = rotate_heads(apply_rope(query, cos, sin), rotation)
            key = rotate_heads(apply_rope(key, cos, sin), rotation)
            self._append(layer, key, value, step.slots)
            output = torch.zeros_like(query)
            for rows, table, kv_len in sequences:
                keys, values = self._gather(layer, table, kv_len)
                output[rows] = attend_exactly(query[rows], keys, values, config.scale, config.windows[layer])
            return output

        return attend

    def _append(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        kept = slots >= 0
        page, place = slots[kept] // PAGE_SIZE, slots[kept] % PAGE_SIZE
        if self._config.kv_bits == 16:
            for pool, x in zip(self._pages[layer], (key, value), strict=True):
                pool[page, :, place] = x[kept]
            return
        bits = self._config.kv_bits
        touched, index = page.unique(return_inverse=True)
        parts = unpack_pages(self._pages[layer, touched], self._config.head_dim, bits)
        for kv, x in zip(parts, (key, value), strict=True):
            new = quantize_kv(x[kept], 4 if bits == 4 else 8)
            kv.codes[index, :, place] = new.codes
            kv.scales[index, :, place] = new.scales
            kv.zeros[index, :, place] = new.zeros
        self._pages[layer, touched] = pack_pages(*parts, bits)

    def _gather(self, layer: int, table: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_len, KV heads, D] as the cache gives them back."""
        ids = table[: -(-kv_len // PAGE_SIZE)].long()
        pages = self._pages[layer]
        if self._config.kv_bits == 16:
            found = pages[0, ids], pages[1, ids]
        else:
            keys, values = unpack_pages(pages[ids], self._config.head_dim, self._config.kv_bits)
            found = self._decoded(keys), self._decoded(values)
        key, value = (part.transpose(1, 2).flatten(0, 1)[:kv_len] for part in found)
        return key, value

    def _decoded(self, kv: QuantizedKV) -> Tensor:
        return dequantize_kv(kv).to(self._dtype)


def attend_exactly(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """[n, H, D] in query's dtype: the last n tokens of [kv_len, KV heads, D] attend up to themselves, in float64."""
    new, heads, head_dim = query.shape
    kv_len, kv_heads = keys.shape[:2]
    keys, values = (x.double().transpose(0, 1) for x in (keys, values))  # KV heads, kv_len, D
    places = torch.arange(kv_len, device=query.device)
    output = torch.empty_like(query)
    for start in range(0, new, _ROWS_AT_ONCE):
        rows = query[start : start + _ROWS_AT_ONCE]
        own = kv_len - new + start + torch.arange(len(rows), device=query.device)
        grouped = rows.double().view(len(rows), kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
        scores = (grouped @ keys.transpose(1, 2) * scale).view(kv_heads, len(rows), -1, kv_len)
        hidden = places > own[:, None]
        if window:
            hidden |= places <= own[:, None] - window
        scores.masked_fill_(hidden[None, :, None], -torch.inf)
        y = scores.softmax(-1).flatten(1, 2) @ values
        output[start : start + len(rows)] = y.view(kv_heads, len(rows), -1, head_dim).transpose(0, 1).reshape(
            len(rows), heads, head_dim
        )  # fmt: skip
    return output


def _sequences(step: Step) -> Sequence[tuple[slice, Tensor, int]]:
    """Rows, page numbers and length of each sequence that runs."""
    if isinstance(step, DecodeStep):
        lens = step.kv_lens.tolist()
        return [(slice(i, i + 1), step.page_table[i], length) for i, length in enumerate(lens) if length]
    found, row = [], 0
    for i, (new, length) in enumerate(zip(step.new_lens, step.kv_lens, strict=True)):
        found.append((slice(row, row + new), step.page_table[i], length))
        row += new
    return found
