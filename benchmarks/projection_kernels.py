"""Fit the models of our kernels, and of what they are compared with, to times measured on an H100.

    python benchmarks/projection_kernels.py

No GPU; some seconds. Writes kernels/tables/projection.json, which `qoq bench --gpu` reads, and
benchmarks/projection-kernels.json: how far each model is from the times that it was fitted to, and what the whole says
about servers whose throughput on an H100 is known. Error bars and workspace come from projection-validation.json.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from least_error import least

from qoq.kernels.footprint import CHUNK_TOKENS, largest_batch
from qoq.kernels.projected_kernels import PROJECTION_TABLE, projected_system, projection_table
from qoq.kernels.projection import MMA_SYNC_SHARE, KernelModel, served_speed, served_work
from qoq.kernels.work import Work, decode_attention_work, gemm_work
from qoq.recipes.gpus import Operand, find_gpu
from qoq.recipes.precisions import WeightKind, find_precision
from qoq.recipes.shapes import ModelShape, find_shape

HERE = Path(__file__).parent
H100 = find_gpu("h100-sxm")
OVERLAPS = (1.5, 2.0, 3.0, 4.0)
STEP_US = 200.0
"""Scheduling and sampling of a step; assumed, until a runtime of ours is measured."""
ROOT = "benchmarks/"


@dataclass(frozen=True)
class Source:
    """Where the times of a kernel are: variant `variant` of `file`; `sustained` has them under sustained load."""

    file: str
    variant: str
    operand: Operand
    portable: bool
    sustained: str | None = None


GEMMS: dict[str, dict[WeightKind, Source]] = {
    "portable": {
        "g128": Source("kernels-h100", "w4a8-g128", "int8", True, "kernels-h100-sustained"),
        "per_channel": Source("kernels-h100", "w4a8-chn", "int8", True, "kernels-h100-sustained"),
        "int8": Source("kernels-h100", "w8a8", "int8", True),
        "fp16": Source("kernels-h100", "fp16", "fp16", False),
        "fp8": Source("hopper-h100", "fp8", "fp8", False, "hopper-sustained-h100"),
    },
    "sm_90": {
        "g128": Source("hopper-h100", "w4a8-g128", "int8", False, "hopper-sustained-h100"),
        "per_channel": Source("hopper-h100", "w4a8-chn", "int8", False, "hopper-sustained-h100"),
        "int8": Source("hopper-h100", "w8a8", "int8", False, "hopper-sustained-h100"),
        "fp16": Source("kernels-h100", "fp16", "fp16", False),
        "fp8": Source("hopper-h100", "fp8", "fp8", False, "hopper-sustained-h100"),
    },
}
ATTENTION = {
    "portable": {"4": ("kernels-h100", "kv4"), "8": ("kernels-h100", "kv8"), "16": ("kernels-h100", "sdpa-fp16")},
    "sm_90": {
        "4": ("hopper-attention-h100", "kv4"),
        "8": ("hopper-attention-h100", "kv8"),
        "16": ("hopper-attention-h100", "sdpa-fp16"),
    },
}


@dataclass(frozen=True)
class Measured:
    """A call and the microseconds that it took; calls of one `group` make up a layer."""

    work: Work
    us: float
    group: int


def main() -> None:
    validation = _read("projection-validation")
    kernels: dict[str, Any] = {}
    misfits: dict[str, Any] = {}
    for where, sources in GEMMS.items():
        kernels[where] = {"gemm": {}, "decode_attention": {}}
        for weights, source in sources.items():
            measured = gemm_times(source, weights)
            model = fit_kernel(measured, KernelModel(0.8, 0.6, source.operand, portable=source.portable))
            kernels[where]["gemm"][weights] = {
                **entry(model),
                "sustained": rounded(sustained_share(source)),
                "source": f"{ROOT}{source.file}.json, {source.variant}",
            }
            misfits[f"{where} {weights}"] = misfit(measured, model)
        for bits, (file, variant) in ATTENTION[where].items():
            times = attention_times(file, variant, int(bits))
            model = fit_kernel(times, KernelModel(0.8))
            source_text = f"{ROOT}{file}.json, {variant}"
            kernels[where]["decode_attention"][bits] = {**entry(model), "sustained": 1.0, "source": source_text}
            misfits[f"{where} attention, {bits} bits"] = misfit(times, model)
        kernels[where]["prefill_attention"] = prefill_attention()
        kernels[where]["small"] = small_kernels()
    table = {
        "made_by": "python benchmarks/projection_kernels.py",
        "measured_on": H100.name,
        "workspace": rounded(validation["workspace"]),
        "chunk_tokens": CHUNK_TOKENS,
        "step_us": STEP_US,
        "error_bars": error_bars(validation, misfits),
        "kernels": kernels,
    }
    PROJECTION_TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    projection_table.cache_clear()
    report = {"made_by": table["made_by"], "misfits": misfits, "h100_servers": h100_servers()}
    (HERE / "projection-kernels.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def entry(model: KernelModel) -> dict[str, Any]:
    """A row of the table."""
    return {name: rounded(value) if isinstance(value, float) else value for name, value in asdict(model).items()}


def rounded(value: float) -> float:
    """To what the measurements can tell."""
    return float(f"{value:.4g}")


def error_bars(validation: dict[str, Any], misfits: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Of ours: how far models are from kernels, and speeds carried from one GPU to another from the truth, together."""
    of_models = math.log1p(max(misfits[name]["error_90"] for name in misfits if "fp" not in name))
    of_transfer = math.log1p(validation["error_bars"]["qserve"])
    return {
        "ours": rounded(math.expm1(math.hypot(of_models, of_transfer))),
        "others": rounded(validation["error_bars"]["tensorrt-llm"]),
        "source": "benchmarks/projection-validation.json, benchmarks/projection-kernels.json",
    }


