"""Perplexity, divergence and agreement against loops over Python floats."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.calib.perplexity import Forward, score_models

SEEDS = st.integers(0, 2**32 - 1)


def constant(logits: Tensor) -> Forward:
    """A model that answers window i with logits[i] [L, V]."""

    def forward(windows: Tensor) -> Iterator[Tensor]:
        assert windows.shape == logits.shape[:2]
        yield from logits

    return forward


def draw(seed: int, windows: int, length: int, vocabulary: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (windows, length), generator=generator)
    return tokens, torch.randn(windows, length, vocabulary, generator=generator) * spread


def log_probabilities(row: list[float]) -> list[float]:
    top = max(row)
    total = math.fsum(math.exp(x - top) for x in row)
    return [x - top - math.log(total) for x in row]


def oracle(tokens: Tensor, logits: Tensor, baseline: Tensor | None = None) -> tuple[float, float, float]:
    """(perplexity, KL(baseline || model), top-1 agreement)"""
    means, divergences, agreed = [], [], []
    for window, ids in enumerate(tokens.tolist()):
        losses = []
        for position in range(len(ids) - 1):
            logs = log_probabilities(logits[window, position].tolist())
            losses.append(-logs[ids[position + 1]])
            if baseline is not None:
                exact = log_probabilities(baseline[window, position].tolist())
                divergences.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(exact, logs, strict=True)))
                agreed.append(exact.index(max(exact)) == logs.index(max(logs)))
        means.append(math.fsum(losses) / len(losses))
    perplexity = math.exp(math.fsum(means) / len(means))
    if baseline is None:
        return perplexity, 0.0, 0.0
    return perplexity, math.fsum(divergences) / len(divergences), sum(agreed) / len(agreed)


@pytest.mark.parametrize(("windows", "length", "vocabulary"), [(1, 2, 2), (1, 40, 17), (4, 9, 50), (3, 600, 5)])
def test_equals_the_oracle(windows: int, length: int, vocabulary: int) -> None:
    tokens, logits = draw(0, windows, length, vocabulary)
    _, other = draw(1, windows, length, vocabulary)
    scores = score_models({"exact": constant(logits), "other": constant(other)}, tokens, baseline="exact")
    assert scores["exact"].perplexity == pytest.approx(oracle(tokens, logits)[0], rel=1e-5)
    assert scores["exact"].kl_divergence is None
    assert scores["exact"].top1_agreement is None
    perplexity, divergence, agreement = oracle(tokens, other, logits)
    assert scores["other"].perplexity == pytest.approx(perplexity, rel=1e-5)
    assert scores["other"].kl_divergence == pytest.approx(divergence, rel=1e-5)
    assert scores["other"].top1_agreement == agreement
    assert {(score.windows, score.tokens) for score in scores.values()} == {(windows, windows * length)}


@given(seed=SEEDS, nearness=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]))
def test_divergence_is_never_negative(seed: int, nearness: float) -> None:
    tokens, logits = draw(seed, 2, 12, 30)
    _, noise = draw(seed + 1, 2, 12, 30)
    models = {"exact": constant(logits), "other": constant(logits + nearness * noise)}
    score = score_models(models, tokens, baseline="exact")["other"]
    assert score.kl_divergence is not None
    assert score.kl_divergence >= 0


def test_a_model_against_itself() -> None:
    tokens, logits = draw(3, 2, 300, 40)
    score = score_models({"a": constant(logits), "b": constant(logits)}, tokens, baseline="a")["b"]
    assert score.kl_divergence == 0
    assert score.top1_agreement == 1


def test_divergence_is_from_the_baseline_to_the_model() -> None:
    """KL(baseline || model): unequal both ways, and the baseline's probabilities are the weights."""
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    sure, torn = torch.tensor([[[9.0, 0.0]] * 2]), torch.tensor([[[0.0, 0.0]] * 2])
    p = 1 / (1 + math.exp(-9.0))
    forward = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    backward = -0.5 * math.log(2 * p) - 0.5 * math.log(2 * (1 - p))
    models = {"sure": constant(sure), "torn": constant(torn)}
    assert score_models(models, tokens, baseline="sure")["torn"].kl_divergence == pytest.approx(forward, rel=1e-5)
    assert score_models(models, tokens, baseline="torn")["sure"].kl_divergence == pytest.approx(backward, rel=1e-5)


