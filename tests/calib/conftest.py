"""Random models of every family, small enough for a test, and references of their numbers written in plain numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

Array = NDArray[Any]
Linear = Callable[[str, Array], Array]
"""(full name of a linear, inputs [T, K]) -> outputs [T, N]."""

VOCABULARY = 96
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class RandomModel:
    """A model folder, and the tensors in it as they were saved."""

    folder: Path
    config: PretrainedConfig
    tensors: dict[str, Tensor]

    def full(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """transformers' own model of these tensors, with its own mask and eager attention."""
        model = AutoModelForCausalLM.from_config(self.config, attn_implementation="eager", dtype=dtype)
        missing, unexpected = model.load_state_dict({k: v.to(dtype) for k, v in self.tensors.items()}, strict=False)
        assert not unexpected
        assert missing == (["lm_head.weight"] if self.config.tie_word_embeddings else [])
        model.tie_weights()
        return model.eval()

    def save(self) -> None:
        """Write the folder again, after `tensors` or `config` were changed."""
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()}, self.folder / "model.safetensors"
        )
        self.config.save_pretrained(self.folder)


MakeModel = Callable[..., RandomModel]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """make_model(family, seed=0, dtype=torch.float16, **config): two blocks, hidden 128, two KV heads of 64."""
    count = 0

    def make(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float16, **overrides: Any) -> RandomModel:
        nonlocal count
        count += 1
        return random_model(tmp_path / f"model-{count}", family, seed=seed, dtype=dtype, **overrides)

    return make


def random_model(
    folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float16, **overrides: Any
) -> RandomModel:
    """Every tensor is random, gains and biases too, so that one that is lost or misplaced shows."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **overrides,
    }
    config = _CONFIGS[family](**settings)
    config.architectures = [_ARCHITECTURES[family]]
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.3 * values
        elif name.endswith("bias"):
            values = 0.7 * values
        elif "embed" in name:
            values = 0.5 * values
        else:
            values = values * (1.5 / shape[1] ** 0.5)
        tensors[name] = values.to(dtype)
    folder.mkdir(parents=True)
    model = RandomModel(folder, config, tensors)
    model.save()
    return model


def random_tokens(windows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def grad_mode_is_left_alone() -> Iterator[None]:
    """Nothing in calib may leave autograd switched off (or on) for the rest of the process."""
    before = torch.is_grad_enabled()
    yield
    after = torch.is_grad_enabled()
    torch.set_grad_enabled(before)
    assert after == before


# ---- numbers, in numpy


def act8_linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """Served linear, token by token: int8 codes from float32 quotients, then exact arithmetic."""
    rows = []
    for token in x.astype(np.float32):
        amax = np.abs(token).max()
        scale = np.float32(amax / np.float32(127)) if amax > 0 else np.float32(1)
        codes = np.clip(np.rint(token / scale), -127, 127)
        rows.append(weight @ (codes.astype(np.float64) * float(scale)))
    out = np.stack(rows)
    return out if bias is None else out + bias


def kv_cached(x: Array, bits: int) -> Array:
    """One head of one token at a time through the asymmetric cache; x is [heads, T, D]."""
    if bits == 16:
        return x
    levels = 2**bits - 1
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:2]):
        head = x[index].astype(np.float32)
        scale = np.float32(np.float16((head.max() - head.min()) / np.float32(levels)))
        if scale == 0:
            scale = np.float32(1)
        zero = np.float32(np.float16(-head.min() / scale))
        codes = np.clip(np.rint(head / scale + zero), 0, levels)
        out[index] = (codes - zero) * scale
    return out


def turned(x: Array, key_rotation: str) -> Array:
    """Every head of x [..., D] times Sylvester's Hadamard matrix over sqrt(D), or as it is."""
    if key_rotation == "none":
        return x
    matrix = np.ones((1, 1))
    while len(matrix) < x.shape[-1]:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return np.asarray(x @ matrix / math.sqrt(len(matrix)))


