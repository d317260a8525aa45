"""The results of `qoq bench` as tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qoq_cli.terminal import print_text

_OURS = ("w4a8-g128", "w4a8-chn", "kv4", "kv8")
_QOQ = "qoq"
_MADE_BY = {
    "w4a8-g128": _QOQ,
    "w4a8-chn": _QOQ,
    "w8a8": _QOQ,
    "kv4": _QOQ,
    "kv8": _QOQ,
    "fp16": "torch.nn.functional.linear",
    "bf16": "torch.nn.functional.linear",
    "int8": "torch._int_mm, without scales",
    "fp8": "torch._scaled_mm",
    "fp8-row": "torch._scaled_mm, one scale a row",
    "sdpa-fp16": "torch.nn.functional.scaled_dot_product_attention",
    "sdpa-bf16": "torch.nn.functional.scaled_dot_product_attention",
}


def render(console: Console, data: dict[str, Any], *, details: bool = False) -> None:
    """Print the tables, the summary last; `details` adds the rates of the baselines to those of our kernels."""
    gpu, roofline, shape = data["gpu"], data["roofline"], data["shape"]
    peaks = ", ".join(f"{rate:.0f} TOPS {kind}" for kind, rate in roofline["tops"].items())
    print_text(
        console,
        f"{gpu['name']} (driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}, torch {gpu['torch']})\n"
        f"measured roofline: {roofline['read_gb_s']:.0f} GB/s, {peaks}\n"
        "spread: 10th to 90th percentile; roof: share of the measured roofline\n",
    )
    if "gemm" in data:
        _render_gemms(console, data["gemm"], details)
    if "attention" in data:
        _render_attention_rates(console, data["attention"], details)
    skipped = {**data.get("gemm", {}).get("skipped", {}), **data.get("attention", {}).get("skipped", {})}
    for what, why in skipped.items():
        print_text(console, f"not measured: {what}: {why}", style="dim")
    shown: list[str] = []
    if "gemm" in data:
        shown += _render_layer(console, data["gemm"], shape)
    if "attention" in data:
        shown += _render_attention(console, data["attention"], shape)
    makers: dict[str, list[str]] = {}
    for variant in shown:
        makers.setdefault(_MADE_BY[variant], []).append(variant)
    for maker, variants in makers.items():
        print_text(console, f"{', '.join(variants)}: {maker}", style="dim")
    if "e2e" in data:
        from qoq_cli.served_tables import render_served

        render_served(console, data["e2e"], shape)


def _render_layer(console: Console, gemm: dict[str, Any], shape: dict[str, Any]) -> list[str]:
    """Print the table; which variants it shows."""
    times = {(row["m"], row["variant"]): row["us"] for row in gemm["layer"]}
    variants = _measured(gemm["variants"], times)
    table = times_table("M", variants)
    for m in dict.fromkeys(m for m, _ in times):
        add_times(table, str(m), m, variants, times)
    print_titled(console, f"Products of one {shape['name']} layer (qkv + o + gate_up + down), µs", table)
    return variants


def _render_attention(console: Console, attention: dict[str, Any], shape: dict[str, Any]) -> list[str]:
    """Print the table; which variants it shows."""
    times = {
        ((row["batch"], row["length"]), row["variant"]): row["timing"]["median_us"] for row in attention["results"]
    }
    heads = f"{shape['num_heads']} query heads, {shape['num_kv_heads']} KV heads, D {shape['head_dim']}"
    variants = _measured(attention["variants"], times)
    table = times_table("sequences\nx tokens", variants)
    for case in dict.fromkeys(case for case, _ in times):
        add_times(table, f"{case[0]} x {case[1]}", case, variants, times)
    print_titled(console, f"Decode attention of one layer ({heads}), µs", table)
    return variants


def _render_gemms(console: Console, gemm: dict[str, Any], details: bool) -> None:
    rows = [row for row in gemm["results"] if details or row["variant"] in _OURS]
    for name in dict.fromkeys(row["gemm"] for row in rows):
        mine = [row for row in rows if row["gemm"] == name]
        table = _rates("M", ((str(row["m"]), row) for row in mine))
        print_titled(console, f"{name}: N = {mine[0]['n']}, K = {mine[0]['k']}", table)


def _render_attention_rates(console: Console, attention: dict[str, Any], details: bool) -> None:
    rows = [row for row in attention["results"] if details or row["variant"] in _OURS]
    if rows:
        named = ((f"{row['batch']} x {row['length']}", row) for row in rows)
        print_titled(console, "Decode attention of one layer", _rates("sequences\nx tokens", named))


def print_titled(console: Console, title: str, table: Table) -> None:
    """A table's own title is folded to the width of the table."""
    console.print(Text(title, "italic"))
    console.print(table)


def _rates(first: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> Table:
    """One line a case and variant; the spread is the 10th to the 90th percentile."""
    table = Table()
    table.add_column(first, justify="right")
    table.add_column("variant")
    for heading in ("µs", "spread", "TOPS", "GB/s", "roof"):
        table.add_column(heading, justify="right")
    previous = ""
    for case, row in rows:
        timing, rates = row["timing"], row["rates"]
        backend = f" {row['backend']}" if row.get("backend") else ""
        table.add_row(
            "" if case == previous else case,
            row["variant"] + backend,
            short(timing["median_us"]),
            f"{short(timing['low_us'])}..{short(timing['high_us'])}",
            short(rates["tops"]),
            f"{rates['gb_s']:.0f}",
            f"{rates['roof_percent']:.0f} %",
        )
        previous = case
    return table


def times_table(first: str, variants: list[str]) -> Table:
    """A column for each variant, beside that of the cases."""
    table = Table()
    table.add_column(first, justify="right")
    for variant in variants:
        heading = variant.replace("-", "\n")  # eight columns of times fit 80 characters
        table.add_column(heading, justify="right", style="bold" if variant in _OURS else "")
    return table


def add_times(table: Table, label: str, case: object, variants: list[str], times: dict[Any, float]) -> None:
    """One row of times; the smallest is green."""
    found = {variant: times[case, variant] for variant in variants if (case, variant) in times}
    best = min(found.values())
    cells = [
        Text("-") if (us := found.get(variant)) is None else Text(short(us), style="green" if us == best else "")
        for variant in variants
    ]
    table.add_row(label, *cells)


def _measured(variants: list[str], times: dict[Any, float]) -> list[str]:
    seen = {variant for _, variant in times}
    return [variant for variant in variants if variant in seen]


def short(value: float) -> str:
    """Three or four digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
