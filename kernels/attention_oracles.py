"""What attention over a paged cache must give, in float64 with PyTorch on any device, from the codes themselves.

One query row at a time: scores are integer codes times exact numbers, no block is ever merged with another, and the
softmax is taken of all scores at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV
from qoq.kernels.layouts import PAGE_SIZE, unpack_pages


def decode_attention_oracle(
    query: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, scale: float, bits: int, window: int = 0
) -> Tensor:
    """float64 [B, H, D]: row b of query attends to the last `window` (0: all) of the first kv_lens[b] tokens.

    query [B, H, D] of any dtype, the rest as for `attention.paged_decode_attention`, on one device. No tokens: zeros.
    """
    output = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for row, length in enumerate(kv_lens.tolist()):
        first = max(0, length - window) if window else 0
        if length == 0:
            continue
        first_page = first // PAGE_SIZE
        pages = kv_pages[page_table[row, first_page : math.ceil(length / PAGE_SIZE)].long()]
        tokens = slice(first - first_page * PAGE_SIZE, length - first_page * PAGE_SIZE)
        keys, values = (_tokens_of(part, tokens) for part in unpack_pages(pages, query.shape[2], bits))
        output[row] = _attend(query[row], keys, values, scale)
    return output


def extend_attention_oracle(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    new_lens: Sequence[int],
    kv_lens: Sequence[int],
    scale: float,
    bits: int,
    window: int = 0,
) -> Tensor:
    """float64 [T, H, D]: each new token as a decode step of its own, at the length the cache had with it."""
    sequences = [i for i, new in enumerate(new_lens) for _ in range(new)]
    lens = [total - new + j + 1 for new, total in zip(new_lens, kv_lens, strict=True) for j in range(new)]
    return decode_attention_oracle(query, kv_pages, page_table[sequences], torch.tensor(lens), scale, bits, window)


def _tokens_of(kv: QuantizedKV, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
    """float64 codes [KV heads, tokens, D], scales and zeros [KV heads, tokens, 1] of pages [pages, KV heads, 64, .]."""
    codes, scales, zeros = (
        part.transpose(0, 1).flatten(1, 2)[:, tokens].double() for part in (kv.codes, kv.scales, kv.zeros)
    )
    return codes, scales, zeros


def _attend(
    query: Tensor, keys: tuple[Tensor, Tensor, Tensor], values: tuple[Tensor, Tensor, Tensor], scale: float
) -> Tensor:
    """[H, D] of a row [H, D]: sum_t p_t s_t c_t - sum_t p_t s_t z_t, query heads grouped by KV head."""
    codes, scales, zeros = keys
    grouped = query.double().view(codes.shape[0], -1, query.shape[1]).transpose(1, 2)  # KV heads, D, share
    scores = (codes @ grouped - zeros * grouped.sum(dim=1, keepdim=True)) * scales * scale
    powers = torch.exp(scores - scores.amax(dim=1, keepdim=True))
    weights = powers / powers.sum(dim=1, keepdim=True)
    codes, scales, zeros = values
    weights = weights * scales
    output = weights.transpose(1, 2) @ codes - (weights * zeros).sum(dim=1).unsqueeze(2)
    return output.reshape(query.shape)
