"""How many pages of KV cache a memory budget leaves room for, by formulas that can be checked by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qoq.kernels.extend_batch import DEFAULT_SCRATCH_BYTES
from qoq.kernels.runtime.config import RuntimeConfig
from qoq.kernels.runtime.sampling import ROW_NBYTES, ROWS_AT_ONCE
from qoq.recipes.errors import EnvironmentProblem

GPU_RESERVE = 1536 << 20
"""Bytes of a GPU for what is not counted one by one: its context, kernels, graphs, cuBLAS, gaps between tensors."""
_MERGED_BYTES = 16
_GB = 1e9


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part, and the pages that fill the rest of the budget."""

    budget: int
    weights: int
    workspace: int
    reserve: int
    page: int
    num_pages: int

    @property
    def pages(self) -> int:
        return self.page * self.num_pages


def workspace_nbytes(config: RuntimeConfig, dtype: torch.dtype, *, chunk_tokens: int, max_batch: int) -> int:
    """Activations, logits and what is drawn from them, of a prefill step and of a decode step, which CUDA graphs keep
    memory of its own for; and the scratch of attention.

    Of a token there may be at once: four hidden states, q, k and v before and after RoPE, the attention's output, gate
    and up, their product before and after it is quantized; and outputs of attention, 16 bytes each, where it was cut
    along the keys and is merged.
    """
    heads = config.num_heads * config.head_dim
    values = 4 * config.hidden_size + 2 * config.qkv_features + heads + 3 * config.intermediate_size
    token = values * dtype.itemsize + max(config.intermediate_size, config.hidden_size) + _MERGED_BYTES * heads
    logits = max_batch * config.vocab_size * dtype.itemsize
    drawing = min(max_batch, ROWS_AT_ONCE) * config.vocab_size * ROW_NBYTES
    return (chunk_tokens + max_batch) * token + 2 * (logits + drawing) + DEFAULT_SCRATCH_BYTES


def plan_memory(
    *, budget: int, weights: int, workspace: int, reserve: int, page: int, page_size: int, most_pages: int
) -> MemoryPlan:
    """Give pages what weights, workspace and reserve leave of the budget, up to most_pages.

    Raises EnvironmentProblem when it is not one page.
    """
    rest = budget - weights - workspace - reserve
    if rest < page:
        raise EnvironmentProblem(
            f"{budget / _GB:.2f} GB do not hold the model: weights {weights / _GB:.2f} GB, workspace "
            f"{(workspace + reserve) / _GB:.2f} GB, and {page / _GB:.4f} GB for each {page_size} tokens of KV cache",
            remedy="give more memory, run fewer sequences or tokens at a time, or use fewer bits",
        )
    return MemoryPlan(budget, weights, workspace, reserve, page, min(rest // page, most_pages))
