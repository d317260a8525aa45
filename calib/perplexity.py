"""Perplexity, and how far a model's predictions are from those of the 16-bit model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Forward = Callable[[Tensor], Iterator[Tensor]]
"""Token ids [S, L] to logits float32 [L, V] of each window, in order."""

_ROWS = 256
"""Positions scored at once; bounds the float32 temporaries for large vocabularies."""


@dataclass(frozen=True)
class Score:
    """Over the same windows for every model.

    perplexity      exp of the mean next-token cross-entropy (nats), L - 1 targets a window
    kl_divergence   mean KL(baseline || model) of the next-token distributions in nats, or None without a baseline
    top1_agreement  fraction of positions where both prefer the same token, or None without a baseline
    """

    perplexity: float
    kl_divergence: float | None
    top1_agreement: float | None
    windows: int
    tokens: int


class _Totals:
    def __init__(self) -> None:
        self.nll = 0.0
        self.divergence = 0.0
        self.agreed = 0
        self.positions = 0
        self.windows = 0
        self.tokens = 0

    def add(self, tokens: Tensor, logits: Tensor, baseline: Tensor | None) -> None:
        targets = tokens[1:].to(logits.device)
        nll = 0.0
        for start in range(0, len(targets), _ROWS):
            stop = min(start + _ROWS, len(targets))
            log_probs = torch.log_softmax(logits[start:stop].float(), dim=-1)
            nll -= float(log_probs.gather(1, targets[start:stop, None]).sum(dtype=torch.float64))
            if baseline is not None:
                exact = torch.log_softmax(baseline[start:stop].float().to(logits.device), dim=-1)
                self.divergence += float((exact.exp() * (exact - log_probs)).sum(dtype=torch.float64))
                self.agreed += int((exact.argmax(-1) == log_probs.argmax(-1)).sum())
        self.nll += nll / len(targets)
        self.positions += len(targets)
        self.windows += 1
        self.tokens += len(tokens)

    def score(self, *, against_baseline: bool) -> Score:
        return Score(
            perplexity=math.exp(min(self.nll / self.windows, 700.0)),
            # Of two models that hardly differ, float32 log-probabilities may put the sum a little below 0.
            kl_divergence=max(self.divergence / self.positions, 0.0) if against_baseline else None,
            top1_agreement=self.agreed / self.positions if against_baseline else None,
            windows=self.windows,
            tokens=self.tokens,
        )


def score_models(
    models: Mapping[str, Forward],
    windows: Tensor,
    *,
    baseline: str | None = None,
    on_window: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """Score several models on windows [S, L] side by side; the one named `baseline` is what the others are held to.

    Windows do not overlap and each is scored on its own: the sum of mean cross-entropies over n windows, divided by n.
    Raises ValueError for windows of fewer than 2 tokens.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [S >= 1, L >= 2], got {list(windows.shape)}")
    totals = {name: _Totals() for name in models}
    streams = zip(windows, *(forward(windows) for forward in models.values()), strict=True)
    for i, (tokens, *outputs) in enumerate(streams):
        logits = dict(zip(models, outputs, strict=True))
        exact = logits[baseline] if baseline is not None else None
        for name, total in totals.items():
            total.add(tokens, logits[name], None if name == baseline else exact)
        if on_window is not None:
            on_window(i)
    return {
        name: total.score(against_baseline=baseline is not None and name != baseline) for name, total in totals.items()
    }
