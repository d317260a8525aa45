"""The tensors of a model for the runtime: q, k and v as one linear, gate and up as one.

Each block is fused, checked and brought to the order of its kernels before the next one is read, so that memory holds
the model and one block's linear twice; or lm_head, on its way to 8 bits, three times in 8 bits beside the 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from qoq.formats.arithmetic import IntegerWeight, quantize_channels
from qoq.formats.checkpoint import Checkpoint, is_checkpoint, open_checkpoint
from qoq.formats.packing import padded_in_features, unpack_linear
from qoq.formats.sources import TensorSource, open_folder
from qoq.kernels.act_quant import MAX_NORM_K
from qoq.kernels.modules import IN_FEATURES_STEP, wants_tiles
from qoq.kernels.runtime.config import RuntimeConfig
from qoq.kernels.runtime.elementwise import Fuse, plain
from qoq.kernels.runtime.linears import (
    DenseLinear,
    Int8Linear,
    Linear,
    Norm,
    PackedLinear,
    ReferenceLinear,
    TiledLinear,
    joined,
)
from qoq.kernels.tiles import tile_int8_weights, tile_weights
from qoq.recipes.errors import InputError
from qoq.recipes.schema import ZeroDomain

Arithmetic = Literal["kernels", "reference"]
"""What computes: CUDA kernels, or the reference on any device."""
_HEAD_STEP, _HIDDEN_STEP = 32, 8
"""That outputs and inputs of an 8-bit lm_head are multiples of: its product's and its quantizer's."""
_ROWS_AT_ONCE = 8192
"""Of lm_head, which are copied to float32 on their way to 8 bits."""
_ALONG_CHANNELS = {"qweight": 0, "s1_scales": 0, "s1_szeros": 0, "bias": 0, "s2_scales": 1, "s2_zeros": 1}
"""The axis of each packed tensor along which linears are put side by side: N, in whole stripes of 32 channels."""


@dataclass(frozen=True)
class BlockWeights:
    """A decoder block; head_norms [heads + KV heads, D] are the gains of queries' and keys' norms, if there are any."""

    input_norm: Norm
    qkv: Linear
    head_norms: Tensor | None
    o: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class ModelWeights:
    """embedding [V, H], which lm_head may have as its weight."""

    embedding: Tensor
    blocks: tuple[BlockWeights, ...]
    final_norm: Norm
    lm_head: Linear

    @property
    def nbytes(self) -> int:
        """Of what takes memory: the linears, the embedding and the head; norms do not count."""
        linears = sum(b.qkv.nbytes + b.o.nbytes + b.gate_up.nbytes + b.down.nbytes for b in self.blocks)
        is_tied = isinstance(self.lm_head, DenseLinear) and self.lm_head.weight is self.embedding
        head = 0 if is_tied else self.lm_head.nbytes
        return linears + self.embedding.nbytes + head


def load_weights(
    path: Path,
    config: RuntimeConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    arithmetic: Arithmetic,
    act_bits: int | None = None,
    lm_head_bits: int = 16,
    fuse: Fuse = plain,
    on_block: Callable[[int], None] = lambda _: None,
) -> ModelWeights:
    """The weights of a checkpoint or of a 16-bit model's folder; act_bits None: as the checkpoint says.

    Raises InputError, by the tensor's name, for what is missing, damaged or of another shape.
    """
    checkpoint = open_checkpoint(path) if is_checkpoint(path) else None
    source = checkpoint.source if checkpoint is not None else open_folder(path)
    reader = _Reader(source, checkpoint, config, device, dtype, arithmetic, act_bits, fuse)
    blocks = []
    for index in range(config.num_layers):
        blocks.append(reader.block(index))
        on_block(index)
    family, hidden = config.family, config.hidden_size
    embedding = reader.tensor(f"{family.embedding}.weight", (config.vocab_size, hidden))
    head = embedding
    if not config.tied_embeddings:
        head = reader.tensor(f"{family.lm_head}.weight", (config.vocab_size, hidden))
    lm_head = place_head(head, lm_head_bits, arithmetic, fuse)
    del head
    _settle(device)
    return ModelWeights(embedding, tuple(blocks), reader.norm(family.final_norm), lm_head)


def place_head(weight: Tensor, bits: int, arithmetic: Arithmetic, fuse: Fuse) -> Linear:
    """lm_head of weight [V, H] in the model's dtype: as it is, or with 8 bits (`quantize_channels`) and int8 inputs.

    Raises InputError for a vocabulary that the kernels cannot have in 8 bits.
    """
    if bits == 16:
        return DenseLinear(weight, None, fuse)
    vocabulary, hidden = weight.shape
    parts = [quantize_channels(rows) for rows in weight.split(_ROWS_AT_ONCE)]
    values, scales = torch.cat([part.values for part in parts]), torch.cat([part.s1_scales for part in parts])
    del parts
    if arithmetic == "reference":
        return ReferenceLinear(IntegerWeight(values, scales, None, None), 8)
    if vocabulary % _HEAD_STEP or hidden % _HIDDEN_STEP or hidden > MAX_NORM_K:
        raise InputError(
            f"lm_head: {vocabulary} tokens of {hidden} values; in 8 bits the kernels take multiples of {_HEAD_STEP} "
            f"and {_HIDDEN_STEP}, and up to {MAX_NORM_K} values",
            remedy="leave lm_head at 16 bits",
        )
    padded = functional.pad(values, (0, padded_in_features(hidden) - hidden))
    del values
    if wants_tiles(padded):
        return TiledLinear(tile_int8_weights(padded), scales.half(), None, None, int8=True)
    return Int8Linear(padded, scales.half())


def place_packed(
    packed: Mapping[str, Tensor],
    *,
    in_features: int,
    zero_domain: ZeroDomain,
    act_bits: int,
    arithmetic: Arithmetic,
) -> Linear:
    """A linear of packed tensors on their device. Raises ValueError where they are not legal (`unpack_linear`)."""
    logical = unpack_linear(packed, in_features=in_features, zero_domain=zero_domain)
    if arithmetic == "reference":
        return ReferenceLinear(IntegerWeight.decode(logical, packed["qweight"].device), act_bits)
    return place_checked(packed)


def place_checked(packed: Mapping[str, Tensor]) -> Linear:
    """A linear for the kernels of packed tensors that are known to be legal."""
    if wants_tiles(packed["qweight"]):
        return TiledLinear(tile_weights(packed), packed["s1_scales"], packed.get("s1_szeros"), packed.get("bias"))
    names = ("s2_scales", "s2_zeros", "s1_szeros", "bias")
    return PackedLinear(packed["qweight"], packed["s1_scales"], *(packed.get(name) for name in names))


def fuse_packed(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Packed linears of one input as one, channels in the order of `parts`; a missing bias becomes zeros."""
    names = {name for part in parts for name in part}
    fused = {}
    for name in names:
        tensors = [
            part[name] if name in part else torch.zeros_like(part["s1_scales"])  # only a bias may be missing
            for part in parts
        ]
        fused[name] = torch.cat(tensors, dim=_ALONG_CHANNELS[name]).contiguous()
    return fused


