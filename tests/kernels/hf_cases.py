"""Checkpoints of small random models for the transformers plug-in, and what must come of them: integer oracles for the
linears, a cache that stores rounded keys and values for attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import qoq.kernels.hf  # noqa: F401  (makes transformers know the format)
from qoq.formats.packing import pack_linear
from qoq.formats.quantization_config import QuantizationConfig
from qoq.formats.quantized_linear import QuantizedLinear, ZeroPoints

VOCABULARY = 96
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PADDED: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3}
MODELS: dict[str, tuple[Callable[[], PreTrainedConfig], int | None]] = {
    "llama": (lambda: LlamaConfig(**SHARED), 128),
    "qwen2": (lambda: Qwen2Config(**{**SHARED, "tie_word_embeddings": True}), None),
    "qwen3": (lambda: Qwen3Config(**{**SHARED, **PADDED}), 128),
    "mistral": (lambda: MistralConfig(**{**SHARED, **PADDED, "sliding_window": 8}), None),
}


# ---- the oracle side


def round_to_nearest(
    weight: Tensor, bias: Tensor | None, *, progressive: bool
) -> tuple[QuantizedLinear, Tensor, Tensor, Tensor]:
    """The layer, and what it means apart from any packing: integers int64 [N, K], scales and shifts float64 [N].

    The weight is integers * scale - shift.
    """
    n, k = weight.shape
    padded = nn.functional.pad(weight.double(), (0, -k % 128))
    if progressive:
        s1 = (padded.abs().amax(dim=1) / 119).half()
        level1 = (padded / s1.double()[:, None]).clamp(-119, 119).view(n, -1, 128)
        low, high = level1.amin(dim=2).clamp(max=0), level1.amax(dim=2).clamp(min=0)
        s2 = torch.round((high - low) / 15).clamp(1, 16)
        zeros = torch.round(-low / s2).clamp(0, 15)
        codes = (torch.round(level1 / s2[:, :, None]) + zeros[:, :, None]).clamp(0, 15)
        integers = ((codes - zeros[:, :, None]) * s2[:, :, None]).view(n, -1)
        shift = torch.zeros(n, dtype=torch.float64)
        s2_scales = s2.to(torch.uint8)
    else:
        low, high = padded.amin(dim=1).clamp(max=0), padded.amax(dim=1).clamp(min=0)
        s1 = ((high - low) / 15).half()
        zeros = torch.round(-low / s1.double()).clamp(0, 15)[:, None]
        codes = (torch.round(padded / s1.double()[:, None]) + zeros).clamp(0, 15)
        integers = codes
        shift = (zeros[:, 0].float() * s1.float()).half().double()
        s2_scales = None
    stored = codes.reshape(n, -1).to(torch.uint8)
    linear = QuantizedLinear(stored, s1, s2_scales, ZeroPoints(zeros.to(torch.uint8)), bias, k)
    return linear, integers[:, :k].long(), s1.double(), shift


class OracleLinear(nn.Module):
    """The layer in int64 and float64."""

    def __init__(self, integers: Tensor, scale: Tensor, shift: Tensor, bias: Tensor | None, act_bits: int) -> None:
        super().__init__()
        self.integers, self.scale, self.shift, self.act_bits = integers, scale, shift, act_bits
        self.offset = None if bias is None else bias.double()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.act_bits == 16:
            y = rows.double() @ (self.integers.double() * self.scale[:, None] - self.shift[:, None]).t()
        else:
            token = rows.float().abs().amax(dim=1, keepdim=True) / 127
            codes = torch.round(rows.float() / token).long()
            y = (codes @ self.integers.t()).double() * self.scale - self.shift * codes.sum(dim=1, keepdim=True)
            y = y * token.double()
        y = y if self.offset is None else y + self.offset
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class RoundedCache(DynamicCache):
    """Stores keys and values as an asymmetric cache of `bits` gives them back, rounded once, when they come in.

    With `rotated`, keys are turned by a Hadamard matrix before that and back after it, so that queries need no turn.
    """

    def __init__(self, config: PreTrainedConfig, bits: int, *, rotated: bool = False) -> None:
        super().__init__(config=config)
        self.bits, self.rotated = bits, rotated

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = self.turned(self.rounded(self.turned(key_states)))
        return super().update(keys, self.rounded(value_states), *args, **kwargs)

    def turned(self, x: Tensor) -> Tensor:
        """x [..., D] times the matrix over sqrt(D), its own inverse, in float64."""
        if not self.rotated or self.bits == 16:
            return x
        matrix = np.ones((1, 1))
        while len(matrix) < x.shape[-1]:
            matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
        return (x.double() @ torch.from_numpy(matrix) / len(matrix) ** 0.5).to(x.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        if self.bits == 16:
            return x
        a = x.detach().float().numpy()
        low, high = a.min(axis=-1, keepdims=True), a.max(axis=-1, keepdims=True)
        scale = ((high - low) / np.float32(2**self.bits - 1)).astype(np.float16).astype(np.float32)
        zero = (-low / scale).astype(np.float16).astype(np.float32)
        codes = np.clip(np.rint(a / scale + zero), 0, 2**self.bits - 1)
        return torch.from_numpy((codes - zero) * scale).to(x.dtype)


@dataclass
class Checkpoint:
    folder: Path
    config: PreTrainedConfig
    weights: dict[str, Tensor]
    linears: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None]]

    def reference(self, *, act_bits: int = 8, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        """The dense model in eager attention, its linears replaced by oracles."""
        model = AutoModelForCausalLM.from_config(self.config, attn_implementation="eager", dtype=dtype).eval()
        model.load_state_dict(self.weights, strict=self.config.tie_word_embeddings is False)
        model.tie_weights()
        for name, (integers, scale, shift, bias) in self.linears.items():
            model.set_submodule(name, OracleLinear(integers, scale, shift, bias, act_bits))
        return model  # type: ignore[no-any-return]

    def expected(self, tokens: Tensor, *, act_bits: int = 8, kv_bits: int = 4, rotated: bool = False) -> Tensor:
        cache = RoundedCache(self.config, kv_bits, rotated=rotated)
        with torch.no_grad():
            logits: Tensor = self.reference(act_bits=act_bits)(tokens, past_key_values=cache).logits
        return logits


def write_checkpoint(folder: Path, name: str, **overrides: Any) -> Checkpoint:
    """A random model quantized to nearest, in two shards; `overrides` are keys of QuantizationConfig."""
    return write_model(folder, *MODELS[name], **overrides)


def write_model(
    folder: Path, make_config: Callable[[], PreTrainedConfig], group_size: int | None, **overrides: Any
) -> Checkpoint:
    """The same of any configuration."""
    config = make_config()
    torch.manual_seed(7)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.ndim == 1:  # biases and gains are constants in a fresh model
                parameter.add_(torch.randn_like(parameter) * 0.1)
    weights = {key: tensor.half() for key, tensor in dense.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    tensors, linears, padded = dict(weights), {}, {}
    for path, module in dense.named_modules():
        if (
            not isinstance(module, nn.Linear)
            or path == "lm_head"
            or path in overrides.get("modules_to_not_convert", ())
        ):
            continue
        bias = weights.get(f"{path}.bias")
        linear, *meaning = round_to_nearest(weights[f"{path}.weight"], bias, progressive=group_size is not None)
        linears[path] = (meaning[0], meaning[1], meaning[2], bias)
        del tensors[f"{path}.weight"]
        tensors.update({f"{path}.{leaf}": tensor for leaf, tensor in pack_linear(linear).items()})
        if module.in_features % 128:
            padded[path] = module.in_features
    quantization = QuantizationConfig(group_size=group_size, padded=padded, **overrides).to_dict()
    save_tensors(folder, tensors)
    config.dtype = torch.float16
    config.architectures = [type(dense).__name__]
    config.save_pretrained(folder)
    edit_config(folder, lambda data: data.update(quantization_config=quantization))
    return Checkpoint(folder, make_config(), weights, linears)


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({key: tensors[key].contiguous() for key in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, held in shards.items() for key in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load_tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def edit_quantization(folder: Path, **keys: Any) -> None:
    edit_config(folder, lambda data: data["quantization_config"].update(keys))


def load(checkpoint: Checkpoint | Path, **kwargs: Any) -> Any:
    folder = checkpoint.folder if isinstance(checkpoint, Checkpoint) else checkpoint
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits_of(model: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens, **kwargs).logits
    return logits


def error_of(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to what is expected."""
    return float((got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())