def h100_servers() -> list[dict[str, Any]]:
    """Servers whose throughput on an H100 is known, and what the models say of kernels without a server around them."""
    rows = []
    for told in _read("published-throughput")["h100_servers"]["rows"]:
        shape, precision = find_shape(told["model"]), find_precision(told["precision"])
        system = projected_system(H100, precision)
        prompt, output = told["prompt_len"], told["output_len"]
        sequences = largest_batch(
            shape,
            precision,
            H100.memory_bytes,
            tokens=prompt + output,
            prompt_len=prompt,
            workspace=system.workspace,
            chunk_tokens=CHUNK_TOKENS,
            limit=told["sequences"],
        )
        work = served_work(shape, precision, sequences, prompt, output, chunk_tokens=CHUNK_TOKENS)
        speed = served_speed(work, system, H100)
        rows.append({**told, "projected_sequences": sequences, "projected": rounded(speed.tokens_per_s)})
    return rows


def gemm_times(source: Source, weights: WeightKind) -> list[Measured]:
    """Every product of a variant."""
    rows = _read(source.file)["gemm"]["results"]
    return [
        Measured(gemm_work(weights, row["m"], row["n"], row["k"]), row["timing"]["median_us"], row["m"])
        for row in rows
        if row["variant"] == source.variant
    ]


def attention_times(file: str, variant: str, bits: int) -> list[Measured]:
    """Every case of a variant; the time of each is a group."""
    table = _read(file)
    sizes = {name: size for name, size in table["shape"].items() if name in ModelShape.__dataclass_fields__}
    shape = ModelShape(**{"vocab_size": 0, **sizes})
    return [
        Measured(
            decode_attention_work(shape, bits, row["batch"], row["length"]),
            row["timing"]["median_us"],
            row["batch"] * row["length"],
        )
        for row in table["attention"]["results"]
        if row["variant"] == variant
    ]


def fit_kernel(measured: Sequence[Measured], start: KernelModel) -> KernelModel:
    """Bandwidth, operations, latency and overlap with the least mean absolute logarithm of modelled over measured."""
    has_operations = any(m.work.operations for m in measured)
    found: list[tuple[float, KernelModel]] = []
    for overlap in OVERLAPS if has_operations else (start.overlap,):

        def model(point: list[float], overlap: float = overlap) -> KernelModel:
            bandwidth, latency_us, *operations = (math.exp(x) for x in point)
            share = operations[0] if operations else 1.0
            return replace(start, bandwidth=bandwidth, latency_us=latency_us, operations=share, overlap=overlap)

        def error(point: list[float], overlap: float = overlap) -> float:
            tried = model(point, overlap)
            misses = [abs(math.log(tried.call_us(m.work, H100) / m.us)) for m in measured]
            too_fast = max(0.0, tried.bandwidth - 1) + max(0.0, tried.operations - 1)
            return statistics.fmean(misses) + too_fast

        first = [math.log(start.bandwidth), math.log(2.0)] + [math.log(start.operations)] * has_operations
        point = least(error, first)
        found.append((error(point), model(point)))
    return min(found, key=lambda pair: pair[0])[1]


def misfit(measured: Sequence[Measured], model: KernelModel) -> dict[str, float]:
    """Errors of layer sums (of attention: of cases), as shares of what was measured."""
    groups: dict[int, list[Measured]] = {}
    for m in measured:
        groups.setdefault(m.group, []).append(m)
    errors = sorted(
        abs(sum(model.call_us(m.work, H100) for m in group) / sum(m.us for m in group) - 1) for group in groups.values()
    )
    return {
        "median_error": statistics.median(errors),
        "error_90": errors[math.ceil(0.9 * len(errors)) - 1],
        "largest_error": errors[-1],
    }


def sustained_share(source: Source) -> float:
    """Rate under sustained load over the rate with rests, at the largest M that was measured both ways; at most 1."""
    if source.sustained is None:
        return 1.0
    times = [
        {row["m"]: row["us"] for row in _read(file)["gemm"]["layer"] if row["variant"] == source.variant}
        for file in (source.file, source.sustained)
    ]
    m = max(times[0].keys() & times[1].keys())
    return min(1.0, times[0][m] / times[1][m])


def prefill_attention() -> dict[str, Any]:
    """FlashAttention over 8192 new tokens of one sequence, which runs mma.sync on every GPU."""
    (row,) = (r for r in _read("extend-h100")["rows"] if (r["sequences"], r["new"], r["tokens"]) == (1, 8192, 8192))
    operations = 2.0 * row["tokens"] ** 2 * 32 * 128
    peak = H100.fp16_tops * MMA_SYNC_SHARE[H100.architecture]
    model = KernelModel(0.8, operations / row["kv4_us"] * 1e-6 / peak, "fp16", portable=True)
    return {**entry(model), "sustained": 1.0, "source": f"{ROOT}extend-h100.json, 1 x 8192 of 8192, kv4_us"}


def small_kernels() -> dict[str, Any]:
    """Quantizers and append with few tokens, which are latency; the bandwidth that many reach is assumed."""
    times = [c["overlapping_us"] for c in _read("small-kernels-h100")["chains"]]
    model = KernelModel(0.8, latency_us=statistics.median(times))
    return {**entry(model), "sustained": 1.0, "source": f"{ROOT}small-kernels-h100.json, overlapping_us, median"}


def _read(name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return table


if __name__ == "__main__":
    main()
