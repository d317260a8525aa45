"""The tables of hopper.md and its roofline plot, from the measured JSON files.

    python benchmarks/hopper_tables.py --plot benchmarks/hopper-roofline.svg

Prints the tables as Markdown; a test holds hopper.md to them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markdown_table import markdown_table

from qoq.kernels.bench import gemm_bytes
from qoq.kernels.roofline import Roofline

FOLDER = Path(__file__).parent
KIND = "w4a8-g128"
GEMMS = ("qkv", "o", "gate_up", "down")
LAYER_COLUMNS = {
    "w4a8-g128": "W4A8 g128",
    "w4a8-chn": "W4A8 per channel",
    "w8a8": "W8A8",
    "bf16": "bf16",
    "int8": "int8",
    "fp8": "fp8",
    "fp8-row": "fp8, rows",
}
ROWS_OF_PRODUCTS = (1, 16, 64, 128, 256, 1024, 4096)
LAUNCHES = {"overlapping": "overlapping", "alone": "one after the other"}
SMALL_ROWS = (1, 8, 16)
LARGE_CALLS = (2048, 16384)

Rows = Sequence[Sequence[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the roofline into FILE, .svg or .png")
    arguments = parser.parse_args()
    print("\n\n".join(f"{title}\n\n{table}" for title, table in tables()))
    if arguments.plot:
        draw_roofline(arguments.plot)


def tables() -> Iterator[tuple[str, str]]:
    """Each table with what it shows."""
    gemms, attention, small = (_read(f"{name}-h100") for name in ("hopper", "hopper-attention", "small-kernels"))
    yield "products of a layer", _layer_table(gemms)
    yield "single products", _product_table(gemms)
    yield "how they are launched", _launch_table(_read("hopper-layers-h100"))
    yield "other models", _model_table([*_read("hopper-layers-h100")["layers"], *_others()])
    yield "attention", _attention_table(attention)
    yield "chains", _chain_table(small)
    yield "bandwidth", _bandwidth_table(small)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _others() -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = _read("hopper-layers-others-h100")["layers"]
    return layers


def _layer_table(data: dict[str, Any]) -> str:
    layer = {(row["m"], row["variant"]): row["us"] for row in data["gemm"]["layer"]}
    body = [
        [str(m), *(f"{layer[m, variant]:.1f}" if (m, variant) in layer else "-" for variant in LAYER_COLUMNS)]
        for m in sorted({m for m, _ in layer})
    ]
    return markdown_table(["M", *LAYER_COLUMNS.values()], body)


def _product_table(data: dict[str, Any]) -> str:
    found = {(row["gemm"], row["m"]): row for row in data["gemm"]["results"] if row["variant"] == KIND}
    body = []
    for gemm in GEMMS:
        first = found[gemm, ROWS_OF_PRODUCTS[0]]
        cells = [
            f"{row['timing']['median_us']:.1f} ({row['rates']['roof_percent']:.0f})"
            for row in (found[gemm, m] for m in ROWS_OF_PRODUCTS)
        ]
        body.append([f"{gemm} {first['n']} x {first['k']}", *cells])
    return markdown_table(["product", f"M = {ROWS_OF_PRODUCTS[0]}", *map(str, ROWS_OF_PRODUCTS[1:])], body)


def _times(layer: dict[str, Any]) -> dict[tuple[int, str, str], float]:
    return {(time["m"], time["what"], time["launched"]): time["median_us"] for time in layer["times"]}


def _launch_table(data: dict[str, Any]) -> str:
    body = []
    for layer in data["layers"]:
        times = _times(layer)
        for m in sorted({m for m, *_ in times}):
            sums = [sum(times[m, gemm, launch] for gemm in GEMMS) for launch in LAUNCHES]
            orders = [times[m, "layer in order", launch] for launch in LAUNCHES]
            body.append([layer["weights"].replace("_", " "), str(m), *(f"{us:.1f}" for us in (*sums, *orders))])
    columns = [f"{what}, {launch}" for what in ("sum", "in order") for launch in LAUNCHES.values()]
    return markdown_table(["weights", "M", *columns], body)


def _model_table(layers: Sequence[dict[str, Any]]) -> str:
    """Sums of the four, and which share of it the limit is."""
    roofline = Roofline(**_read("hopper-h100")["roofline"])
    layers = [layer for layer in layers if layer["weights"] == "g128"]
    rows = sorted({time["m"] for layer in layers for time in layer["times"]})
    body = []
    for layer in layers:
        times, cells = _times(layer), []
        for m in rows:
            us = sum(times[m, gemm, "overlapping"] for gemm in GEMMS)
            floor = sum(
                roofline.floor_us(nbytes=gemm_bytes(KIND, m, n, k), operations=2.0 * m * n * k, kind="8-bit")
                for n, k in layer["gemms"].values()
            )
            cells.append(f"{us:.1f} ({100 * floor / us:.0f})")
        body.append([layer["model"], *cells])
    return markdown_table(["model", f"M = {rows[0]}", *map(str, rows[1:])], body)


def _attention_table(data: dict[str, Any]) -> str:
    variants = {"kv4": "KV4", "kv8": "KV8", "sdpa-bf16": "bf16 (cuDNN)"}
    found = {(row["batch"], row["length"], row["variant"]): row for row in data["attention"]["results"]}
    cases = dict.fromkeys((batch, length) for batch, length, _ in found)
    body = [
        [
            f"{batch} x {length}",
            *(
                f"{row['timing']['median_us']:.1f} ({row['rates']['roof_percent']:.0f})"
                for row in (found[batch, length, variant] for variant in variants)
            ),
        ]
        for batch, length in cases
    ]
    return markdown_table(["sequences x tokens", *variants.values()], body)


def _chain_table(data: dict[str, Any]) -> str:
    found = {(row["operation"], row["k"], row["m"]): row for row in data["chains"]}
    body = []
    for operation, k in dict.fromkeys((operation, k) for operation, k, _ in found):
        rows = [found[operation, k, m] for m in SMALL_ROWS]
        cells = [f"{row[way]:.2f}" for way in ("overlapping_us", "apart_us") for row in rows]
        body.append([_called(operation, k), *cells])
    columns = [f"{way}, M = {m}" for way in ("overlapping", "apart") for m in SMALL_ROWS]
    return markdown_table(["kernel", *columns], body)


def _bandwidth_table(data: dict[str, Any]) -> str:
    found = {(row["operation"], row["k"], row["m"]): row for row in data["bandwidths"]}
    body = []
    for operation, k in dict.fromkeys((operation, k) for operation, k, _ in found):
        cells = []
        for m in LARGE_CALLS:
            row = found[operation, k, m]
            cells += [f"{row['megabytes']:.0f}", f"{row['us']:.1f}", f"{row['percent_of_copy']:.0f}"]
        body.append([_called(operation, k), *cells])
    columns = [f"{what}, M = {m}" for m in LARGE_CALLS for what in ("MB", "µs", "% of a copy")]
    return markdown_table(["kernel", *columns], body)


def _called(operation: str, k: int) -> str:
    return f"`{operation}`" + (f" {k}" if k else "")


def draw_roofline(path: Path) -> None:
    """Operations a second of every product over its operations per byte, under the two limits that were measured."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = _read("hopper-h100")
    read_tb_s, peak = data["roofline"]["read_gb_s"] / 1000, data["roofline"]["tops"]["8-bit"]
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    intensities = [1.0, peak / read_tb_s, 10000.0]
    roof = [min(peak, intensity * read_tb_s) for intensity in intensities]
    axes.plot(intensities, roof, color="#333333", linewidth=1.6)
    axes.annotate(f"{read_tb_s:.2f} TB/s", (12, 12 * read_tb_s * 1.25), rotation=38, color="#333333")
    axes.annotate(f"{peak:.0f} TOPS (fp8, cuBLAS)", (1200, peak * 1.12), color="#333333")
    colours = {"qkv": "#0b6e4f", "o": "#53b68c", "gate_up": "#355c9a", "down": "#c98a10"}
    for gemm in GEMMS:
        rows = [row for row in data["gemm"]["results"] if (row["gemm"], row["variant"]) == (gemm, KIND)]
        axes.plot(
            [2.0 * row["m"] * row["n"] * row["k"] / gemm_bytes(KIND, row["m"], row["n"], row["k"]) for row in rows],
            [row["rates"]["tops"] for row in rows],
            marker="o",
            markersize=4,
            linewidth=1,
            color=colours[gemm],
            label=f"{gemm} {rows[0]['n']} x {rows[0]['k']}",
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="10¹² operations a second")
    axes.set_title(f"W4A8 products in groups of 128, {rows[0]['m']} to {rows[-1]['m']} tokens, {data['gpu']['name']}")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(loc="lower right")
    with rc_context({"svg.hashsalt": "qoq"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
