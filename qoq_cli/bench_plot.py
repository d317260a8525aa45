"""The results of `qoq bench` as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qoq.recipes.errors import EnvironmentProblem, InputError

_SUFFIXES = (".svg", ".png")
_STYLES = {
    "w4a8-g128": ("#0b6e4f", "o"),
    "w4a8-chn": ("#53b68c", "s"),
    "w8a8": ("#8a6fb0", "^"),
    "fp16": ("#355c9a", "D"),
    "bf16": ("#7a9fd6", "d"),
    "int8": ("#c8553d", "v"),
    "fp8": ("#c98a10", "P"),
    "fp8-row": ("#f0c060", "X"),
    "kv4": ("#0b6e4f", "o"),
    "kv8": ("#53b68c", "s"),
    "sdpa-fp16": ("#355c9a", "D"),
    "sdpa-bf16": ("#7a9fd6", "d"),
    "w4a8kv4-g128": ("#0b6e4f", "o"),
    "w4a8kv4-chn": ("#2f9468", "p"),
    "w4a8kv8-g128": ("#53b68c", "s"),
    "w4a8kv8-chn": ("#8fd3b4", "h"),
    "w8a8kv8": ("#8a6fb0", "^"),
}
"""Colour and marker; qoq's kernels are green, what PyTorch has is not."""
_OURS = ("w4a8-g128", "w4a8-chn", "kv4", "kv8", "w4a8kv4-g128", "w4a8kv4-chn", "w4a8kv8-g128", "w4a8kv8-chn")
_LABELLED_CASES = 6
"""With more cases than this, the times do not fit beside their points, nor the names of the cases side by side."""


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
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [part for part in _PANELS if part in data]
    figure = Figure(figsize=(7 * len(parts), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, part in enumerate(parts):
        axes = figure.add_subplot(1, len(parts), panel + 1)
        _PANELS[part](axes, data)
        _finish(axes)
    figure.suptitle(f"{data['shape']['name']} on {data['gpu']['name']}")
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        with rc_context({"svg.hashsalt": "qoq"}):  # the same picture is the same file
            figure.savefig(path, dpi=150, metadata=metadata)
    except OSError as error:
        raise EnvironmentProblem(f"--plot {path}: cannot be written: {error}", remedy="name another file") from error


def _draw_gemms(axes: Any, data: dict[str, Any]) -> None:
    """Lines over M; qoq's lie on top of the others."""
    for variant in data["gemm"]["variants"]:
        points = [(row["m"], row["us"]) for row in data["gemm"]["layer"] if row["variant"] == variant]
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=2.2 if variant in _OURS else 1.2, **_style(variant))
    axes.set_xscale("log", base=2)
    ticks = sorted({row["m"] for row in data["gemm"]["layer"]})
    axes.set_xticks(ticks, [str(m) for m in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens M")
    axes.set_ylabel("µs, the four products of one layer (lower is better)")


def _draw_attention(axes: Any, data: dict[str, Any]) -> None:
    """One column a case, the variants side by side in it."""
    results = data["attention"]["results"]
    cases = list(dict.fromkeys((row["batch"], row["length"]) for row in results))
    variants = [v for v in data["attention"]["variants"] if any(row["variant"] == v for row in results)]
    for i, variant in enumerate(variants):
        points = [
            (cases.index((row["batch"], row["length"])) + (i - (len(variants) - 1) / 2) * 0.2, _median(row))
            for row in results
            if row["variant"] == variant
        ]
        axes.plot(*zip(*points, strict=True), linestyle="none", **_style(variant))
        for x, us in points if len(cases) <= _LABELLED_CASES else ():
            axes.annotate(
                f"{us:.3g}" if us < 1000 else f"{us:.0f}",
                (x, us),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=_STYLES.get(variant, ("black",))[0],
            )
    crowded = len(cases) > _LABELLED_CASES
    names = [f"{batch} x {length}" for batch, length in cases]
    axes.set_xticks(range(len(cases)), names, rotation=45 if crowded else 0, ha="right" if crowded else "center")
    axes.set_xlim(-0.6, len(cases) - 0.4)
    for border in range(1, len(cases)):
        axes.axvline(border - 0.5, color="#e4e4e4", linewidth=0.8, zorder=0)
    axes.set_xlabel("sequences x tokens in the cache of each")
    axes.set_ylabel("µs, attention of one layer, one decode step (lower is better)")


def _draw_served(axes: Any, data: dict[str, Any]) -> None:
    """A line a precision over the batches: what a request waits for a token, against what all of them get."""
    results = [row for row in data["e2e"]["results"] if row["token_ms"] is not None]
    for precision in dict.fromkeys(row["precision"] for row in results):
        mine = sorted((row for row in results if row["precision"] == precision), key=lambda row: row["requests"])
        speeds = [row["tokens_per_s"] for row in mine]
        medians, slow = ([row["token_ms"][which] for row in mine] for which in ("p50", "p99"))
        style = _style(precision)
        axes.plot(medians, speeds, linewidth=2.2 if precision in _OURS else 1.2, **style)
        axes.hlines(speeds, medians, slow, color=style["color"], linewidth=0.8, alpha=0.6)
        for x, y, row in zip(medians, speeds, mine, strict=True):
            axes.annotate(str(row["requests"]), (x, y), xytext=(4, -9), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.set_xlabel("ms per output token of a request, p50 (line: to p99); numbers: requests")
    axes.set_ylabel("output tokens/s of all (higher is better)")


def _finish(axes: Any) -> None:
    """A logarithmic scale with plain numbers, and a legend."""
    axes.set_yscale("log")
    axes.margins(y=0.08)
    _plain_numbers(axes.yaxis)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2)


def _plain_numbers(axis: Any) -> None:
    """On a logarithmic axis: 1, 2, 5, 10, ... without powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _style(variant: str) -> dict[str, Any]:
    colour, marker = _STYLES.get(variant, (None, "o"))
    return {
        "label": variant,
        "color": colour,
        "marker": marker,
        "markersize": 6,
        "zorder": 3 if variant in _OURS else 2,
    }


def _median(row: dict[str, Any]) -> float:
    return float(row["timing"]["median_us"])


_PANELS = {"gemm": _draw_gemms, "attention": _draw_attention, "e2e": _draw_served}
