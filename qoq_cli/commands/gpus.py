"""`qoq gpus`: the data sheet that `qoq bench --gpu` projects from."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.table import Column, Table

from qoq.recipes.gpus import gpus as data_sheets
from qoq_cli.terminal import JsonOption, Terminal, TracebackOption, guarded, print_text


@guarded
def gpus(as_json: JsonOption = False, traceback: TracebackOption = False) -> None:
    """List the GPUs whose speed `qoq bench --gpu` can project, with what their vendor promises."""
    terminal = Terminal(as_json)
    sheets = data_sheets().values()

    def render(console: Console) -> None:
        numbers = ("GiB", "GB/s", "fp16", "int8", "fp8", "W")
        table = Table(
            Column("name", no_wrap=True), "also", "arch", *(Column(heading, justify="right") for heading in numbers)
        )
        for gpu in sheets:
            table.add_row(
                gpu.name,
                ", ".join(gpu.aliases),
                gpu.architecture,
                f"{gpu.memory_mib / 1024:.0f}",
                f"{gpu.bandwidth_gb_s:.0f}",
                *(f"{tops:.0f}" if tops else "-" for tops in (gpu.fp16_tops, gpu.int8_tops, gpu.fp8_tops)),
                str(gpu.watts),
            )
        console.print(table)
        print_text(
            console,
            "fp16, int8, fp8: 10^12 operations a second of the tensor cores, dense, 16-bit and fp8 products summed in "
            "32 bit. `qoq bench --gpu NAME` projects from these figures; none of them was measured.",
            style="dim",
        )

    terminal.result({"gpus": [asdict(gpu) for gpu in sheets]}, render)
