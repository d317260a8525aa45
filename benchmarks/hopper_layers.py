"""The four products of a decoder layer on Hopper, launched so that they overlap and one after the other.

    python benchmarks/hopper_layers.py --out benchmarks/hopper-layers-h100.json

Each call waits for the one before it: with programmatic dependent launch a kernel begins to read its weights meanwhile.
Beside the products one by one, over copies of their weights, stands the whole layer in the order of the model. Random
weights beyond the L2 cache, trains in CUDA graphs in turns (`qoq.kernels.timing`): microseconds, medians with 10th and
90th percentile. repack_us is the time in which weights are put in the order of the kernels, once, at load.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qoq.formats.packing import padded_in_features
from qoq.kernels.compiler import compile_all
from qoq.kernels.dispatch import choose_gemm
from qoq.kernels.gemm_sm90 import run_gemm_sm90
from qoq.kernels.gemm_tiles import HOPPER, WeightFormat
from qoq.kernels.gpu_facts import read_facts
from qoq.kernels.launch import is_hopper
from qoq.kernels.random_weights import random_act_codes, random_packed_linear
from qoq.kernels.tiles import tile_activations, tile_weights
from qoq.kernels.timing import Variant, copies_beyond_cache, measure
from qoq.recipes.shapes import find_shape

FORMATS: tuple[WeightFormat, ...] = ("g128", "per_channel")


class Product:
    """Copies of one random weight as the kernels read it, and its activations."""

    def __init__(self, weights: WeightFormat, n: int, k: int, generator: torch.Generator) -> None:
        self.weights, self.n, self.k, self._generator = weights, n, k, generator
        cache_bytes = int(torch.cuda.get_device_properties(generator.device).L2_cache_size)
        copies = copies_beyond_cache(n * k // 2, cache_bytes=cache_bytes, budget_bytes=8 << 30)
        self.copies: list[dict[str, Tensor]] = []
        self.repack_us = 0.0
        for _ in range(copies):
            packed = random_packed_linear(n, k, progressive=weights == "g128", generator=generator)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            tiles = tile_weights(packed)
            stop.record()
            stop.synchronize()
            self.repack_us = 1000 * start.elapsed_time(stop)
            self.copies.append({"tiles": tiles, **{name: packed[name] for name in packed if name.startswith("s1_")}})

    def prepare(self, m: int) -> None:
        codes, scales, sums = random_act_codes(m, self.k, generator=self._generator)
        self._act = tile_activations(codes), scales, sums
        self._out = torch.empty(m, self.n, dtype=torch.float16, device=codes.device)

    def run(self, i: int, *, overlapping: bool) -> None:
        copy = self.copies[i % len(self.copies)]
        run_gemm_sm90(
            self.weights,
            *self._act,
            copy["tiles"],
            copy["s1_scales"],
            copy.get("s1_szeros"),
            None,
            torch.float16,
            out=self._out,
            overlapping=overlapping,
        )


def layer(products: Mapping[str, Product], i: int, *, overlapping: bool) -> None:
    for product in products.values():
        product.run(i, overlapping=overlapping)


def bench(model: str, weights: WeightFormat, tokens: Sequence[int], repeat: int) -> dict[str, object]:
    """All measurements of one model's layer."""
    gemms = find_shape(model).layer_gemms()
    generator = torch.Generator("cuda").manual_seed(0)
    products = {name: Product(weights, n, padded_in_features(k), generator) for name, (n, k) in gemms.items()}
    compile_all(
        (choose_gemm(HOPPER, weights, m, product.n, product.k).tile.spec(HOPPER, weights, "float16"), HOPPER)
        for product in products.values()
        for m in tokens
    )
    times = []
    for m in tokens:
        for product in products.values():
            product.prepare(m)
        torch.cuda.synchronize()
        calls: dict[str, tuple[Callable[..., None], int]] = {
            name: (product.run, len(product.copies)) for name, product in products.items()
        }
        calls["layer in order"] = (partial(layer, products), max(len(product.copies) for product in products.values()))
        variants = [
            Variant(f"{name}/{how}", partial(call, overlapping=overlapping), copies=copies)
            for name, (call, copies) in calls.items()
            for how, overlapping in (("overlapping", True), ("alone", False))
        ]
        for name, timing in measure(variants, repeat=repeat).timings.items():
            what, how = name.split("/")
            times.append({"m": m, "what": what, "launched": how, **asdict(timing)})
        total = {how: sum(t["median_us"] for t in times if t["m"] == m and t["launched"] == how and t["what"] in gemms)
                 for how in ("overlapping", "alone")}  # fmt: skip
        ordered = {t["launched"]: t["median_us"] for t in times if t["m"] == m and t["what"] == "layer in order"}
        print(f"{model} {weights} M={m}: sum {total['overlapping']:.1f} (alone {total['alone']:.1f}), "
              f"in order {ordered['overlapping']:.1f} (alone {ordered['alone']:.1f})", flush=True)  # fmt: skip
    repack = {name: product.repack_us for name, product in products.items()}
    return {"model": model, "weights": weights, "gemms": gemms, "repack_us": repack, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-3-8b,llama-3-70b,qwen3-8b")
    parser.add_argument("--weights", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="1,8,16,32,64,128,256")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--out", type=Path, help="all measurements as JSON")
    arguments = parser.parse_args()
    if not is_hopper(torch.cuda.current_device()):
        parser.error("this GPU is no Hopper")
    tokens = [int(m) for m in arguments.tokens.split(",")]
    results = []
    for model in arguments.models.split(","):
        for weights in arguments.weights.split(","):
            results.append(bench(model, weights, tokens, arguments.repeat))
            if arguments.out:
                facts = asdict(read_facts(torch.cuda.current_device()))
                arguments.out.write_text(json.dumps({"gpu": facts, "layers": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
