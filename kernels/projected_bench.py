"""What `qoq bench` shows of a GPU that is not here: projected products of a layer, decode attention, served models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qoq.kernels.footprint import MemorySplit, largest_batch, memory_split
from qoq.kernels.projected_kernels import error_bars, kernel_models, projected_system
from qoq.kernels.projection import ServedSpeed, served_speed, served_work
from qoq.kernels.work import decode_attention_work, layer_gemms_work
from qoq.recipes.gpus import Gpu
from qoq.recipes.precisions import Precision, find_precision
from qoq.recipes.shapes import ModelShape

GEMM_VARIANTS = {
    "w4a8-g128": "w4a8kv4-g128",
    "w4a8-chn": "w4a8kv4-chn",
    "fp16": "fp16",
    "fp8": "fp8",
    "w8a8": "w8a8kv8",
}
ATTENTION_VARIANTS = {"kv4": "w4a8kv4-g128", "kv8": "w4a8kv8-g128", "fp16": "fp16"}
"""Precisions that have the product, or the attention, of a variant."""
MAX_BATCH = 512
"""Sequences that a server takes at once if more would fit."""


@dataclass(frozen=True)
class ProjectedTime:
    """Of the products of a layer for `rows` tokens, or of its attention for `rows` sequences of `length` tokens."""

    rows: int
    length: int | None
    variant: str
    us: float
    low_us: float
    high_us: float


@dataclass(frozen=True)
class ProjectedModel:
    """A model served with a batch of prompts that come at once.

    kernels              "qoq", or "torch" for PyTorch's products and attention
    error                share by which throughput may be off, see `ErrorBars`
    speed                None where not one sequence fits; see `memory`
    first_token_alone_s  time to the first token of one prompt on an idle GPU
    dollars_per_million  output tokens, at the price that was given
    """

    precision: str
    kernels: str
    prompt_len: int
    output_len: int
    memory: MemorySplit
    error: float
    speed: ServedSpeed | None = None
    low_tokens_per_s: float | None = None
    high_tokens_per_s: float | None = None
    first_token_alone_s: float | None = None
    tokens_per_dollar: float | None = None
    dollars_per_million: float | None = None


def runs_on(gpu: Gpu, precision: Precision) -> bool:
    """Whether the tensor cores of `gpu` know the operands of `precision`."""
    return precision.weights != "fp8" or gpu.fp8_tops is not None


def project_gemms(shape: ModelShape, gpu: Gpu, rows: Sequence[int], variants: Sequence[str]) -> list[ProjectedTime]:
    """The four products of a layer for each M of `rows`, in each of GEMM_VARIANTS that is asked for."""
    times = []
    for m in rows:
        for variant in variants:
            precision = find_precision(GEMM_VARIANTS[variant])
            model = kernel_models(gpu, precision, sustained=False)["gemm"]
            us = sum(model.call_us(work, gpu) for work in layer_gemms_work(shape, precision.weights, m))
            times.append(_with_bars(gpu, m, None, variant, us))
    return times


def project_attention(
    shape: ModelShape, gpu: Gpu, cases: Sequence[tuple[int, int]], variants: Sequence[str]
) -> list[ProjectedTime]:
    """One layer of a decode step for each (sequences, tokens) of `cases`, in each of ATTENTION_VARIANTS asked for."""
    times = []
    for sequences, tokens in cases:
        for variant in variants:
            precision = find_precision(ATTENTION_VARIANTS[variant])
            model = kernel_models(gpu, precision, sustained=False)["decode_attention"]
            us = model.call_us(decode_attention_work(shape, precision.kv_bits, sequences, tokens), gpu)
            times.append(_with_bars(gpu, sequences, tokens, variant, us))
    return times


def project_model(
    shape: ModelShape,
    gpu: Gpu,
    precision: Precision,
    *,
    prompt_len: int,
    output_len: int,
    sequences: int | None = None,
    price: float | None = None,
) -> ProjectedModel:
    """Throughput on the whole memory of `gpu` with `sequences`, or with as many as fit up to MAX_BATCH.

    `price` is in dollars an hour. Where the sequences do not fit there is no speed; nor where not one does.
    """
    system = projected_system(gpu, precision)
    chunk_tokens = system.chunk_tokens or prompt_len * (sequences or 1)
    tokens = prompt_len + output_len
    batch = sequences or largest_batch(
        shape,
        precision,
        gpu.memory_bytes,
        tokens=tokens,
        prompt_len=prompt_len,
        workspace=system.workspace,
        chunk_tokens=system.chunk_tokens,
        limit=MAX_BATCH,
    )
    memory = memory_split(
        shape,
        precision,
        gpu.memory_bytes,
        sequences=max(1, batch),
        tokens=tokens,
        prompt_tokens=min(max(1, batch) * prompt_len, chunk_tokens),
        workspace=system.workspace,
    )
    is_ours = precision.weights in ("g128", "per_channel", "int8")
    bars = error_bars(gpu)
    error = bars.ours if is_ours else bars.others
    kernels = "qoq" if is_ours else "torch"
    if memory.left < 0:
        return ProjectedModel(precision.name, kernels, prompt_len, output_len, memory, error)

    def speed_of(count: int, new_tokens: int) -> ServedSpeed:
        work = served_work(shape, precision, count, prompt_len, new_tokens, chunk_tokens=chunk_tokens)
        return served_speed(work, system, gpu)

    speed = speed_of(batch, output_len)
    per_dollar = None if price is None else speed.tokens_per_s * 3600 / price
    return ProjectedModel(
        precision.name,
        kernels,
        prompt_len,
        output_len,
        memory,
        error,
        speed,
        low_tokens_per_s=speed.tokens_per_s / (1 + error),
        high_tokens_per_s=speed.tokens_per_s * (1 + error),
        first_token_alone_s=speed_of(1, 1).prefill_s,
        tokens_per_dollar=per_dollar,
        dollars_per_million=None if per_dollar is None else 1e6 / per_dollar,
    )


def _with_bars(gpu: Gpu, rows: int, length: int | None, variant: str, us: float) -> ProjectedTime:
    error = error_bars(gpu).ours
    return ProjectedTime(rows, length, variant, us, us / (1 + error), us * (1 + error))
