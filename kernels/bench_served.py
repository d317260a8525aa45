"""Benchmark of whole models on the runtime: a closed set of requests, with prompts and answers of fixed lengths.

All requests come at once, answers do not end early, and the time runs from the first prompt to the last token that the
host knows, prefill included. Weights and prompts are random; every precision has the same memory, and takes at most the
same number of sequences at a time. Graphs are captured, and kernels loaded, before the time runs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qoq.kernels.bench_decode import DecodeResult, bench_decode
from qoq.kernels.energy import EnergyMeter
from qoq.kernels.footprint import CHUNK_TOKENS
from qoq.kernels.runtime.engine import Completion, Engine
from qoq.kernels.runtime.memory import MemoryPlan
from qoq.kernels.runtime.model import Options, RuntimeModel
from qoq.kernels.runtime.scheduler import Request, decode_batches
from qoq.recipes.errors import QoQError
from qoq.recipes.precisions import Precision
from qoq.recipes.shapes import ModelShape

_ALONE_TOKENS = 1024
_PERCENTILES = (50, 99)
_Tell = Callable[[float], None]


@dataclass(frozen=True)
class ServedCase:
    """requests of prompt_len tokens that get output_len each; at most `batch` sequences at a time.

    requests   None: as many as fit into the memory at once with all of their tokens, up to `batch`
    """

    prompt_len: int
    output_len: int
    batch: int
    requests: int | None = None

    @property
    def longest(self) -> int:
        return self.prompt_len + self.output_len


@dataclass(frozen=True)
class Percentiles:
    """Over the requests of a run."""

    p50: float
    p99: float

    @staticmethod
    def of(values: Sequence[float]) -> Percentiles:
        p50, p99 = np.percentile(values, _PERCENTILES)
        return Percentiles(float(p50), float(p99))


@dataclass(frozen=True)
class ServedResult:
    """What a case got at one precision.

    requests       that were answered;  together: most of them that fit into the memory at once, all tokens counted
    seconds        from the first prompt to the last token
    tokens_per_s   output tokens of all requests over that time
    first_token_s  from the start, when all requests came, to the first token of each
    token_ms       time per output token of a request, from its first to its last; None for answers of one token
    joules         of the GPU meanwhile, idle power included; None where it cannot be read
    """

    precision: str
    case: ServedCase
    requests: int
    together: int
    seconds: float
    tokens_per_s: float
    first_token_s: Percentiles
    token_ms: Percentiles | None
    joules: float | None
    memory: MemoryPlan
    prefill_steps: int
    decode_steps: int
    decode_rows: int
    preemptions: int


@dataclass(frozen=True)
class ServedReport:
    """What was measured, and by case and precision why there is nothing.

    steps   single decode steps: of one sequence of 1024 tokens, and of as many as fit in the middle of their answers
    """

    results: list[ServedResult]
    steps: list[DecodeResult]
    skipped: dict[str, str]


def bench_served(
    shape: ModelShape,
    precisions: Sequence[Precision],
    cases: Sequence[ServedCase],
    *,
    options: Options,
    read_gb_s: float | None = None,
    seed: int = 0,
    on_step: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> ServedReport:
    """Run every case at every precision. `options` say the device and the memory; lengths and batches are the cases'.

    read_gb_s   bandwidth that single decode steps of the first case are compared with; None to leave them out (there
                are none on a CPU)

    What fails is told in `skipped`, and the rest goes on.
    """
    report = ServedReport([], [], {})
    stepped = [(cases[0], precision) for precision in precisions] if read_gb_s is not None and cases else []
    runs = [(case, precision) for case in cases for precision in precisions]
    total = len(runs) + len(stepped)
    for done, (case, precision) in enumerate(runs):
        label = f"{precision.name}, {case.prompt_len} in, {case.output_len} out, batch {case.batch}"
        on_step(done * 1000, total * 1000, f"{label}: weights")

        def tell(share: float, begun: int = done, label: str = label) -> None:
            on_step(int((begun + share) * 1000), total * 1000, label)

        def run(case: ServedCase = case, precision: Precision = precision, tell: _Tell = tell) -> None:
            engine = Engine(_model(shape, precision, case, options, seed))
            report.results.append(run_case(engine, precision.name, case, seed=seed, on_share=tell))

        _attempt(run, label, report, options)
    # Last: a profiler that has run once slows what follows.
    for done, (case, precision) in enumerate(stepped, start=len(runs)):
        on_step(done * 1000, total * 1000, f"{precision.name}: single steps")

        def step(case: ServedCase = case, precision: Precision = precision) -> None:
            engine = Engine(_model(shape, precision, case, options, seed))
            for batch, context in _steps(engine, case):
                report.steps.append(bench_decode(engine, shape, precision, batch, context, read_gb_s=read_gb_s or 0.0))

        _attempt(step, f"{precision.name}: single steps", report, options)
    return report


def _attempt(work: Callable[[], None], label: str, report: ServedReport, options: Options) -> None:
    """Do it, or tell why not; afterwards nothing of it is left on the device."""
    why = None
    try:
        work()
    except (QoQError, RuntimeError, ValueError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
    if why is not None:  # outside: the error holds on to the model
        report.skipped[label] = why
    _collect(options)


def together_of(engine: Engine, case: ServedCase) -> int:
    """Sequences that fit into the cache with all of their tokens, up to the case's batch and the model's."""
    model, pool = engine.model, engine.model.pool
    return min(case.batch, model.max_batch, pool.num_pages // pool.pages_for(case.longest))


def run_case(
    engine: Engine,
    precision: str,
    case: ServedCase,
    *,
    seed: int = 0,
    on_share: Callable[[float], None] = lambda share: None,
) -> ServedResult:
    """One case on a model that is loaded."""
    model = engine.model
    together = together_of(engine, case)
    engine.warm_up()
    requests = _requests(model, case, case.requests or max(1, together), seed)
    chunkful = -(-model.options.chunk_tokens // case.prompt_len) + 1
    engine.generate([Request(request.prompt, min(2, case.output_len)) for request in requests[:chunkful]])
    total, known = len(requests) * case.output_len, 0

    def count(_: int, __: int) -> None:
        nonlocal known
        known += 1
        if known % 1024 == 0:
            on_share(known / total)

    with EnergyMeter(model.device) as meter:
        answers = engine.generate(requests, on_token=count)
    stats = engine.stats
    return ServedResult(
        precision=precision,
        case=case,
        requests=len(requests),
        together=together,
        seconds=stats.seconds,
        tokens_per_s=sum(len(answer.tokens) for answer in answers) / stats.seconds,
        first_token_s=Percentiles.of([answer.times[0] for answer in answers]),
        token_ms=Percentiles.of([_token_ms(answer) for answer in answers]) if case.output_len > 1 else None,
        joules=meter.joules,
        memory=model.memory,
        prefill_steps=stats.prefill_steps,
        decode_steps=stats.decode_steps,
        decode_rows=stats.decode_rows,
        preemptions=sum(answer.preemptions for answer in answers),
    )


def gemm_rows(max_batch: int) -> list[int]:
    """Rows of the products that cases of up to so many sequences run: decode batches, and chunks of prompts."""
    rows = set(decode_batches(max_batch))
    while max(rows) < CHUNK_TOKENS:
        rows.add(2 * max(rows))
    return sorted(rows)


def _steps(engine: Engine, case: ServedCase) -> list[tuple[int, int]]:
    """Sequences and tokens of single decode steps; as many sequences as a step of the run may have."""
    together = together_of(engine, case)
    batch = max((size for size in decode_batches(engine.model.max_batch) if size <= together), default=0)
    middle = (batch, case.prompt_len + max(1, case.output_len // 2))
    return [step for step in ((1, _ALONE_TOKENS), middle) if step[0] and step[1] <= case.longest]


def _model(shape: ModelShape, precision: Precision, case: ServedCase, options: Options, seed: int) -> RuntimeModel:
    sizes = {"max_batch": case.batch, "max_tokens": case.longest}
    return RuntimeModel.from_shape(shape, precision, Options(**{**vars(options), **sizes}), seed=seed)


def _requests(model: RuntimeModel, case: ServedCase, count: int, seed: int) -> list[Request]:
    """Random prompts, none the beginning of another."""
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, size=(count, case.prompt_len))
    return [Request(prompt, case.output_len) for prompt in tokens.tolist()]


def _token_ms(answer: Completion) -> float:
    return (answer.times[-1] - answer.times[0]) / (len(answer.times) - 1) * 1000


def _collect(options: Options) -> None:
    """Give the memory of a model back, that of its graphs too."""
    gc.collect()
    if torch.device(options.device).type == "cuda":
        torch.cuda.empty_cache()
