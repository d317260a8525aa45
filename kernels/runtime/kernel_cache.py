"""The KV cache of 4 or 8 bits on a GPU: RoPE, rounding and attention by qoq's kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qoq.kernels.extend import run_extend
from qoq.kernels.extend_batch import prepare_extend
from qoq.kernels.layouts import page_bytes
from qoq.kernels.runtime.attention import Attend, DecodeStep, ExtendStep, KVCache, Step
from qoq.kernels.runtime.config import RuntimeConfig


class KernelCache(KVCache):
    """Pages uint8 [layers, num_pages, KV heads, page bytes] in the order of `layouts`."""

    def __init__(self, config: RuntimeConfig, num_pages: int, device: torch.device) -> None:
        self._config = config
        nbytes = page_bytes(config.head_dim, config.kv_bits)
        self._pages = torch.zeros(
            config.num_layers, num_pages, config.num_kv_heads, nbytes, dtype=torch.uint8, device=device
        )
        self._cos, self._sin = config.cos.to(device), config.sin.to(device)

    def begin(self, step: Step) -> Attend:
        config, pages = self._config, self._pages
        attention = self._decode(step) if isinstance(step, DecodeStep) else self._extend(step)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            turned = torch.ops.qoq.rope_append(
                query,
                key,
                value,
                self._cos,
                self._sin,
                step.positions,
                pages[layer],
                step.slots,
                config.kv_bits,
                config.key_rotation,
                True,  # positions and slots were written before the embedding was looked up
            )
            return attention(turned, pages[layer], config.windows[layer])

        return attend

    def _decode(self, step: DecodeStep) -> Callable[[Tensor, Tensor, int], Tensor]:
        """Lengths, page numbers and all tokens but the newest were written before the embedding was looked up."""
        scale, bits = self._config.scale, self._config.kv_bits

        def attention(query: Tensor, pages: Tensor, window: int) -> Tensor:
            y: Tensor = torch.ops.qoq.overlapping_decode_attention(
                query, pages, step.page_table, step.kv_lens, scale, bits, window, 1
            )
            return y

        return attention

    def _extend(self, step: ExtendStep) -> Callable[[Tensor, Tensor, int], Tensor]:
        config = self._config
        batches = {
            window: prepare_extend(
                step.new_lens,
                step.kv_lens,
                max_pages=step.page_table.shape[1],
                heads=config.num_heads,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                device=step.page_table.device,
                window=window,
            )
            for window in set(config.windows)
        }
        return lambda query, pages, window: run_extend(
            query, pages, step.page_table, batches[window], config.scale, config.kv_bits
        )
