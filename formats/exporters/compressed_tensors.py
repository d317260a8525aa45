"""For vLLM without a plug-in: the `pack-quantized` format of the compressed-tensors library.

Of each linear (compressed-tensors 0.20, PackedQuantizationCompressor; vLLM 0.26, CompressedTensorsWNA8Int and
CompressedTensorsWNA16):
    weight_packed      int32 [N, K/8]      eight int4 a word, the first in the lowest bits, each plus 8
    weight_scale       16-bit [N, K/128]   of a group: s1 times s2, rounded to the model's dtype
    weight_zero_point  int32 [N/8, K/128]  asymmetric only: zeros minus 8, packed likewise along N
    weight_shape       int64 [2]           N and K
A weight is (int4 - zero) * scale. On the progressive grid that is the weight that qoq multiplies by, but for the
rounding of s1 * s2 to 16 bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qoq.formats.checkpoint import Checkpoint
from qoq.formats.exporters.exporter import (
    Exporter,
    fusion_problems,
    has_bias,
    in_features,
    kept_dtype,
    out_features,
    padding_problems,
    plain_config,
    rotation_problems,
)
from qoq.formats.packing import unpack_s2
from qoq.formats.quantized_linear import SYMMETRIC_ZERO, QuantizedLinear
from qoq.formats.safetensors_file import TensorInfo
from qoq.recipes.schema import GROUP_SIZE

_BITS, _IN_WORD = 4, 8
_FORMAT = "pack-quantized"
_KV_NOTE = (
    "The KV cache is vLLM's; --kv-cache-dtype int4_per_token_head asks for 4 bits, which its kernels read slowly."
)


class _PackQuantized(Exporter):
    """Both forms; `_symmetric` ones have no zeros."""

    _symmetric: bool

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        found = list(rotation_problems(checkpoint))
        if checkpoint.quantization.group_size is None:
            found.append("weights are quantized per channel: this format is for groups of 128 (--g128)")
            return found
        return [*found, *padding_problems(checkpoint), *fusion_problems(checkpoint), *self._zero_problems(checkpoint)]

    @abstractmethod
    def _zero_problems(self, checkpoint: Checkpoint) -> Iterator[str]:
        """What of activations or zeros does not fit."""

    def shapes(self, checkpoint: Checkpoint, linear: str) -> dict[str, TensorInfo]:
        n, k = out_features(checkpoint, linear), in_features(checkpoint, linear)
        kept = kept_dtype(checkpoint)
        shapes = {
            "weight_packed": TensorInfo(torch.int32, (n, k // _IN_WORD)),
            "weight_scale": TensorInfo(kept, (n, k // GROUP_SIZE)),
            "weight_shape": TensorInfo(torch.int64, (2,)),
        }
        if not self._symmetric:
            shapes["weight_zero_point"] = TensorInfo(torch.int32, (n // _IN_WORD, k // GROUP_SIZE))
        if has_bias(checkpoint, linear):
            shapes["bias"] = TensorInfo(kept, (n,))
        return shapes

    def tensors(self, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
        if linear.s2_scales is None:
            raise ValueError("expected the progressive grid")
        scales = linear.s1_scales.float().unsqueeze(1) * linear.s2_scales.float()
        stored = {
            "weight_packed": pack_words(linear.codes),
            "weight_scale": scales.to(dtype),
            "weight_shape": torch.tensor(linear.codes.shape, dtype=torch.int64),
        }
        if not self._symmetric:
            stored["weight_zero_point"] = pack_words(linear.zeros.values.t()).t().contiguous()
        if linear.bias is not None:
            stored["bias"] = linear.bias.to(dtype)
        return stored

    def decode(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
        n, k = tensors["weight_shape"].tolist()
        if k != in_features:
            raise ValueError(f"weight_shape says {k} inputs, expected {in_features}")
        codes = unpack_words(tensors["weight_packed"]).view(n, -1, GROUP_SIZE).float()
        zeros = torch.full((n, codes.shape[1]), float(SYMMETRIC_ZERO))
        if not self._symmetric:
            zeros = unpack_words(tensors["weight_zero_point"].t().contiguous()).t().float()
        weight = (codes - zeros.unsqueeze(2)) * tensors["weight_scale"].float().unsqueeze(2)
        return weight.view(n, k)

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        weights = {
            "num_bits": _BITS,
            "type": "int",
            "symmetric": self._symmetric,
            "strategy": "group",
            "group_size": GROUP_SIZE,
            "dynamic": False,
        }
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        group = {
            "targets": ["Linear"],
            "format": _FORMAT,  # with 8-bit activations the library would take another one for granted
            "weights": weights,
            "input_activations": activations if self._symmetric else None,
            "output_activations": None,
        }
        quantization = {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(checkpoint.quantization.modules_to_not_convert),
            "kv_cache_scheme": None,
        }
        return {**plain_config(checkpoint), "quantization_config": quantization}


class VllmW4A8(_PackQuantized):
    """Symmetric int4 in groups of 128, int8 activations per token."""

    name = "vllm-w4a8"
    summary = "symmetric int4 groups of 128 with int8 activations, for stock vLLM; needs the recipe qoq-sym"
    readers = "vLLM 0.26 and newer (Turing and newer GPUs); the rules were read in its sources"
    notes = (
        """On Hopper vLLM takes fp8 activations, unless --kernel-config '{"linear_backend": "humming"}' is given.""",
        _KV_NOTE,
    )
    _symmetric = True

    def _zero_problems(self, checkpoint: Checkpoint) -> Iterator[str]:
        if checkpoint.quantization.act_bits != 8:
            yield f"act_bits is {checkpoint.quantization.act_bits}: this format has 8-bit activations"
        asymmetric = [name for name in checkpoint.quantized_linears() if not _is_symmetric(checkpoint, name)]
        if asymmetric:
            first = f"{asymmetric[0]}" + (f" and {len(asymmetric) - 1} more" if len(asymmetric) > 1 else "")
            yield (
                f"groups with zeros other than {SYMMETRIC_ZERO} ({first}): vLLM's W4A8 is symmetric; quantize with "
                "--recipe qoq-sym, or export to vllm-w4a16"
            )


class VllmW4A16(_PackQuantized):
    """Asymmetric int4 in groups of 128, activations in 16 bit."""

    name = "vllm-w4a16"
    summary = "int4 groups of 128 with zeros and 16-bit activations, for stock vLLM; any g128 recipe with whole zeros"
    readers = "vLLM 0.26 and newer (Turing and newer GPUs); the rules were read in its sources"
    notes = (
        "Activations stay in 16 bit: no 8-bit products, and a little closer to the 16-bit model.",
        "transformers does not load it: with compressed-tensors 0.20 it makes room for zeros that are not packed.",
        _KV_NOTE,
    )
    _symmetric = False

    def _zero_problems(self, checkpoint: Checkpoint) -> Iterator[str]:
        if checkpoint.quantization.zero_domain != "pre_scale":
            yield (
                f"zero_domain is {checkpoint.quantization.zero_domain}: zeros of this format are whole codes; quantize "
                "with a recipe whose zero_domain is pre_scale, such as qoq-g128"
            )


def _is_symmetric(checkpoint: Checkpoint, linear: str) -> bool:
    """Whether all zeros are code 8, by the small tensors of the linear."""
    scales, zeros = (unpack_s2(checkpoint.source.load(f"{linear}.s2_{part}")) for part in ("scales", "zeros"))
    return torch.equal(-zeros, SYMMETRIC_ZERO * scales)  # uint8: both sides modulo 256


def pack_words(codes: Tensor) -> Tensor:
    """uint8 [N, C] of 0..15 as int32 [N, C/8], the first of eight in the lowest bits; C is a multiple of 8."""
    eights = codes.contiguous().view(codes.shape[0], -1, _IN_WORD).long()
    words = (eights << torch.arange(0, 32, _BITS)).sum(dim=2)
    return words.to(torch.int32)  # keeps the low 32 bits


def unpack_words(words: Tensor) -> Tensor:
    """The inverse: uint8 [N, C] from int32 [N, C/8]."""
    codes = (words.unsqueeze(2) >> torch.arange(0, 32, _BITS, dtype=torch.int32)) & 15
    return codes.reshape(words.shape[0], -1).to(torch.uint8)
