"""Compiling kernels ahead of their first use, with progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qoq_cli.progress import progress
from qoq_cli.terminal import Terminal

if TYPE_CHECKING:
    from qoq.kernels.compiler import Cubin, KernelSpec


def compile_with_progress(terminal: Terminal, jobs: Sequence[tuple[KernelSpec, str]]) -> tuple[list[Cubin], float]:
    """Compile each (kernel, architecture) into the cache, in parallel; what is there now, and the seconds it took.

    Raises EnvironmentProblem as `compile_kernel` does.
    """
    from qoq.kernels.compiler import compile_all

    distinct = list(dict.fromkeys(jobs))
    lock, done = threading.Lock(), 0
    started = time.monotonic()
    with progress(terminal, "compiling kernels") as update:

        def on_done(spec: KernelSpec, arch: str) -> None:
            nonlocal done
            with lock:
                done += 1
                update(done, len(distinct), f"{spec.source} for {arch}")

        update(0, len(distinct), "starting")
        try:
            cubins = compile_all(distinct, on_done=on_done)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("finished kernels are kept: run the same command again to continue") from None
    return list(cubins.values()), time.monotonic() - started
