"""How long counted work takes on a GPU that need not be here: an analytic model of each kernel over a data sheet.

A call takes its latency, and then what it needs longest: its bytes at a share of the bandwidth, its operations at a
share of the tensor cores' rate, or its other instructions at a share of the rate at which they are issued. How well
these hide behind each other is one exponent. Shares were fitted to measured times, and are taken to be the same on
other GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qoq.kernels.work import Work, decode_work, prefill_work
from qoq.recipes.gpus import Gpu, Operand
from qoq.recipes.precisions import Precision
from qoq.recipes.shapes import ModelShape

MMA_SYNC_SHARE = {"sm_90": 0.63, "sm_100": 0.33}
"""Share of the promised rate that the portable instruction reaches, where newer ones are faster: 1240 of 1979 TOPS
measured on an H100 (benchmarks/kernels.md); on sm_100 that an SM is as fast in a clock as Hopper's is an assumption."""
_STEPS_SAMPLED = 2


@dataclass(frozen=True)
class KernelModel:
    """Speed of one kernel, in shares of what a data sheet promises.

    bandwidth    of the memory's bandwidth
    operations   of the tensor cores' rate for `operand`
    lanes        of the rate of instructions outside the tensor cores; None where they never decide
    latency_us   of a call that has nothing to do
    overlap      exponent: 1 where bytes and operations take turns, large where the longer hides the shorter
    portable     runs mma.sync, see MMA_SYNC_SHARE
    """

    bandwidth: float
    operations: float = 1.0
    operand: Operand = "fp16"
    lanes: float | None = None
    latency_us: float = 0.0
    overlap: float = 3.0
    portable: bool = False

    def call_us(self, work: Work, gpu: Gpu) -> float:
        """Time of one call. Raises ValueError where the GPU's tensor cores do not know the operand."""
        times = [work.nbytes / (gpu.bandwidth_gb_s * self.bandwidth) * 1e-3]
        if work.operations:
            peak = gpu.tops(self.operand)
            if peak is None:
                raise ValueError(f"{gpu.title} has no {self.operand}")
            share = MMA_SYNC_SHARE.get(gpu.architecture, 1.0) if self.portable else 1.0
            times.append(work.operations / (peak * share * self.operations) * 1e-6)
        if work.lanes and self.lanes is not None:
            times.append(work.lanes / (gpu.vector_tops * self.lanes) * 1e-6)
        longest = max(times)
        if longest == 0:
            return self.latency_us
        combined: float = sum((time / longest) ** self.overlap for time in times) ** (1 / self.overlap)
        return self.latency_us + longest * combined


@dataclass(frozen=True)
class System:
    """A server: its kernels by the name that `Work` has, and what it adds.

    layer_us      a layer of a decode step, beside its kernels
    step_us       a decode step: scheduling, sampling
    workspace     allocated activations in multiples of `footprint.activation_bytes`
    chunk_tokens  prompt tokens computed at a time; None for all prompts together
    """

    kernels: Mapping[str, KernelModel]
    layer_us: float = 0.0
    step_us: float = 0.0
    workspace: float = 1.0
    chunk_tokens: int | None = None

    def total_us(self, works: Iterable[Work], gpu: Gpu) -> float:
        """Kernels one after the other."""
        return sum(work.count * self.kernels[work.kernel].call_us(work, gpu) for work in works)


@dataclass(frozen=True)
class ServedWork:
    """A batch from its prompts to its last token. `steps` holds samples of the decode steps, evenly spread."""

    sequences: int
    output_len: int
    num_layers: int
    prefill: Sequence[Work]
    steps: Sequence[Sequence[Work]]


@dataclass(frozen=True)
class ServedSpeed:
    """What a batch gets; all its prompts come at once.

    tokens_per_s    output tokens of all sequences over the time from the prompts to the last token
    prefill_s       until every sequence has its first token
    step_ms         time per output token of each sequence, mean over the decode steps
    """

    sequences: int
    tokens_per_s: float
    prefill_s: float
    step_ms: float


def served_work(
    shape: ModelShape, precision: Precision, sequences: int, prompt_len: int, output_len: int, *, chunk_tokens: int
) -> ServedWork:
    """Count the work of `sequences` that get `output_len` tokens each, the first of them from the prompt."""
    samples = min(_STEPS_SAMPLED, output_len - 1)
    lengths = [prompt_len + (i + 0.5) * (output_len - 1) / samples for i in range(samples)]
    return ServedWork(
        sequences,
        output_len,
        shape.num_layers,
        prefill_work(shape, precision, sequences, prompt_len, chunk_tokens=chunk_tokens),
        [decode_work(shape, precision, sequences, length) for length in lengths],
    )


def served_speed(work: ServedWork, system: System, gpu: Gpu) -> ServedSpeed:
    """Speed of that work on `gpu`."""
    prefill_s = system.total_us(work.prefill, gpu) * 1e-6
    step_ms = 0.0
    if work.steps:
        added_us = work.num_layers * system.layer_us + system.step_us
        step_ms = (sum(system.total_us(step, gpu) for step in work.steps) / len(work.steps) + added_us) * 1e-3
    seconds = prefill_s + (work.output_len - 1) * step_ms * 1e-3
    return ServedSpeed(work.sequences, work.sequences * work.output_len / seconds, prefill_s, step_ms)
