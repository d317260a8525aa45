"""Measure every tile of kernels/tables/gemm.json on this GPU and write the best of each shape and M into the table.

On Hopper it is Hopper's own kernels that are measured, launched as they are used, each free to start before the one
before has ended; --portable measures those that every architecture has, without that.

    python benchmarks/tune_gemm.py --write
    python benchmarks/tune_gemm.py --write --model llama-3-70b --tokens 8,16,32

Results are not compared here: that every tile is exact is for `make test-gpu` to say. Calls rotate over more weights
than the L2 holds, in a CUDA graph; candidates are interleaved over the rounds, since heat moves the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq.kernels.compiler import compile_all
from qoq.kernels.dispatch import GEMM_TABLE, GemmChoice, gemm_table, gemm_tile
from qoq.kernels.gemm import run_gemm
from qoq.kernels.gemm_sm90 import run_gemm_sm90
from qoq.kernels.gemm_tiles import (
    HOPPER,
    OUT_FORMATS,
    DecodeTile,
    GemmTile,
    HopperTile,
    SplitTile,
    Tile,
    WeightFormat,
    weight_block_bytes,
)
from qoq.kernels.launch import architecture, is_hopper
from qoq.kernels.tiles import PAIR_CHANNELS, tile_activations
from qoq.recipes.shapes import find_shape

PORTABLE_TOKENS: dict[WeightFormat, list[int]] = {
    "g128": [1, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096],
    "per_channel": [1, 16, 32, 64, 128, 256, 1024, 4096],
    "int8": [16, 32, 64, 128, 256, 1024, 4096],
}
"""Values of M that are measured; each row serves up to its own, the last one any."""
HOPPER_TOKENS = [8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096]
WEIGHTS = list(PORTABLE_TOKENS)
ROTATED_BYTES = 256 << 20
_LARGE = 192
_MOST_TILES = 1024
"""Kernels whose blocks take one tile each are not for more."""


class Problem:
    """One shape: random weights in several copies, and activations."""

    def __init__(self, weights: WeightFormat, n: int, k: int, most_tokens: int, *, is_hopper: bool) -> None:
        generator = torch.Generator("cuda").manual_seed(n + k)
        self.weights, self.n, self.k = weights, n, k
        bytes_each = n * k if weights == "int8" else n * k // 2

        def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, device="cuda", dtype=dtype)

        self.copies = max(1, math.ceil(ROTATED_BYTES / bytes_each))
        width = k if weights == "int8" else k // 2
        self.weight = [integers(-128, 128, n, width) for _ in range(self.copies)]
        if is_hopper:  # bytes of no meaning, scales included
            shape = (n // PAIR_CHANNELS, k // 128, 2, weight_block_bytes(weights))
            self.weight = [integers(0, 256, *shape, dtype=torch.uint8) for _ in range(self.copies)]
        self.s1 = torch.rand(n, generator=generator, device="cuda").half() * 1e-3
        self.s2 = integers(1, 17, k // 128, n) if weights == "g128" else None
        self.zeros = integers(-120, 1, k // 128, n) if weights == "g128" else None
        self.szeros = self.s1 * 7 if weights == "per_channel" else None
        self.codes = integers(-127, 128, most_tokens, k)
        self.scales = torch.rand(most_tokens, generator=generator, device="cuda") * 1e-2
        self.sums = self.codes.sum(1, dtype=torch.int32)
        self.out = torch.empty(most_tokens, n, dtype=torch.float16, device="cuda")
        self._tiles: dict[int, Tensor] = {}
        torch.cuda.synchronize()

    def run(self, m: int, copy: int, choice: GemmChoice) -> None:
        if isinstance(choice.tile, HopperTile):
            if m not in self._tiles:
                self._tiles = {m: tile_activations(self.codes[:m])}
            run_gemm_sm90(
                self.weights,
                self._tiles[m],
                self.scales[:m],
                self.sums[:m],
                self.weight[copy],
                self.s1,
                self.szeros,
                None,
                torch.float16,
                choice=choice,
                out=self.out[:m],
            )
            return
        run_gemm(
            self.weights,
            self.codes[:m],
            self.scales[:m],
            self.sums[:m],
            self.weight[copy],
            self.s1,
            self.s2,
            self.zeros,
            self.szeros,
            None,
            self.n,
            torch.float16,
            choice=choice,
            out=self.out[:m],
        )


def capture(problem: Problem, m: int, choice: GemmChoice, calls: int) -> torch.cuda.CUDAGraph:
    problem.run(m, 0, choice)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            problem.run(m, i % problem.copies, choice)
    return graph


def time_graphs(graphs: dict[str, torch.cuda.CUDAGraph], calls: int, rounds: int) -> dict[str, float]:
    """Median microseconds of one call, the graphs interleaved."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            samples[name].append(start.elapsed_time(stop) * 1000 / calls)
    return {name: statistics.median(times[1:] or times) for name, times in samples.items()}


def without_spills(arch: str, formats: list[WeightFormat]) -> dict[WeightFormat, set[str]]:
    """Tiles of the kernels for `arch` that take the weights and, for every output, fit the registers."""
    tiles = {name: gemm_tile(name) for name in gemm_table()["tiles"]}
    names = {
        weights: [name for name, tile in tiles.items() if is_for(tile, arch) and takes(tile, weights)]
        for weights in formats
    }
    jobs = {
        (tiles[name].spec(arch, weights, out), arch): (weights, name)
        for weights in formats
        for name in names[weights]
        for out in OUT_FORMATS
    }
    cubins = compile_all(jobs)
    unfit = {jobs[job] for job, cubin in cubins.items() if cubin.resources.spill_bytes or cubin.resources.waits}
    return {weights: {name for name in names[weights] if (weights, name) not in unfit} for weights in formats}


