"""For anything that reads a Hugging Face model: the quantized weights as 16-bit numbers."""

from __future__ import annotations

from collections.abc import Mapping
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
    plain_config,
    rotation_problems,
)
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.formats.safetensors_file import TensorInfo


class Dequantized(Exporter):
    """An ordinary model with the weights that the kernels multiply by."""

    name = "hf-dequantized"
    summary = "an ordinary 16-bit model with the rounded weights; activations and KV cache are not quantized"
    readers = "transformers, vLLM, llama.cpp's converter, and whatever else reads Hugging Face models"
    notes = ("It shows what rounding the weights costs; it is neither smaller nor faster than the original.",)

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        return list(rotation_problems(checkpoint))

    def shapes(self, checkpoint: Checkpoint, linear: str) -> dict[str, TensorInfo]:
        n, kept = out_features(checkpoint, linear), kept_dtype(checkpoint)
        shapes = {"weight": TensorInfo(kept, (n, in_features(checkpoint, linear)))}
        if has_bias(checkpoint, linear):
            shapes["bias"] = TensorInfo(kept, (n,))
        return shapes

    def tensors(self, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
        stored = {"weight": linear.dequantize().to(dtype)}
        if linear.bias is not None:
            stored["bias"] = linear.bias.to(dtype)
        return stored

    def decode(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
        weight = tensors["weight"].float()
        if weight.shape[1] != in_features:
            raise ValueError(f"the weight has {weight.shape[1]} inputs, expected {in_features}")
        return weight

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return plain_config(checkpoint)
