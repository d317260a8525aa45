"""Which kernel runs an operation: rows of data, each with its reason. Nothing is launched here.

`tables/gemm.json` holds the GEMM's tiles by name and rows that say which tile serves which M, measured for weights of a
format and a shape [N, K] on an architecture (`make tune`). `choose_gemm` takes the rows of the nearest shape; an
architecture that was never measured takes those of sm_90, with the stages that its shared memory holds. Hopper has rows
of its own under "sm_90a", for operands laid out for it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qoq.kernels.compiler import KernelSpec
from qoq.kernels.gemm_tiles import (
    HOPPER,
    OUT_FORMATS,
    WEIGHT_FORMATS,
    DecodeTile,
    GemmTile,
    Sm90Tile,
    SplitTile,
    Tile,
    WeightFormat,
)
from qoq.recipes.schema import GROUP_SIZE

_MEASURED_FIRST = "sm_90"
GEMM_TABLE = Path(__file__).resolve().parent / "tables" / "gemm.json"


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

    tile: Tile
    stream: bool
    reason: str

    def share(self, architecture: str, weights: WeightFormat, m: int, n: int, k: int, num_sms: int) -> Share:
        """How the work on out [M, N] is shared between blocks: no more than run at once, none without work."""
        if not isinstance(self.tile, GemmTile | Sm90Tile):
            raise TypeError(f"{self.tile}: a block of its kernel has one tile")
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
    """GEMM_TABLE: "tiles", arguments of a `Tile` by name, which say of which kind it is, and "measured", the rows."""
    table: dict[str, Any] = json.loads(GEMM_TABLE.read_text(encoding="utf-8"))
    return table


def gemm_tile(name: str) -> Tile:
    """The tile that rows of the table call `name`."""
    arguments = gemm_table()["tiles"][name]
    kinds: dict[str, type[Tile]] = {"units": DecodeTile, "splits": SplitTile, "warpgroups": Sm90Tile}
    kind = next((kind for argument, kind in kinds.items() if argument in arguments), GemmTile)
    return kind(**arguments)


def gemm_specs(architecture: str) -> list[tuple[KernelSpec, str]]:
    """Every GEMM that `choose_gemm` can ask for on `architecture`, with what it is for; on sm_90 Hopper's own too."""
    found: dict[KernelSpec, str] = {}
    for kernels in (architecture, HOPPER) if architecture == "sm_90" else (architecture,):
        for weights in WEIGHT_FORMATS:
            for name in sorted({row["tile"] for row in _rows(kernels, weights)[1]}):
                for out in OUT_FORMATS:
                    found[gemm_tile(name).spec(kernels, weights, out)] = f"GEMM {weights} to {out}, tile {name}"
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
