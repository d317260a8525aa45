"""What a run of random requests amounts to: tokens a second, how long users wait, and how near memory's rate it is."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from qoq.kernels.runtime.attention import page_nbytes
from qoq.kernels.runtime.engine import Engine, RunStats
from qoq.kernels.runtime.model import RuntimeModel
from qoq.kernels.runtime.scheduler import Request


@dataclass(frozen=True)
class Throughput:
    """A closed set of requests, all there from the start.

    output_tokens_s    tokens of answers over the whole time, prefill included
    first_token_s      median and 99th percentile of the seconds to a request's first token
    token_s            median and 99th percentile of the seconds between two tokens of a request
    """

    requests: int
    prompt_len: int
    output_len: int
    seconds: float
    output_tokens_s: float
    first_token_s: tuple[float, float]
    token_s: tuple[float, float]
    preemptions: int
    stats: RunStats


def measure_closed_set(engine: Engine, *, requests: int, prompt_len: int, output_len: int, seed: int = 0) -> Throughput:
    """Random prompts and greedy answers of fixed lengths; call `engine.warm_up()` before, or graphs are timed too."""
    random = torch.Generator().manual_seed(seed)
    vocabulary = engine.model.config.vocab_size
    prompts = torch.randint(vocabulary, (requests, prompt_len), generator=random).tolist()
    answers = engine.generate([Request(prompt, output_len) for prompt in prompts])
    seconds = engine.stats.seconds
    waits = [later - earlier for a in answers for earlier, later in zip(a.times, a.times[1:], strict=False)]
    return Throughput(
        requests=requests,
        prompt_len=prompt_len,
        output_len=output_len,
        seconds=seconds,
        output_tokens_s=sum(len(answer.tokens) for answer in answers) / seconds,
        first_token_s=_spread([answer.times[0] for answer in answers]),
        token_s=_spread(waits),
        preemptions=sum(answer.preemptions for answer in answers),
        stats=engine.stats,
    )


def decode_nbytes(model: RuntimeModel, kv_lens: list[int]) -> int:
    """Bytes that a decode step of sequences of these lengths must read: all weights but the embedding's other rows, and
    keys and values."""
    weights = model.decoder.weights
    embedding = 0 if weights.lm_head is weights.embedding else weights.embedding.nbytes
    size = model.pool.page_size
    token = page_nbytes(model.config, size, model.dtype) / size
    return weights.nbytes - embedding + int(token * sum(kv_lens))


def _spread(seconds: list[float]) -> tuple[float, float]:
    """Median and 99th percentile; nothing of nothing."""
    if not seconds:
        return (0.0, 0.0)
    ordered = sorted(seconds)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
