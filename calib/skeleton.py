"""The model without its weights: transformers' own modules on the meta device, and what was checked of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from qoq.calib.attention import ATTENTION_NAME
from qoq.formats.packing import TILE
from qoq.formats.sources import is_gguf
from qoq.recipes.errors import InputError, raise_problems
from qoq.recipes.families import Family, family_of

_DOWNLOAD_AGAIN = "copy or download the file again"
_SUPPORTED = "`qoq models` lists what is supported; other sizes and RoPE variants need a change in qoq"


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device with its family; no weights are allocated."""

    config: PretrainedConfig
    family: Family
    model: PreTrainedModel

    @property
    def num_blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def num_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        given = getattr(self.config, "num_key_value_heads", None)
        return self.num_heads if given is None else int(given)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.hidden_size // self.num_heads)

    @property
    def is_tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    def block(self, index: int) -> nn.Module:
        """A fresh copy of block `index` on the meta device."""
        return copy.deepcopy(self.model.get_submodule(f"{self.family.blocks}.{index}"))

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of a block that can be quantized: full module name to (meta) module."""
        prefix = self.family.block_prefix(index)
        return {
            prefix + name: self.model.get_submodule(prefix + name)  # type: ignore[misc]
            for name in self.family.roles.values()
        }

    def all_linears(self) -> dict[str, nn.Linear]:
        """`linears` of every block, in order."""
        return {name: linear for i in range(self.num_blocks) for name, linear in self.linears(i).items()}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a model folder must hold, by name; a tied lm_head is not among them."""
        head = f"{self.family.lm_head}.weight"
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        if self.is_tied:
            shapes.pop(head, None)
        return shapes

    def rotary(self, device: torch.device) -> nn.Module:
        """The rotary embedding of all blocks, on `device`."""
        with torch.device(device):
            return type(self.model.get_submodule(self.family.rotary))(config=self.config)

    def final_norm(self) -> nn.Module:
        return copy.deepcopy(self.model.get_submodule(self.family.final_norm))

    def sliding_window(self, index: int) -> int | None:
        """Tokens that block `index` attends to, or None for all."""
        # config.json may hold keys that its model does not know, and transformers keeps them as attributes.
        known = type(self.config).__dataclass_fields__
        window = self.config.sliding_window if "sliding_window" in known else None
        layer_types = self.config.layer_types if "layer_types" in known else None
        if layer_types is not None and layer_types[index] != "sliding_attention":
            return None
        return int(window) if window is not None else None


def load_config(path: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the configuration of a model folder or a GGUF file. Raises InputError."""
    folder, gguf_file = (path.parent, path.name) if is_gguf(path) else (path, None)
    if gguf_file is None and not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json", remedy="pass the folder of a Hugging Face model, or a .gguf file")
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    try:
        config = AutoConfig.from_pretrained(folder, **kwargs)
    except Exception as error:  # transformers raises many kinds here; each means that this config is of no use
        needs_trust = "trust_remote_code" in str(error)
        raise InputError(
            f"{path}: cannot read the model's configuration: {_reason(error)}",
            remedy="pass --trust-remote-code if you trust this model's code" if needs_trust else _DOWNLOAD_AGAIN,
        ) from error
    if not isinstance(config, PretrainedConfig):
        raise InputError(f"{path}: config.json does not describe a model")
    return config


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Read the tokenizer of a model folder or a GGUF file. Raises InputError."""
    folder, gguf_file = (path.parent, path.name) if is_gguf(path) else (path, None)
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    elif not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(
            f"{path}: no tokenizer (tokenizer.json, tokenizer.model or vocab.json)",
            remedy="copy the tokenizer files of the model into its folder",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    except Exception as error:  # as above: whatever the cause, there is no tokenizer to use
        raise InputError(f"{path}: cannot read the tokenizer: {_reason(error)}", remedy=_DOWNLOAD_AGAIN) from error
    # Windows are cut after tokenizing whole documents, so the "sequence too long" warning would only confuse.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _reason(error: Exception) -> str:
    """What another library said, on one line."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


def build_skeleton(config: PretrainedConfig, *, where: str) -> Skeleton:
    """Build the model of `config` on the meta device and check that qoq can quantize it.

    Raises InputError that lists everything that does not fit: family, RoPE variant, head size, output sizes.
    """
    family = family_of(config.model_type, tuple(config.architectures or ()))
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    problems = [*_rope_problems(config, family), *_size_problems(config, family)]
    raise_problems(f"{where}: this model cannot be quantized", problems, remedy=_SUPPORTED)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=torch.float32)
    skeleton = Skeleton(model.config, family, model.eval())
    misfits = [
        f"{name}: {linear.out_features} output features, expected a multiple of {TILE}"
        for name, linear in skeleton.linears(0).items()
        if linear.out_features % TILE
    ]
    raise_problems(f"{where}: this model cannot be quantized", misfits, remedy=_SUPPORTED)
    return skeleton


def _rope_problems(config: PretrainedConfig, family: Family) -> list[str]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    problems = []
    if rope_type not in family.rope_types:
        problems.append(f"RoPE type {rope_type!r} is not supported (supported: {', '.join(family.rope_types)})")
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor {partial} is not supported; every channel of a head must rotate")
    return problems


def _size_problems(config: PretrainedConfig, family: Family) -> list[str]:
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    problems = [f"{name} is {size}, expected at least 1" for name in sizes if (size := getattr(config, name)) < 1]
    if problems:
        return problems
    heads = int(config.num_attention_heads)
    given = getattr(config, "num_key_value_heads", None)
    kv_heads = heads if given is None else int(given)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size / heads
    if head_dim not in family.head_dims:
        allowed = " or ".join(map(str, family.head_dims))
        problems.append(f"head_dim is {head_dim:g}, expected {allowed}")
    if kv_heads < 1 or heads % kv_heads:
        problems.append(f"{heads} attention heads do not share {kv_heads} KV heads evenly")
    if getattr(config, "hidden_act", "silu") != "silu":
        problems.append(f"activation {config.hidden_act!r} is not supported (supported: silu)")
    return problems


def fill(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Give a meta module its tensors (assigned, not copied) and return it."""
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)
