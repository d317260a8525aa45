"""The attention function of calibration and evaluation: keys and values go through the KV cache's round trip.

transformers calls it with queries and keys after RoPE, where they are rotated if they are to be, and where the cache
quantizes. Registered under `ATTENTION_NAME`; importing this module registers it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qoq.calib.gradients import straight_through
from qoq.formats.arithmetic import as_attended, rotate_heads
from qoq.recipes.schema import KeyRotation

ATTENTION_NAME = "qoq_calibration"
_KV_BITS, _KEY_ROTATION, _OBSERVER = "qoq_kv_bits", "qoq_key_rotation", "qoq_observer"
"""Attributes of an attention module; transformers passes the module, and nothing else of ours, to the function."""

AttentionObserver = Callable[[Tensor, Tensor, Tensor, "AttentionCall"], None]
"""Called with queries [B, heads, L, D], keys and values [B, kv_heads, L, D], all before rotation and round trip."""


class AttentionCall:
    """One attention computation that an observer may repeat with other keys and queries."""

    def __init__(self, module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        self._module, self._mask, self._kwargs = module, mask, kwargs

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention output [B, L, heads, D]."""
        output, _ = sdpa_attention_forward(self._module, query, key, value, self._mask, **self._kwargs)
        return output


def set_kv_bits(attention: nn.Module, kv_bits: int, key_rotation: KeyRotation = "none") -> None:
    """Make this attention module use a KV cache of 4, 8 or 16 bits, the keys in it rotated (16: as they are)."""
    setattr(attention, _KV_BITS, kv_bits)
    setattr(attention, _KEY_ROTATION, key_rotation)


class _Seen(Exception):
    """Ends a forward pass that was run only to show an observer its queries and keys."""


def observe(attention: nn.Module, observer: AttentionObserver, forward: Callable[[], object]) -> None:
    """Call `forward`, which runs the block of this attention module, as far as `observer` needs it.

    The observer sees queries, keys and values; what comes after them in the block is not computed.
    """
    setattr(attention, _OBSERVER, observer)
    try:
        forward()
    except _Seen:
        return
    finally:
        delattr(attention, _OBSERVER)
    raise RuntimeError(f"{type(attention).__name__} did not call the attention function {ATTENTION_NAME!r}")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    call = AttentionCall(module, attention_mask, kwargs)
    observer: AttentionObserver | None = getattr(module, _OBSERVER, None)
    if observer is not None:
        observer(query, key, value, call)
        raise _Seen
    kv_bits: int = getattr(module, _KV_BITS, 16)
    key_rotation: KeyRotation = getattr(module, _KEY_ROTATION, "none")
    queries, keys, values = as_attended(query, key, value, kv_bits=kv_bits, key_rotation=key_rotation)
    if torch.is_grad_enabled() and kv_bits != 16:
        keys = straight_through(keys, rotate_heads(key, key_rotation))
        values = straight_through(values, value)
    return call(queries, keys, values), None


AttentionInterface.register(ATTENTION_NAME, _attention)


def sliding_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Boolean mask [1, 1, L, L], true where a query attends; None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return ((distance >= 0) & (distance < window))[None, None]
