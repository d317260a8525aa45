"""Published throughput of QServe and TensorRT-LLM, and the few parameters of a model of each that come closest to it.

Fitted are, for each system, the share of the memory's bandwidth that its kernels reach, the share of the tensor cores'
rate for each kind of weights, the share of the issue rate that decode attention reaches, and the time that a layer of a
decode step adds. The workspace of prompts comes from the batches that QServe was run with. The rest is in FIXED.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from least_error import least

from qoq.kernels.footprint import (
    CHUNK_TOKENS,
    RESERVED_BYTES,
    activation_bytes,
    kv_token_bytes,
    largest_batch,
    weight_bytes,
)
from qoq.kernels.projection import KernelModel, ServedSpeed, ServedWork, System, served_speed, served_work
from qoq.recipes.gpus import Gpu, Operand, find_gpu
from qoq.recipes.precisions import Precision, find_precision
from qoq.recipes.shapes import ModelShape, find_shape

PUBLISHED = Path(__file__).with_name("published-throughput.json")
OPERANDS: dict[str, Operand] = {
    "g128": "int8",
    "per_channel": "int8",
    "int8": "int8",
    "int4_fp16": "fp16",
    "fp16": "fp16",
}
KINDS = {"qserve": ("g128", "per_channel"), "tensorrt-llm": ("fp16", "int4_fp16", "int8")}
FIXED = {
    "lm_head": 0.8,  # of the 16-bit rate; cuBLAS on an H100
    "prefill_attention": 0.52,  # of the 16-bit rate of mma.sync; FlashAttention-2 on an H100
    "overlap": 3.0,
}
START = {"bandwidth": 0.8, "operations": 0.5, "lanes": 0.2, "layer_us": 20.0}
_PULL = 1e-3
"""Of parameters to their start, in squared logarithms: it decides only what the rows leave open."""
_LIMIT = 1024


@dataclass(frozen=True)
class Row:
    """One cell of the table; `tokens_per_s` is None where the model does not fit, `batch` where it is not told."""

    gpu: Gpu
    system: str
    precision: Precision
    shape: ModelShape
    tokens_per_s: float | None
    batch: int | None


@dataclass(frozen=True)
class Fitted:
    """Parameters of one system; `operations` by kind of weights."""

    bandwidth: float
    operations: Mapping[str, float]
    lanes: float
    layer_us: float

    def system(self, weights: str) -> System:
        """For weights of that kind."""
        overlap = FIXED["overlap"]
        return System(
            {
                "gemm": KernelModel(self.bandwidth, self.operations[weights], OPERANDS[weights], overlap=overlap),
                "lm_head": KernelModel(self.bandwidth, FIXED["lm_head"], overlap=overlap),
                "prefill_attention": KernelModel(self.bandwidth, FIXED["prefill_attention"], overlap=overlap),
                "decode_attention": KernelModel(self.bandwidth, lanes=self.lanes, overlap=overlap),
                "small": KernelModel(self.bandwidth),
            },
            layer_us=self.layer_us,
        )


@dataclass(frozen=True)
class Case:
    """A row and its counted work at the batch that is assumed."""

    row: Row
    work: ServedWork


def published() -> dict[str, Any]:
    """published-throughput.json."""
    table: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return table


def read_rows() -> list[Row]:
    """Every cell of the published table."""
    table = published()
    rows = []
    for line in table["rows"]:
        gpu, precision = find_gpu(line["gpu"]), find_precision(line["precision"])
        batches = line.get("batch") or [None] * len(table["models"])
        for model, tokens, batch in zip(table["models"], line["tokens_per_s"], batches, strict=True):
            rows.append(Row(gpu, line["system"], precision, find_shape(model), tokens, batch))
    return rows


def fit_workspace(rows: Sequence[Row]) -> float:
    """Median over the rows whose batch is known of the memory that was left for activations, as a multiple."""
    prompt, tokens = lengths()
    found = []
    for row in rows:
        if row.batch is not None:
            kv_cache = row.batch * tokens * kv_token_bytes(row.shape, row.precision.kv_bits)
            left = row.gpu.memory_bytes - RESERVED_BYTES - weight_bytes(row.shape, row.precision.weights) - kv_cache
            found.append(left / (row.batch * prompt * activation_bytes(row.shape)))
    return statistics.median(found)


def fitting_batch(row: Row, workspace: float) -> int:
    """The largest batch that fits, all prompts at once as QServe runs them; 0 where none does."""
    prompt, tokens = lengths()
    return largest_batch(
        row.shape,
        row.precision,
        row.gpu.memory_bytes,
        tokens=tokens,
        prompt_len=prompt,
        workspace=workspace,
        chunk_tokens=None,
        limit=_LIMIT,
    )


def make_case(row: Row, workspace: float, *, use_told: bool = True) -> Case:
    """With the batch of the table where it tells one, or else the largest that fits (one sequence where none does)."""
    told = row.batch if use_told else None
    batch = told or max(1, fitting_batch(row, workspace))
    prompt, tokens = lengths()
    return Case(row, served_work(row.shape, row.precision, batch, prompt, tokens - prompt, chunk_tokens=CHUNK_TOKENS))


def fit(system: str, cases: Sequence[Case]) -> Fitted:
    """The parameters of `system` with the least mean absolute logarithm of projected over published."""
    names = ["bandwidth", "lanes", "layer_us", *KINDS[system]]
    start = [math.log(START.get(name, START["operations"])) for name in names]

    def error(point: list[float]) -> float:
        fitted = _unpack(names, point)
        misses = [abs(log_error(case, fitted)) for case in cases]
        pull = _PULL * sum((x - y) ** 2 for x, y in zip(point, start, strict=True))
        too_fast = sum(max(0.0, x - math.log(0.95)) for name, x in zip(names, point, strict=True) if name != "layer_us")
        return statistics.fmean(misses) + pull + too_fast

    return _unpack(names, least(error, start))


def project(case: Case, fitted: Fitted) -> ServedSpeed:
    """What the model says of a case."""
    return served_speed(case.work, fitted.system(case.row.precision.weights), case.row.gpu)


def log_error(case: Case, fitted: Fitted) -> float:
    """Logarithm of projected over published tokens per second."""
    told = case.row.tokens_per_s
    if told is None:
        raise ValueError(f"{case.row}: the table has no throughput")
    return math.log(project(case, fitted).tokens_per_s / told)


@cache
def lengths() -> tuple[int, int]:
    """Tokens of a prompt, and of a prompt with its output."""
    table = published()
    return table["prompt_len"], table["prompt_len"] + table["output_len"]


def _unpack(names: Sequence[str], point: Sequence[float]) -> Fitted:
    values = {name: math.exp(x) for name, x in zip(names, point, strict=True)}
    shares = {name: value for name, value in values.items() if name in OPERANDS}
    return Fitted(values["bandwidth"], shares, values["lanes"], values["layer_us"])
