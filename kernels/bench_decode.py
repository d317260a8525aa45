"""One decode step of a whole model at a given length: how long it takes, of what its roofline allows, and what for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from qoq.kernels.footprint import kv_token_bytes, weight_bytes
from qoq.kernels.runtime.engine import Engine
from qoq.kernels.runtime.scheduler import DecodePlan, Request, Running
from qoq.kernels.timing import Timing, summarize
from qoq.recipes.errors import InputError
from qoq.recipes.precisions import Precision
from qoq.recipes.shapes import ModelShape

_STEPS = 8
"""Of one sample: the host must be ahead of the device."""
_GROUPS = (
    ("products", re.compile(r"qoq_gemm")),
    ("attention", re.compile(r"qoq_(decode|paged)|flash|fmha|sdpa", re.IGNORECASE)),
    ("RoPE, append", re.compile(r"qoq_kv_append")),
    ("norms, quantizers", re.compile(r"qoq_act_quant|triton_")),
    ("PyTorch's products", re.compile(r"gemm|nvjet|cutlass|cublas|xmma", re.IGNORECASE)),
)
"""Kernels by their names, the first that matches. A 16-bit lm_head is among PyTorch's products, and what torch.compile
fused around products among norms."""
OTHER = "other"


@dataclass(frozen=True)
class DecodeResult:
    """A decode step of `batch` sequences with `context` tokens each, the new one included.

    step_us        of a step in a train of them
    roof_percent   of that, the time in which weights (lm_head with them, the embedding not) and cache are read once at
                   the bandwidth that this GPU was measured to have
    kernels_us     time of kernels by what they are for, by the profiler; where two overlap, the time is that of the one
                   that began first; empty where it does not run
    """

    precision: str
    batch: int
    context: int
    step_us: Timing
    roof_percent: float
    kernels_us: dict[str, float]


def bench_decode(
    engine: Engine,
    shape: ModelShape,
    precision: Precision,
    batch: int,
    context: int,
    *,
    read_gb_s: float,
    repeat: int = 10,
) -> DecodeResult:
    """Measure a step of the engine's model, on a CUDA device. Raises InputError where the cache has too little room."""
    pool = engine.model.pool
    needed = batch * pool.pages_for(context)
    if context > engine.model.longest or batch > engine.model.max_batch or needed > pool.free:
        raise InputError(
            f"a decode step of {batch} x {context} tokens has no room in this cache of {pool.free} pages",
            remedy="use fewer sequences, shorter ones, or more memory",
        )
    pages = [pool.take(pool.pages_for(context)) for _ in range(batch)]
    try:
        launch = engine.prepare_decode(_plan(pages, context))
        samples = [_time(launch) for _ in range(repeat)]
        kernels = _kernels(launch)
    finally:
        for own in pages:
            pool.give_back(own)
    timing = summarize(samples, calls=_STEPS)
    nbytes = step_bytes(shape, precision, batch, context, lm_head_bits=engine.model.options.lm_head_bits)
    floor_us = nbytes / read_gb_s * 1e-3
    return DecodeResult(precision.name, batch, context, timing, 100 * floor_us / timing.median_us, kernels)


def step_bytes(shape: ModelShape, precision: Precision, batch: int, context: int, *, lm_head_bits: int = 16) -> int:
    """That a decode step must read: weights with their scales, lm_head, and the cache."""
    embedding = 0 if shape.tied_embeddings else 2 * shape.vocab_size * shape.hidden_size
    saved = 0 if lm_head_bits == 16 else shape.vocab_size * (shape.hidden_size - 2)  # a byte a weight, less the scales
    cache = batch * context * kv_token_bytes(shape, precision.kv_bits)
    return weight_bytes(shape, precision.weights) - embedding - saved + cache


def _plan(pages: list[list[int]], context: int) -> DecodePlan:
    """Sequences that are at this length, in the first rows."""
    sequences = []
    for row, own in enumerate(pages):
        request = Request([0] * (context - 1), 2)
        running = Running(row, request, list(request.prompt), cached=context, pages=own, row=row)
        sequences.append(running)
    table = tuple((row, place, page) for row, own in enumerate(pages) for place, page in enumerate(own))
    return DecodePlan(tuple(sequences), len(pages), (), table)


def _time(launch: Callable[[], None]) -> float:
    """Microseconds of a step."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    launch()  # the host is ahead when the clock starts
    start.record()
    for _ in range(_STEPS):
        launch()
    stop.record()
    stop.synchronize()
    return 1000 * float(start.elapsed_time(stop)) / _STEPS


def _kernels(launch: Callable[[], None]) -> dict[str, float]:
    """Microseconds of a step by group."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(_STEPS):
            launch()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiled.events() or ()
        if event.device_type.name == "CUDA"
    ]
    return {group: us / _STEPS for group, us in spent_by_group(spans).items()}


def spent_by_group(spans: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Time of kernels (start, end, name) by group, the longest first; what two share counts once, for the earlier.

    An overlapping kernel begins while the one before it runs, and waits for it: its duration says little.
    """
    found: dict[str, float] = {}
    ended = -math.inf
    for start, end, name in sorted(spans):
        group = group_of(name)
        found[group] = found.get(group, 0.0) + max(0.0, end - max(start, ended))
        ended = max(ended, end)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def group_of(kernel: str) -> str:
    """What a kernel of this name is for."""
    return next((group for group, pattern in _GROUPS if pattern.search(kernel)), OTHER)