def is_for(tile: Tile, arch: str) -> bool:
    return isinstance(tile, HopperTile) == (arch == HOPPER)


def takes(tile: Tile, weights: WeightFormat) -> bool:
    """Whether there is a kernel of that tile for the weights, and room for it."""
    return not isinstance(tile, DecodeTile | SplitTile) or tile.fits(HOPPER, weights)


def candidates(m: int, n: int, names: set[str]) -> dict[str, GemmChoice]:
    """Tiles for M tokens: none that is mostly empty, none that would take very many passes over the weights."""
    found = {}
    for name in sorted(names):
        tile = gemm_tile(name)
        least = 16 if isinstance(tile, GemmTile) else 8
        if tile.block_m > least and tile.block_m >= 2 * m:
            continue
        match tile:
            case DecodeTile() | SplitTile():
                tiles = math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n)
                if m > 2 * tile.block_m or (isinstance(tile, DecodeTile) and m > tile.block_m) or tiles > _MOST_TILES:
                    continue
                found[f"{name}/tiles"] = GemmChoice(tile, False, "tuning")
            case _:
                if m > 4 * tile.block_m and tile.block_m < (64 if isinstance(tile, GemmTile) else _LARGE):
                    continue
                for stream in (True, False):
                    found[f"{name}/{'stream' if stream else 'tiles'}"] = GemmChoice(tile, stream, "tuning")
    return found


def as_text(table: dict[str, Any]) -> str:
    """The table as JSON, a tile or a row on each line."""
    tiles = [f"  {json.dumps(name)}: {json.dumps(arguments)}" for name, arguments in table["tiles"].items()]
    rows = [f"  {json.dumps(row)}" for row in table["measured"]]
    return "\n".join(["{", ' "tiles": {', ",\n".join(tiles), " },", ' "measured": [', ",\n".join(rows), " ]", "}", ""])


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows instead of the old ones of their problem, but for those of M outside what was measured anew."""
    problem = itemgetter("architecture", "weights", "n", "k")

    def largest(row: dict[str, Any]) -> float:
        return math.inf if row["max_m"] is None else row["max_m"]

    ranges = {
        key: (min(limits), max(limits))
        for key, rows in groupby(sorted(new, key=problem), problem)
        if (limits := [largest(row) for row in rows])
    }

    def stays(row: dict[str, Any]) -> bool:
        least, most = ranges.get(problem(row), (math.inf, 0.0))
        return not least <= largest(row) <= most

    kept = [row for row in old if stays(row)]
    return sorted(kept + new, key=lambda row: (WEIGHTS.index(row["weights"]), problem(row), largest(row)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the best into kernels/tables/gemm.json")
    parser.add_argument("--log", type=Path, help="all measurements as JSON")
    parser.add_argument("--weights", default="g128,per_channel,int8")
    parser.add_argument("--tokens", help="only these M, for every format; rows for smaller and larger ones stay")
    parser.add_argument("--model", default="llama-3-8b", help="whose products, by the names of `qoq models`")
    parser.add_argument("--portable", action="store_true", help="on Hopper: the kernels that every architecture has")
    parser.add_argument("--seconds", type=float, default=600, help="stop measuring after this long")
    arguments = parser.parse_args()
    device = torch.cuda.current_device()
    on_hopper = is_hopper(device) and not arguments.portable
    arch = HOPPER if on_hopper else architecture(device)
    formats: list[WeightFormat] = arguments.weights.split(",")
    started = time.perf_counter()
    usable = without_spills(arch, formats)
    print(f"compiled in {time.perf_counter() - started:.1f} s; tiles without spills: {usable}", flush=True)
    started, log, rows = time.perf_counter(), [], []
    for weights in formats:
        all_tokens = HOPPER_TOKENS if on_hopper else PORTABLE_TOKENS[weights]
        tokens = [int(m) for m in arguments.tokens.split(",")] if arguments.tokens else all_tokens
        for shape, (n, k) in find_shape(arguments.model).layer_gemms().items():
            problem = Problem(weights, n, k, max(tokens), is_hopper=on_hopper)
            for m in tokens:
                if time.perf_counter() - started > arguments.seconds:
                    sys.exit("out of time")
                calls = max(4, min(40, int(40 * 256 / max(m, 256))))
                choices = candidates(m, n, usable[weights])
                graphs = {name: capture(problem, m, choice, calls) for name, choice in choices.items()}
                times = time_graphs(graphs, calls, 4)
                best = sorted(times, key=times.__getitem__)
                log.append({"weights": weights, "shape": shape, "n": n, "k": k, "m": m, "us": times})
                tops = 2 * m * n * k / times[best[0]] * 1e-6
                bandwidth = problem.weight[0].numel() / times[best[0]] * 1e-3
                shown = "  ".join(f"{name} {times[name]:.1f}" for name in best[:4])
                print(f"{weights} {shape} M={m}: {tops:.0f} TOPS {bandwidth:.0f} GB/s  {shown}", flush=True)
                tile, schedule = best[0].split("/")
                rows.append(
                    {
                        "architecture": arch,
                        "weights": weights,
                        "n": n,
                        "k": k,
                        "max_m": m if m != max(all_tokens) else None,
                        "tile": tile,
                        "stream": schedule == "stream",
                    }
                )
            del problem
        total = {m: sum(min(e["us"].values()) for e in log if e["m"] == m and e["weights"] == weights) for m in tokens}
        print(weights, "layer:", {m: round(us, 1) for m, us in total.items()}, flush=True)
    if arguments.log:
        arguments.log.write_text(json.dumps(log, indent=1))
    if arguments.write:
        table = gemm_table()
        GEMM_TABLE.write_text(as_text({**table, "measured": merged(table["measured"], rows)}))


if __name__ == "__main__":
    main()
