"""The attention of the transformers plug-in: sdpa over keys and values as a quantized KV cache gives them back.

A name for each cache: "qoq_kv4", "qoq_kv8", and "qoq_kv4_hadamard", "qoq_kv8_hadamard" where queries and keys are
rotated first (`formats.arithmetic.as_attended`). `register_attention` makes transformers know them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qoq.formats.arithmetic import kv_round_trip, rotate_heads, rotates
from qoq.kernels.kv_operands import KEY_ROTATIONS, rotation_fits, round_trip_fits
from qoq.kernels.modules import Backend, is_on_gpu
from qoq.recipes.errors import InputError
from qoq.recipes.schema import KeyRotation

BASE_ATTENTION = "sdpa"
CacheBits = Literal[4, 8]
ATTENTION: dict[tuple[int, KeyRotation], str] = {
    (bits, rotation): f"qoq_kv{bits}" + ("" if rotation == "none" else f"_{rotation}")
    for bits, rotation in product(get_args(CacheBits), KEY_ROTATIONS)
}
"""The name of the attention for a cache of so many bits with keys rotated so."""
_BACKEND = "qoq_backend"
"""Attribute of an attention module; transformers passes the module, and nothing else of ours, to the function."""


def register_attention() -> None:
    """Make transformers know the names; doing it again changes nothing."""
    for (bits, key_rotation), name in ATTENTION.items():
        ALL_ATTENTION_FUNCTIONS.register(name, _attention(4 if bits == 4 else 8, key_rotation))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[BASE_ATTENTION])


def set_attention_backend(module: nn.Module, backend: Backend) -> None:
    """From now on, this attention module uses `backend`; a module of another kind is left alone."""
    if hasattr(module, "head_dim"):
        setattr(module, _BACKEND, backend)


def choose_attention(model: PreTrainedModel, implementation: str) -> None:
    """Make `model` use the attention of this name. Raises InputError when it does not let itself be told."""
    model.set_attn_implementation(implementation)
    if model.config._attn_implementation != implementation:
        raise InputError(f"{type(model).__name__} does not let its attention be chosen, so kv_bits must be 16")


def check_attention(model: PreTrainedModel, kv_bits: int, key_rotation: KeyRotation) -> None:
    """Raise InputError where `model` cannot have a cache of `kv_bits` with keys rotated so."""
    if key_rotation not in KEY_ROTATIONS:
        raise InputError(f"key_rotation is {key_rotation!r}, expected {' or '.join(map(repr, KEY_ROTATIONS))}")
    implementation = model.config._attn_implementation
    if implementation not in (BASE_ATTENTION, *ATTENTION.values()) or not model._supports_sdpa:
        raise InputError(
            f"attn_implementation is {implementation!r}, but a {kv_bits}-bit KV cache is emulated on sdpa only",
            remedy="leave attn_implementation out; to go on without KV quantization, load the model first, then call "
            f"model.set_attn_implementation({implementation!r})",
        )
    head_dim = _head_dim(model)
    if key_rotation != "none" and not rotates(head_dim):
        raise InputError(f"key_rotation is {key_rotation!r}, but head_dim is {head_dim}, which is no power of two")


def _head_dim(model: PreTrainedModel) -> int:
    given: int | None = getattr(model.config, "head_dim", None)
    return given or int(model.config.hidden_size) // int(model.config.num_attention_heads)


def _attention(bits: CacheBits, key_rotation: KeyRotation) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """transformers' sdpa attention over key and value [batch, KV heads, tokens, D] after the round trip."""
        backend: Backend = getattr(module, _BACKEND, "auto")
        query = _rotate(query, key_rotation, backend)
        key, value = _round_trip(key, bits, key_rotation, backend), _round_trip(value, bits, "none", backend)
        result: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS[BASE_ATTENTION](
            module, query, key, value, attention_mask, **kwargs
        )
        return result

    return attend


def _rotate(query: Tensor, key_rotation: KeyRotation, backend: Backend) -> Tensor:
    """query [..., D] rotated; the kernel and PyTorch give the same numbers."""
    if key_rotation == "none" or not rotation_fits(query.shape[-1]) or not _runs_kernels(query, backend):
        return rotate_heads(query, key_rotation)
    rotated: Tensor = torch.ops.qoq.rotate_heads(query.contiguous())
    return rotated


def _round_trip(x: Tensor, bits: CacheBits, key_rotation: KeyRotation, backend: Backend) -> Tensor:
    """x [..., D], rotated, as a cache gives it back; the kernel and PyTorch give the same numbers."""
    head_dim = x.shape[-1]
    fits = round_trip_fits(head_dim) and (key_rotation == "none" or rotation_fits(head_dim))
    if not fits or not _runs_kernels(x, backend):
        return kv_round_trip(rotate_heads(x, key_rotation), bits)
    rounded: Tensor = torch.ops.qoq.kv_round_trip(x.contiguous(), bits, key_rotation)
    return rounded


def _runs_kernels(x: Tensor, backend: Backend) -> bool:
    is_fit = is_on_gpu(x) and x.dtype in (torch.float16, torch.bfloat16)
    return backend != "reference" and is_fit and _kernels_are_usable()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kernels_are_usable() -> bool:
    from qoq.kernels.ops import usable_device_problem

    return usable_device_problem() is None
