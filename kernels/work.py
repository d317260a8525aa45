"""What a served model asks of a GPU, counted: bytes to move and operations to do, kernel by kernel.

Nothing here knows how fast anything is; `qoq.kernels.projection` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qoq.kernels.footprint import kv_token_bytes, linear_bytes
from qoq.recipes.precisions import Precision, WeightKind
from qoq.recipes.shapes import ModelShape

ACTIVATION_BYTES: dict[WeightKind, int] = {
    "g128": 1,
    "per_channel": 1,
    "int8": 1,
    "fp8": 1,
    "int4_fp16": 2,
    "fp16": 2,
}
"""Of one input of a linear, by the kind of its weights."""
SMALL_KERNELS = 5
"""Launches of a layer beside products and attention: two norms, rotation of keys with the append, quantization of what
attention gives, and the activation of the MLP."""


@dataclass(frozen=True)
class Work:
    """Calls of one kernel.

    kernel       "gemm", "lm_head", "decode_attention", "prefill_attention" or "small"
    nbytes       moved by a call
    operations   of the tensor cores, in a call
    lanes        operations outside the tensor cores, in a call, by a scale of the kernel's own
    count        how often the call is made
    """

    kernel: str
    nbytes: float
    operations: float = 0.0
    lanes: float = 0.0
    count: int = 1


def gemm_work(weights: WeightKind, m: int, n: int, k: int, *, count: int = 1, kernel: str = "gemm") -> Work:
    """A product [M, K] x [N, K] with 16-bit outputs."""
    nbytes = linear_bytes(weights, n, k) + m * k * ACTIVATION_BYTES[weights] + 2 * m * n
    return Work(kernel, nbytes, operations=2.0 * m * n * k, count=count)


def decode_attention_work(shape: ModelShape, kv_bits: int, sequences: int, tokens: float, *, count: int = 1) -> Work:
    """One layer of a decode step over `tokens` cached tokens a sequence."""
    read = sequences * tokens * kv_token_bytes(shape, kv_bits) / shape.num_layers
    each = 4.0 * sequences * tokens * shape.num_heads * shape.head_dim
    return Work("decode_attention", read, lanes=each, count=count)


def decode_work(shape: ModelShape, precision: Precision, sequences: int, tokens: float) -> list[Work]:
    """A step that adds a token to each of `sequences`, which have `tokens` each in the cache."""
    return [
        *_layer_work(shape, precision, sequences, count=shape.num_layers),
        decode_attention_work(shape, precision.kv_bits, sequences, tokens, count=shape.num_layers),
        _head_work(shape, sequences),
    ]


def prefill_work(
    shape: ModelShape, precision: Precision, prompts: int, prompt_len: int, *, chunk_tokens: int
) -> list[Work]:
    """Prompts computed `chunk_tokens` at a time, up to the first new token of each."""
    total = prompts * prompt_len
    whole, rest = divmod(total, chunk_tokens)
    work: list[Work] = []
    for tokens, chunks in ((chunk_tokens, whole), (rest, 1)):
        if tokens and chunks:
            work += _layer_work(shape, precision, tokens, count=shape.num_layers * chunks)
    causal = 2.0 * prompt_len * prompt_len * shape.num_heads * shape.head_dim
    written = prompt_len * kv_token_bytes(shape, precision.kv_bits) / shape.num_layers
    work.append(Work("prefill_attention", written, operations=causal, count=shape.num_layers * prompts))
    work.append(_head_work(shape, prompts))
    return work


def layer_gemms_work(shape: ModelShape, weights: WeightKind, m: int, *, count: int = 1) -> list[Work]:
    """The four products of a decoder layer."""
    return [gemm_work(weights, m, n, k, count=count) for n, k in shape.layer_gemms().values()]


def _layer_work(shape: ModelShape, precision: Precision, m: int, *, count: int) -> Sequence[Work]:
    """All of a layer but attention, for M tokens."""
    qkv, _ = shape.layer_gemms()["qkv"]
    # Read and written: residual, sum and normed input at both norms, attention's output; q, k, v; gate, up, product.
    moved = 17 * shape.hidden_size + 4 * qkv + 5 * shape.intermediate_size
    return [
        *layer_gemms_work(shape, precision.weights, m, count=count),
        Work("small", m * moved / SMALL_KERNELS, count=SMALL_KERNELS * count),
    ]


def _head_work(shape: ModelShape, m: int) -> Work:
    return gemm_work("fp16", m, shape.vocab_size, shape.hidden_size, kernel="lm_head")
