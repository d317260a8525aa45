"""`qoq bench --gpu` of a GPU that is not here: the options of a projection, and its result."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from qoq.recipes.errors import InputError
from qoq.recipes.gpus import Gpu
from qoq.recipes.precisions import PRECISIONS, Precision, find_precision
from qoq.recipes.shapes import ModelShape
from qoq_cli.bench_options import (
    MAX_ROWS,
    MAX_SEQUENCES,
    attention_cases,
    check_price,
    choose,
    numbers,
    served_lengths,
    split,
)
from qoq_cli.projection_tables import render_projection
from qoq_cli.terminal import Terminal

_PARTS = ("gemm", "attention", "e2e")
_OURS = tuple(name for name, precision in PRECISIONS.items() if precision.weights in ("g128", "per_channel"))
_GEMMS = {"fp16": "fp16", "bf16": "fp16", "w8a8": "w8a8", "fp8": "fp8"}
_MODELS = {"fp16": "fp16", "bf16": "fp16", "w8a8": "w8a8kv8", "fp8": "fp8"}
_AGAINST = ("fp16", "bf16", "int8", "fp8", "w8a8", "sdpa")
"""What --against takes; int8 products without scales are not projected."""
_ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)


@dataclass(frozen=True)
class ProjectionPlan:
    """The options, checked. `cases`, and an entry of `batches`, are None where the defaults are meant; `lengths` are of
    prompts and answers."""

    parts: list[str]
    rows: list[int]
    cases: list[tuple[int, int]] | None
    batches: list[int | None]
    lengths: list[tuple[int, int]]
    precisions: list[Precision]
    against: list[str]
    price: float | None

    @staticmethod
    def parse(
        what: str | None,
        batch: str | None,
        prompt_len: str | None,
        output_len: str | None,
        precision: str | None,
        against: str,
        price: float | None,
    ) -> ProjectionPlan:
        """From the options of `qoq bench`. Raises InputError that names the option."""
        parts = ["all"] if what is None else split("--what", what)
        parts = list(_PARTS) if parts == ["all"] else choose("--what", parts, _PARTS)
        for option, value in (("--output-len", output_len), ("--precision", precision), ("--price", price)):
            if value is not None and "e2e" not in parts:
                raise InputError(f"{option}: only e2e serves a model", remedy="leave it out, or add e2e to --what")
        if parts == ["gemm"] and prompt_len is not None:
            raise InputError("--prompt-len: a product has no sequences", remedy="leave it out, or --what attention,e2e")
        check_price(price)
        rows = list(_ROWS) if batch is None else numbers("--batch", batch, MAX_ROWS)
        batches: list[int | None] = [None] if batch is None else [each for each in rows if each <= MAX_SEQUENCES]
        if "e2e" in parts and not batches:
            raise InputError(f"--batch {batch}: e2e takes at most {MAX_SEQUENCES} sequences", remedy="pass fewer")
        names = _OURS[:2] if precision is None else choose("--precision", split("--precision", precision), _OURS)
        return ProjectionPlan(
            parts=parts,
            rows=rows,
            cases=attention_cases(parts, batch, prompt_len),
            batches=batches,
            lengths=served_lengths(prompt_len, output_len),
            precisions=[find_precision(name) for name in names],
            against=[] if against == "none" else choose("--against", split("--against", against), _AGAINST),
            price=price,
        )


def run_projection(terminal: Terminal, plan: ProjectionPlan, find_shape: Callable[[], ModelShape], gpu: Gpu) -> None:
    """Project, and print."""
    data = _project(plan, find_shape(), gpu)
    terminal.result(data, lambda console: render_projection(console, data))


def _project(plan: ProjectionPlan, shape: ModelShape, gpu: Gpu) -> dict[str, Any]:
    from qoq.kernels.bench_attention import DEFAULT_CASES
    from qoq.kernels.layouts import HEAD_DIMS
    from qoq.kernels.projected_bench import MAX_BATCH, project_attention, project_gemms, project_model, runs_on
    from qoq.kernels.projected_kernels import caveat, error_bars, kernel_set, projection_table

    if shape.head_dim not in HEAD_DIMS:
        raise InputError(
            f"{shape.name}: head_dim is {shape.head_dim}, and the paged cache takes {' or '.join(map(str, HEAD_DIMS))}",
            remedy="project a model with such heads",
        )
    skipped = {}
    if "fp8" in plan.against and gpu.fp8_tops is None:
        skipped["fp8"] = f"the tensor cores of {gpu.title} have no float8"
    if plan.against == ["int8"] or ("int8" in plan.against and len(plan.against) < len(_AGAINST)):
        skipped["int8"] = "products without scales are not projected; w8a8 has them"
    known = [name for name in plan.against if name not in skipped]
    data: dict[str, Any] = {
        "command": shlex.join(["qoq", *sys.argv[1:]]),
        "projected": True,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": asdict(gpu),
        "shape": asdict(shape),
        "kernels": kernel_set(gpu),
        "measured_on": projection_table()["measured_on"],
        "step_us": projection_table()["step_us"],
        "most_sequences": MAX_BATCH,
        "error_bars": asdict(error_bars(gpu)),
        "caveat": caveat(gpu),
        "skipped": skipped,
        "price": plan.price,
    }
    if "gemm" in plan.parts:
        variants = _named(["w4a8-g128", "w4a8-chn"], known, _GEMMS)
        times = project_gemms(shape, gpu, plan.rows, variants)
        data["gemm"] = {"variants": variants, "layer": [{"m": time.rows, **_times(time)} for time in times]}
    if "attention" in plan.parts:
        others = ["fp16"] if {"sdpa", "fp16", "bf16"} & set(known) else []
        cases = plan.cases or list(DEFAULT_CASES)
        times = project_attention(shape, gpu, cases, ["kv4", "kv8", *others])
        results = [{"batch": time.rows, "length": time.length, **_times(time)} for time in times]
        data["attention"] = {"variants": ["kv4", "kv8", *others], "results": results}
    if "e2e" in plan.parts:
        names = _named([precision.name for precision in plan.precisions], known, _MODELS)
        data["e2e"] = [
            asdict(
                project_model(
                    shape,
                    gpu,
                    precision,
                    prompt_len=prompt_len,
                    output_len=output_len,
                    sequences=sequences,
                    price=plan.price,
                )
            )
            for prompt_len, output_len in plan.lengths
            for sequences in plan.batches
            for precision in map(find_precision, names)
            if runs_on(gpu, precision)
        ]
    return data


def _named(ours: list[str], against: list[str], names: dict[str, str]) -> list[str]:
    return list(dict.fromkeys([*ours, *(names[name] for name in against if name in names)]))


def _times(time: Any) -> dict[str, Any]:
    return {"variant": time.variant, "us": time.us, "low_us": time.low_us, "high_us": time.high_us}
