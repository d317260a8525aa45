"""Compiling and loading where there is a driver: NVRTC's own cache, and what a capture must not do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qoq.kernels.compiler import compile_kernel
from qoq.kernels.dispatch import gemm_table, gemm_tile
from qoq.kernels.launch import Kernel, architecture

pytestmark = pytest.mark.gpu


def test_a_kernel_compiled_again_says_its_resources(gpu: torch.device, tmp_path: Path) -> None:
    """With a driver NVRTC keeps a cache of its own, and what comes from there comes without the assembler's log."""
    arch = architecture(0)
    spec = gemm_tile(next(iter(gemm_table()["tiles"]))).spec(arch, "int8", "float16")
    first, second = (compile_kernel(spec, arch, folder=tmp_path / name) for name in ("a", "b"))
    assert first.path != second.path
    assert first.resources == second.resources


def test_loading_during_a_capture_is_refused(gpu: torch.device) -> None:
    spec = gemm_tile(next(iter(gemm_table()["tiles"]))).spec(architecture(0), "int8", "float16")
    x = torch.zeros(1, device=gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(RuntimeError, match="once before capturing"):
            Kernel(spec, 0)
    graph.replay()
    assert float(x) == 1
    assert Kernel(spec, 0).handle
