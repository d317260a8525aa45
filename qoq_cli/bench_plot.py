"""The results of `qoq bench` as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qoq.recipes.errors import EnvironmentProblem, InputError

_SUFFIXES = (".svg", ".png")
_COLOURS = {
    "w4a8-g128": "#0b6e4f",
    "w4a8-chn": "#53b68c",
    "w8a8": "#7fb069",
    "kv4": "#0b6e4f",
    "kv8": "#53b68c",
    "fp16": "#355c9a",
    "bf16": "#7a9fd6",
    "int8": "#c8553d",
    "fp8": "#e0a030",
    "fp8-row": "#f0c878",
    "sdpa-fp16": "#355c9a",
    "sdpa-bf16": "#7a9fd6",
}


def check_plot(path: Path) -> None:
    """Before minutes of measuring: can `path` be drawn? Raises InputError or EnvironmentProblem."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"--plot {path}: a kind of picture that is not drawn", remedy="end the name in .svg or .png")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: no folder {path.parent}", remedy="make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            "--plot needs matplotlib, which is not installed", remedy="pip install 'qoq[report]'"
        ) from error


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the picture: one panel for the products of a layer, one for attention."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [part for part in ("gemm", "attention") if part in data]
    figure = Figure(figsize=(7.5 * len(parts), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, part in enumerate(parts):
        axes = figure.add_subplot(1, len(parts), panel + 1)
        _draw_gemms(axes, data) if part == "gemm" else _draw_attention(axes, data)
        axes.legend(frameon=False)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{data['gpu']['name']}, {data['shape']['name']} sizes (lower is better)")
    try:
        figure.savefig(path)
    except OSError as error:
        raise EnvironmentProblem(f"--plot {path}: cannot be written: {error}") from error


def _draw_gemms(axes: Any, data: dict[str, Any]) -> None:
    for variant in data["gemm"]["variants"]:
        points = [(row["m"], row["us"]) for row in data["gemm"]["layer"] if row["variant"] == variant]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=variant, color=_COLOURS.get(variant))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = list(dict.fromkeys(row["m"] for row in data["gemm"]["layer"]))
    axes.set_xticks(ticks, [str(m) for m in ticks])
    axes.set_xlabel("tokens M")
    axes.set_ylabel("µs, products of one layer")


def _draw_attention(axes: Any, data: dict[str, Any]) -> None:
    results = data["attention"]["results"]
    cases = list(dict.fromkeys((row["batch"], row["length"]) for row in results))
    variants = [v for v in data["attention"]["variants"] if any(row["variant"] == v for row in results)]
    for variant in variants:
        times = {
            (row["batch"], row["length"]): row["timing"]["median_us"] for row in results if row["variant"] == variant
        }
        places = [i for i, case in enumerate(cases) if case in times]
        axes.plot(places, [times[cases[i]] for i in places], "o", label=variant, color=_COLOURS.get(variant))
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), [f"{batch} x {length}" for batch, length in cases])
    axes.set_xlabel("sequences x tokens")
    axes.set_ylabel("µs, one decode step of attention")
