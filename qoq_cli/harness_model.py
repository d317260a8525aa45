"""A model that is loaded already, as lm-eval calls it. Imports lm-eval, so it is imported where lm-eval is known to be.

lm-eval's own HFLM does the work. What is added: progress through a function instead of bars, log-probabilities in
float32 whatever the model's type, a count of the prompts that did not fit, and for LongBench a cut in their middle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from qoq.recipes.errors import InputError


class HarnessModel(HFLM):  # type: ignore[misc]  # lm-eval is optional, so its classes may be unknown here
    """`model` for lm-eval.

    max_length       tokens of a prompt and its continuation at most
    keeps_both_ends  a prompt that is too long keeps its first and last tokens; otherwise its last
    on_requests      called with the requests answered, and all, of the kind that lm-eval asks for
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_length: int,
        batch_size: int,
        keeps_both_ends: bool,
        on_requests: Callable[[int, int], None],
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
        self.shortened = 0
        self._keeps_both_ends, self._on_requests = keeps_both_ends, on_requests

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._watch(requests)
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        self._watch(requests)
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        self._watch(requests)
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _watch(self, requests: Sequence[Any]) -> None:
        self.set_cache_hook(_Counter(len(requests), self._on_requests))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        longest = max((len(answer) for _, _, answer in requests), default=0)
        if longest > self.max_length:
            raise InputError(
                f"an answer to be scored has {longest} tokens, and the model reads {self.max_length} at once",
                remedy="pass a longer --seq-len, leave the task out, or take a model with a longer context",
            )
        if any(not answer for _, _, answer in requests):
            raise InputError(
                "an answer to be scored has no token of its own: it is empty, or melts into the prompt's last token",
                remedy="check doc_to_text, doc_to_target and doc_to_choice in the task's YAML",
            )
        self.shortened += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both [B, L], of prompts; none is longer than `left_truncate_len`."""
        if left_truncate_len is not None:
            too_long = [len(self.tok_encode(text)) > left_truncate_len for text in strings]
            self.shortened += sum(too_long)
            if self._keeps_both_ends:
                strings = [
                    self._without_middle(text, left_truncate_len) if cut else text
                    for text, cut in zip(strings, too_long, strict=True)
                ]
        encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(
            list(strings), padding_side, left_truncate_len, truncation
        )
        return encoded

    def _without_middle(self, text: str, length: int) -> str:
        """As LongBench does it: the text of the first and of the last length / 2 tokens, joined."""
        tokens = self.tok_encode(text)
        kept = length
        while True:
            half = max(kept // 2, 1)
            shorter: str = self.tok_decode(tokens[:half]) + self.tok_decode(tokens[len(tokens) - half :])
            excess = len(self.tok_encode(shorter)) - length
            if excess <= 0 or half == 1:
                return shorter
            kept -= max(excess, 2)  # the seam may be tokenized differently


class _Counter:
    """lm-eval tells its cache about each answer; this one only counts."""

    def __init__(self, total: int, on_requests: Callable[[int, int], None]) -> None:
        self._done, self._total, self._on_requests = 0, total, on_requests

    def add_partial(self, *_: Any) -> None:
        self._done += 1
        self._on_requests(self._done, self._total)
