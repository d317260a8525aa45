"""A quantized linear of vLLM: holds this rank's shard of the packed tensors, and computes with qoq's kernels.

Output channels are sharded by vLLM's own loaders, which know fused linears and replicated KV heads, and cut packed
tensors rightly at multiples of 32. Inputs are cut here, on the tiles of qweight, before a tensor goes to those loaders.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

import qoq.kernels.ops  # registers the operators
from qoq.formats.arithmetic import IntegerWeight, linear_forward
from qoq.formats.packing import CHANNEL_AXIS, TILE, packed_shapes, shard_columns, shard_rows, unpack_linear
from qoq.formats.quantization_config import QuantizationConfig
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.kernels.act_quant import MAX_K
from qoq.kernels.modules import IN_FEATURES_STEP, is_on_gpu, wants_tiles
from qoq.kernels.random_weights import random_packed_linear
from qoq.kernels.tiles import tile_weights
from qoq.kernels.vllm.interface import ShardId, draws_random_weights, load_as_vllm_does, parts_of, stored_channels
from qoq.recipes.errors import EnvironmentProblem, InputError, raise_problems
from qoq.recipes.schema import GROUP_SIZE

_TILED = ("qweight", "s2_scales", "s2_zeros")
_CHECKED_ROWS = 4096
"""Channels that are decoded at a time for the check, which takes some ten bytes a weight."""


class QoQLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """How one linear, `name`, is created, loaded and multiplied by.

    Its parameters are named as in the checkpoint (`qoq.formats.packing`), of this rank's channels and inputs; the bias
    is vLLM's, in the model's dtype. After loading, on Hopper, `weight_tiles` takes the place of qweight, s2_scales and
    s2_zeros. On a CPU the reference arithmetic computes the same numbers.
    """

    def __init__(self, config: QuantizationConfig, name: str) -> None:
        self.config = config
        self.name = name
        self.progressive = config.group_size is not None
        self.backend: Literal["tiles", "packed", "reference"] = "reference"
        self._loaded: dict[str, set[int]] = {}  # by tensor, the parts of a fused linear that came
        self._reference: IntegerWeight | None = None

    # ---- creation

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Register this rank's parameters. Raises InputError, naming the linear, when its sizes cannot be sharded."""
        raise_problems(
            f"{self.name}: this linear cannot be served on {getattr(layer, 'tp_size', 1)} GPUs",
            _size_problems(input_size, input_size_per_partition, output_partition_sizes),
            remedy="choose another tensor_parallel_size",
        )
        self.in_features = input_size_per_partition
        self.input_size = input_size
        self.out_features = sum(output_partition_sizes)
        self.parts = len(output_partition_sizes)
        self.draws_random = draws_random_weights()
        for part, (dtype, shape) in self._shapes(self.out_features, self.in_features).items():
            parameter = Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            # The loader is a bound method: vLLM's reloading rebinds those when it makes the parameters anew.
            attributes = {"part": part, "output_dim": CHANNEL_AXIS[part], "weight_loader": MethodType(_load, layer)}
            set_weight_attrs(parameter, attributes)
            layer.register_parameter(part, parameter)

    def _shapes(self, out_features: int, in_features: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return packed_shapes(out_features, in_features, progressive=self.progressive, has_bias=False)

    # ---- loading

    def load(self, layer: Any, param: Any, loaded_weight: Tensor, shard_id: ShardId) -> None:
        """Copy this rank's share of a checkpoint's tensor. Raises InputError unless it is what the model calls for."""
        part: str = param.part
        dtype, shape = self._shapes(stored_channels(layer, shard_id), self.input_size)[part]
        if loaded_weight.dtype != dtype or tuple(loaded_weight.shape) != shape:
            found = f"{loaded_weight.dtype} {list(loaded_weight.shape)}"
            which = "" if shard_id is None else f" ({shard_id})"
            raise InputError(
                f"{self.name}.{part}{which}: expected {dtype} {list(shape)}, got {found}",
                remedy="the checkpoint is damaged, or its config.json belongs to another model",
            )
        if self.in_features < self.input_size:
            start = layer.tp_rank * self.in_features
            loaded_weight = shard_columns(part, loaded_weight, start, start + self.in_features)
        load_as_vllm_does(layer)(param, loaded_weight, *(() if shard_id is None else (shard_id,)))
        self._loaded.setdefault(part, set()).update(parts_of(shard_id, self.parts))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the bytes, and bring them into the order of the GPU's kernels.

        Raises InputError when a tensor is missing or illegal: a value that leaves a byte would corrupt results
        unnoticed. Raises EnvironmentProblem when the kernels cannot run on the GPU.
        """
        packed = {part: getattr(layer, part).data for part in self._shapes(self.out_features, self.in_features)}
        if self.draws_random:
            _draw_weights_(packed, self.in_features)
        else:
            self._check_complete(packed)
        self._loaded = {}
        if not is_on_gpu(packed["qweight"]):
            self._reference = IntegerWeight.decode(self._unpack(packed), packed["qweight"].device)
            return
        self._check_bytes(packed)
        problem = qoq.kernels.ops.usable_device_problem()
        if problem is not None:
            raise EnvironmentProblem(f"{self.name}: the kernels cannot run: {problem}", remedy="see `qoq doctor`")
        self.backend = "packed"
        self._keep_kernel_bias(layer)
        if wants_tiles(packed["qweight"]):
            tiles = tile_weights(packed)
            if tiles.is_cuda:  # the kernels read weights ahead of what was enqueued
                torch.cuda.current_stream(tiles.device).synchronize()
            for part in _TILED:
                if part in packed:
                    delattr(layer, part)
            layer.register_parameter("weight_tiles", Parameter(tiles, requires_grad=False))
            self.backend = "tiles"

    def _check_complete(self, packed: Mapping[str, Tensor]) -> None:
        everything = set(range(self.parts))
        problems = [
            f"{self.name}.{part}" + (f": parts {sorted(missing)} of {self.parts}" if self.parts > 1 else "")
            for part in packed
            if (missing := everything - self._loaded.get(part, set()))
        ]
        raise_problems(
            "tensors are missing from the checkpoint",
            problems,
            remedy="the checkpoint is incomplete, or its group_size or modules_to_not_convert were changed",
        )

    def _check_bytes(self, packed: Mapping[str, Tensor]) -> None:
        """A stretch of channels at a time: decoded, a large linear would take more memory than serving it does."""
        for start in range(0, self.out_features, _CHECKED_ROWS):
            stop = min(start + _CHECKED_ROWS, self.out_features)
            self._unpack({part: shard_rows(part, tensor, start, stop) for part, tensor in packed.items()})

    def _unpack(self, packed: Mapping[str, Tensor]) -> QuantizedLinear:
        try:
            return unpack_linear(packed, in_features=self.in_features, zero_domain=self.config.zero_domain)
        except ValueError as error:
            raise InputError(
                f"{self.name}: {error}", remedy="the checkpoint is damaged, or was not written by qoq"
            ) from error

    def _keep_kernel_bias(self, layer: Any) -> None:
        """The kernels take float16, and round it to the output's dtype again: bfloat16 values come through exactly."""
        bias = getattr(layer, "bias", None)
        if bias is None or bias.dtype == torch.float16:
            return
        kernel_bias = bias.data.half()
        if not bool(torch.isfinite(kernel_bias).all()):
            raise InputError(f"{self.name}.bias leaves float16 when it is rounded to {bias.dtype}")
        layer.register_parameter("kernel_bias", Parameter(kernel_bias, requires_grad=False))

    # ---- multiplying

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., N] = x [..., K] times the weight, plus `bias` (this layer's, or None), in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        shape = (*x.shape[:-1], self.out_features)
        if self.backend == "reference":
            if self._reference is None:
                raise InputError(f"{self.name}: used before its weights were loaded")
            reference = linear_forward(rows, self._reference, act_bits=8)
            return (reference if bias is None else reference + bias.to(x.dtype)).view(shape)
        rows = rows.contiguous()
        if bias is not None and bias.dtype != torch.float16:
            bias = layer.kernel_bias
        s1_szeros = None if self.progressive else layer.s1_szeros
        if self.backend == "tiles":
            quantized = torch.ops.qoq.quantize_activation(rows, tiled=True)
            tiled: Tensor = torch.ops.qoq.w4a8_gemm_sm90(
                *quantized, layer.weight_tiles, layer.s1_scales, s1_szeros, bias, x.dtype
            )
            return tiled.view(shape)
        y: Tensor = torch.ops.qoq.w4a8_gemm(
            *torch.ops.qoq.quantize_activation(rows),
            layer.qweight,
            layer.s1_scales,
            layer.s2_scales if self.progressive else None,
            layer.s2_zeros if self.progressive else None,
            s1_szeros,
            bias,
            x.dtype,
        )
        return y.view(shape)


def _load(layer: Any, param: Any, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
    layer.quant_method.load(layer, param, loaded_weight, loaded_shard_id)


def _size_problems(input_size: int, in_features: int, out_features: list[int]) -> list[str]:
    problems = []
    if any(size % TILE for size in out_features):
        sizes = ", ".join(map(str, out_features))
        problems.append(f"each GPU gets {sizes} output channels, expected multiples of {TILE}")
    if in_features < input_size and in_features % GROUP_SIZE:
        problems.append(f"each GPU gets {in_features} of {input_size} inputs, expected a multiple of {GROUP_SIZE}")
    elif in_features % IN_FEATURES_STEP or in_features > MAX_K:
        problems.append(f"{in_features} inputs, expected a multiple of {IN_FEATURES_STEP} up to {MAX_K}")
    return problems


def _draw_weights_(packed: Mapping[str, Tensor], in_features: int) -> None:
    """Legal random weights over whatever the tensors hold: vLLM's own would have negative scales."""
    qweight = packed["qweight"]
    drawn = random_packed_linear(
        qweight.shape[0],
        in_features,
        progressive="s2_scales" in packed,
        generator=torch.Generator(qweight.device).manual_seed(0),
    )
    for part, tensor in packed.items():
        tensor.copy_(drawn[part])
