"""What attention calls on a GPU, in float64 on the CPU: shared by the tests of attention and of what is built on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qoq.formats.arithmetic import dequantize_kv
from qoq.kernels import extend
from qoq.kernels.attention import check_decode_operands
from qoq.kernels.attention_oracles import decode_attention_oracle
from qoq.kernels.extend_batch import FlashCall
from qoq.kernels.layouts import unpack_pages


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain attention of query [T, H, D] to all keys [L, KVH, D], float64, and its log-sum-exp [H, T]."""
    share = query.shape[1] // key.shape[1]
    keys, values = (x.double().repeat_interleave(share, dim=1).transpose(0, 1) for x in (key, value))
    scores = query.double().transpose(0, 1) @ keys.transpose(1, 2) * scale
    return (scores.softmax(2) @ values).transpose(0, 1), scores.logsumexp(2)


class StandIns:
    """What extend attention calls on a GPU, on the CPU; counts calls, and bytes dequantized at a time."""

    def __init__(self) -> None:
        self.flash_calls: list[bool] = []
        self.largest = 0
        self.decoded = 0
        self.parts = 0

    def take_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extend, "_flash", self.flash)
        monkeypatch.setattr(extend, "run_gather", self.run_gather)
        monkeypatch.setattr(extend, "run_decode", self.run_decode)

    def run_gather(self, pages: Tensor, page_ids: Tensor, head_dim: int, bits: int, out: tuple[Tensor, Tensor]) -> None:
        for to, part in zip(out, unpack_pages(pages[page_ids.long()], head_dim, bits), strict=True):
            assert to.is_contiguous()
            to.copy_(dequantize_kv(part).transpose(1, 2).reshape(to.shape))
        self.largest = max(self.largest, sum(to.numel() * to.element_size() for to in out))

    def run_decode(self, query: Tensor, *args: Any, out: Tensor | None) -> Tensor:
        self.decoded += query.shape[0]
        check_decode_operands(query, *args)
        if out is None:
            out = query.new_empty(query.shape)
        assert out.is_contiguous()
        return out.copy_(decode_attention_oracle(query, *args))

    def flash(
        self, query: Tensor, key: Tensor, value: Tensor, call: FlashCall, scale: float, window: int
    ) -> tuple[Tensor, Tensor]:
        """As the real one: padded keys, the last row sees the last key, a left window; NaN where nothing is read."""
        assert call.causal or not window
        self.flash_calls.append(call.causal)
        self.parts = max(self.parts, call.parts)
        outputs, sums = [], []
        row_ends, starts, lens = (x.tolist() for x in (call.row_ends, call.key_starts, call.key_lens))
        assert row_ends[-1] == query.shape[0]
        assert len(row_ends) == len(starts) == len(lens) + 1
        assert (call.max_rows, call.max_keys) == (int(call.row_ends.diff().max()), max(lens))
        for i, keys in enumerate(lens):
            assert 0 < keys <= key.shape[0] - starts[i]
            for row in range(row_ends[i], row_ends[i + 1]):
                end = keys - (row_ends[i + 1] - row - 1 if call.causal else 0)
                part = slice(starts[i] + (max(0, end - window) if window else 0), starts[i] + end)
                output, total = softmax_attention(query[row : row + 1], key[part], value[part], scale)
                outputs.append(output)
                sums.append(total)
        return torch.cat(outputs).to(query.dtype), torch.cat(sums, dim=1).float()
