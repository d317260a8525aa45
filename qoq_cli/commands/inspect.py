"""`qoq inspect`: what is inside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qoq_cli.progress import size
from qoq_cli.terminal import JsonOption, Terminal, TracebackOption, guarded


@guarded
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Folder that `qoq quantize` wrote.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Show what a checkpoint holds: format, recipe, provenance, sizes, and the error of each block.

    Reads headers and the manifest only; `qoq verify` is what checks the numbers.
    """
    from qoq.formats.checkpoint import open_checkpoint
    from qoq.formats.manifest import is_intact

    terminal = Terminal(as_json)
    opened = open_checkpoint(checkpoint)
    manifest = opened.manifest
    if not is_intact(manifest):
        terminal.warn("the manifest was changed after it was written; `qoq verify` says more")
    infos = {name: opened.source.info(name) for name in opened.source.names()}
    by_dtype: dict[str, int] = {}
    for info in infos.values():
        kind = str(info.dtype).removeprefix("torch.")
        by_dtype[kind] = by_dtype.get(kind, 0) + info.nbytes
    data: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        **{key: manifest.get(key) for key in ("tool", "recipe", "source", "calibration", "totals", "blocks", "run")},
        "quantization_config": opened.quantization.to_dict(),
        "bytes_by_dtype": by_dtype,
        "files": manifest["files"],
    }
    if tensors:
        data["tensors"] = {
            name: {"dtype": str(info.dtype).removeprefix("torch."), "shape": list(info.shape), "bytes": info.nbytes}
            for name, info in infos.items()
        }
    terminal.result(data, lambda console: _render(console, data))


def _render(console: Console, data: dict[str, Any]) -> None:
    config, totals = data["quantization_config"], data["totals"] or {}
    recipe, source, calibration = data["recipe"] or {}, data["source"] or {}, data["calibration"] or {}
    table = Table(title=data["checkpoint"], title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    revision = f" at {source['revision']}" if source.get("revision") else ""
    table.add_row("made from", f"{source.get('model')}{revision}")
    table.add_row("made by", f"qoq {(data['tool'] or {}).get('version')}, recipe {recipe.get('name')}")
    grid = "groups of 128 (progressive)" if config["group_size"] == 128 else "per channel"
    table.add_row("weights", f"4 bit, {grid}, {totals.get('bits_per_weight')} bits per weight on disk")
    table.add_row("activations", f"{config['act_bits']} bit per token")
    table.add_row("KV cache", f"{config['kv_bits']} bit per token and head, key rotation {config['key_rotation']}")
    table.add_row("zeros", config["zero_domain"])
    table.add_row("norm gains", "folded into the weights" if config["norms_folded"] else "kept apart from the weights")
    kept = config["modules_to_not_convert"]
    table.add_row("in 16 bit", ", ".join(kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else ""))
    if config["padded"]:
        table.add_row("padded", f"{len(config['padded'])} linears whose in_features are no multiple of 128")
    table.add_row(
        "calibration",
        f"{calibration.get('source')}, {calibration.get('windows')} windows of {calibration.get('seq_len')} tokens",
    )
    sizes = ", ".join(f"{kind} {size(count)}" for kind, count in sorted(data["bytes_by_dtype"].items()))
    table.add_row("tensors", sizes)
    table.add_row("files", f"{len(data['files'])}, {size(sum(entry['bytes'] for entry in data['files'].values()))}")
    console.print(table)
    errors = Table(title="Relative output error by block", title_justify="left")
    errors.add_column("block", justify="right")
    errors.add_column("block error", justify="right")
    errors.add_column("worst linear")
    for record in data["blocks"] or []:
        linears = record["linears"]
        worst = max(linears, key=lambda name: linears[name]["output_error"], default=None)
        text = "-" if worst is None else f"{worst} {linears[worst]['output_error']:.3f}"
        errors.add_row(str(record["block"]), f"{record['output_error']:.4f}", text)
    console.print(errors)
    if "tensors" in data:
        listing = Table("tensor", "dtype", "shape", "bytes")
        for name, entry in data["tensors"].items():
            listing.add_row(name, entry["dtype"], str(entry["shape"]), str(entry["bytes"]))
        console.print(listing)
