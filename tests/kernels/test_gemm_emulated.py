"""The GEMM kernels as they are, run on the CPU: arithmetic, layouts, schedules, barriers, tails.

`emulation/` says what is emulated and checked; the tests on a GPU have the same operands and expected values.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qoq.kernels import gemm
from qoq.kernels.compiler import KernelSpec
from qoq.kernels.dispatch import GemmChoice, gemm_table, gemm_tile
from qoq.kernels.gemm_tiles import WEIGHT_FORMATS, WORKSPACE_SUMS_PER_SM, GemmTile, OutFormat, WeightFormat
from qoq.kernels.sources import CUDA_ROOT
from tests.kernels.emulation.emulator import EmulatedKernel, EmulationError, Emulator, missing_compiler
from tests.kernels.gemm_cases import Case, assert_same

DTYPES = (torch.float16, torch.bfloat16, torch.int32)
TILES = {tile: name for name in gemm_table()["tiles"] if isinstance(tile := gemm_tile(name), GemmTile)}
SCHEDULES = 2
"""Orders of blocks in which a tile that they share is computed."""


class Device:
    """What `run_gemm` finds in place of a GPU."""

    def __init__(self, emulator: Emulator, folder: Path, root: Path = CUDA_ROOT) -> None:
        self.architecture, self.num_sms, self.seed = "sm_90", 2, 0
        self._emulator, self._folder, self._root = emulator, folder, root
        self._kernels: dict[KernelSpec, EmulatedKernel] = {}
        self.counters, self.sums = torch.zeros(0), torch.zeros(0)

    def compile(self, specs: list[KernelSpec]) -> None:
        self._kernels |= zip(specs, self._emulator.compile(specs, self._folder, self._root), strict=True)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gemm, "architecture", lambda _: self.architecture)
        monkeypatch.setattr(gemm, "num_sms", lambda _: self.num_sms)
        monkeypatch.setattr(gemm, "load_kernel", self._load)
        monkeypatch.setattr(gemm, "workspace", self._workspace)
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())

    def run(self, case: Case, dtype: torch.dtype, tile: GemmTile, *, stream: bool, num_sms: int) -> Tensor:
        """The kernel's output, after a look at what it leaves in the workspace."""
        self.num_sms = num_sms
        self.seed += 1
        out = case.run(dtype, GemmChoice(tile, stream, "test"))
        assert not bool(self.counters.any()), "counters are not zero for the next launch"
        assert not bool(self.sums.any()), "the workspace is not zero for the next launch"
        return out

    def _load(self, spec: KernelSpec, _device: int | None) -> EmulatedKernel:
        if spec not in self._kernels:
            self.compile([spec])
        self._kernels[spec].seed = self.seed
        return self._kernels[spec]

    def _workspace(self, _device: int | None) -> tuple[Tensor, Tensor]:
        sizes = (self.num_sms * gemm._COUNTERS_PER_SM, self.num_sms * WORKSPACE_SUMS_PER_SM)
        self.counters, self.sums = (torch.zeros(size, dtype=torch.int32) for size in sizes)
        return self.counters, self.sums


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if (problem := missing_compiler()) is not None:
        pytest.skip(problem)
    return Emulator(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def device(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    device = Device(emulator, tmp_path)
    device.install(monkeypatch)
    return device


def launches(tile: GemmTile, blocks: int) -> Iterator[tuple[int, bool, tuple[int, int, int]]]:
    """SMs, whether to share tiles, and shapes with tails on all sides. `blocks` run on an SM."""
    n_tail = tile.block_n - 32 if tile.block_n > 32 else 32
    for _ in range(SCHEDULES):
        yield 2, True, (tile.block_m - 3, n_tail, 1152)  # one tile, which all blocks share
    yield 2, True, (1, 32, 128)  # one unit
    yield 1, False, (2 * tile.block_m - 3, tile.block_n + n_tail, 384)  # whole tiles
    if tile.block_n * tile.block_m <= 4096:
        yield 2, False, (8 * tile.block_m + 1, 2 * tile.block_n, 128)  # more than a band of them
    grid = 2 * blocks
    tiles_n = next(tiles for tiles in count(1) if 3 * tiles > grid and 3 * tiles % grid)  # by three of tokens
    yield 2, True, (3 * tile.block_m - 3, (tiles_n - 1) * tile.block_n + n_tail, 640)  # whole ones, then shared ones


def check(device: Device, tile: GemmTile, architecture: str, first_dtype: int) -> None:
    device.architecture = architecture
    dtypes: dict[WeightFormat, torch.dtype] = {
        weights: DTYPES[(first_dtype + i) % len(DTYPES)] for i, weights in enumerate(WEIGHT_FORMATS)
    }
    device.compile([tile.spec(architecture, *pair) for pair in zip(dtypes, map(name_of, dtypes.values()), strict=True)])
    for weights, dtype in dtypes.items():
        blocks, _ = tile.resident(architecture, weights)
        for seed, (num_sms, stream, shape) in enumerate(launches(tile, blocks)):
            case = Case(weights, *shape, seed=seed, bias=seed % 2 == 0, device="cpu")
            assert_same(device.run(case, dtype, tile, stream=stream, num_sms=num_sms), case.expected(dtype))


def name_of(dtype: torch.dtype) -> OutFormat:
    return gemm._OUT_FORMATS[dtype]


@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_every_tile_is_exact(device: Device, tile: GemmTile) -> None:
    check(device, tile, "sm_90", first_dtype=list(TILES).index(tile))


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "turn"), [("sm_90", 1), ("sm_90", 2), ("sm_86", 0)])
@pytest.mark.parametrize("tile", TILES, ids=TILES.get)
def test_every_tile_is_exact_with_other_outputs_and_fewer_stages(
    device: Device, tile: GemmTile, architecture: str, turn: int
) -> None:
    check(device, tile, architecture, first_dtype=list(TILES).index(tile) + turn)