class _Reader:
    """Reads tensors by name onto the device."""

    def __init__(
        self,
        source: TensorSource,
        checkpoint: Checkpoint | None,
        config: RuntimeConfig,
        device: torch.device,
        dtype: torch.dtype,
        arithmetic: Arithmetic,
        act_bits: int | None,
        fuse: Fuse,
    ) -> None:
        self._source, self._checkpoint, self._config = source, checkpoint, config
        self._act_bits, self._fuse = act_bits, fuse
        self._device, self._dtype, self._arithmetic = device, dtype, arithmetic
        self._names = frozenset(source.names())

    def block(self, index: int) -> BlockWeights:
        config, family = self._config, self._config.family
        prefix = family.block_prefix(index)
        hidden, heads, kv = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        head_norms = None
        if config.head_norms:
            gains = [
                self.tensor(f"{prefix}{name}.weight", (config.head_dim,)).expand(count, -1)
                for name, count in ((family.query_norm, config.num_heads), (family.key_norm, config.num_kv_heads))
            ]
            head_norms = torch.cat(gains)
        roles = family.roles
        return BlockWeights(
            input_norm=self.norm(prefix + family.input_norm),
            qkv=self._linear(prefix, [(roles["attn_q"], heads), (roles["attn_k"], kv), (roles["attn_v"], kv)], hidden),
            head_norms=head_norms,
            o=self._linear(prefix, [(roles["attn_out"], hidden)], heads),
            mlp_norm=self.norm(prefix + family.mlp_norm),
            gate_up=self._linear(
                prefix, [(roles[role], config.intermediate_size) for role in ("mlp_gate", "mlp_up")], hidden
            ),
            down=self._linear(prefix, [(roles["mlp_down"], hidden)], config.intermediate_size),
        )

    def norm(self, name: str) -> Norm:
        return Norm(self.tensor(f"{name}.weight", (self._config.hidden_size,)), self._config.eps)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A 16-bit tensor in the runtime's dtype."""
        info = self._source.info(name)
        if info.shape != shape:
            raise InputError(
                f"{self._source.location}: tensor {name}: shape {list(info.shape)}, "
                f"the configuration says {list(shape)}",
                remedy="check that config.json belongs to these weights",
            )
        return self._source.load(name).to(self._device, self._dtype)

    def _linear(self, prefix: str, parts: Sequence[tuple[str, int]], in_features: int) -> Linear:
        """One linear of `parts` (name, outputs), or several where some are quantized and some are not."""
        names = [prefix + name for name, _ in parts]
        quantized = [self._checkpoint is not None and self._checkpoint.is_quantized(name) for name in names]
        if all(quantized):
            return self._packed(names, parts, in_features)
        if not any(quantized):
            return self._dense(names, parts, in_features)
        return joined([
            (self._packed if is_quantized else self._dense)([name], [part], in_features)
            for name, part, is_quantized in zip(names, parts, quantized, strict=True)
        ])  # fmt: skip

    def _dense(self, names: Sequence[str], parts: Sequence[tuple[str, int]], in_features: int) -> DenseLinear:
        outputs = [count for _, count in parts]
        weights = [self.tensor(f"{n}.weight", (count, in_features)) for n, count in zip(names, outputs, strict=True)]
        biases = [
            self.tensor(f"{name}.bias", (count,)) if f"{name}.bias" in self._names else weights[0].new_zeros(count)
            for name, count in zip(names, outputs, strict=True)
        ]
        has_bias = any(f"{name}.bias" in self._names for name in names)
        return DenseLinear(torch.cat(weights), torch.cat(biases) if has_bias else None, self._fuse)

    def _packed(self, names: Sequence[str], parts: Sequence[tuple[str, int]], in_features: int) -> Linear:
        checkpoint = self._checkpoint
        if checkpoint is None:
            raise RuntimeError("only a checkpoint has packed tensors")
        quantization = checkpoint.quantization
        act_bits = self._act_bits or quantization.act_bits
        if self._arithmetic == "kernels" and (act_bits != 8 or in_features % IN_FEATURES_STEP):
            raise InputError(
                f"{names[0]}: the kernels take 8-bit activations and in_features that are a multiple of "
                f"{IN_FEATURES_STEP}, got {act_bits} bits and {in_features}",
                remedy="use the reference backend",
            )
        packed = []
        for name, (_, outputs) in zip(names, parts, strict=True):
            tensors = checkpoint.packed(name, in_features=in_features)
            if tensors["qweight"].shape[0] != outputs:
                found = tensors["qweight"].shape[0]
                raise InputError(
                    f"{checkpoint.folder}: {name}: {found} output features, the configuration says {outputs}",
                    remedy="check that config.json belongs to these weights",
                )
            packed.append({part: tensor.to(self._device) for part, tensor in tensors.items()})
        fused = fuse_packed(packed)
        del packed
        try:
            return place_packed(
                fused,
                in_features=in_features,
                zero_domain=quantization.zero_domain,
                act_bits=act_bits,
                arithmetic=self._arithmetic,
            )
        except ValueError as error:
            raise InputError(
                f"{checkpoint.folder}: {', '.join(names)}: {error}",
                remedy="the checkpoint is damaged: quantize the model again",
            ) from error


def _settle(device: torch.device) -> None:
    """Hopper's kernels read weights ahead of what was enqueued; and what was held twice is given back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
