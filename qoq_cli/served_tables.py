"""Measured throughput of whole models as tables for people."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qoq_cli.bench_tables import print_titled, short
from qoq_cli.terminal import print_text

_GB = 1e9
_GROUPS = 5
"""Kinds of kernels that have a column of their own."""


def render_served(console: Console, data: dict[str, Any], shape: dict[str, Any]) -> None:
    """Print one table for each pair of lengths, and one of single decode steps."""
    results = data["results"]
    for (prompt_len, output_len), rows in groupby(
        results, key=lambda row: (row["case"]["prompt_len"], row["case"]["output_len"])
    ):
        title = f"Throughput of {shape['name']}, {prompt_len} tokens in, {output_len} out"
        print_titled(console, title, _throughput(list(rows), with_price=data["price"] is not None))
    steps = list({_step_key(step): step for row in results for step in row["decode"]}.values())
    if steps:
        print_titled(console, "One decode step, µs a layer by kind of kernel", _decode(steps, shape["num_layers"]))
    for what, why in data["skipped"].items():
        print_text(console, f"not measured: {what}: {why}", style="dim")
    if results:
        print_text(
            console,
            "all requests come at once; (at once): how many fit with all of their tokens; tokens/s: output tokens over "
            "all the time; p50 (p99) over requests; roof: weights, lm_head, cache read once at the measured bandwidth",
            style="dim",
        )


def _throughput(rows: list[dict[str, Any]], *, with_price: bool) -> Table:
    """One line for each precision and batch; the fastest is green."""
    with_energy = any(row["joules_per_token"] is not None for row in rows)
    table = Table()
    table.add_column("precision", no_wrap=True)
    headings = ["requests\n(at once)", "tokens/s", "ms per\ntoken", "first\ntoken, s", "GB: weights\n+ KV"]
    headings += ["J per\ntoken"] * with_energy + ["tokens\nper $"] * with_price
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    best = max(row["tokens_per_s"] for row in rows)
    for row in rows:
        memory, speed = row["memory"], row["tokens_per_s"]
        cells = [
            Text(row["precision"], "bold" if row["precision"].startswith("w4a8") else ""),
            Text(f"{row['requests']} ({row['together']})"),
            Text(f"{speed:.0f}", "green" if speed == best else ""),
            Text(_spread(row["token_ms"])),
            Text(_spread(row["first_token_s"])),
            Text(f"{memory['weights'] / _GB:.1f} + {memory['page'] * memory['num_pages'] / _GB:.1f}"),
        ]
        if with_energy:
            cells.append(Text("-" if row["joules_per_token"] is None else f"{row['joules_per_token']:.3f}"))
        if with_price:
            cells.append(Text(f"{short(row['tokens_per_dollar'] / 1e6)} M"))
        table.add_row(*cells)
    return table


def _spread(percentiles: dict[str, float] | None) -> str:
    return "-" if percentiles is None else f"{short(percentiles['p50'])} ({short(percentiles['p99'])})"


def _step_key(step: dict[str, Any]) -> tuple[str, int, int]:
    return step["precision"], step["batch"], step["context"]


def _decode(steps: list[dict[str, Any]], layers: int) -> Table:
    """Kinds of kernels by the time that all of them take."""
    totals: dict[str, float] = {}
    for step in steps:
        for group, us in step["kernels_us"].items():
            totals[group] = totals.get(group, 0.0) + us
    groups = sorted(totals, key=lambda group: -totals[group])[:_GROUPS]
    table = Table()
    table.add_column("precision", no_wrap=True)
    for heading in ("sequences\nx tokens", "step, ms", "roof", *(group.replace(" ", "\n") for group in groups)):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in steps:
        table.add_row(
            step["precision"],
            f"{step['batch']} x {step['context']}",
            short(step["step_us"]["median_us"] / 1000),
            f"{step['roof_percent']:.0f} %",
            *(short(step["kernels_us"][group] / layers) if group in step["kernels_us"] else "-" for group in groups),
        )
    return table