@pytest.mark.parametrize("architecture", ["sm_90", "sm_86"])
def test_launches_have_whole_tiles_and_shared_ones(architecture: str) -> None:
    for tile in TILES:
        blocks, _ = tile.resident(architecture, "g128")
        (num_sms, stream, shape), *_, (last_sms, last_stream, last_shape) = launches(tile, blocks)
        first = GemmChoice(tile, stream, "test").share(architecture, "g128", *shape, num_sms)
        assert not first.whole
        assert first.blocks > 1
        last = GemmChoice(tile, last_stream, "test").share(architecture, "g128", *last_shape, last_sms)
        assert last.whole
        assert last.units_each + last.longer


MISTAKES = {
    "a copy not waited for": ("gemm.cu", "wait_for_copies<STAGES - 2>", "wait_for_copies<STAGES - 1>", "under way"),
    "no barriers": ("gemm.cu", "__syncthreads();", "", "since the last barrier|under way"),
    "sums not waited for": ("gemm.cu", "load_acquire(additions) !=", "load_acquire(additions) >", "differ|not zero"),
    "a block that waits for ever": ("gemm.cu", "atomicAdd(additions, steps)", "(void)additions", "for ever"),
    "a row too many": ("gemm_epilogue.cuh", "8 * j < rows_left", "8 * j <= rows_left", "bytes at byte .* of out"),
    "a row of weights too many": ("gemm_loader.cuh", "more >= stripes_left", "more > stripes_left", "of weight"),
    "a wrong byte": ("gemm_weights.cuh", "0x80808081u", "0x80808080u", "differ"),
    "a wrong swizzle": ("gemm_loader.cuh", "to ^ 64", "to + 64", "since the last barrier"),
    "a store that is not aligned": ("gemm_epilogue.cuh", "(odd ? 6 : 0)", "(odd ? 7 : 0)", "not aligned"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mistake: str
) -> None:
    source, right, wrong, says = MISTAKES[mistake]
    root = tmp_path / "cuda"
    shutil.copytree(CUDA_ROOT, root)
    text = (root / "sm80" / source).read_text(encoding="utf-8")
    assert right in text, f"{source} changed: find another place for this mistake"
    (root / "sm80" / source).write_text(text.replace(right, wrong), encoding="utf-8")
    device = Device(emulator, tmp_path, root)
    device.install(monkeypatch)
    tile = GemmTile(block_n=64, block_m=64, warps_n=2, warps_m=2, stages=3, blocks_per_sm=2)

    def run_often() -> None:
        for seed in range(4):
            case = Case("g128", 61, 96, 640, seed=seed, device="cpu")
            assert_same(device.run(case, torch.float16, tile, stream=True, num_sms=2), case.out(torch.float16))

    with pytest.raises((EmulationError, AssertionError), match=says):
        run_often()
