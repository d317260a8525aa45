"""`qoq export`: a checkpoint in the form that another server reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qoq.recipes.errors import InputError
from qoq_cli import __version__
from qoq_cli.progress import progress, size
from qoq_cli.sizes import parse_size
from qoq_cli.terminal import JsonOption, QuietOption, Terminal, TracebackOption, guarded, print_text


@guarded
def export(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CKPT", help="Folder that `qoq quantize` wrote.", show_default=False)
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FORMAT", help="What to write; without it, the formats are listed.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Where.  [default: CKPT-FORMAT, beside the checkpoint]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say whether it can be exported, and who reads the result; write nothing.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest safetensors file, such as 5GB or 500MB.")
    ] = "5GB",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Write a checkpoint in the form that another server reads.

    Whatever keeps it from being written so is listed before anything is written: wrong zeros, sizes, data types, or a
    model that the server does not have. Then every file is compared with the manifest, and every linear decoded again
    from what was stored.

    Examples: `qoq export` lists the formats; `qoq export checkpoints/llama-3-8b-w4a8kv4-g128 --to vllm-w4a16`.
    """
    from qoq.formats.checkpoint import open_checkpoint
    from qoq.formats.export import export_checkpoint, preflight
    from qoq.formats.exporters import EXPORTERS, find_exporter

    terminal = Terminal(as_json, quiet)
    if to is None:
        if checkpoint is not None:
            raise InputError("--to: missing", remedy=f"pass one of {', '.join(EXPORTERS)}")
        formats = {
            e.name: {"what": e.summary, "readers": e.readers, "notes": list(e.notes)} for e in EXPORTERS.values()
        }
        terminal.result({"formats": formats}, lambda console: _list(console, formats))
        return
    exporter = find_exporter(to)
    if checkpoint is None:
        raise InputError("CKPT: missing", remedy="pass the folder that `qoq quantize` wrote")
    opened = open_checkpoint(checkpoint)
    target = output or checkpoint.parent / f"{checkpoint.resolve().name}-{exporter.name}"
    about = {"checkpoint": str(checkpoint), "format": exporter.name, "readers": exporter.readers}
    data: dict[str, Any] = {**about, "notes": list(exporter.notes), "target": str(target)}
    data["output"] = None if dry_run else str(target)
    if dry_run:
        preflight(opened, exporter, target)
    else:
        with progress(terminal, f"exporting to {exporter.name}") as update:
            report = export_checkpoint(
                opened,
                exporter,
                target,
                max_shard_bytes=parse_size("--max-shard-size", max_shard_size),
                tool_version=__version__,
                on_step=update,
            )
        data |= {key: value for key, value in asdict(report).items() if key != "folder"}
    terminal.result(data, lambda console: _render(console, data))


def _list(console: Console, formats: dict[str, dict[str, Any]]) -> None:
    table = Table("--to", "what it is", "read by", show_lines=True)
    for name, about in formats.items():
        table.add_row(name, about["what"], about["readers"])
    console.print(table)


def _render(console: Console, data: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if data["output"] is None:
        table.add_row("can be exported", f"{data['checkpoint']} to {data['format']}, into {data['target']}")
    else:
        table.add_row("exported", data["output"])
        table.add_row("size", f"{size(data['nbytes'])}, {data['linears']} quantized linears")
        rounding = f"at most {data['error']:.4%} of a weight matrix ({data['worst']})" if data["error"] else "none"
        table.add_row("rounding", rounding)
    table.add_row("read by", data["readers"])
    console.print(table)
    for note in data["notes"]:
        print_text(console, f"- {note}")
