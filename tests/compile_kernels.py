"""Compile every instantiation that dispatch can ask for, for every architecture, and say what each takes of a thread.

    python tests/compile_kernels.py [sm_90 ...]

Needs no GPU. Exits with 1 when a kernel does not compile, spills registers, or has its wgmma wait for each other.
"""

from __future__ import annotations

import sys
import time

from qoq.kernels.compiler import compile_all
from qoq.kernels.dispatch import all_specs
from qoq.kernels.gemm_tiles import ARCHITECTURES
from qoq.recipes.errors import QoQError


def main() -> int:
    architectures = sys.argv[1:] or list(ARCHITECTURES)
    wrong, total, started = [], 0, time.perf_counter()
    for architecture in architectures:
        specs = dict(all_specs(architecture))
        cubins = compile_all((spec, architecture) for spec in specs)
        for (spec, _), cubin in cubins.items():
            used = cubin.resources
            line = f"{architecture:8} {used.registers:3} registers {used.spill_bytes:4} B spilled  {spec.label}"
            print(line)
            if used.spill_bytes or used.waits:
                wrong.append(line + ("  (wgmma wait for each other)" if used.waits else ""))
        total += len(cubins)
    print(f"{total} kernels for {', '.join(architectures)} in {time.perf_counter() - started:.0f} s")
    if wrong:
        print("kernels that spill or wait:", *wrong, sep="\n  ", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except QoQError as error:
        sys.exit(f"error: {error}")