@given(seed=SEEDS)
def test_a_constant_added_to_a_row_changes_nothing(seed: int) -> None:
    tokens, logits = draw(seed, 2, 6, 11)
    plain = score_models({"m": constant(logits)}, tokens)["m"]
    moved = score_models({"m": constant(logits + 100)}, tokens)["m"]
    assert moved.perplexity == pytest.approx(plain.perplexity, rel=1e-4)


def test_uniform_logits_give_the_vocabulary() -> None:
    tokens, _ = draw(0, 3, 20, 37)
    score = score_models({"m": constant(torch.zeros(3, 20, 37))}, tokens)["m"]
    assert score.perplexity == pytest.approx(37, rel=1e-6)
    assert score.kl_divergence is None


def test_the_last_position_does_not_count() -> None:
    tokens, logits = draw(0, 2, 10, 8)
    changed = logits.clone()
    changed[:, -1] = 1e4 * torch.randn(8)
    models = {"a": constant(logits), "b": constant(changed)}
    scores = score_models(models, tokens, baseline="a")
    assert scores["a"].perplexity == scores["b"].perplexity
    assert scores["b"].kl_divergence == 0


def test_every_window_weighs_the_same() -> None:
    """exp of the mean over windows of the mean over targets, as the published protocol has it."""
    tokens, logits = draw(5, 4, 7, 9)
    singles = [score_models({"m": constant(logits[i : i + 1])}, tokens[i : i + 1])["m"].perplexity for i in range(4)]
    together = score_models({"m": constant(logits)}, tokens)["m"].perplexity
    assert together == pytest.approx(math.prod(singles) ** 0.25, rel=1e-6)


def test_a_huge_loss_stays_a_number() -> None:
    tokens = torch.tensor([[0, 0]])
    score = score_models({"m": constant(torch.tensor([[[-2000.0, 0.0]] * 2]))}, tokens)["m"]
    assert math.isfinite(score.perplexity)
    assert score.perplexity > 1e300


def test_logits_that_are_not_finite_show() -> None:
    tokens, logits = draw(0, 2, 5, 8)
    logits[1, 2] = math.nan
    assert math.isnan(score_models({"m": constant(logits)}, tokens)["m"].perplexity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits_are_scored_in_32(dtype: torch.dtype) -> None:
    tokens, logits = draw(0, 2, 300, 20)
    low = logits.to(dtype)
    score = score_models({"m": constant(low)}, tokens)["m"]
    assert score.perplexity == pytest.approx(oracle(tokens, low.float())[0], rel=1e-5)


def test_models_run_in_lock_step() -> None:
    tokens, logits = draw(0, 3, 5, 8)
    order: list[str] = []

    def model(name: str) -> Forward:
        def forward(windows: Tensor) -> Iterator[Tensor]:
            for i in range(len(windows)):
                order.append(f"{name}{i}")
                yield logits[i]

        return forward

    score_models(
        {"a": model("a"), "b": model("b"), "c": model("c")}, tokens, on_window=lambda i: order.append(f"window {i}")
    )
    assert order == [step for i in range(3) for step in (f"a{i}", f"b{i}", f"c{i}", f"window {i}")]


@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (1, 0), (4,), (1, 2, 3)], ids=str)
def test_windows_without_a_target_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="windows must be"):
        score_models({"m": constant(torch.zeros(1, 2, 3))}, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("given_windows", [2, 4])
def test_a_model_that_answers_fewer_or_more_windows_is_refused(given_windows: int) -> None:
    """A score over other windows than those asked for must not pass for one."""
    tokens, logits = draw(0, 3, 5, 8)
    several = torch.cat((logits, logits))[:given_windows]
    with pytest.raises(ValueError, match="zip"):
        score_models({"m": lambda _: iter(several)}, tokens)


def test_an_unknown_baseline_is_refused() -> None:
    tokens, logits = draw(0, 1, 5, 8)
    with pytest.raises((ValueError, KeyError)):
        score_models({"m": constant(logits)}, tokens, baseline="other")


def test_nothing_is_changed() -> None:
    tokens, logits = draw(0, 2, 5, 8)
    before = tokens.clone(), logits.clone()
    score_models({"a": constant(logits), "b": constant(logits)}, tokens, baseline="a")
    assert torch.equal(tokens, before[0])
    assert torch.equal(logits, before[1])
