"""What the runtime must know of a model: sizes, RoPE, norms. Formulas of RoPE stay in transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, PretrainedConfig

from qoq.formats.arithmetic import rotates
from qoq.recipes.errors import InputError, raise_problems
from qoq.recipes.families import Family, family_of
from qoq.recipes.schema import KeyRotation
from qoq.recipes.shapes import ModelShape

_GIVE_MODEL = "give a folder with a whole config.json, as `qoq quantize` or the model's publisher wrote it"
_SUPPORTED = "`qoq generate --device cpu` runs it through transformers"
_MAX_POSITIONS = 8192
"""Of a model made from a shape, which does not say."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Sizes and settings of a model of one of the known families.

    windows        for each layer: how many of the last tokens it attends to, 0 for all
    cos, sin       float32 [max_positions, D/2] on the CPU: half-split RoPE, scaling included
    head_norms     queries and keys are normalized, head by head, before RoPE
    kv_bits, key_rotation   of the cache that the model is meant to be served with
    dtype          of activations on a GPU
    """

    family: Family
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int
    eps: float
    windows: tuple[int, ...]
    head_norms: bool
    tied_embeddings: bool
    cos: Tensor
    sin: Tensor
    dtype: torch.dtype = torch.float16
    kv_bits: int = 16
    key_rotation: KeyRotation = "none"

    @property
    def max_positions(self) -> int:
        return int(self.cos.shape[0])

    @property
    def qkv_features(self) -> int:
        """Outputs of the fused q, k and v."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def scale(self) -> float:
        """Of scores."""
        return float(self.head_dim**-0.5)

    def served_with(self, kv_bits: int | None, key_rotation: KeyRotation | None = None) -> RuntimeConfig:
        """The same with another cache (None: as it is). Raises InputError for what there is none of."""
        bits = self.kv_bits if kv_bits is None else kv_bits
        if bits not in (4, 8, 16):
            raise InputError(f"kv_bits is {bits}, expected 4, 8 or 16")
        rotation = key_rotation or self.key_rotation
        if bits == 16:
            rotation = "none"
        if rotation != "none" and not rotates(self.head_dim):
            raise InputError(f"key_rotation is {rotation!r}, but head_dim is {self.head_dim}, which is no power of two")
        return replace(self, kv_bits=bits, key_rotation=rotation)


def read_config(path: Path) -> PretrainedConfig:
    """transformers' configuration of a model folder. Raises InputError."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: cannot read the model's configuration: {first}", remedy=_GIVE_MODEL) from error
    return config  # type: ignore[no-any-return]


def runtime_config(config: PretrainedConfig, *, where: str, max_positions: int | None = None) -> RuntimeConfig:
    """What `config` comes to. Raises InputError that lists everything that the runtime has no code for.

    max_positions: as many as a sequence may have; by default, and at most, what the model knows.
    """
    family = family_of(config.model_type, tuple(config.architectures or ()))
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    problems = _problems(config, family, kv_heads, head_dim)
    raise_problems(f"{where}: the runtime cannot run this model", problems, remedy=_SUPPORTED)
    known = int(config.max_position_embeddings)
    cos, sin = _rope_tables(config, family, min(max_positions or known, known))
    return RuntimeConfig(
        family=family,
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        eps=float(config.rms_norm_eps),
        windows=tuple(_window(config, layer) for layer in range(config.num_hidden_layers)),
        head_norms=family.key_fold == "norms",
        tied_embeddings=bool(config.tie_word_embeddings),
        cos=cos,
        sin=sin,
        dtype=torch.bfloat16 if config.dtype == torch.bfloat16 else torch.float16,
    )


def config_of_shape(shape: ModelShape, *, max_positions: int = _MAX_POSITIONS) -> RuntimeConfig:
    """A Llama of the sizes of `shape`, without biases or norms of heads: for measurements on random weights."""
    return runtime_config(llama_of_shape(shape, max_positions=max_positions), where=shape.name)


def llama_of_shape(shape: ModelShape, *, max_positions: int) -> LlamaConfig:
    """The same as transformers' configuration."""
    return LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=max_positions,
    )


def stop_tokens(path: Path, config: PretrainedConfig) -> frozenset[int]:
    """The tokens that end a text, as generation_config.json says, else config.json."""
    found: Any = config.eos_token_id
    if (path / "generation_config.json").is_file():
        try:
            found = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id or found
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise InputError(f"{path}/generation_config.json: cannot be read ({error})") from error
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list | tuple) else [int(found)])


def _problems(config: PretrainedConfig, family: Family, kv_heads: int, head_dim: int) -> list[str]:
    problems = []
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in family.rope_types:
        problems.append(f"RoPE type {rope_type!r} (supported: {', '.join(family.rope_types)})")
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor {partial}; every channel of a head must rotate")
    if head_dim not in family.head_dims:
        problems.append(f"head_dim {head_dim}, expected {' or '.join(map(str, family.head_dims))}")
    if config.num_attention_heads % kv_heads:
        problems.append(f"{config.num_attention_heads} heads do not share {kv_heads} KV heads evenly")
    if getattr(config, "hidden_act", "silu") != "silu":
        problems.append(f"activation {config.hidden_act!r}, expected 'silu'")
    return problems


def _rope_tables(config: PretrainedConfig, family: Family, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin float32 [positions, D/2] of the model's own rotary embedding.

    A dynamic one changes with the length of a text, but not within the positions that the model knows.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rotary = type(model.get_submodule(family.rotary))(config=model.config)
    with torch.no_grad():
        cos, sin = rotary(torch.empty(0), torch.arange(positions).unsqueeze(0))
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


def _window(config: PretrainedConfig, layer: int) -> int:
    # config.json may hold keys that its model does not know, and transformers keeps them as attributes.
    known = type(config).__dataclass_fields__
    window = config.sliding_window if "sliding_window" in known else None
    layer_types = config.layer_types if "layer_types" in known else None
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return 0
    return int(window or 0)
