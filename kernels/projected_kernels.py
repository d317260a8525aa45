"""Which modelled kernels a projection runs on which GPU, read from tables/projection.json.

Hopper has kernels of its own; every other GPU runs the portable ones. Products in 16 bit and fp8 are PyTorch's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from qoq.kernels.projection import MMA_SYNC_SHARE, KernelModel, System
from qoq.recipes.gpus import Gpu
from qoq.recipes.precisions import Precision

PROJECTION_TABLE = Path(__file__).resolve().parent / "tables" / "projection.json"
VALIDATED = ("l40s", "a100-80gb")
"""GPUs of the published table that the projection was checked against."""
_WIDER = {"sm_80": 1.5, "sm_86": 1.5, "sm_89": 1.5, "sm_90": 1.5}
_WIDEST = 2.0
"""Error bars are so much wider on GPUs that the table does not have, of architectures where the kernels or published
figures were measured, and of others: a judgement, not a measurement."""
_MODEL_FIELDS = {field.name for field in fields(KernelModel)}


@dataclass(frozen=True)
class ErrorBars:
    """Shares by which a figure may be off: x to be from x / (1 + share) to (1 + share) x, as nine in ten were.

    ours     times of kernels, and throughput with qoq's
    others   throughput in other precisions, by how far TensorRT-LLM was off
    widened  factor that is in both
    """

    ours: float
    others: float
    widened: float


@cache
def projection_table() -> dict[str, Any]:
    """PROJECTION_TABLE: models of kernels by "portable" and architecture, what a server adds, and error bars."""
    table: dict[str, Any] = json.loads(PROJECTION_TABLE.read_text(encoding="utf-8"))
    return table


def kernel_set(gpu: Gpu) -> str:
    """Name of the kernels that run on `gpu` in the table."""
    return gpu.architecture if gpu.architecture in projection_table()["kernels"] else "portable"


def kernel_models(gpu: Gpu, precision: Precision, *, sustained: bool) -> Mapping[str, KernelModel]:
    """Models by the name that `Work` has; `sustained` under the load of serving, where the clock falls.

    Raises KeyError for weights of a kind that was never measured.
    """
    kernels = projection_table()["kernels"][kernel_set(gpu)]
    entries = {
        "gemm": kernels["gemm"][precision.weights],
        "lm_head": kernels["gemm"]["fp16"],
        "decode_attention": kernels["decode_attention"][str(precision.kv_bits)],
        "prefill_attention": kernels["prefill_attention"],
        "small": kernels["small"],
    }
    return {name: _model(entry, sustained=sustained) for name, entry in entries.items()}


def projected_system(gpu: Gpu, precision: Precision) -> System:
    """A server with these kernels on `gpu`."""
    table = projection_table()
    return System(
        kernel_models(gpu, precision, sustained=True),
        step_us=table["step_us"],
        workspace=table["workspace"],
        chunk_tokens=table["chunk_tokens"],
    )


def error_bars(gpu: Gpu) -> ErrorBars:
    """How far figures for `gpu` may be off."""
    bars = projection_table()["error_bars"]
    widened = 1.0 if gpu.name in VALIDATED else _WIDER.get(gpu.architecture, _WIDEST)
    return ErrorBars(ours=widened * bars["ours"], others=widened * bars["others"], widened=widened)


def caveat(gpu: Gpu) -> str | None:
    """What a user must know about projections for `gpu`, if anything."""
    if gpu.architecture == "sm_100":
        share = MMA_SYNC_SHARE[gpu.architecture]
        return (
            f"{gpu.title}: qoq has no kernels for its own instructions, and that the portable one reaches "
            f"{100 * share:.0f} % of the promised rate is an assumption"
        )
    return None


def _model(entry: Mapping[str, Any], *, sustained: bool) -> KernelModel:
    model = KernelModel(**{name: value for name, value in entry.items() if name in _MODEL_FIELDS})
    return replace(model, operations=model.operations * entry["sustained"]) if sustained else model
