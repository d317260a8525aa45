"""vLLM's view of a checkpoint's `quantization_config`: which layers are quantized, and what cannot be served."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qoq.formats.quantization_config import QUANT_METHOD
from qoq.formats.quantization_config import QuantizationConfig as CheckpointConfig
from qoq.kernels.vllm.cache import BACKEND, choose_cache, fit_memory
from qoq.kernels.vllm.interface import add_graph_pass, cache_type, is_attention_of, logger
from qoq.recipes.errors import InputError


def prepare(config: Any) -> None:
    """What vLLM calls with the VllmConfig of a model, before it builds it: the cache, and what compiled graphs fuse.

    Graphs are only changed where the environment has QOQ_VLLM_FUSE=1. Nothing changes for models that are not ours.
    Raises as `choose_cache` does.
    """
    choose_cache(config)
    if config.model_config.quantization == QUANT_METHOD and os.environ.get("QOQ_VLLM_FUSE") == "1":
        from qoq.kernels.vllm.fusion import fuse_quantizers

        add_graph_pass(config, fuse_quantizers)


class QoQConfig(QuantizationConfig):  # type: ignore[misc]
    """Quantization method "qoq" of vLLM. `packed_modules_mapping` is filled by vLLM: fused name -> names in the files.

    Raises InputError where the configuration is not understood, or asks for what is not served here.
    """

    def __init__(self, checkpoint: CheckpointConfig) -> None:
        super().__init__()
        _refuse_unserved(checkpoint)
        self.checkpoint = checkpoint

    def __repr__(self) -> str:
        return f"QoQConfig({self.checkpoint})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json holds all of it

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QoQConfig:
        return cls(CheckpointConfig.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names of modules as the model's class in vLLM has them."""
        kept = tuple(hf_to_vllm_mapper.apply_list(list(self.checkpoint.modules_to_not_convert)))
        self.checkpoint = replace(self.checkpoint, modules_to_not_convert=kept)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The linear method of a quantized linear, vLLM's own for one left in 16 bit, None for other layers.

        Raises InputError when only some of the linears that vLLM fuses in `prefix` are quantized.
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from qoq.kernels.vllm.linear import QoQLinearMethod

        if is_attention_of(layer, BACKEND):
            fit_memory(layer)
        else:
            self._warn_of_cache(layer)
        if not isinstance(layer, LinearBase):
            return None
        if is_kept(prefix, self.checkpoint.modules_to_not_convert, self.packed_modules_mapping):
            return UnquantizedLinearMethod()
        return QoQLinearMethod(self.checkpoint, prefix)

    def _warn_of_cache(self, layer: nn.Module) -> None:
        cache = cache_type(layer)
        if cache is not None and self.checkpoint.kv_bits != 16:
            logger.warning_once(
                "qoq: the KV cache is vLLM's own, in %s, not qoq's %d-bit cache, which the checkpoint was made for and "
                "which is kept where neither --kv-cache-dtype nor --attention-backend asks for another.",
                cache,
                self.checkpoint.kv_bits,
            )


def is_kept(name: str, kept: tuple[str, ...], fused: Mapping[str, list[str]]) -> bool:
    """Whether linear `name` of vLLM is left in 16 bit. Raises InputError when that holds for some of its parts only."""
    parent, _, leaf = name.rpartition(".")
    parts = [f"{parent}.{part}" if parent else part for part in fused.get(leaf, [leaf])]
    in_16_bit = [part for part in parts if part in kept]
    if in_16_bit and len(in_16_bit) < len(parts):
        raise InputError(
            f"{name}: vLLM fuses {', '.join(parts)}, of which only {', '.join(in_16_bit)} is left in 16 bit",
            remedy="quantize the model again, with all of them in modules_to_not_convert or none",
        )
    return bool(in_16_bit) or name in kept


def _refuse_unserved(checkpoint: CheckpointConfig) -> None:
    if checkpoint.act_bits != 8:
        raise InputError(
            f"quantization_config: act_bits is {checkpoint.act_bits}; the vLLM plug-in serves 8",
            remedy="quantize the model with act_bits 8, or `qoq export --to vllm-w4a16`",
        )
