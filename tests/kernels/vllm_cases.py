"""Linears of vLLM's own classes on one rank of several, which need no process group: shared by the plug-in's tests.

Test files that import this skip where vLLM is not installed; `make test-vllm` makes an environment that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from qoq.formats.packing import pack_linear
from qoq.formats.quantization_config import QuantizationConfig
from qoq.formats.quantized_linear import QuantizedLinear, S2Offsets, ZeroPoints

pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` runs these in an environment that has it")
layers = import_module("vllm.model_executor.layers.linear")
parameters = import_module("vllm.model_executor.parameter")
vllm_config = import_module("vllm.config")
plugin_config = import_module("qoq.kernels.vllm.config")
BACKEND: str = import_module("qoq.kernels.vllm.cache").BACKEND

Mode = Literal["pre_scale", "post_scale", "per_channel"]
MODES: tuple[Mode, ...] = ("pre_scale", "post_scale", "per_channel")
HEAD_DIM = 64
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def random_linear(mode: Mode, n: int, k: int, seed: int, *, has_bias: bool = False) -> QuantizedLinear:
    """Random legal weights, with scales such that outputs of unit inputs are near 1."""
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=random).to(torch.uint8)

    groups = 1 if mode == "per_channel" else -(-k // 128)
    s2_scales = None if mode == "per_channel" else integers(1, 8, n, groups)  # codes and zeros stay in [-120, 120]
    points = integers(0, 15, n, groups)
    return QuantizedLinear(
        codes=integers(0, 15, n, -(-k // 128) * 128),
        s1_scales=(torch.rand(n, generator=random) * 0.001 + 0.0005).half(),
        s2_scales=s2_scales,
        zeros=S2Offsets(points * s2_scales) if mode == "post_scale" and s2_scales is not None else ZeroPoints(points),
        bias=torch.randn(n, generator=random).half() if has_bias else None,
        in_features=k,
    )


def quantization(mode: Mode = "pre_scale", **keys: Any) -> Any:
    """vLLM's QuantizationConfig for a checkpoint, knowing what vLLM fuses."""
    keys = {
        "group_size": None if mode == "per_channel" else 128,
        "zero_domain": "post_scale" if mode == "post_scale" else "pre_scale",
        **keys,
    }
    config = plugin_config.QoQConfig.from_config(QuantizationConfig(**keys).to_dict())
    config.packed_modules_mapping = FUSED
    return config


@contextmanager
def on_rank(rank: int, size: int, *, load_format: str = "auto") -> Iterator[None]:
    """As if this process were one of `size` that share the model's tensors."""
    config = vllm_config.VllmConfig(
        device_config=vllm_config.DeviceConfig(device="cpu"),
        load_config=vllm_config.LoadConfig(load_format=load_format),
    )
    with ExitStack() as stack:
        for module in (layers, parameters):
            stack.enter_context(patch.object(module, "get_tensor_model_parallel_rank", return_value=rank))
            stack.enter_context(patch.object(module, "get_tensor_model_parallel_world_size", return_value=size))
        stack.enter_context(vllm_config.set_current_vllm_config(config))
        yield


def qkv_layer(config: Any, hidden: int, heads: int, kv_heads: int, **keys: Any) -> Any:
    return layers.QKVParallelLinear(
        hidden, HEAD_DIM, heads, kv_heads, quant_config=config, prefix="model.layers.0.self_attn.qkv_proj", **keys
    )


def gate_up_layer(config: Any, hidden: int, size: int, **keys: Any) -> Any:
    return layers.MergedColumnParallelLinear(
        hidden, [size, size], quant_config=config, prefix="model.layers.0.mlp.gate_up_proj", **keys
    )


def down_layer(config: Any, size: int, hidden: int, **keys: Any) -> Any:
    """Row-parallel; what it returns is this rank's summand."""
    return layers.RowParallelLinear(
        size,
        hidden,
        quant_config=config,
        prefix="model.layers.0.mlp.down_proj",
        **{"bias": False, "reduce_results": False, **keys},
    )


def load(layer: Any, linears: Iterable[tuple[str | int | None, QuantizedLinear]]) -> Any:
    """What vLLM's models do with the tensors of a checkpoint, then what its loader does with each layer."""
    for shard_id, linear in linears:
        for part, tensor in pack_linear(linear).items():
            load_tensor(layer, part, tensor, shard_id)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def load_tensor(layer: Any, part: str, tensor: Tensor, shard_id: str | int | None) -> None:
    parameter = getattr(layer, part)
    loader: Callable[..., None] = parameter.weight_loader
    loader(parameter, tensor, *(() if shard_id is None else (shard_id,)))
