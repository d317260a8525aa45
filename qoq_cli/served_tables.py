"""Measured throughput of whole models as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qoq_cli.bench_tables import print_titled, short
from qoq_cli.terminal import print_text

_GB = 1e9


def render_served(console: Console, data: dict[str, Any], shape: dict[str, Any]) -> None:
    """Print two tables for each pair of lengths, and two of single decode steps."""
    results = data["results"]
    if data["lm_head_bits"] != 16:
        print_text(console, f"lm_head has {data['lm_head_bits']} bits, at every precision")
    for (prompt_len, output_len), rows in groupby(
        results, key=lambda row: (row["case"]["prompt_len"], row["case"]["output_len"])
    ):
        found, lengths = list(rows), f"{shape['name']}, {prompt_len} tokens in, {output_len} out"
        print_titled(console, f"Throughput of {lengths}", _throughput(found, with_price=data["price"] is not None))
        print_titled(console, f"What a request waits for: {lengths}", _latency(found))
    for title, steps in _steps(data["steps"]):
        print_titled(console, title, _decode(steps, shape["num_layers"]))
    for what, why in data["skipped"].items():
        print_text(console, f"not measured: {what}: {why}", style="dim")
    if results:
        print_text(
            console,
            "all requests come at once; at once: how many fit with all of their tokens; tokens/s: output tokens over "
            "all the time; roof: weights, lm_head and cache read once at the measured bandwidth",
            style="dim",
        )


def _throughput(rows: list[dict[str, Any]], *, with_price: bool) -> Table:
    """One line for each precision and batch; the fastest is green."""
    with_energy = any(row["joules_per_token"] is not None for row in rows)
    headings = ["requests", "at\nonce", "tokens/s", "GB: weights\n+ KV"]
    table = served_table([*headings, *["J per\ntoken"] * with_energy, *["tokens\nper $"] * with_price])
    best = max(row["tokens_per_s"] for row in rows)
    for row in rows:
        memory, speed = row["memory"], row["tokens_per_s"]
        cells = [
            Text(str(row["requests"])),
            Text(str(row["together"])),
            Text(f"{speed:.0f}", "green" if speed == best else ""),
            Text(f"{memory['weights'] / _GB:.1f} + {memory['page'] * memory['num_pages'] / _GB:.1f}"),
        ]
        if with_energy:
            cells.append(Text("-" if row["joules_per_token"] is None else f"{row['joules_per_token']:.3f}"))
        if with_price:
            cells.append(Text(f"{short(row['tokens_per_dollar'] / 1e6)} M"))
        table.add_row(_name(row), *cells)
    return table


def _latency(rows: list[dict[str, Any]]) -> Table:
    """The same lines."""
    table = served_table(["requests", "ms per token\np50", "\np99", "first token, s\np50", "\np99"])
    for row in rows:
        waits = [row["token_ms"], row["first_token_s"]]
        cells = ["-" if wait is None else short(wait[which]) for wait in waits for which in ("p50", "p99")]
        table.add_row(_name(row), str(row["requests"]), *cells)
    return table


def served_table(headings: list[str]) -> Table:
    table = Table()
    table.add_column("precision", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _name(row: dict[str, Any]) -> Text:
    return Text(row["precision"], "bold" if row["precision"].startswith("w4a8") else "")


def _steps(steps: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Decode steps of one sequence, and those of as many as fit."""
    for title, alone in (("One sequence", True), ("As many as fit", False)):
        found = [step for step in steps if (step["batch"] == 1) == alone]
        if found:
            yield f"{title}: a decode step, by kind of kernel in µs a layer", found


def _decode(steps: list[dict[str, Any]], layers: int) -> Table:
    """A column for each step; kinds of kernels by the time that all of them take."""
    totals: dict[str, float] = {}
    for step in steps:
        for group, us in step["kernels_us"].items():
            totals[group] = totals.get(group, 0.0) + us
    table = Table()
    table.add_column("", no_wrap=True)
    for step in steps:
        table.add_column(step["precision"].replace("-", "\n"), justify="right", no_wrap=True)
    table.add_row("sequences", *(str(step["batch"]) for step in steps))
    table.add_row("tokens of each", *(str(step["context"]) for step in steps))
    table.add_row("ms", *(short(step["step_us"]["median_us"] / 1000) for step in steps))
    table.add_row("roof", *(f"{step['roof_percent']:.0f} %" for step in steps), end_section=True)
    for group in sorted(totals, key=lambda group: -totals[group]):
        kernels = [step["kernels_us"].get(group) for step in steps]
        table.add_row(group, *("-" if us is None else short(us / layers) for us in kernels))
    return table
