"""Check the projection against published throughput, each model left out of the fit that projects it.

    python benchmarks/projection_validation.py --out benchmarks/projection-validation.json

No GPU; about 20 seconds. What the figures mean is in projection.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from projection_fit import (
    KINDS,
    Case,
    Fitted,
    Row,
    fit,
    fit_workspace,
    fitting_batch,
    log_error,
    make_case,
    project,
    published,
    read_rows,
)

from qoq.kernels.projection import MMA_SYNC_SHARE
from qoq.kernels.work import decode_attention_work, gemm_work, layer_gemms_work
from qoq.recipes.gpus import find_gpu
from qoq.recipes.shapes import find_shape

TWINS = {"llama-3-8b", "mistral-7b"}
"""Their layers have the same sizes, so that leaving out one of them leaves much of it in."""
CLEAR = 0.1
"""Two precisions are told apart where the table has them further apart than this."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    found = validate()
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(markdown(found["cells"])))


def validate() -> dict[str, Any]:
    """Everything that projection-validation.json has."""
    rows = read_rows()
    workspace = fit_workspace(rows)
    fitted = {system: fit(system, _cases(rows, system, workspace)) for system in KINDS}
    models = list(dict.fromkeys(row.shape.name for row in rows))
    cells = [cell for model in models for cell in left_out(rows, {model})]
    cells.sort(key=lambda cell: (cell["gpu"], cell["system"], cell["precision"], models.index(cell["model"])))
    twins = [cell for cell in left_out(rows, TWINS) if cell["model"] in TWINS]
    transferred = transfer(rows, workspace)
    found: dict[str, Any] = {
        "made_by": "python benchmarks/projection_validation.py",
        "workspace": workspace,
        "fitted": {system: asdict(parameters) for system, parameters in fitted.items()},
        "left_out": {system: _summary(cells, system) for system in KINDS},
        "both_twins_left_out": {system: _summary(twins, system) for system in KINDS},
        "other_gpu": other_gpu(rows, workspace),
        "transfer_from_h100": transferred,
        "out_of_memory": out_of_memory(cells),
        "ranking": ranking(cells),
    }
    qserve = [abs(cell["log_error"]) for cell in cells if cell["system"] == "qserve"]
    other = [abs(c["log_error"]) for c in cells if c["system"] != "qserve" and c["published"] is not None]
    found["error_bars"] = {
        "qserve": math.exp(max(_quantile(qserve, 0.9), transferred["log_error_90"])) - 1,
        "tensorrt-llm": math.exp(_quantile(other, 0.9)) - 1,
    }
    found["cells"] = cells
    return found


def left_out(rows: Sequence[Row], models: set[str]) -> list[dict[str, Any]]:
    """The cells of `models`, projected by fits to all the other models."""
    kept = [row for row in rows if row.shape.name not in models]
    workspace = fit_workspace(kept)
    fitted = {system: fit(system, _cases(kept, system, workspace)) for system in KINDS}
    return [_cell(row, workspace, fitted[row.system]) for row in rows if row.shape.name in models]


def other_gpu(rows: Sequence[Row], workspace: float) -> dict[str, Any]:
    """TensorRT-LLM's cells on each GPU, projected by a fit to the other one. (QServe's have another format on each.)"""
    cells = []
    for gpu in dict.fromkeys(row.gpu.name for row in rows):
        kept = [row for row in rows if row.gpu.name != gpu]
        fitted = fit("tensorrt-llm", _cases(kept, "tensorrt-llm", workspace))
        cells += [_cell(row, workspace, fitted) for row in rows if row.gpu.name == gpu and row.system == "tensorrt-llm"]
    return _summary(cells, "tensorrt-llm")


def transfer(rows: Sequence[Row], workspace: float) -> dict[str, Any]:
    """QServe's cells from speeds of its kernels that were measured on an H100: how qoq projects its own kernels.

    Not measured there, and taken from the start of the fits, are the share of the bandwidth and what a layer adds.
    """
    h100, measured = find_gpu("h100-sxm"), published()["qserve_on_h100"]
    peak = h100.int8_tops * MMA_SYNC_SHARE[h100.architecture]
    layer, product, attention = (
        measured[name] for name in ("layer_gemms_g128", "gate_up_per_channel", "decode_attention_kv4")
    )
    of_layer = sum(work.operations for work in layer_gemms_work(find_shape(layer["model"]), "g128", layer["m"]))
    of_product = gemm_work("per_channel", product["m"], product["n"], product["k"]).operations
    lanes = decode_attention_work(find_shape(attention["model"]), 4, attention["sequences"], attention["tokens"]).lanes
    fitted = Fitted(
        bandwidth=0.8,
        operations={
            "g128": of_layer / layer["us"] * 1e-6 / peak,
            "per_channel": of_product / product["us"] * 1e-6 / peak,
        },
        lanes=lanes / attention["us"] * 1e-6 / h100.vector_tops,
        layer_us=20.0,
    )
    cells = [_cell(row, workspace, fitted) for row in rows if row.system == "qserve"]
    return {"parameters": asdict(fitted), **_summary(cells, "qserve")}


