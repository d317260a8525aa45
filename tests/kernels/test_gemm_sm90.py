"""Hopper's GEMM operators without a GPU: what is refused, and that the kernel gets what its parameters are called."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qoq.kernels import gemm
from qoq.kernels.compiler import KernelSpec
from qoq.kernels.dispatch import GemmChoice
from qoq.kernels.gemm_sm90 import run_gemm_sm90
from qoq.kernels.gemm_tiles import DecodeTile, HopperTile, Sm90Tile, SplitTile
from qoq.kernels.sources import CUDA_ROOT
from qoq.kernels.tiles import tile_activations, tile_weights
from tests.kernels.gemm_cases import Case


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the launch by the names that the kernel has for them, its grid, and whether it may overlap."""
    found: dict[str, Any] = {}

    def load(spec: KernelSpec, device: int) -> SimpleNamespace:
        signature = re.search(rf"{spec.entry}\(([^)]*)\)", (CUDA_ROOT / spec.source).read_text())
        assert signature
        names = [parameter.split()[-1].lstrip("*") for parameter in signature.group(1).split(",")]

        def launch(grid: tuple[int, int, int], arguments: tuple[Any, ...], *, overlapping: bool) -> None:
            found.update(zip(names, arguments, strict=True), grid=grid, overlapping=overlapping)

        return SimpleNamespace(launch=launch)

    monkeypatch.setattr(gemm, "load_kernel", load)
    monkeypatch.setattr(gemm, "num_sms", lambda device: 132)
    monkeypatch.setattr(gemm, "workspace", lambda device: (torch.zeros(1), torch.zeros(2)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return found


def operands(weights: Any) -> dict[str, Tensor | None]:
    case = Case(weights, 9, 96, 256, seed=5)
    names = ("s1_scales", "s1_szeros", "bias")
    return {
        "act_tiles": tile_activations(case.codes),
        "act_scales": case.scales,
        "act_sums": case.sums,
        "weight_tiles": tile_weights(case.operands),
        **{name: case.operands.get(name) for name in names},
    }


@pytest.mark.parametrize("weights", ["g128", "per_channel"])
@pytest.mark.parametrize(
    ("tile", "grid"),
    [
        (Sm90Tile(16, 2, 4, 1), (1, 1, 1)),
        (SplitTile(8, 1, 2, 2, 4, 1), (4, 2, 1)),
        (DecodeTile(8, 2, 8, 2, 1, 1), (3, 2, 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_kernel_gets_what_its_parameters_are_called(
    launched: dict[str, Any], weights: Any, tile: HopperTile, grid: tuple[int, int, int]
) -> None:
    given, choice = operands(weights), GemmChoice(tile, False, "test")
    out = run_gemm_sm90(weights, *given.values(), torch.float16, choice=choice)  # type: ignore[arg-type]
    called = {"act_tiles": "act_codes", "weight_tiles": "weight"}
    for name, tensor in given.items():
        assert launched[called.get(name, name)] is tensor, name
    assert launched["out"] is out
    assert (launched["m"], launched["n"], launched["k"]) == (9, 96, 256)
    if isinstance(tile, Sm90Tile):
        assert (launched["counters"].numel(), launched["workspace"].numel()) == (1, 2)
    assert launched["grid"] == grid
    assert launched["overlapping"] is True


@pytest.mark.parametrize("name", ["act_tiles", "act_scales", "weight_tiles", "bias"])
def test_operands_that_do_not_fit_are_refused(launched: dict[str, Any], name: str) -> None:
    given = operands("g128")
    wrong = given[name]
    assert wrong is not None
    given[name] = wrong[..., :-1].contiguous()
    with pytest.raises(ValueError, match="act_tiles" if name == "act_scales" else name):
        run_gemm_sm90("g128", *given.values(), torch.float16)  # type: ignore[arg-type]
    assert not launched
