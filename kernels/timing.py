"""Times of GPU calls, side by side: trains of calls in CUDA graphs, replayed in turns.

A graph takes Python and launch costs out of the measurement (kernels are still launched one after the other; those that
ask for it overlap with the end of the one before). A train rotates over copies of its data that together exceed the L2
cache. Variants take turns, train by train, because the clock of a card falls as it heats up: whoever is measured later
would look slower.
After each train the GPU rests. Large products draw more power than a card may use for long, so that without rests the
clock of each variant would depend on what its neighbours draw.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

TRAIN_US = 1000.0
"""A train lasts at least this long, so that starting it does not count."""
REST = 3.0
"""After a train the GPU idles this many times as long: on average it then draws a quarter of its load."""
_MAX_CALLS = 1024
_HEAD_START_CYCLES = 100_000
_CACHES = 4
"""Copies together are this many times the L2 cache, whose replacement is not strictly oldest first."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, 10th and 90th percentile over `samples` trains of `calls` calls each."""

    median_us: float
    low_us: float
    high_us: float
    samples: int
    calls: int


@dataclass(frozen=True)
class Variant:
    """One thing to time. `call(i)` enqueues one call on copy i (0 <= i < copies) of its data, without synchronising.

    An optional variant that the GPU or PyTorch refuses is left out with the reason; else the error is raised.
    """

    name: str
    call: Callable[[int], object]
    copies: int = 1
    optional: bool = False


@dataclass(frozen=True)
class Measurement:
    """Timings by variant, and why others are missing."""

    timings: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def measure(
    variants: Sequence[Variant], *, repeat: int = 20, train_us: float = TRAIN_US, rest: float = REST
) -> Measurement:
    """Time `variants` on the current CUDA device, `repeat` trains each, in turns, each followed by `rest` times its
    length without work (0: trains follow each other, and the GPU is under full load).

    Each variant's first calls, outside the measurement, compile and load what it needs.
    """
    if repeat < 1:
        raise ValueError(f"repeat must be at least 1, got {repeat}")
    result = Measurement()
    trains: dict[str, Train] = {}
    with torch.no_grad():
        for variant in variants:
            try:
                trains[variant.name] = _prepare(variant, train_us)
            except (RuntimeError, ValueError, NotImplementedError) as error:  # what PyTorch raises when it refuses
                if not variant.optional:
                    raise
                result.skipped[variant.name] = _first_line(error)
    samples: dict[str, list[float]] = {name: [] for name in trains}
    names = list(trains)
    for turn in range(repeat if names else 0):
        start = turn % len(names)
        order = names[start:] + names[:start]
        for name, elapsed in zip(order, time_trains([trains[name] for name in order], rest=rest), strict=True):
            samples[name].append(elapsed / trains[name].calls)
    result.timings.update({name: summarize(values, trains[name].calls) for name, values in samples.items()})
    return result


def summarize(samples: Sequence[float], calls: int) -> Timing:
    """Median and percentiles of `samples`, microseconds of a call."""
    ordered = sorted(samples)
    return Timing(
        median_us=_percentile(ordered, 0.5),
        low_us=_percentile(ordered, 0.1),
        high_us=_percentile(ordered, 0.9),
        samples=len(ordered),
        calls=calls,
    )


def copies_beyond_cache(copy_bytes: int, *, cache_bytes: int, budget_bytes: int) -> int:
    """How many copies of `copy_bytes` make a train read memory and not the L2 cache; 0 when not even one fits.

    At least 2 where they fit: the end of one large copy would still be in the cache when it is read again.
    """
    wanted = max(2, -(-_CACHES * cache_bytes // copy_bytes))
    return min(wanted, budget_bytes // copy_bytes)


@dataclass(frozen=True)
class Train:
    """A captured graph of `calls` calls."""

    graph: torch.cuda.CUDAGraph
    calls: int


def capture(variant: Variant, calls: int) -> Train:
    """A graph of `calls` calls that rotate over the copies; everything they need must be loaded."""
    # torch.cuda.graph() would also collect garbage and empty the allocator's cache: slow, and not needed here.
    graph = torch.cuda.CUDAGraph()
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    collects = gc.isenabled()
    gc.disable()  # what it frees may call what must not be called during a capture
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                for i in range(calls):
                    variant.call(i % variant.copies)
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return Train(graph, calls)


def time_trains(trains: Sequence[Train], *, rest: float = 0.0) -> list[float]:
    """Microseconds of each train, replayed one after the other; the GPU stays busy, or rests after each."""
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in trains] for _ in range(2))
    if not rest:
        trains[-1].graph.replay()  # untimed: while it runs, the host gets ahead of the GPU
    for train, start, end in zip(trains, starts, ends, strict=True):
        if rest:
            torch.cuda._sleep(_HEAD_START_CYCLES)  # the same, on a GPU that is idle
        start.record()
        train.graph.replay()
        end.record()
        if rest:
            end.synchronize()
            time.sleep(rest * float(start.elapsed_time(end)) * 1e-3)
    torch.cuda.synchronize()
    return [1000.0 * float(start.elapsed_time(end)) for start, end in zip(starts, ends, strict=True)]


def _prepare(variant: Variant, train_us: float) -> Train:
    """Load what the variant needs, and capture a train that lasts long enough and visits all copies equally often."""
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries keep workspaces for each stream
        for i in range(variant.copies):
            variant.call(i)
    torch.cuda.synchronize()
    train = capture(variant, variant.copies)
    time_trains([train])
    calls = plan_calls(variant.copies, min(time_trains([train])), train_us)
    return train if calls == variant.copies else capture(variant, calls)


def plan_calls(copies: int, round_us: float, train_us: float) -> int:
    """Calls of a train: whole rounds over the copies, of `round_us` each, that last `train_us` together."""
    rounds = math.ceil(train_us / max(round_us, 1e-3))
    return copies * max(1, min(rounds, _MAX_CALLS // copies))


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """Linear between the two nearest samples."""
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
