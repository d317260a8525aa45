"""The tables of served.md, from the measured JSON files.

    python benchmarks/served_tables.py

Prints the tables as Markdown; a test holds served.md to them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_table import markdown_table

from qoq.kernels.projected_bench import project_model
from qoq.recipes.gpus import find_gpu
from qoq.recipes.precisions import find_precision
from qoq.recipes.shapes import find_shape

FOLDER = Path(__file__).parent
FILES = {"1000 in, 1000 out": "served-1000-1000-h200", "1024 in, 512 out": "served-1024-512-h200"}
NAMES = {"w4a8kv4-g128": "W4A8KV4 g128", "w8a8kv8": "W8A8KV8", "fp8": "fp8, KV8", "fp16": "fp16"}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("\n\n".join(f"{title}\n\n{table}" for title, table in tables()))


def tables() -> Iterator[tuple[str, str]]:
    """Each table with what it shows."""
    measured = {
        title: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for title, name in FILES.items()
    }
    for title, data in measured.items():
        yield title, _throughput(data["e2e"]["results"])
    (first, *_) = measured.values()
    layers = first["shape"]["num_layers"]
    for title, alone in (("one sequence", True), ("as many as fit", False)):
        yield title, _steps([step for step in first["e2e"]["steps"] if (step["batch"] == 1) == alone], layers)
    yield "projected", _projected(measured)


def _throughput(results: Sequence[dict[str, Any]]) -> str:
    ours = results[0]["tokens_per_s"]
    body = [
        [
            NAMES[row["precision"]],
            str(row["together"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{ours / row['tokens_per_s']:.2f}",
            f"{row['token_ms']['p50']:.1f} / {row['token_ms']['p99']:.1f}",
            f"{row['first_token_s']['p50']:.1f} / {row['first_token_s']['p99']:.1f}",
            f"{1000 * row['joules_per_token']:.0f}",
        ]
        for row in results
    ]
    heads = [
        "",
        "fit with all tokens",
        "tokens/s",
        "ours is faster by",
        "ms a token, p50 / p99",
        "s to the first, p50 / p99",
    ]
    return markdown_table([*heads, "mJ a token"], body)


def _steps(steps: Sequence[dict[str, Any]], layers: int) -> str:
    groups = list(dict.fromkeys(group for step in steps for group in step["kernels_us"]))
    body = [
        [
            NAMES[step["precision"]],
            f"{step['batch']} x {step['context']}",
            f"{step['step_us']['median_us'] / 1000:.2f}",
            f"{step['roof_percent']:.0f} %",
            *(f"{step['kernels_us'][group] / layers:.1f}" if group in step["kernels_us"] else "-" for group in groups),
        ]
        for step in steps
    ]
    return markdown_table(["", "sequences x tokens", "ms", "of the reads alone", *groups], body)


def _projected(measured: Mapping[str, dict[str, Any]]) -> str:
    """What `qoq bench --gpu` says of this GPU for as many sequences, beside what was measured."""
    body = []
    for title, data in measured.items():
        shape, gpu = find_shape(data["shape"]["name"]), find_gpu(data["gpu"]["name"].removeprefix("NVIDIA "))
        for row in data["e2e"]["results"]:
            case, precision = row["case"], find_precision(row["precision"])
            lengths = {"prompt_len": case["prompt_len"], "output_len": case["output_len"]}
            made = project_model(shape, gpu, precision, **lengths, sequences=row["together"])
            if made.speed is None:
                raise ValueError(f"{precision.name} does not fit {gpu.name}")
            ratio = made.speed.tokens_per_s / row["tokens_per_s"]
            cells = [f"{row['tokens_per_s']:,.0f}", f"{made.speed.tokens_per_s:,.0f}", f"{100 * (ratio - 1):+.0f} %"]
            body.append([title, NAMES[precision.name], *cells, f"{100 * made.error:.0f} %"])
    return markdown_table(["", "", "measured", "projected", "difference", "error bar"], body)


if __name__ == "__main__":
    main()
