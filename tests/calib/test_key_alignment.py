"""Key alignment: angles against trigonometry in loops, and RoPE at any position."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.calib.key_alignment import MeanKeyObserver, angles, fold
from qoq.recipes.families import family_of

LLAMA = family_of("llama", ())
SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rope(x: Tensor, position: int) -> Tensor:
    """x [heads, D] at a position, pair by pair."""
    half = x.shape[1] // 2
    y = torch.empty_like(x)
    for i in range(half):
        angle = position / 10000 ** (i / half)
        y[:, i] = x[:, i] * math.cos(angle) - x[:, i + half] * math.sin(angle)
        y[:, i + half] = x[:, i + half] * math.cos(angle) + x[:, i] * math.sin(angle)
    return y


def tensors(seed: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    found = {}
    for i, (part, count) in enumerate((("q", heads), ("k", kv_heads))):
        found[f"self_attn.{part}_proj.weight"] = drawn(seed + i, count * head_dim, 6)
        found[f"self_attn.{part}_proj.bias"] = drawn(seed + 7 + i, count * head_dim)
    return found


def project(of: dict[str, Tensor], part: str, x: Tensor, head_dim: int) -> Tensor:
    return (of[f"self_attn.{part}_proj.weight"] @ x + of[f"self_attn.{part}_proj.bias"]).view(-1, head_dim)


@given(seed=SEEDS, group=st.sampled_from([1, 3]), positions=st.tuples(st.integers(0, 999), st.integers(0, 999)))
def test_scores_stay_at_any_two_positions(seed: int, group: int, positions: tuple[int, int]) -> None:
    kv_heads, head_dim = 2, 8
    before = tensors(seed, kv_heads * group, kv_heads, head_dim)
    turned = angles(drawn(seed + 20, kv_heads, head_dim).double())
    after = fold(before, turned, LLAMA, kv_heads * group)
    x, y = drawn(seed + 30, 6), drawn(seed + 31, 6)
    scores = []
    for of in (before, after):
        queries = rope(project(of, "q", x, head_dim).double(), positions[0])
        keys = rope(project(of, "k", y, head_dim).double(), positions[1]).repeat_interleave(group, dim=0)
        scores.append((queries * keys).sum(dim=1))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(after["self_attn.k_proj.bias"], before["self_attn.k_proj.bias"])


@given(seed=SEEDS)
def test_the_mean_comes_to_lie_on_the_diagonal(seed: int) -> None:
    before = tensors(seed, 2, 2, 8)
    mean = project(before, "k", torch.zeros(6), 8)
    after = fold(before, angles(mean.double()), LLAMA, 2)
    first, second = project(after, "k", torch.zeros(6), 8).chunk(2, dim=1)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert bool((first > -1e-5).all()), "and on one side of zero"
    torch.testing.assert_close(first.square() + second.square(), mean[:, :4].square() + mean[:, 4:].square())


def test_keys_without_a_mean_are_turned_by_some_angle() -> None:
    assert bool(torch.isfinite(angles(torch.zeros(1, 8, dtype=torch.float64))).all())


def test_the_mean_is_over_batches_and_positions() -> None:
    seen = MeanKeyObserver()
    with pytest.raises(ValueError, match="no attention"):
        _ = seen.total
    batches = [drawn(1, 2, 3, 5, 8), drawn(2, 1, 3, 7, 8)]
    for keys in batches:
        seen(keys, keys, keys, None)  # type: ignore[arg-type]
    want = sum(keys.double().sum(dim=(0, 2)) for keys in batches)
    torch.testing.assert_close(seen.total, want)