@dataclass
class Reference:
    """A whole decoder in numpy float64, one window at a time, every loop written out.

    `kv_bits` and `key_rotation` apply to each block; linears named in `served` (full name: float weight, bias) get
    int8 activations.
    `inputs` collects what enters each block, `outputs` what leaves it, `keys` and `queries` those after RoPE.
    """

    config: PretrainedConfig
    tensors: dict[str, Array]
    kv_bits: int = 16
    key_rotation: str = "none"
    served: dict[str, tuple[Array, Array | None]] = field(default_factory=dict)
    keys: dict[int, Array] = field(default_factory=dict)
    queries: dict[int, Array] = field(default_factory=dict)

    def linear(self, name: str, x: Array) -> Array:
        if name in self.served:
            return act8_linear(x, *self.served[name])
        out = x @ self.tensors[f"{name}.weight"].T
        return out + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else out

    def norm(self, name: str, x: Array) -> Array:
        eps = float(self.config.rms_norm_eps)
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * self.tensors[f"{name}.weight"]

    def frequencies(self) -> Array:
        rope = self.config.rope_parameters
        half = int(self.config.head_dim) // 2
        out = np.array([float(rope["rope_theta"]) ** (-i / half) for i in range(half)])
        if rope["rope_type"] == "llama3":
            for i, frequency in enumerate(out):
                turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
                low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
                if turns < low:
                    out[i] = frequency / factor
                elif turns <= high:
                    mix = (turns - low) / (high - low)
                    out[i] = frequency * ((1 - mix) / factor + mix)
        return out

    def rotate(self, head: Array) -> Array:
        """[T, D] of one head: channel i turns with channel i + D/2."""
        out = np.empty_like(head)
        half = head.shape[1] // 2
        for position in range(head.shape[0]):
            for i, frequency in enumerate(self.frequencies()):
                a, b = head[position, i], head[position, i + half]
                cos, sin = math.cos(position * frequency), math.sin(position * frequency)
                out[position, i], out[position, i + half] = a * cos - b * sin, b * cos + a * sin
        return out

    def window(self, index: int) -> int | None:
        if self.config.model_type == "llama":
            return None
        if self.config.model_type == "mistral":
            return self.config.sliding_window
        return self.config.sliding_window if self.config.layer_types[index] == "sliding_attention" else None

    def block(self, index: int, x: Array) -> Array:
        """What leaves block `index` when x [T, H] enters it."""
        prefix = f"model.layers.{index}."
        heads, kv_heads = int(self.config.num_attention_heads), int(self.config.num_key_value_heads)
        size, tokens = int(self.config.head_dim), x.shape[0]
        normed = self.norm(prefix + "input_layernorm", x)
        split = {}
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            flat = self.linear(f"{prefix}self_attn.{part}_proj", normed)
            of_heads = [flat[:, i * size : (i + 1) * size] for i in range(count)]
            if part != "v":
                if self.config.model_type == "qwen3":
                    of_heads = [self.norm(f"{prefix}self_attn.{part}_norm", head) for head in of_heads]
                of_heads = [self.rotate(head) for head in of_heads]
            split[part] = np.stack(of_heads)
        self.queries[index], self.keys[index] = split["q"], split["k"]
        query, key = turned(split["q"], self.key_rotation), turned(split["k"], self.key_rotation)
        attended = self.attend(query, kv_cached(key, self.kv_bits), kv_cached(split["v"], self.kv_bits), index)
        x = x + self.linear(f"{prefix}self_attn.o_proj", attended.reshape(tokens, heads * size))
        normed = self.norm(prefix + "post_attention_layernorm", x)
        gate = self.linear(f"{prefix}mlp.gate_proj", normed)
        up = self.linear(f"{prefix}mlp.up_proj", normed)
        return x + self.linear(f"{prefix}mlp.down_proj", gate / (1 + np.exp(-gate)) * up)

    def attend(self, query: Array, key: Array, value: Array, index: int) -> Array:
        """Outputs [T, heads, D]."""
        heads, tokens, size = query.shape
        share = heads // key.shape[0]
        window = self.window(index) or tokens
        out = np.empty((tokens, heads, size))
        for head in range(heads):
            k, v = key[head // share], value[head // share]
            for t in range(tokens):
                first = max(0, t - window + 1)
                scores = k[first : t + 1] @ query[head, t] / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[t, head] = weights @ v[first : t + 1] / weights.sum()
        return out

    def logits(self, tokens: Tensor) -> Array:
        """[S, L, V] of token ids [S, L]."""
        table = self.tensors["model.embed_tokens.weight"]
        head = self.tensors.get("lm_head.weight", table)
        out = []
        for window in tokens.numpy():
            x = table[window]
            for index in range(int(self.config.num_hidden_layers)):
                x = self.block(index, x)
            out.append(self.norm("model.norm", x) @ head.T)
        return np.stack(out)


@dataclass(frozen=True)
class Rounded:
    """What the rounding oracle decides for a weight [N, K]; all arrays float64 except s1."""

    codes: Array
    s1: Array
    s2: Array
    zeros: Array

    def dequantize(self, in_features: int) -> Array:
        k = self.codes.shape[1]
        width = k // self.zeros.shape[1]
        spread = np.repeat(self.zeros, width, axis=1)
        scale = np.repeat(self.s2, k // self.s2.shape[1], axis=1)
        s1 = self.s1.astype(np.float64)[:, None]
        if self.s2.shape[1] == 1 and self.zeros.shape[1] == 1 and np.isnan(self.s2).all():
            stored = (self.zeros.astype(np.float32) * self.s1.astype(np.float32)[:, None]).astype(np.float16)
            return (self.codes * s1 - stored.astype(np.float64))[:, :in_features]
        return ((self.codes - spread) * scale * s1)[:, :in_features]


def round_oracle(weight: Array, *, progressive: bool) -> Rounded:
    """algorithm: two levels with pre-scale zeros (range 119), or one level per channel; one row at a time.

    A float16 scale that rounding made zero, or too small to cover the range, is the next one up that does.
    Quotients are float32 numbers rounded from float64, which is exact enough for both to agree on every tie.
    """
    n, k = weight.shape
    width = -(-k // 128) * 128
    padded = np.zeros((n, width))
    padded[:, :k] = weight
    groups = width // 128 if progressive else 1
    codes, s1 = np.zeros((n, width)), np.zeros(n, np.float16)
    s2, zeros = np.full((n, groups), np.nan), np.zeros((n, groups))
    for row in range(n):
        values = padded[row]
        span = np.abs(values).max() if progressive else max(values.max(), 0.0) - min(values.min(), 0.0)
        levels = 119 if progressive else 15
        s1[row] = _scale(span, levels)
        u = (values / float(s1[row])).astype(np.float32)
        for group in range(groups):
            part = slice(group * width // groups, (group + 1) * width // groups)
            v = np.clip(u[part], -119, 119) if progressive else u[part]
            step = np.float32(1)
            if progressive:
                high, low = max(v.max(), np.float32(0)), min(v.min(), np.float32(0))
                step = s2[row, group] = max(1.0, np.rint((high - low) / np.float32(15)))
            else:
                low = min(v.min(), np.float32(0))
            zero = zeros[row, group] = np.clip(np.rint(-low / np.float32(step)), 0, 15)
            codes[row, part] = np.clip(np.rint(v / np.float32(step) + np.float32(zero)), 0, 15)
    return Rounded(codes, s1, s2, zeros)


def _scale(span: float, levels: int) -> np.float16:
    if span == 0:
        return np.float16(1)
    scale = np.float16(np.float32(np.float32(span) / np.float32(levels)))
    if scale == 0:
        scale = np.float16(2.0**-24)
    while span / float(scale) > levels + 0.5:
        scale = np.nextafter(scale, np.float16(np.inf))
    return scale


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Rounded]:
    return round_oracle


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    return Reference


@pytest.fixture(scope="session")
def in_rotated_heads() -> Callable[[Array, str], Array]:
    """in_rotated_heads(x [..., D], key_rotation)"""
    return turned


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """tokens(windows, length, seed=0): int64 ids."""
    return random_tokens
