"""Random weights of a model's shape at a precision, made on the device: for measurements where no model is at hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qoq.formats.packing import padded_in_features
from qoq.kernels.modules import wants_tiles
from qoq.kernels.random_weights import random_packed_linear
from qoq.kernels.runtime.config import RuntimeConfig
from qoq.kernels.runtime.elementwise import Fuse, plain
from qoq.kernels.runtime.linears import DenseLinear, Fp8Linear, Int8Linear, Linear, Norm, TiledLinear
from qoq.kernels.runtime.weights import Arithmetic, BlockWeights, ModelWeights, place_checked, place_head, place_packed
from qoq.kernels.tiles import tile_int8_weights
from qoq.recipes.errors import InputError
from qoq.recipes.precisions import WeightKind

_SPREAD = 0.02
"""Standard deviation of 16-bit weights."""
_FP8_ACT_SCALE = 0.05
"""Inputs of up to 22 fit float8_e4m3fn so."""


def random_weights(
    config: RuntimeConfig,
    weights: WeightKind,
    *,
    device: torch.device,
    dtype: torch.dtype,
    arithmetic: Arithmetic,
    lm_head_bits: int = 16,
    seed: int = 0,
    fuse: Fuse = plain,
) -> ModelWeights:
    """Weights of no meaning in the sizes of `config`, linears of kind `weights`; no float copy of a model is made.

    Raises InputError for a kind that the runtime cannot multiply by.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, spread: float = _SPREAD) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=spread, generator=generator)

    make = _maker(weights, arithmetic, generator, normal, fuse)
    hidden, inner = config.hidden_size, config.intermediate_size
    gains = torch.ones(hidden, dtype=dtype, device=device)
    norm = Norm(gains, config.eps)
    heads = config.num_heads + config.num_kv_heads
    head_norms = gains.new_ones(heads, config.head_dim) if config.head_norms else None
    blocks = tuple(
        BlockWeights(
            input_norm=norm,
            qkv=make(config.qkv_features, hidden),
            head_norms=head_norms,
            o=make(hidden, config.num_heads * config.head_dim),
            mlp_norm=norm,
            gate_up=make(2 * inner, hidden),
            down=make(hidden, inner),
        )
        for _ in range(config.num_layers)
    )
    embedding = normal(config.vocab_size, hidden, spread=1.0)
    head = embedding if config.tied_embeddings else normal(config.vocab_size, hidden)
    lm_head = place_head(head, lm_head_bits, arithmetic, fuse)
    del head
    if device.type == "cuda":  # Hopper's kernels read weights ahead of what was enqueued
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return ModelWeights(embedding, blocks, norm, lm_head)


def _maker(
    weights: WeightKind,
    arithmetic: Arithmetic,
    generator: torch.Generator,
    normal: Callable[..., Tensor],
    fuse: Fuse,
) -> Callable[[int, int], Linear]:
    device = generator.device

    def packed(n: int, k: int) -> Linear:
        tensors = random_packed_linear(n, k, progressive=weights == "g128", generator=generator)
        if arithmetic == "kernels":
            return place_checked(tensors)
        return place_packed(tensors, in_features=k, zero_domain="pre_scale", act_bits=8, arithmetic=arithmetic)

    def int8(n: int, k: int) -> Linear:
        weight = torch.empty(n, padded_in_features(k), dtype=torch.int8, device=device)
        weight.random_(-127, 128, generator=generator)
        scales = (torch.rand(n, generator=generator, device=device) * 1e-4 + 1e-4).half()
        if wants_tiles(weight):
            return TiledLinear(tile_int8_weights(weight), scales, None, None, int8=True)
        return Int8Linear(weight, scales)

    def fp8(n: int, k: int) -> Linear:
        weight = normal(n, k, spread=1.0).to(torch.float8_e4m3fn)
        scale, act_scale = (torch.tensor(value, device=device) for value in (_SPREAD, _FP8_ACT_SCALE))
        return Fp8Linear(weight, scale, act_scale, fuse)

    kinds: dict[WeightKind, Callable[[int, int], Linear]] = {"fp16": lambda n, k: DenseLinear(normal(n, k), None, fuse)}
    kinds |= {"g128": packed, "per_channel": packed}
    if arithmetic == "kernels":
        kinds |= {"int8": int8, "fp8": fp8}
    if weights not in kinds:
        raise InputError(
            f"weights of kind {weights}: the runtime has no {arithmetic} for them", remedy=f"use {', '.join(kinds)}"
        )
    return kinds[weights]
