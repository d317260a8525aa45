"""For servers that read QoQ's packed tensors as they are: the checkpoint's own bytes, and their conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qoq.formats.checkpoint import Checkpoint
from qoq.formats.exporters.exporter import (
    Exporter,
    has_bias,
    in_features,
    kept_dtype,
    out_features,
    padding_problems,
    plain_config,
    rotation_problems,
)
from qoq.formats.packing import pack_linear, packed_shapes, unpack_linear
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.formats.safetensors_file import TensorInfo
from qoq.recipes.schema import ZeroDomain

_CHANNELS_G128, _CHANNELS = 64, 128
"""Their kernels leave outputs past a multiple of so many channels unwritten, in groups and per channel."""


class _Native(Exporter):
    def problems(self, checkpoint: Checkpoint) -> list[str]:
        return [*rotation_problems(checkpoint), *padding_problems(checkpoint), *_kernel_problems(checkpoint)]

    def shapes(self, checkpoint: Checkpoint, linear: str) -> dict[str, TensorInfo]:
        shapes = packed_shapes(
            out_features(checkpoint, linear),
            in_features(checkpoint, linear),
            progressive=checkpoint.quantization.group_size is not None,
            has_bias=has_bias(checkpoint, linear),
        )
        return {part: TensorInfo(dtype, shape) for part, (dtype, shape) in shapes.items()}

    def tensors(self, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
        return pack_linear(linear)

    def decode(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
        # What a progressive weight is does not depend on whether its zeros are whole codes.
        domain: ZeroDomain = "post_scale" if "s2_scales" in tensors else "pre_scale"
        return unpack_linear(tensors, in_features=in_features, zero_domain=domain).dequantize()


class Omniserve(_Native):
    """The runtime of the QServe paper."""

    name = "omniserve"
    summary = "the packed tensors as omniserve reads them (any recipe with norms_folded)"
    readers = "omniserve (W4A8KV4 and W4A8KV8, Llama and Mistral), from its sources of 2025-02; not run here"
    notes = (
        "Give --group-size 128 (-1 per channel), --kv-quant-granularity fine_grained and --sparse-decode-mode 0.",
        "NUM_RETRIEVAL_GPU_PAGE_BLOCKS and NUM_STREAMING_GPU_PAGE_BLOCKS must be set in its environment.",
    )

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        return [*super().problems(checkpoint), *_omniserve_problems(checkpoint)]

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return plain_config(checkpoint)


class SGLang(_Native):
    """SGLang while it had QoQ."""

    name = "sglang"
    summary = "the packed tensors with the configuration of SGLang's qoq method"
    readers = "SGLang 0.4.6.post5 to 0.5.15.post1; later versions dropped qoq. Not run here"
    notes = (
        "Serve it on one GPU: its tensor parallelism cuts packed rows in the wrong places.",
        "The KV cache is SGLang's own, of 8 or 16 bits.",
    )

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        group_size = checkpoint.quantization.to_dict()["group_size"]
        quantization = {"quant_method": "qoq", "wbits": 4, "group_size": group_size}
        return {**plain_config(checkpoint), "quantization_config": quantization}


def _kernel_problems(checkpoint: Checkpoint) -> Iterator[str]:
    dtype = kept_dtype(checkpoint)
    if dtype != torch.float16:
        yield f"the tensors left in 16 bit are {dtype}: their kernels take float16 (quantize with --dtype float16)"
    step = _CHANNELS if checkpoint.quantization.group_size is None else _CHANNELS_G128
    for linear in checkpoint.quantized_linears():
        channels = out_features(checkpoint, linear)
        if channels % step:
            yield f"{linear}: out_features {channels} is no multiple of {step}: their kernels leave the rest unwritten"


def _omniserve_problems(checkpoint: Checkpoint) -> Iterator[str]:
    config, quantization = checkpoint.config, checkpoint.quantization
    if not quantization.norms_folded:
        yield "norm gains are kept apart, and its loader drops them: use a recipe that rotates, such as qoq-g128"
    if config["model_type"] not in ("llama", "mistral"):
        yield f"model_type is {config['model_type']}: it has llama and mistral only"
    kept = [name for name in quantization.modules_to_not_convert if name != "lm_head"]
    if kept:
        yield f"{len(kept)} linears are left in 16 bit ({kept[0]}, ...): it takes all of them in 4 bits"
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    if head_dim != 128 or heads * head_dim != config["hidden_size"]:
        yield f"head_dim is {head_dim} with {heads} heads: its attention has head_dim 128 = hidden_size / heads only"
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        yield f"RoPE scaling is {kind}: it knows linear only"
    if not checkpoint.has_tensor("lm_head.weight"):
        yield "there is no lm_head.weight (tied embeddings): its loader wants one"
    if quantization.kv_bits == 16:
        yield "kv_bits is 16: with packed weights its KV cache has 4 or 8 bits"
