"""Give a small model the outlier channels of a large one, without changing what it computes.

Large language models keep a few key channels and a few normalized activations ten or more times
larger than the rest, and those are what makes 4-bit keys and 8-bit activations hard. A model of a
few million parameters has none, so every quantizer looks good on it. Here such channels are made by
rescaling two places whose product alone matters:

* keys and queries: scores are `q . k`, so a key channel times `factor` and the query channels that
  meet it over `factor` cancel out. RoPE mixes channels i and i + D/2, so both get the same factor;
* norm gains and the columns of the linear layers that read the normalized activations.

Powers of two keep fp16 and bf16 exact, but for values that become subnormal. Every function returns
a new dict and leaves the tensors it was given alone.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NORM_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def inject_key_outliers(
    tensors: Mapping[str, Tensor],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    factor: float,
    pairs_per_head: int,
    seed: int,
) -> dict[str, Tensor]:
    """Multiply `pairs_per_head` RoPE pairs of every KV head by `factor`, dividing the queries by it.

    The pairs are drawn anew for every layer and KV head; weights are [N, K], biases [N].
    """
    half = head_dim // 2
    if num_heads % num_kv_heads or head_dim % 2:
        raise ValueError(
            f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}, and head_dim {head_dim} even"
        )
    if not 0 <= pairs_per_head <= half:
        raise ValueError(f"pairs_per_head: expected 0..{half} for head_dim {head_dim}, got {pairs_per_head}")
    _check_factor(factor)
    result = dict(tensors)
    generator = torch.Generator().manual_seed(seed)
    for layer in _layers(tensors, "self_attn.k_proj.weight"):
        if f"{layer}.self_attn.k_norm.weight" in tensors:
            raise ValueError(f"{layer}.self_attn.k_norm: a norm after k_proj undoes the scaling of its rows")
        scale = torch.ones(num_kv_heads, head_dim)
        for head in range(num_kv_heads):
            pairs = torch.randperm(half, generator=generator)[:pairs_per_head]
            scale[head, pairs] = factor
            scale[head, pairs + half] = factor
        query_scale = scale.repeat_interleave(num_heads // num_kv_heads, dim=0)
        for kind in ("weight", "bias"):
            key, query = f"{layer}.self_attn.k_proj.{kind}", f"{layer}.self_attn.q_proj.{kind}"
            if key in tensors:
                result[key] = _scale_rows(key, tensors[key], scale.flatten())
            if query in tensors:
                result[query] = _scale_rows(query, tensors[query], 1 / query_scale.flatten())
    return result


def inject_norm_outliers(
    tensors: Mapping[str, Tensor], *, channels: int, factor: float, seed: int
) -> dict[str, Tensor]:
    """Multiply `channels` gains of both norms of every layer by `factor`, dividing the columns that read them.

    Holds for norms that multiply by their gain as it is stored (Llama, Mistral, Qwen), not by 1 + gain (Gemma).
    The same channels are used in every layer, as in large models.
    """
    _check_factor(factor)
    result = dict(tensors)
    generator = torch.Generator().manual_seed(seed)
    scale: Tensor | None = None
    for layer in _layers(tensors, "input_layernorm.weight"):
        for norm, readers in NORM_READERS.items():
            gain = tensors[f"{layer}.{norm}.weight"]
            if scale is None:
                if not 0 <= channels <= gain.numel():
                    raise ValueError(f"channels: expected 0..{gain.numel()} (the hidden size), got {channels}")
                scale = torch.ones(gain.numel())
                scale[torch.randperm(gain.numel(), generator=generator)[:channels]] = factor
            result[f"{layer}.{norm}.weight"] = _scale_rows(f"{layer}.{norm}.weight", gain, scale)
            for reader in readers:
                weight = tensors[f"{layer}.{reader}.weight"]
                result[f"{layer}.{reader}.weight"] = (weight.float() / scale.to(weight.device)).to(weight.dtype)
    return result


def make_tiny_outlier(tiny_dir: Path, out_dir: Path, *, channels: int = 4, factor: float = 32.0, seed: int = 0) -> Path:
    """Write `tiny-outlier`, the embedded model with outliers in its norms too, to `out_dir`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in sorted(tiny_dir.iterdir()):
        if path.suffix in {".json", ".txt"}:
            shutil.copyfile(path, out_dir / path.name)
    tensors = inject_norm_outliers(
        load_file(tiny_dir / "model.safetensors"), channels=channels, factor=factor, seed=seed
    )
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    note = {"derived_from": "tiny", "norm_channels": channels, "factor": factor, "seed": seed}
    (out_dir / "outliers.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return out_dir


def _layers(names: Iterable[str], suffix: str) -> list[str]:
    """Prefixes `...layers.N` of the tensors called `...layers.N.<suffix>`, in the order of N."""
    pattern = re.compile(rf"(.*\blayers\.(\d+))\.{re.escape(suffix)}")
    found = sorted((int(match[2]), match[1]) for match in map(pattern.fullmatch, names) if match)
    if not found:
        raise ValueError(f"no tensor is called layers.N.{suffix}: not a model of the Llama kind")
    return [prefix for _, prefix in found]


def _scale_rows(name: str, tensor: Tensor, scale: Tensor) -> Tensor:
    """`tensor` [N] or [N, K] with row n multiplied by scale[n], computed in fp32."""
    if tensor.shape[0] != scale.numel():
        raise ValueError(f"{name}: expected {scale.numel()} rows, got {tensor.shape[0]}")
    factors = scale.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))
    return (tensor.float() * factors).to(tensor.dtype)


def _check_factor(factor: float) -> None:
    if not factor > 0:
        raise ValueError(f"factor: expected a positive number, got {factor}")
