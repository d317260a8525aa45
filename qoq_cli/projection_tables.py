"""The results of a projection as tables for people; every title says that nothing was measured."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qoq_cli.bench_tables import add_times, print_titled, short, times_table
from qoq_cli.terminal import print_text

_GB = 1e9
_KERNELS = {"portable": "qoq's portable kernels", "sm_90": "qoq's kernels for Hopper"}


def render_projection(console: Console, data: dict[str, Any]) -> None:
    """Print the tables, throughput last, and what they rest on."""
    gpu, shape = data["gpu"], data["shape"]
    fp8 = "" if gpu["fp8_tops"] is None else f", fp8 {gpu['fp8_tops']:.0f}"
    print_text(
        console,
        f"PROJECTED for {gpu['title']}, not measured: counted bytes and operations over its data sheet\n"
        f"data sheet: {gpu['memory_mib'] / 1024:.0f} GiB, {gpu['bandwidth_gb_s']:.0f} GB/s, TOPS fp16 "
        f"{gpu['fp16_tops']:.0f}, int8 {gpu['int8_tops']:.0f}{fp8}\n",
    )
    for what, why in data["skipped"].items():
        print_text(console, f"not projected: {what}: {why}", style="dim")
    label = f"{shape['name']} on {gpu['title']}"
    if "gemm" in data:
        _render_times(
            console,
            f"Projected: products of one layer of {label}, µs",
            "M",
            data["gemm"]["variants"],
            {(str(row["m"]), row["variant"]): row["us"] for row in data["gemm"]["layer"]},
        )
    if "attention" in data:
        _render_times(
            console,
            f"Projected: decode attention of one layer of {label}, µs",
            "sequences\nx tokens",
            data["attention"]["variants"],
            {(f"{row['batch']} x {row['length']}", row["variant"]): row["us"] for row in data["attention"]["results"]},
        )
    for (prompt_len, output_len), rows in groupby(
        data.get("e2e", ()), key=lambda row: (row["prompt_len"], row["output_len"])
    ):
        title = f"Projected: throughput of {label}, {prompt_len} tokens in, {output_len} out"
        _render_served(console, title, list(rows), with_price=data["price"] is not None)
    _render_notes(console, data)


def _render_times(
    console: Console, title: str, first: str, variants: list[str], times: dict[tuple[str, str], float]
) -> None:
    table = times_table(first, variants)
    for case in dict.fromkeys(case for case, _ in times):
        add_times(table, case, case, variants, times)
    print_titled(console, title, table)


def _render_served(console: Console, title: str, rows: list[dict[str, Any]], *, with_price: bool) -> None:
    """One line for each precision and batch; the fastest is green."""
    table = Table()
    table.add_column("precision", no_wrap=True)
    headings = ["batch", "tokens/s", "ms per\ntoken", "first\ntoken", "GB: weights\n+ KV"]
    for heading in [*headings, "tokens\nper $"] if with_price else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    best = max((row["speed"]["tokens_per_s"] for row in rows if row["speed"]), default=0)
    for row in rows:
        memory = row["memory"]
        name = Text(row["precision"], "bold" if row["kernels"] == "qoq" and row["precision"].startswith("w4") else "")
        gigabytes = f"{memory['weights'] / _GB:.1f} + {memory['kv_cache'] / _GB:.1f}"
        if row["speed"] is None:
            cells = [Text(str(memory["sequences"])), Text("too large", "yellow"), Text("-"), Text("-")]
        else:
            speed = row["speed"]
            tokens = f"{speed['tokens_per_s']:.0f} ± {100 * row['error']:.0f} %"
            cells = [
                Text(str(speed["sequences"])),
                Text(tokens, "green" if speed["tokens_per_s"] == best else ""),
                Text(short(speed["step_ms"]) if speed["step_ms"] else "-"),
                Text(f"{short(speed['prefill_s'])} s"),
            ]
        cells.append(Text(gigabytes))
        if with_price:
            cells.append(Text("-" if row["speed"] is None else f"{short(row['tokens_per_dollar'] / 1e6)} M"))
        table.add_row(name, *cells)
    print_titled(console, title, table)


def _render_notes(console: Console, data: dict[str, Any]) -> None:
    """Which kernels, at whose speed, and how far it may be off."""
    bars = data["error_bars"]
    others = f", ± {100 * bars['others']:.0f} % of throughput in fp16 and fp8" if "e2e" in data else ""
    basis = (
        "nine in ten published figures were within"
        if bars["widened"] == 1
        else f"{bars['widened']:g} times as wide as for L40S and A100, since no figures of this GPU were checked"
    )
    ours = f"± {100 * bars['ours']:.0f} % of times and of throughput with qoq's kernels"
    print_text(
        console,
        f"w4a8, w8a8, kv4, kv8: {_KERNELS[data['kernels']]}; fp16, fp8: PyTorch's; all at the shares of a data sheet "
        f"that they reached on an H100\nerror bars: {ours}{others} (x ± 50 % is x / 1.5 to 1.5 x); {basis}",
        style="dim",
    )
    if data["caveat"]:
        print_text(console, data["caveat"], style="dim")
    if "e2e" in data:
        too_large = [row for row in data["e2e"] if row["speed"] is None]
        for row in too_large:
            memory = row["memory"]
            print_text(
                console,
                f"too large: {row['precision']}, {memory['sequences']} x {row['prompt_len'] + row['output_len']} "
                f"tokens: {-memory['left'] / _GB:.1f} GB more than the GPU has",
                style="dim",
            )
        print_text(
            console,
            f"batch: as many sequences as fit, up to {data['most_sequences']}, unless --batch says; all prompts come "
            "at once; first token: when the last of them has it; tokens/s: output tokens over all the time; a server "
            f"is assumed to cost {data['step_us'] / 1000:g} ms a step beside its kernels",
            style="dim",
        )
