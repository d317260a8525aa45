"""Steps of a server as vLLM's runners describe them, on qoq's attention in one or several layers; what must come of
them is kept apart: the keys and values of each sequence as they came, rounded and attended to in float64."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qoq.formats.arithmetic import kv_round_trip, rotate_heads
from qoq.recipes.schema import KeyRotation
from tests.kernels.vllm_cases import quantization, vllm_config

attention = import_module("qoq.kernels.vllm.attention")
cache = import_module("qoq.kernels.vllm.cache")
backend = import_module("vllm.v1.attention.backend")
specs = import_module("vllm.v1.kv_cache_interface")
CPU = torch.device("cpu")
PAGE = 64
MAX_PAGES = 5


def make_layer(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    bits: int = 4,
    window: int | None = None,
    key_rotation: KeyRotation = "none",
    **keys: Any,
) -> Any:
    """The attention of a layer, made while a model with our weights is under construction."""
    config = vllm_config.VllmConfig(device_config=vllm_config.DeviceConfig("cpu"))
    config.quant_config = quantization(kv_bits=bits, key_rotation=key_rotation)
    with vllm_config.set_current_vllm_config(config):
        arguments = {"sliding_window": window, "kv_cache_dtype": cache.CACHE_TYPES[bits], **keys}
        return attention.QoQAttention(heads, head_dim, 1 / head_dim**0.5, kv_heads, **arguments)


def make_builder(layers: Sequence[Any], block_size: int = PAGE, device: torch.device = CPU) -> Any:
    """The builder of the metadata of layers with one cache."""
    names = [f"model.layers.{i}.self_attn.attn" for i in range(len(layers))]
    config = vllm_config.VllmConfig(device_config=vllm_config.DeviceConfig("cpu"))
    context = {name: SimpleNamespace(impl=layer) for name, layer in zip(names, layers, strict=True)}
    config.compilation_config.static_forward_context.update(context)
    spec = specs.FullAttentionSpec(
        block_size=block_size, num_kv_heads=layers[0].num_kv_heads, head_size=layers[0].head_size, dtype=torch.uint8
    )
    return attention.QoQAttentionBackend.get_builder_cls()(spec, names, config, device)


def batch_of(
    new_lens: Sequence[int], kv_lens: Sequence[int], table: Tensor, slots: Tensor, *, tokens: int | None = None
) -> Any:
    """vLLM's description of a step; `tokens`: with padding. Upper bounds of lengths are those of real sequences."""
    ends = torch.tensor([0, *np.cumsum(new_lens)], dtype=torch.int32)
    real = sum(length > 0 for length in kv_lens)
    return backend.CommonAttentionMetadata(
        query_start_loc=ends,
        query_start_loc_cpu=ends,
        seq_lens=torch.tensor(kv_lens, dtype=torch.int32),
        num_reqs=len(new_lens),
        num_actual_tokens=sum(new_lens) if tokens is None else tokens,
        max_query_len=max(new_lens),
        max_seq_len=max(kv_lens),
        block_table_tensor=table,
        slot_mapping=slots,
        seq_lens_cpu_upper_bound=torch.tensor(kv_lens[:real], dtype=torch.int32),
    )


class Server:
    """Sequences on random pages of a pool whose bytes are garbage at first."""

    def __init__(self, layers: Sequence[Any], sequences: int, dtype: torch.dtype) -> None:
        self.layers, self.dtype = layers, dtype
        self.random = torch.Generator().manual_seed(5)
        self.builder = make_builder(layers)
        layer = layers[0]
        pages = sequences * MAX_PAGES + 2
        shape = attention.QoQAttentionBackend.get_kv_cache_shape(
            pages, PAGE, layer.num_kv_heads, layer.head_size, layer.kv_cache_dtype
        )
        kind = torch.uint8 if layer.bits == 4 else torch.int8  # as vLLM has them
        self.pools = [torch.full(shape, 0x3B, dtype=torch.uint8).view(kind) for _ in layers]
        order = torch.randperm(pages - 1, generator=self.random) + 1  # vLLM keeps page 0 for padding
        self.table = order[: sequences * MAX_PAGES].view(sequences, MAX_PAGES).int()
        empty = torch.empty(0, layer.num_kv_heads, layer.head_size, dtype=dtype)
        self.kept = [[(empty, empty)] * sequences for _ in layers]

    def length(self, sequence: int) -> int:
        return len(self.kept[0][sequence][0])

    def step(
        self,
        new: Sequence[tuple[int, int]],
        *,
        padded_sequences: int = 0,
        padded_rows: int = 0,
        as_tokens: bool = False,
    ) -> Any:
        """Run (sequence, new tokens) in this order on each layer, and compare; the metadata of the step.

        padded_sequences: without tokens, at the end; padded_rows: of queries, counted as tokens with `as_tokens`
        """
        slots, counts = [], [count for _, count in new]
        for sequence, count in new:
            places = torch.arange(self.length(sequence), self.length(sequence) + count)
            slots.append(self.table[sequence].long()[places // PAGE] * PAGE + places % PAGE)
        slots.append(torch.full((padded_rows,), -1))
        rows = sum(counts) + padded_rows
        lens = [self.length(sequence) + count for sequence, count in new] + [0] * padded_sequences
        table = torch.cat(
            [self.table[[sequence for sequence, _ in new]], self.table.new_zeros(padded_sequences, MAX_PAGES)]
        )
        batch = batch_of(
            counts + [0] * padded_sequences, lens, table, torch.cat(slots), tokens=rows if as_tokens else None
        )
        metadata = self.builder.build(0, batch)
        for i, layer in enumerate(self.layers):
            qkv = torch.randn(
                rows, layer.num_heads + 2 * layer.num_kv_heads, layer.head_size, generator=self.random
            ).to(self.dtype)
            query, key, value = qkv.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
            layer.do_kv_cache_update(None, key, value, self.pools[i], torch.cat(slots))
            output = torch.full_like(query.contiguous(), torch.nan)
            assert layer.forward(None, query, key, value, self.pools[i], metadata, output) is output
            self.check(i, new, query, key, value, output)
        return metadata

    def check(
        self, i: int, new: Sequence[tuple[int, int]], query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        layer, first = self.layers[i], 0
        tolerance = 2e-3 if self.dtype == torch.float16 else 1.6e-2
        for sequence, count in new:
            rows = slice(first, first + count)
            before = self.kept[i][sequence]
            keys, values = (torch.cat([old, x[rows]]) for old, x in zip(before, (key, value), strict=True))
            self.kept[i][sequence] = keys, values
            expected = attended(layer, query[rows], keys, values)
            torch.testing.assert_close(output[rows].double(), expected, rtol=tolerance, atol=tolerance)
            first += count
        assert not output[first:].any()


def attended(layer: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """float64 [n, H, D]: the last n tokens, each one up to itself, by a mask over all scores at once."""
    share = layer.num_heads // layer.num_kv_heads
    keys = kv_round_trip(rotate_heads(keys, layer.key_rotation), layer.bits)
    keys, values = (x.double().repeat_interleave(share, 1) for x in (keys, kv_round_trip(values, layer.bits)))
    turned = rotate_heads(query, layer.key_rotation).double()
    scores = torch.einsum("qhd,khd->hqk", turned, keys) * layer.scale
    own = torch.arange(len(keys) - len(query), len(keys)).unsqueeze(1)
    places = torch.arange(len(keys))
    seen = places <= own
    if layer.window:
        seen &= places > own - layer.window
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
