"""Tables of what `benchmarks/gpu_tables.py vllm-...` measured on one GPU.

    python benchmarks/vllm_tables.py --gpu h200

Prints, as Markdown, what is there: throughput by lengths, and latency by request rates.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_tables import FOLDER, TABLES
from markdown_table import markdown_table

_AGAINST = "fp8"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True, help="end of the files' names")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are (default: benchmarks/)")
    arguments = parser.parse_args()
    made = list(tables(arguments.folder, arguments.gpu))
    if not made:
        print(f"vllm_tables: no vllm-*-{arguments.gpu}.json in {arguments.folder}", file=sys.stderr)
        return 1
    print("\n\n".join(f"{title}\n\n{table}" for title, table in made))
    return 0


def tables(folder: Path, gpu: str) -> Iterator[tuple[str, str]]:
    """Each table with what it shows."""
    files = {name: folder / f"{table.stem}-{gpu}.json" for name, table in TABLES.items() if name.startswith("vllm-")}
    data = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}
    latency = [each for name, each in data.items() if name.startswith("vllm-latency-")]
    runs = [run for name, each in data.items() if "vllm" in each for run in _runs(name, each)]
    for prompt_len, output_len in dict.fromkeys((run["prompt_len"], run["output_len"]) for run in runs):
        chosen = [run for run in runs if (run["prompt_len"], run["output_len"]) == (prompt_len, output_len)]
        yield f"{prompt_len} tokens in, {output_len} out", _throughput(chosen)
    if latency:
        yield "Latency", _latency(latency)


def _runs(name: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    again = ", again" if "-again-" in name else ""
    return [{**run, "configuration": run["configuration"] + again} for run in data["vllm"]["results"]]


def _throughput(runs: Sequence[dict[str, Any]]) -> str:
    fp8 = next((run["tokens_per_s"] for run in runs if run["configuration"] == _AGAINST), None)
    body = [
        [
            run["configuration"],
            f"{run['tokens_per_s']:,.0f}",
            "-" if fp8 is None else f"{run['tokens_per_s'] / fp8:.2f}",
            "-" if run["kv_tokens"] is None else f"{run['kv_tokens']:,}",
        ]
        for run in runs
    ]
    return markdown_table(["", "tokens/s", f"of {_AGAINST}", "tokens that fit in the cache"], body)


def _latency(reports: Sequence[dict[str, Any]]) -> str:
    body = [
        [
            f"{row['rate']:g}",
            report["configuration"],
            *(f"{row[f'p50_{what}_ms']:.{digits}f} / {row[f'p99_{what}_ms']:.{digits}f}" for what, digits in _TIMES),
            f"{row['output_throughput']:,.0f}",
        ]
        for rate in dict.fromkeys(row["rate"] for report in reports for row in report["rates"])
        for report in reports
        for row in report["rates"]
        if row["rate"] == rate
    ]
    heads = ["requests a second", "", "ms to the first token, p50 / p99", "ms a further token, p50 / p99", "tokens/s"]
    return markdown_table(heads, body)


_TIMES = (("ttft", 0), ("tpot", 1))
"""What the client of vLLM calls them, and digits."""


if __name__ == "__main__":
    sys.exit(main())
