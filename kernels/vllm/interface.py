"""What we use of vLLM that is not a documented interface, in one place: it may change between versions.

Read in vLLM 0.26.0 and 0.33.0. Importing it imports neither layers nor models of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers import quantization as methods
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

ShardId = str | int | tuple[int, ...] | None
"""Which part of a fused linear a checkpoint's tensor is: q, k or v, a number, several, or all of it (None)."""
_QKV = ("q", "k", "v")

logger = init_logger("vllm.qoq")
"""Below "vllm", so that vLLM's handlers and levels hold."""


def known_method(name: str) -> type | None:
    """The configuration class that a plug-in registered under `name`, QuantizationConfig for one of vLLM's own."""
    registered: dict[str, type] = methods._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    if name in registered:
        return registered[name]
    return QuantizationConfig if name in methods.QUANTIZATION_METHODS else None


def add_method(name: str, config_class: type) -> None:
    """Register `config_class` under `name`."""
    methods.register_quantization_config(name)(config_class)


def load_as_vllm_does(layer: Any) -> Callable[..., None]:
    """The layer's own loader: copies the rank's output channels of a tensor along its parameter's `output_dim`.

    It knows fused parts and replicated KV heads. It is the first version of vLLM's loaders: parameters of the second
    are given to methods that vLLM knows by name.
    """
    loader: Callable[..., None] = layer.weight_loader
    return loader


def stored_channels(layer: Any, shard_id: ShardId) -> int:
    """Output channels that the checkpoint's tensor for part `shard_id` of a linear has, of all ranks."""
    if hasattr(layer, "total_num_kv_heads"):  # its output_sizes count replicated heads more than once
        sizes = [
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        ]
    else:
        sizes = list(getattr(layer, "output_sizes", [layer.output_size]))
    return sum(sizes[part] for part in parts_of(shard_id, len(sizes)))


def parts_of(shard_id: ShardId, count: int) -> tuple[int, ...]:
    """`shard_id` as numbers of parts of a linear that is fused of `count`."""
    if shard_id is None:
        return tuple(range(count))
    if isinstance(shard_id, str):
        return (_QKV.index(shard_id),)
    return shard_id if isinstance(shard_id, tuple) else (shard_id,)


def cache_type(layer: Any) -> str | None:
    """What an attention layer of vLLM stores keys and values in; None for another layer."""
    name = getattr(layer, "kv_cache_dtype", None)
    if name is None:
        return None
    dtype = getattr(layer, "kv_cache_torch_dtype", None)
    return str(dtype).removeprefix("torch.") if name == "auto" else str(name)


def draws_random_weights() -> bool:
    """Whether the model under construction gets random weights (load_format="dummy"), for benchmarks."""
    from vllm.config import get_current_vllm_config

    return str(get_current_vllm_config().load_config.load_format) == "dummy"
