"""Hardware counters of single launches on Hopper, by Nsight Compute (`ncu`), for what falls short of its limit.

    python benchmarks/counters.py --out benchmarks/counters-h100.json

Each case is launched once to warm up and once under the profiler, which empties the caches before and leaves the clocks
alone. Counted are the speed-of-light, memory, scheduler, warp-state and occupancy sections, by ncu's names. Times under
the profiler are not those of a graph: nothing overlaps.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats")
_LLAMA = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
GEMMS = [
    *(("qkv", m) for m in (1, 64, 128, 256, 1024)),
    *(("o", m) for m in (1, 64, 128, 256)),
    *(("down", m) for m in (64, 128, 256)),
    *(("gate_up", m) for m in (1, 256, 4096)),
]
ATTENTIONS = ((64, 1024), (128, 1536), (128, 4096), (1, 8192), (8, 32768))
SMALL = (("silu_mul", 1, 14336), ("silu_mul", 16, 14336), ("add_rms_norm", 16, 4096), ("rope_append", 8192, 0))


def case_names() -> list[str]:
    """In the order of their launches."""
    return [
        *(f"{gemm} M={m}" for gemm, m in GEMMS),
        *(f"attention {batch} x {length}" for batch, length in ATTENTIONS),
        *(f"{operation} M={m} K={k}" for operation, m, k in SMALL),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="all counters as JSON")
    parser.add_argument("--launch", action="store_true", help="only launch the cases, for ncu")
    arguments = parser.parse_args()
    if arguments.launch:
        launch_all()
        return
    if arguments.out is None:
        parser.error("--out FILE is missing")
    words = ["ncu", "--csv", "--page", "details", "--print-details", "all"]
    words += ["--profile-from-start", "off", "--clock-control", "none"]
    words += [word for section in SECTIONS for word in ("--section", section)]
    told = subprocess.run(
        [*words, sys.executable, __file__, "--launch"], stdout=subprocess.PIPE, encoding="utf-8", check=True
    ).stdout
    launches = parse(told.splitlines())
    names = case_names()
    if len(launches) != len(names):
        sys.exit(f"counters: {len(launches)} launches for {len(names)} cases")
    import torch

    from qoq.kernels.gpu_facts import read_facts

    facts = asdict(read_facts(torch.cuda.current_device()))
    cases = [{"case": name, **launch} for name, launch in zip(names, launches, strict=True)]
    arguments.out.write_text(json.dumps({"gpu": facts, "cases": cases}, indent=1) + "\n")


def parse(lines: Iterable[str]) -> list[dict[str, object]]:
    """ncu's details as CSV, which begin at the line with the headings: the kernel and counters of each launch."""
    rows = list(lines)
    start = next((i for i, line in enumerate(rows) if line.startswith('"ID"')), len(rows))
    launches: dict[str, dict[str, object]] = {}
    for row in csv.DictReader(rows[start:]):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "counters": {}})
        counters = launch["counters"]
        if row["Metric Name"] and isinstance(counters, dict):
            name = f"{row['Section Name']}: {row['Metric Name']}"  # sections share names
            counters[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())


def launch_all() -> None:
    """Every case once, and once more between the marks that the profiler goes by."""
    import torch

    for call in calls():
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def calls() -> Iterable[Callable[[], object]]:
    """In the order of `case_names`; each launches one kernel."""
    import torch
    from hopper_layers import Product
    from small_kernels import Operands

    from qoq.kernels.bench_attention import paged_call
    from qoq.recipes.shapes import find_shape

    generator = torch.Generator("cuda").manual_seed(0)
    for gemm in dict.fromkeys(gemm for gemm, _ in GEMMS):
        product = Product("g128", *_LLAMA[gemm], generator)
        for m in (m for name, m in GEMMS if name == gemm):
            product.prepare(m)
            yield lambda product=product: product.run(0, overlapping=True)
    shape = find_shape("llama-3-8b")
    for batch, length in ATTENTIONS:
        yield paged_call(shape, batch, length, 4, generator)
    for operation, m, k in SMALL:
        yield Operands(operation, m, k, tiled=True).call


if __name__ == "__main__":
    main()
