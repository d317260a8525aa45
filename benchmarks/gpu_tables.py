"""Makes the tables of benchmarks/ that need a GPU, named after the one at hand; or lists the commands.

    python benchmarks/gpu_tables.py --list
    python benchmarks/gpu_tables.py products layers served-1000

Each table is written when its command has ended well; one that fails leaves the file as it was, and the rest goes on,
but for --stop.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
_ROWS = "1,8,16,32,48,64,96,128,192,256,384,512,1024,2048,4096"
_PROGRAMS = {"qoq": [sys.executable, "-c", "from qoq_cli.app import main; main()"], "python": [sys.executable]}


@dataclass(frozen=True)
class Table:
    """`stem`-GPU.json, by a command that prints it or, where it has `{out}`, writes it."""

    stem: str
    command: str


TABLES = {
    "kernels": Table("kernels", "qoq bench --json"),
    "products": Table(
        "hopper", f"qoq bench --what gemm --batch {_ROWS} --against bf16,int8,fp8,w8a8 --repeat 8 --json"
    ),
    "sustained": Table(
        "hopper-sustained", "qoq bench --what gemm --batch 1024,4096 --against fp8,w8a8 --rest 0 --repeat 10 --json"
    ),
    "layers": Table("hopper-layers", "python benchmarks/hopper_layers.py --models llama-3-8b --repeat 8 --out {out}"),
    "others": Table(
        "hopper-layers-others",
        "python benchmarks/hopper_layers.py --models qwen3-8b,llama-3-70b --weights g128 --repeat 5 --out {out}",
    ),
    "attention": Table("hopper-attention", "qoq bench --what attention --repeat 12 --json"),
    "small": Table("small-kernels", "python benchmarks/small_kernels.py --out {out}"),
    "extend": Table("extend", "python benchmarks/extend_attention.py --repeat 8 --out {out}"),
    "counters": Table("counters", "python benchmarks/counters.py --out {out}"),
    **{
        f"served-{prompt_len}": Table(
            f"served-{prompt_len}-{output_len}",
            f"qoq bench --what e2e --prompt-len {prompt_len} --output-len {output_len} --requests 512 --memory 73GB "
            "--precision w4a8kv4-g128 --against fp16,w8a8,fp8 --json",
        )
        for prompt_len, output_len in ((1000, 1000), (1024, 512))
    },
    # One start of vLLM each, which takes minutes. The first comes once more at the end: a GPU gets warm.
    **{
        f"vllm-{name}-{prompt_len}": Table(
            f"vllm-{name}-{prompt_len}-{output_len}",
            f"qoq bench --what vllm --prompt-len {prompt_len} --output-len {output_len} --memory 73GB {options} --json",
        )
        for prompt_len, output_len in ((1000, 1000), (1024, 512))
        for name, options in {
            "w4a8kv4": "--precision w4a8kv4-g128 --against none",
            "fp8": "--precision none --against fp8",
            "bf16": "--precision none --against bf16",
            "int4kv": "--precision none --against w4a8-int4kv",
            "w4a8kv4-again": "--precision w4a8kv4-g128 --against none",
        }.items()
    },
    **{
        f"vllm-latency-{name}": Table(
            f"vllm-latency-{name}",
            f"python benchmarks/vllm_latency.py --configuration {configuration} --memory 73GB --out {{out}}",
        )
        for name, configuration in {"w4a8kv4": "w4a8kv4-g128", "fp8": "fp8", "bf16": "bf16"}.items()
    },
    "served-batches": Table(
        "served-batches",
        "qoq bench --what e2e --batch 1,8,32,128,512 --memory 73GB --precision w4a8kv4-g128 --against fp16,fp8 --json",
    ),
    "served-lengths": Table(
        "served-lengths",
        "qoq bench --what e2e --prompt-len 128,2048,500 --output-len 128,2048,2000 --memory 73GB "
        "--precision w4a8kv4-g128 --against fp16,w8a8,fp8 --json",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}; none means all")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--gpu", metavar="NAME", help="end of the files' names; by default from the GPU's own")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go (default: benchmarks/)")
    parser.add_argument("--stop", action="store_true", help="when one fails; by default the rest goes on")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in TABLES]
    if unknown:
        parser.error(f"no such table: {', '.join(unknown)}; there are {', '.join(TABLES)}")
    gpu = arguments.gpu or ("GPU" if arguments.list else _gpu_name())
    failed = []
    for name in arguments.names or TABLES:
        out = arguments.folder / f"{TABLES[name].stem}-{gpu}.json"
        if arguments.list:
            print(f"{name:14} {out.name}: {TABLES[name].command.format(out=out.name)}")
        elif not make(TABLES[name], out):
            failed.append(name)
            if arguments.stop:
                break
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def make(table: Table, out: Path) -> bool:
    """Run the command; whether the file was written."""
    temporary = out.with_suffix(".json.tmp")
    words = shlex.split(table.command.format(out=temporary))
    print(f"{out.name}: {shlex.join(words)}", file=sys.stderr, flush=True)
    words[:1] = _PROGRAMS[words[0]]
    started = time.perf_counter()
    if "{out}" in table.command:
        code = subprocess.run(words, cwd=FOLDER.parent, check=False).returncode
    else:
        with temporary.open("wb") as file:
            code = subprocess.run(words, cwd=FOLDER.parent, stdout=file, check=False).returncode
    is_made = code == 0 and temporary.is_file()
    if is_made:
        temporary.replace(out)
    else:
        temporary.unlink(missing_ok=True)
    print(f"{out.name}: exit code {code} after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return is_made


def _gpu_name() -> str:
    """Such as h100 of "NVIDIA H100 80GB HBM3"."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_tables: no CUDA device here; --list says what would run")
    return str(torch.cuda.get_device_name()).removeprefix("NVIDIA ").split()[0].lower()


if __name__ == "__main__":
    sys.exit(main())
