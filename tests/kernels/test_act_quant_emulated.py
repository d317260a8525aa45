"""The activation quantizers as they are, run on the CPU: every way in which threads share rows, in rows and in tiles.

`emulation/` says what is emulated and checked. Clusters are not: rows that several blocks share are for tests on a GPU.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qoq.formats.packing import padded_in_features
from qoq.kernels import act_quant
from qoq.kernels.act_oracles import add_oracle, quantize_oracle, rms_norm_oracle, silu_mul_oracle
from qoq.kernels.act_quant import RowShape
from qoq.kernels.compiler import KernelSpec
from qoq.kernels.tiles import activation_tiles_shape, untile_activations
from tests.kernels.emulation.emulator import EmulatedKernel, Emulator, missing_compiler

DTYPES = (torch.float16, torch.bfloat16)
EPS = 1e-5
SHAPES = {
    192: [RowShape(1, 1, rows=4)],
    1000: [RowShape(4, 1, rows=4)],
    1288: [RowShape(1, 6), RowShape(2, 3), RowShape(4, 2), RowShape(2, 3, turns=2), RowShape(4, 2, turns=4)],
}
"""By K: those of one warp a row, then of a block a row, then of a block for several rows in turn."""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if (problem := missing_compiler()) is not None:
        pytest.skip(problem)
    return Emulator(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(autouse=True)
def device(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels: dict[KernelSpec, EmulatedKernel] = {}

    def load(spec: KernelSpec, _device: int | None) -> EmulatedKernel:
        if spec not in kernels:
            (kernels[spec],) = emulator.compile([spec], tmp_path)
        return kernels[spec]

    monkeypatch.setattr(act_quant, "load_kernel", load)
    monkeypatch.setattr(act_quant, "may_overlap", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())


def rows_of(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 10 ** (torch.rand(m, 1, generator=generator) * 3 - 2)
    if m > 2:
        x[1], x[2, k - 1] = 0, torch.inf
    return x.to(dtype)


def operands(operation: str, m: int, k: int, dtype: torch.dtype) -> dict[str, Tensor | float | None]:
    norm = operation.endswith("rms_norm")
    return {
        "x": rows_of(m, 2 * k if operation == "silu_mul" else k, dtype, seed=1),
        "residual": rows_of(m, k, dtype, seed=2) if operation == "add_rms_norm" else None,
        "weight": rows_of(1, k, dtype, seed=3)[0] if norm else None,
        "eps": EPS if norm else 0.0,
    }


def run(operation: str, shape: RowShape, given: dict[str, Tensor | float | None], *, tiled: bool) -> list[Tensor]:
    """Codes as rows, scales, sums, what was quantized and, with a residual, the sum; memory is poisoned before."""
    x = given["x"]
    assert isinstance(x, Tensor)
    m, k = x.shape[0], x.shape[1] // (2 if operation == "silu_mul" else 1)
    size = activation_tiles_shape(m, padded_in_features(k)) if tiled else (m, padded_in_features(k))
    codes = torch.full(size, 0x7F, dtype=torch.int8)
    scales, sums = torch.full((m,), torch.nan), torch.full((m,), 0x7F7F7F7F, dtype=torch.int32)
    values = torch.full((m, k), torch.nan, dtype=x.dtype)
    out = codes, scales, sums
    *_, added = act_quant.run_quantizer(operation, **given, values=values, out=out, tiled=tiled, shape=shape)
    if tiled:
        rest = codes.permute(1, 3, 0, 2, 4).flatten(0, 1)[m:]
        assert bool((rest == 0x7F).all()), "wrote codes of tokens that are none"
        codes = untile_activations(codes, m)
    return [codes, scales, sums, values, *([] if added is None else [added])]


def same(found: Tensor, expected: Tensor) -> bool:
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", act_quant.OPERATIONS)
@pytest.mark.parametrize("k", SHAPES)
def test_all_shapes_compute_the_same_in_rows_and_tiles(k: int, operation: str, dtype: torch.dtype) -> None:
    m = 11
    given = operands(operation, m, k, dtype)
    found = run(operation, SHAPES[k][0], given, tiled=False)
    codes, scales, sums, values, *added = found
    x, residual, weight = (given[name] for name in ("x", "residual", "weight"))
    assert isinstance(x, Tensor)
    expected = x.double()
    if isinstance(residual, Tensor):
        expected = add_oracle(x, residual)
        assert same(added[0], expected.to(dtype))
    if isinstance(weight, Tensor):
        expected = rms_norm_oracle(expected.to(dtype), weight, EPS)
    if operation == "silu_mul":
        expected = silu_mul_oracle(x)
    is_finite = expected.isfinite().all(1)
    assert torch.allclose(values[is_finite].double(), expected[is_finite], rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
    for ours, theirs in zip((codes[:, :k], scales, sums), quantize_oracle(values), strict=True):
        assert same(ours, theirs)
    assert not bool(codes[:, k:].any())
    for shape in SHAPES[k]:
        for tiled in (False, True):
            if shape.turns == 1 or tiled:
                again = run(operation, shape, given, tiled=tiled)
                assert all(same(a, b) for a, b in zip(again, found, strict=True)), (shape, tiled)
