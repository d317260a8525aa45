"""The 16-bit KV cache on a GPU: the baseline that the quantized ones are measured against.

A page is a lane, as long as the longest sequence, and a sequence has one. PyTorch's flash attention could read real
pages of 256 tokens, but not with its split along the keys (pytorch issue 194167), which is what keeps a GPU busy where
sequences are few. Here a sequence's keys lie together, and a decode step is cut along them by attending to each part as
to a sequence of its own, merged by log-sum-exp.

PyTorch's flash attention computes 128 rows for each KV head of a sequence, however few there are. Where a step has most
of the lanes, scaled_dot_product_attention by cuDNN reads all of them, masked, in three quarters of the time: for
measurements (`masked`), because an infinity that a sequence left in a lane would reach the next one through the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qoq.kernels.extend import flash_packed, flash_plain, merge_by_lse
from qoq.kernels.extend_batch import FlashCall
from qoq.kernels.extend_plan import BUSY_BLOCKS, PART_KEYS
from qoq.kernels.layouts import PAGE_SIZE
from qoq.kernels.runtime.attention import Attend, DecodeStep, ExtendStep, KVCache, RopeTables, Step
from qoq.kernels.runtime.config import RuntimeConfig
from qoq.kernels.runtime.elementwise import Fuse, apply_rope, plain
from qoq.kernels.upload import Upload

_MOST_LANES = 0.75
"""Of the lanes must be in a step that reads all of them."""
_Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""attention(query, keys and values of all lanes)."""


class LaneCache(KVCache):
    """16 bits: `page_size` is the lane's; behind the lanes is a place for what idle rows write."""

    idle_len = 1

    def __init__(
        self,
        config: RuntimeConfig,
        num_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        fuse: Fuse = plain,
        *,
        masked: bool = False,
    ) -> None:
        self.page_size, self._lanes, self._masked = page_size, num_pages, masked
        self.idle_slot = num_pages * page_size
        self._config, self._turn = config, fuse(apply_rope)
        size = (config.num_layers, 2, num_pages * page_size + PAGE_SIZE, config.num_kv_heads, config.head_dim)
        self._memory = torch.zeros(size, dtype=dtype, device=device)
        self._rope = RopeTables(config, device, dtype)

    def begin(self, step: Step) -> Attend:
        config = self._config
        cos, sin = self._rope.rows(step.positions)
        attentions = {window: self._attention(step, window) for window in set(config.windows)}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._memory[layer]
            keys.index_copy_(0, step.slots, self._turn(key, cos, sin))
            values.index_copy_(0, step.slots, value)
            return attentions[config.windows[layer]](self._turn(query, cos, sin), keys, values)

        return attend

    def _attention(self, step: Step, window: int) -> _Attention:
        starts, scale = step.page_table[:, 0] * self.page_size, self._config.scale
        if isinstance(step, ExtendStep):
            call = _extend_call(step, starts)
        elif window:
            call = _decode_call(step.kv_lens, starts, 1, self.page_size)
        else:
            blocks = starts.shape[0] * self._config.num_kv_heads
            parts = max(1, min(BUSY_BLOCKS // blocks, self.page_size // PART_KEYS))
            if self._masked and parts == 1 and starts.shape[0] >= _MOST_LANES * self._lanes:
                return self._masked_attention(step)
            call = _packed_call(step.kv_lens, starts, self._config, parts, self.page_size)
        return lambda query, keys, values: _attend(query, keys, values, call, scale, window)

    def _masked_attention(self, step: DecodeStep) -> _Attention:
        """Of all lanes, in their order, to which a decode step's rows are brought and from which they are taken."""
        lanes, length, scale = self._lanes, self.page_size, self._config.scale
        device, rows = step.kv_lens.device, step.kv_lens.shape[0]
        lane_of_row = step.page_table[:, 0].long()
        is_idle = step.slots == self.idle_slot
        target = torch.where(is_idle, lanes, lane_of_row)  # idle rows share a lane that is not there
        row_of_lane = torch.zeros(lanes + 1, dtype=torch.int64, device=device)
        row_of_lane.scatter_(0, target, torch.arange(rows, device=device))
        lens = torch.ones(lanes + 1, dtype=torch.int32, device=device).scatter_(0, target, step.kv_lens)[:lanes]
        mask = torch.zeros(lanes, 1, 1, length, dtype=self._memory.dtype, device=device)
        mask.masked_fill_(torch.arange(length, device=device) >= lens.view(-1, 1, 1, 1), -torch.inf)

        def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            of_lanes = query.index_select(0, row_of_lane[:lanes]).unsqueeze(2)
            key, value = (part[: lanes * length].view(lanes, length, *part.shape[1:]) for part in (keys, values))
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION if query.is_cuda else SDPBackend.MATH]):
                found = scaled_dot_product_attention(
                    of_lanes, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, scale=scale, enable_gqa=True
                )
            return found.squeeze(2).index_select(0, lane_of_row)

        return attention


def _extend_call(step: ExtendStep, starts: Tensor) -> FlashCall:
    """Every sequence's new tokens attend to its keys up to themselves."""
    upload = Upload(starts.device)
    ends = upload.add([0, *accumulate(step.new_lens)], torch.int32)
    kv_lens = upload.add(step.kv_lens, torch.int32)
    upload.send()
    return FlashCall(ends, _closed(starts), kv_lens, max(step.new_lens), max(step.kv_lens), causal=True, parts=0)


def _decode_call(kv_lens: Tensor, starts: Tensor, rows: int, longest: int) -> FlashCall:
    """Items of `rows` rows each."""
    ends = rows * torch.arange(len(starts) + 1, dtype=torch.int32, device=starts.device)
    return FlashCall(ends, _closed(starts), kv_lens, rows, longest, causal=True, parts=0)


def _packed_call(kv_lens: Tensor, starts: Tensor, config: RuntimeConfig, parts: int, longest: int) -> FlashCall:
    """The query heads of a KV head as rows; every sequence's first part, then every second, ... (`extend_plan`)."""
    places = torch.arange(parts + 1, dtype=torch.int32, device=starts.device).unsqueeze(1)
    borders = (kv_lens * places).div(parts, rounding_mode="floor")
    share = config.num_heads // config.num_kv_heads
    ends = share * torch.arange(parts * len(starts) + 1, dtype=torch.int32, device=starts.device)
    key_starts, key_lens = (starts + borders[:-1]).flatten(), (borders[1:] - borders[:-1]).flatten()
    return FlashCall(ends, _closed(key_starts), key_lens, share, longest, causal=False, parts=parts)


def _closed(starts: Tensor) -> Tensor:
    """Flash attention wants one number more, and does not use it."""
    return torch.cat([starts, starts.new_zeros(1)])


def _attend(query: Tensor, keys: Tensor, values: Tensor, call: FlashCall, scale: float, window: int) -> Tensor:
    rows, heads, head_dim = query.shape
    grouped = query.view(rows, keys.shape[1], -1, head_dim)
    if not call.parts:
        return flash_plain(grouped, keys, values, call, scale, window)[0].reshape(rows, heads, head_dim)
    parts, sums = flash_packed(grouped, keys, values, call, scale, window)
    if call.parts == 1:
        return parts[0].reshape(rows, heads, head_dim)
    empty = (call.key_lens == 0).view(call.parts, rows, 1, 1)  # a sequence of fewer tokens than parts
    merged = merge_by_lse(parts, sums.masked_fill(empty, -torch.inf))
    return merged.reshape(rows, heads, head_dim).to(query.dtype)
