"""Which kernel runs an operation: rows of data, each with its reason. Nothing is launched here.

`tables/gemm.json` holds the GEMM's tiles by name and rows that say which tile serves which M, measured for weights of a
format and a shape [N, K] on an architecture (`make tune`). `choose_gemm` takes the rows of the nearest shape; an
architecture that was never measured takes those of sm_90, with the stages that its shared memory holds.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from qoq.kernels.compiler import KernelSpec
from qoq.recipes.schema import GROUP_SIZE

WeightFormat = Literal["g128", "per_channel", "int8"]
OutFormat = Literal["float16", "bfloat16", "int32"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("g128", "per_channel", "int8")
OUT_FORMATS: tuple[OutFormat, ...] = ("float16", "bfloat16", "int32")

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100a", "sm_120a")
"""What the portable kernels are compiled for in continuous integration."""

_SHARED_KIB = {"sm_80": 164, "sm_87": 164, "sm_90": 228, "sm_100a": 228, "sm_103a": 228}
_OTHER_SHARED_KIB = 100
_RESERVED_KIB = 1
"""Of the shared memory of an SM (CUDA programming guide, "Technical Specifications"), each block loses this much."""

WORKSPACE_SUMS_PER_SM = 36864
"""Sums (int32) of shared tiles that the workspace of the GEMMs holds for each SM: blocks_per_sm * block_n * block_m."""

_FEW_STAGES = 3
_STAGE_ALIGNMENT = 128
_STATIC_SHARED_BYTES = 128
_MEASURED_FIRST = "sm_90"
GEMM_TABLE = Path(__file__).resolve().parent / "tables" / "gemm.json"


def shared_bytes_of_sm(architecture: str) -> int:
    """Shared memory of one SM, in bytes."""
    return _SHARED_KIB.get(architecture, _OTHER_SHARED_KIB) * 1024


@dataclass(frozen=True)
class GemmTile:
    """Template arguments of one instantiation of sm80/gemm.cu; see there."""

    block_n: int
    block_m: int
    warps_n: int
    warps_m: int
    stages: int
    blocks_per_sm: int
    groups: int = 1
    warps_k: int = 1

    def __post_init__(self) -> None:
        if self.blocks_per_sm * self.block_n * self.block_m > WORKSPACE_SUMS_PER_SM:
            raise ValueError(f"{self}: the workspace has {WORKSPACE_SUMS_PER_SM} sums for each SM")

    def stage_bytes(self, weights: WeightFormat) -> int:
        """Of `groups` times 128 inputs: weights, activations and, for g128, a scale and a zero byte a channel."""
        per_channel = {"g128": 66, "per_channel": 64, "int8": 128}[weights]
        size = (self.block_n * per_channel + self.block_m * GROUP_SIZE) * self.groups
        return -(-size // _STAGE_ALIGNMENT) * _STAGE_ALIGNMENT

    @property
    def partial_bytes(self) -> int:
        """Of the sums that warps add where they share K."""
        return 4 * self.block_n * self.block_m if self.warps_k > 1 else 0

    def resident(self, architecture: str, weights: WeightFormat) -> tuple[int, int]:
        """Blocks an SM holds, and stages each then has: fewer than asked for where shared memory is short."""
        wanted = min(self.stages, _FEW_STAGES)
        for blocks, least in [*((b, wanted) for b in range(self.blocks_per_sm, 0, -1)), (1, 2)]:
            room = shared_bytes_of_sm(architecture) // blocks - _RESERVED_KIB * 1024 - _STATIC_SHARED_BYTES
            stages = min(self.stages, (room - self.partial_bytes) // self.stage_bytes(weights))
            if stages >= least:
                return blocks, stages
        raise ValueError(f"{self} does not fit the shared memory of {architecture}")

    def spec(self, architecture: str, weights: WeightFormat, out: OutFormat) -> KernelSpec:
        """The instantiation for `architecture`."""
        return _gemm_spec(self, architecture, weights, out)


@cache
def _gemm_spec(tile: GemmTile, architecture: str, weights: WeightFormat, out: OutFormat) -> KernelSpec:
    blocks, stages = tile.resident(architecture, weights)
    defines = {
        "WEIGHT_FORMAT": WEIGHT_FORMATS.index(weights),
        "OUT_FORMAT": OUT_FORMATS.index(out),
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "WARPS_N": tile.warps_n,
        "WARPS_M": tile.warps_m,
        "STAGES": stages,
        "BLOCKS_PER_SM": blocks,
        "GROUPS": tile.groups,
        "WARPS_K": tile.warps_k,
    }
    threads = 32 * tile.warps_n * tile.warps_m * tile.warps_k
    shared = stages * tile.stage_bytes(weights) + tile.partial_bytes
    return KernelSpec("sm80/gemm.cu", "qoq_gemm_sm80", tuple(defines.items()), threads, shared)


@dataclass(frozen=True)
class Share:
    """Blocks of a launch. They take the first `whole` tiles in turns; of the steps of the others each has units_each,
    and the first `longer` blocks one more."""

    blocks: int
    whole: int
    units_each: int
    longer: int


@dataclass(frozen=True)
class GemmChoice:
    """A tile, how tiles are shared out ("stream": those that do not fill a round of all blocks are cut, and every block
    gets the same number of their steps), and why."""

    tile: GemmTile
    stream: bool
    reason: str

    def share(self, architecture: str, weights: WeightFormat, m: int, n: int, k: int, num_sms: int) -> Share:
        """How the work on out [M, N] is shared between blocks: no more than run at once, none without work."""
        tiles = math.ceil(n / self.tile.block_n) * math.ceil(m / self.tile.block_m)
        blocks, _ = self.tile.resident(architecture, weights)
        if not self.stream:
            return Share(min(num_sms * blocks, tiles), tiles, 0, 0)
        steps = math.ceil(k / (GROUP_SIZE * self.tile.groups))
        grid = min(num_sms * blocks, tiles * steps)
        whole = tiles // grid * grid
        return Share(grid, whole, *divmod((tiles - whole) * steps, grid))


def choose_gemm(architecture: str, weights: WeightFormat, m: int, n: int, k: int) -> GemmChoice:
    """The kernel for out [M, N] with K inputs (padded) on `architecture`."""
    return next(choice for limit, choice in _choices(architecture, weights, n, k) if m <= limit)


def covering_tokens(architecture: str, weights: WeightFormat, n: int, k: int) -> tuple[int, ...]:
    """Values of M that together make `choose_gemm` give every kernel it can for weights [N, K]: the least for each."""
    limits = [limit for limit, _ in _choices(architecture, weights, n, k)]
    return (1, *(int(limit) + 1 for limit in limits[:-1]))


@cache
def _choices(architecture: str, weights: WeightFormat, n: int, k: int) -> list[tuple[float, GemmChoice]]:
    """The largest M of each row of the nearest measured shape, in order, and what runs up to it."""
    source, measured = _rows(architecture, weights)
    shapes = sorted({(row["n"], row["k"]) for row in measured})
    nearest = min(shapes, key=lambda shape: _distance(shape, (n, k)))
    where = f"measured on {source} for [{nearest[0]}, {nearest[1]}]"
    choices = []
    for row in measured:
        if (row["n"], row["k"]) == nearest:
            reason = f"{where}, M <= {row['max_m'] or 'any'}: {row['tile']}"
            choices.append((row["max_m"] or math.inf, GemmChoice(gemm_tile(row["tile"]), row["stream"], reason)))
    return sorted(choices, key=lambda choice: choice[0])


@cache
def gemm_table() -> dict[str, Any]:
    """GEMM_TABLE: "tiles", arguments of `GemmTile` by name, and "measured", the rows."""
    table: dict[str, Any] = json.loads(GEMM_TABLE.read_text(encoding="utf-8"))
    return table


def gemm_tile(name: str) -> GemmTile:
    """The tile that rows of the table call `name`."""
    return GemmTile(**gemm_table()["tiles"][name])


def gemm_specs(architecture: str) -> list[tuple[KernelSpec, str]]:
    """Every GEMM that `choose_gemm` can ask for on `architecture`, with what it is for."""
    found: dict[KernelSpec, str] = {}
    for weights in WEIGHT_FORMATS:
        for name in sorted({row["tile"] for row in _rows(architecture, weights)[1]}):
            for out in OUT_FORMATS:
                found[gemm_tile(name).spec(architecture, weights, out)] = f"GEMM {weights} to {out}, tile {name}"
    return list(found.items())


def all_specs(architecture: str) -> list[tuple[KernelSpec, str]]:
    """Every kernel that can be asked for on `architecture`, with what it is for."""
    from qoq.kernels import act_quant, attention, kv_cache

    others = [(spec, spec.source) for module in (act_quant, kv_cache, attention) for spec in module.specs(architecture)]
    return list(dict([*gemm_specs(architecture), *others]).items())


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Shapes are alike when their sizes are, and how the size is split between N and K counts half as much."""
    size = abs(math.log(a[0] * a[1]) - math.log(b[0] * b[1]))
    aspect = abs(math.log(a[0] / a[1]) - math.log(b[0] / b[1]))
    return size + aspect / 2


def _rows(architecture: str, weights: WeightFormat) -> tuple[str, list[dict[str, Any]]]:
    """The rows for `architecture`, and the architecture that they were measured on."""
    rows = [row for row in gemm_table()["measured"] if row["weights"] == weights]
    source = architecture if any(row["architecture"] == architecture for row in rows) else _MEASURED_FIRST
    return source, [row for row in rows if row["architecture"] == source]
