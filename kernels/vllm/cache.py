"""Which KV cache vLLM keeps for our checkpoints: ours, unless another one was asked for by name.

vLLM's list of cache types is closed. Two of its names have exactly the bytes of our pages, so their memory is counted
and handed out rightly; the attention backend (`attention`) fills it in our order.
"""

from __future__ import annotations

import math
from typing import Any

from qoq.formats.quantization_config import QUANT_METHOD, QuantizationConfig
from qoq.kernels.layouts import HEAD_DIMS, PAGE_SIZE, page_bytes
from qoq.kernels.vllm.interface import (
    CacheChoice,
    backend_path,
    bytes_of_token,
    cache_choice,
    custom_backend,
    keep_all_tokens,
    logger,
)
from qoq.recipes.errors import EnvironmentProblem, InputError, raise_problems

BACKEND = "qoq.kernels.vllm.attention.QoQAttentionBackend"
"""Imported by vLLM when it looks for the backend, which is after it has chosen a GPU."""
CACHE_TYPES = {4: "int4_per_token_head", 8: "int8_per_token_head"}
"""vLLM's names for our pages, by bits."""
PAGES_HOLD = f"pages hold heads of {' or '.join(map(str, HEAD_DIMS))}"
REMEDY = "serve with a cache of vLLM's own: --kv-cache-dtype float16 or bfloat16, as the model's dtype is"


def bits_of(cache_type: str) -> int | None:
    """Bits of our cache under vLLM's name `cache_type`; None for a cache that is not ours."""
    return next((bits for bits, name in CACHE_TYPES.items() if name == cache_type), None)


def cache_shape(pages: int, kv_heads: int, head_dim: int, bits: int) -> tuple[int, int, int, int]:
    """Shape of the memory of `pages` pages, in values of one byte: every token's share of its page comes last."""
    return pages, kv_heads, PAGE_SIZE, page_bytes(head_dim, bits) // PAGE_SIZE


def choose_cache(config: Any) -> None:
    """Make vLLM keep the cache that a checkpoint of ours was made for; `config` is vLLM's VllmConfig, and is changed.

    Nothing changes for other models, for kv_bits 16, and where a cache type of vLLM's own was asked for. Raises
    InputError when a setting does not go with our cache, EnvironmentProblem when another plug-in is in its place.
    """
    if config.model_config.quantization != QUANT_METHOD:
        return
    choice = cache_choice(config)
    kv_bits = QuantizationConfig.from_dict(choice.checkpoint).kv_bits
    if kv_bits == 16 or choice.cache_type not in {"auto", *CACHE_TYPES.values()}:
        return
    other = None if choice.backend in {None, custom_backend()} else choice.backend.name
    if other is not None and choice.cache_type != "auto":
        return  # vLLM's own cache of that name, with the backend that was asked for
    bits = kv_bits if choice.cache_type == "auto" else bits_of(choice.cache_type)
    problems = _problems(choice)
    if other is not None:
        problems.append(f"attention backend {other}: it does not know qoq's pages")
    raise_problems(
        f"qoq's {bits}-bit KV cache, which the checkpoint was made for, cannot be served so",
        problems,
        remedy=f"leave these settings out, or {REMEDY}",
    )
    if backend_path() != BACKEND:
        raise EnvironmentProblem(
            f"another plug-in of vLLM has the attention backend CUSTOM ({backend_path()})",
            remedy=f"uninstall it, or {REMEDY}",
        )
    if bits != kv_bits:
        logger.warning("qoq: the KV cache takes %s bits, as asked; the checkpoint was made for %d", bits, kv_bits)
    config.cache_config.cache_dtype = CACHE_TYPES[bits or kv_bits]
    config.attention_config.backend = custom_backend()


def _problems(choice: CacheChoice) -> list[str]:
    problems = [f"{name}: it is not part of qoq's attention" for name in choice.unserved]
    if choice.head_dim not in HEAD_DIMS:
        problems.append(f"heads of {choice.head_dim} values: {PAGES_HOLD}")
    if choice.block_size is not None and choice.block_size % PAGE_SIZE:
        problems.append(f"--block-size {choice.block_size}: expected a multiple of the {PAGE_SIZE} tokens of a page")
    return problems


def fit_memory(layer: Any) -> None:
    """See to it that vLLM sets aside the bytes of our pages for an attention layer under construction.

    vLLM 0.26 counts a whole byte for a value of 4 bits where a layer has a window: such a layer then keeps all tokens.
    Raises InputError where the bytes are others still.
    """
    if layer.impl.memory_fits:
        return
    expected = math.prod(cache_shape(1, layer.num_kv_heads, layer.head_size, layer.impl.bits)) / PAGE_SIZE
    if bytes_of_token(layer) != expected and layer.sliding_window is not None:
        keep_all_tokens(layer)
    found = bytes_of_token(layer)
    if found != expected:
        raise InputError(
            f"vLLM sets aside {found:g} bytes for a token of a layer, qoq's pages take {expected:g}",
            remedy=f"this version of vLLM is not supported; {REMEDY}",
        )
    layer.impl.memory_fits = True