def out_of_memory(cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """In how many cells the projection is right about whether one sequence fits."""
    wrong = [cell for cell in cells if (cell["largest_batch"] == 0) != (cell["published"] is None)]
    names = [f"{cell['gpu']} {cell['precision']} {cell['model']}" for cell in wrong]
    total = sum(1 for _ in cells)
    return {"cells": total, "right": total - len(wrong), "wrong": names}


def ranking(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether precisions come in the right order, for each GPU and model; what does not fit comes last."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["gpu"], cell["model"]), []).append(cell)
    best = pairs = right = 0
    wrong = []
    for (gpu, model), group in groups.items():
        told = {cell["precision"]: cell["published"] or 0 for cell in group}
        ours = {cell["precision"]: cell["projected"] or 0 for cell in group}
        best += max(told, key=told.__getitem__) == max(ours, key=ours.__getitem__)
        for a, b in combinations(told, 2):
            slow, fast = sorted((a, b), key=told.__getitem__)
            if told[slow] < (1 - CLEAR) * told[fast]:
                pairs += 1
                if ours[slow] < ours[fast]:
                    right += 1
                else:
                    wrong.append(f"{gpu} {model}: {fast} over {slow}")
    return {"groups": len(groups), "best_right": best, "clear_pairs": pairs, "pairs_right": right, "wrong": wrong}


def markdown(cells: Sequence[dict[str, Any]]) -> list[str]:
    """The cells as a table of projection.md: published, then projected with its error; QServe's with their batches."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    lines = [f"| GPU, precision | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for cell in cells:
        if cell["model"] == models[0]:
            lines.append(f"| {cell['gpu']} {cell['precision']} |")
        if cell["published"] is None:
            lines[-1] += " - |" if cell["projected"] is None else f" - / {cell['projected']:.0f} |"
        elif cell["projected"] is None:
            lines[-1] += f" {cell['published']:.0f} / - |"
        else:
            error = 100 * (cell["projected"] / cell["published"] - 1)
            lines[-1] += f" {cell['published']:.0f} / {cell['projected']:.0f} ({error:+.0f}) |"
    return lines


def _cases(rows: Iterable[Row], system: str, workspace: float) -> list[Case]:
    return [make_case(row, workspace) for row in rows if row.system == system and row.tokens_per_s is not None]


def _cell(row: Row, workspace: float, fitted: Fitted) -> dict[str, Any]:
    largest = fitting_batch(row, workspace)
    case = make_case(row, workspace)
    speed = project(case, fitted)
    own = project(make_case(row, workspace, use_told=False), fitted)
    fits = row.batch is not None or largest > 0
    return {
        "gpu": row.gpu.name,
        "system": row.system,
        "precision": row.precision.name,
        "model": row.shape.name,
        "published": row.tokens_per_s,
        "published_batch": row.batch,
        "largest_batch": largest,
        "batch": speed.sequences if fits else 0,
        "projected": speed.tokens_per_s if fits else None,
        "projected_at_largest_batch": own.tokens_per_s if largest else None,
        "log_error": log_error(case, fitted) if row.tokens_per_s is not None else None,
    }


def _summary(cells: Iterable[dict[str, Any]], system: str) -> dict[str, Any]:
    """Absolute errors as shares of the published figure."""
    told = [cell for cell in cells if cell["system"] == system and cell["published"] is not None]
    errors = [abs(math.exp(cell["log_error"]) - 1) for cell in told]
    own = [abs(cell["projected_at_largest_batch"] / cell["published"] - 1) for cell in told if cell["largest_batch"]]
    return {
        "cells": len(told),
        "median_error": statistics.median(errors),
        "error_90": _quantile(errors, 0.9),
        "largest_error": max(errors),
        "median_error_at_largest_batch": statistics.median(own),
        "log_error_90": _quantile([abs(cell["log_error"]) for cell in told], 0.9),
    }


def _quantile(values: Sequence[float], share: float) -> float:
    """The least value that at least `share` of them do not pass."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


if __name__ == "__main__":
    main()
