"""SmoothAttention: move the outlier channels of keys into queries, where nothing is quantized.

Post-RoPE keys are divided by lambda and queries multiplied by it, so scores are unchanged while 4-bit keys lose less
(QServe paper, section 4.2). RoPE mixes channels i and i + D/2, so the two share one lambda; query heads of a group
share that of their KV head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.calib.attention import AttentionCall
from qoq.formats.arithmetic import kv_round_trip, rotate_heads
from qoq.recipes.families import Family
from qoq.recipes.schema import KeyRotation, SmoothAttention


class RangeObserver:
    """Collects absmax of post-RoPE keys and queries, each float32 [kv_heads, D] (queries: largest of the group)."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.queries: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        kv_heads, head_dim = key.shape[1], key.shape[3]
        keys = key.abs().amax(dim=(0, 2))
        queries = query.abs().amax(dim=(0, 2)).view(kv_heads, -1, head_dim).amax(dim=1)
        self.keys = keys if self.keys is None else torch.maximum(self.keys, keys)
        self.queries = queries if self.queries is None else torch.maximum(self.queries, queries)

    @property
    def is_finite(self) -> bool:
        """False when a key or query was NaN or infinite."""
        seen = [ranges for ranges in (self.keys, self.queries) if ranges is not None]
        return all(bool(torch.isfinite(ranges).all()) for ranges in seen)


@dataclass(frozen=True)
class KeyRanges:
    """absmax of post-RoPE keys and queries, float32 [kv_heads, D], equal within each RoPE pair."""

    keys: Tensor
    queries: Tensor

    @staticmethod
    def from_observer(observer: RangeObserver, *, shared: bool) -> KeyRanges:
        """`shared`: all heads get the largest range, for families whose fold point has one row for all."""
        if observer.keys is None or observer.queries is None:
            raise ValueError("no attention was observed")
        keys, queries = _pair_max(observer.keys), _pair_max(observer.queries)
        if shared:
            keys = keys.amax(dim=0, keepdim=True).expand_as(keys)
            queries = queries.amax(dim=0, keepdim=True).expand_as(queries)
        return KeyRanges(keys, queries)

    def scale(self, alpha: float, beta: float) -> Tensor:
        """lambda = keys**alpha / queries**beta, [kv_heads, D]; 1 where a channel is never used."""
        scale = self.keys**alpha / self.queries**beta
        usable = torch.isfinite(scale) & torch.isfinite(1.0 / scale)  # it is divided by, too
        return torch.where(usable, scale, torch.ones_like(scale))

    def balanced(self, scale: Tensor) -> Tensor:
        """`scale` times a power of two for each head, so that the largest query and the largest key meet.

        One factor for a whole head changes no code of its keys, but without it folded queries may leave float16.
        """
        keys, queries = (self.keys / scale).amax(dim=1, keepdim=True), (self.queries * scale).amax(dim=1, keepdim=True)
        exponent = torch.round(torch.log2(keys / queries) / 2)
        return scale * torch.exp2(torch.where(torch.isfinite(exponent), exponent, torch.zeros_like(exponent)))


class StrengthSearch:
    """Measures, for each candidate lambda, how far 4-bit keys move the attention output of each KV head.

    Smoothed keys and queries are rotated as they will be when served: the rotation takes some of lambda's work.

    `errors` is float64 [candidates, kv_heads]: squared error of the outputs of the group's query heads, values kept
    in full precision. Outputs, not scores: a score matters as much as the probability it moves.
    """

    def __init__(self, candidates: Tensor, kv_bits: int, token_limit: int, key_rotation: KeyRotation = "none") -> None:
        self._candidates, self._kv_bits, self._left = candidates, kv_bits, token_limit
        self._key_rotation: KeyRotation = key_rotation
        self.errors = torch.zeros(candidates.shape[:2], dtype=torch.float64, device=candidates.device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        if self._left <= 0:
            return
        self._left -= query.shape[0] * query.shape[2]
        kv_heads = key.shape[1]
        group = query.shape[1] // kv_heads
        exact = call(query, key, value)
        for i, scale in enumerate(self._candidates):
            key_scale = scale[None, :, None, :]
            keys = kv_round_trip(rotate_heads(key / key_scale, self._key_rotation), self._kv_bits)
            queries = rotate_heads(query * key_scale.repeat_interleave(group, dim=1), self._key_rotation)
            output = call(queries, keys, value)
            squared = (output - exact).double().square().sum(dim=(0, 1, 3))  # [heads]
            self.errors[i] += squared.view(kv_heads, group).sum(dim=1)

    @property
    def is_done(self) -> bool:
        return self._left <= 0


@dataclass(frozen=True)
class Smoothing:
    """The chosen lambda float32 [kv_heads, D] and the alpha of each KV head."""

    scale: Tensor
    alphas: tuple[float, ...]


def candidate_scales(ranges: KeyRanges, spec: SmoothAttention) -> Tensor:
    """[candidates, kv_heads, D]: lambda for each strength that `spec` allows."""
    if spec.mode == "fixed":
        return ranges.scale(spec.alpha, spec.beta)[None]
    return torch.stack([ranges.scale(alpha, 1.0 - alpha) for alpha in spec.alphas])


def choose(candidates: Tensor, errors: Tensor, spec: SmoothAttention, *, shared: bool) -> Smoothing:
    """The best candidate of each KV head (of all heads together where they share one); ties go to the first."""
    if shared:
        errors = errors.sum(dim=1, keepdim=True).expand_as(errors)
    best = errors.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(dim=0)  # argmin takes a NaN for the least
    heads = torch.arange(candidates.shape[1], device=candidates.device)
    return Smoothing(candidates[best, heads], tuple(spec.alphas[int(i)] for i in best))


def fold(tensors: dict[str, Tensor], scale: Tensor, family: Family, num_heads: int) -> dict[str, Tensor]:
    """Fold lambda [kv_heads, D] into a block's tensors (names relative to the block); the input is left alone.

    Projections: rows and biases of k_proj are divided and those of q_proj multiplied. Norms: the gains of k_norm and
    q_norm, which come after the projections and are shared by all heads.
    """
    folded = dict(tensors)
    if family.key_fold == "norms":
        folded[f"{family.key_norm}.weight"] = tensors[f"{family.key_norm}.weight"] / scale[0]
        folded[f"{family.query_norm}.weight"] = tensors[f"{family.query_norm}.weight"] * scale[0]
        return folded
    group = num_heads // scale.shape[0]
    key_rows = scale.reshape(-1)
    query_rows = scale.repeat_interleave(group, dim=0).reshape(-1)
    for role, rows in (("attn_k", 1.0 / key_rows), ("attn_q", query_rows)):
        linear = family.roles[role]
        folded[f"{linear}.weight"] = tensors[f"{linear}.weight"] * rows.unsqueeze(1)
        if f"{linear}.bias" in tensors:
            folded[f"{linear}.bias"] = tensors[f"{linear}.bias"] * rows
    return folded


def _pair_max(ranges: Tensor) -> Tensor:
    half = ranges.shape[1] // 2
    largest = torch.maximum(ranges[:, :half], ranges[:, half:])
    return torch.cat((largest, largest), dim=1)
