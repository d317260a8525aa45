"""Bytes that a served model takes on a GPU: weights, KV cache, activations; and how many sequences fit.

Weights and pages are counted as qoq's formats have them, and linears and caches of other precisions by the same
rules, so that what differs between two precisions is their bits. Nothing is allocated here.
"""

from __future__ import annotations

from dataclasses import dataclass

from qoq.formats.packing import padded_in_features
from qoq.kernels.layouts import PAGE_SIZE, page_bytes
from qoq.recipes.precisions import Precision, WeightKind
from qoq.recipes.schema import GROUP_SIZE
from qoq.recipes.shapes import ModelShape

RESERVED_BYTES = 1 << 30
"""What CUDA, its libraries and graphs keep for themselves."""
CHUNK_TOKENS = 8192
"""Prompt tokens that a server takes at a time, as vLLM and TensorRT-LLM do by default."""


@dataclass(frozen=True)
class MemorySplit:
    """Where the bytes of a GPU go when `sequences` are served at once.

    activations   working space of the prompt tokens that are computed at a time
    left          of the whole memory; negative where it does not fit
    """

    sequences: int
    weights: int
    kv_cache: int
    activations: int
    reserved: int
    left: int


def linear_bytes(weights: WeightKind, n: int, k: int) -> int:
    """A linear [N, K] with its scales and zeros; 4-bit and int8 weights are padded to whole groups of K."""
    padded = padded_in_features(k)
    groups = n * padded // GROUP_SIZE
    return {
        "g128": n * padded // 2 + 2 * groups + 2 * n,
        "per_channel": n * padded // 2 + 4 * n,
        "int8": n * padded + 2 * n,
        "fp8": n * padded,
        "int4_fp16": n * padded // 2 + 5 * groups // 2,  # a 16-bit scale and a 4-bit zero
        "fp16": 2 * n * k,
    }[weights]


def weight_bytes(shape: ModelShape, weights: WeightKind) -> int:
    """All weights of a model: linears of the blocks in `weights`, embedding and lm_head in 16 bit."""
    layer = sum(linear_bytes(weights, n, k) for n, k in shape.layer_gemms().values())
    vocabulary = 2 * shape.vocab_size * shape.hidden_size
    return shape.num_layers * layer + (1 if shape.tied_embeddings else 2) * vocabulary


def kv_token_bytes(shape: ModelShape, kv_bits: int) -> int:
    """Keys and values of one token in all layers; those of 4 and 8 bits with their scales and zeros."""
    head = 4 * shape.head_dim if kv_bits == 16 else page_bytes(shape.head_dim, kv_bits) // PAGE_SIZE
    return shape.num_layers * shape.num_kv_heads * head


def activation_bytes(shape: ModelShape) -> int:
    """16-bit activations of one token that live at once: hidden states and residual, q, k, v, and those of the MLP."""
    qkv, _ = shape.layer_gemms()["qkv"]
    return 2 * (2 * shape.hidden_size + qkv + 3 * shape.intermediate_size)


def memory_split(
    shape: ModelShape,
    precision: Precision,
    memory_bytes: int,
    *,
    sequences: int,
    tokens: int,
    prompt_tokens: int,
    workspace: float,
) -> MemorySplit:
    """What `sequences` of `tokens` each need, whole pages, when `prompt_tokens` are computed at a time.

    `workspace` says how many times `activation_bytes` a server allocates.
    """
    pages = -(-tokens // PAGE_SIZE)
    weights = weight_bytes(shape, precision.weights)
    kv_cache = sequences * pages * PAGE_SIZE * kv_token_bytes(shape, precision.kv_bits)
    activations = int(workspace * prompt_tokens * activation_bytes(shape))
    left = memory_bytes - RESERVED_BYTES - weights - kv_cache - activations
    return MemorySplit(sequences, weights, kv_cache, activations, RESERVED_BYTES, left)


def largest_batch(
    shape: ModelShape,
    precision: Precision,
    memory_bytes: int,
    *,
    tokens: int,
    prompt_len: int,
    workspace: float,
    chunk_tokens: int | None,
    limit: int,
) -> int:
    """Most sequences of `tokens` each that fit, up to `limit`; 0 where not one does.

    Their prompts are computed together (`chunk_tokens` None) or so many tokens at a time.
    """

    def fits(sequences: int) -> bool:
        prompt_tokens = sequences * prompt_len
        if chunk_tokens is not None:
            prompt_tokens = min(prompt_tokens, chunk_tokens)
        split = memory_split(
            shape,
            precision,
            memory_bytes,
            sequences=sequences,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            workspace=workspace,
        )
        return split.left >= 0

    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
