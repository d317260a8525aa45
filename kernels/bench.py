"""Benchmark of the GEMMs of a decoder layer: model-shaped problems, our kernels beside what a user would use instead.

Only the products are timed; inputs are quantized beforehand, for every variant. Data are random: a GPU computes zeros
with less power, and so faster. On Hopper ours are its own kernels, on operands laid out for them; a product may start
before the one before has ended, and then waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qoq.formats.packing import padded_in_features
from qoq.kernels.compiler import KernelSpec
from qoq.kernels.dispatch import choose_gemm
from qoq.kernels.footprint import linear_bytes
from qoq.kernels.gemm_tiles import HOPPER, WeightFormat, weight_block_bytes
from qoq.kernels.launch import is_hopper
from qoq.kernels.random_weights import random_act_codes, random_packed_linear
from qoq.kernels.roofline import Roofline
from qoq.kernels.tiles import tile_activations, tile_int8_weights, tile_weights
from qoq.kernels.timing import REST, Timing, Variant, copies_beyond_cache, measure
from qoq.recipes.errors import EnvironmentProblem

GEMM_VARIANTS = ("w4a8-g128", "w4a8-chn", "w8a8", "fp16", "bf16", "int8", "fp8", "fp8-row")
"""w4a8-* and w8a8 are ours; then torch's 16-bit products, torch._int_mm, and torch._scaled_mm with one scale for each
operand and with one for each row."""
_OUR_WEIGHTS: dict[str, WeightFormat] = {"w4a8-g128": "g128", "w4a8-chn": "per_channel", "w8a8": "int8"}
OURS = tuple(_OUR_WEIGHTS)
_KINDS = {
    "w4a8-g128": "8-bit",
    "w4a8-chn": "8-bit",
    "w8a8": "8-bit",
    "int8": "8-bit",
    "fp8": "8-bit",
    "fp8-row": "8-bit",
    "fp16": "fp16",
    "bf16": "bf16",
}
_INT_MM_ROWS = 17
"""torch._int_mm takes more than 16 rows only."""


@dataclass(frozen=True)
class Rates:
    """What a timing amounts to: 10^12 operations and 10^9 bytes a second, and the percentage of the roofline."""

    tops: float
    gb_s: float
    roof_percent: float

    @staticmethod
    def of(timing: Timing, *, operations: float, nbytes: float, kind: str, roofline: Roofline) -> Rates:
        floor = roofline.floor_us(nbytes=nbytes, operations=operations, kind=kind)
        return Rates(
            tops=operations / timing.median_us * 1e-6,
            gb_s=nbytes / timing.median_us * 1e-3,
            roof_percent=100 * floor / timing.median_us,
        )


@dataclass(frozen=True)
class GemmResult:
    """One product [m, k] x [n, k] of one variant."""

    gemm: str
    m: int
    n: int
    k: int
    variant: str
    timing: Timing
    rates: Rates


@dataclass
class GemmReport:
    """Results in the order they were measured; `skipped` maps "variant" or "gemm, M = m: variant" to a reason."""

    results: list[GemmResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def layer_us(self, m: int, variant: str, gemms: Iterable[str]) -> float | None:
        """Sum of medians over the products of a layer; None where one is missing."""
        medians = {r.gemm: r.timing.median_us for r in self.results if (r.m, r.variant) == (m, variant)}
        wanted = list(gemms)
        return sum(medians[gemm] for gemm in wanted) if all(gemm in medians for gemm in wanted) else None


def gemm_bytes(variant: str, m: int, n: int, k: int) -> int:
    """Bytes that must move: weight with its scales, inputs with theirs, 16-bit outputs (32-bit for `int8`)."""
    padded = padded_in_features(k)
    if variant in ("fp16", "bf16"):
        return linear_bytes("fp16", n, k) + 2 * (m * k + m * n)
    if variant in ("fp8", "fp8-row", "int8"):
        return linear_bytes("fp8", n, k) + m * padded + (4 if variant == "int8" else 2) * m * n
    return linear_bytes(_OUR_WEIGHTS[variant], n, k) + m * padded + 8 * m + 2 * m * n


def gemm_kernels(
    gemms: Mapping[str, tuple[int, int]], rows: Sequence[int], variants: Sequence[str], architecture: str
) -> list[KernelSpec]:
    """What `bench_gemms` will launch, to be compiled beforehand and in parallel."""
    kernels = HOPPER if architecture == "sm_90" else architecture
    return [
        choose_gemm(kernels, weights, m, n, padded_in_features(k)).tile.spec(kernels, weights, "float16")
        for name, weights in _OUR_WEIGHTS.items()
        if name in variants
        for n, k in gemms.values()
        for m in rows
    ]


def bench_gemms(
    gemms: Mapping[str, tuple[int, int]],
    rows: Sequence[int],
    variants: Sequence[str],
    roofline: Roofline,
    *,
    repeat: int = 20,
    rest: float = REST,
    seed: int = 0,
    on_step: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> GemmReport:
    """Time `variants` for each of `gemms` (name to N, K) and each M of `rows`, on the current CUDA device.

    Raises EnvironmentProblem when the weights of one product do not fit; errors of our own kernels come through.
    """
    import qoq.kernels.ops  # noqa: F401  (registers the operators)

    report = GemmReport()
    generator = torch.Generator("cuda").manual_seed(seed)
    total = len(gemms) * len(rows)
    for i, (gemm, (n, k)) in enumerate(gemms.items()):
        torch.cuda.empty_cache()
        problem = GemmProblem(n, k, variants, generator)
        for j, m in enumerate(rows):
            on_step(i * len(rows) + j, total, f"{gemm} {n} x {k}, M = {m}")
            measured = measure(list(problem.variants(m, report.skipped)), repeat=repeat, rest=rest)
            for name, timing in measured.timings.items():
                rates = Rates.of(
                    timing,
                    operations=2.0 * m * n * k,
                    nbytes=gemm_bytes(name, m, n, k),
                    kind=_KINDS[name],
                    roofline=roofline,
                )
                report.results.append(GemmResult(gemm, m, n, k, name, timing, rates))
            report.skipped.update({f"{gemm}, M = {m}: {name}": why for name, why in measured.skipped.items()})
        del problem
    return report


class GemmProblem:
    """Copies of one weight in every form that `wanted` variants need, and their calls for any M."""

    def __init__(self, n: int, k: int, wanted: Sequence[str], generator: torch.Generator) -> None:
        self._n, self._k, self._wanted, self._generator = n, k, wanted, generator
        self._is_hopper = is_hopper(torch.cuda.current_device())
        cache_bytes = int(torch.cuda.get_device_properties(generator.device).L2_cache_size)
        free, _ = torch.cuda.mem_get_info()
        forms = dict.fromkeys(self._form(name) for name in wanted if name in _FORMS)
        budget = int(0.6 * free) // max(1, len(forms))
        self._weights: dict[str, list[dict[str, Tensor]]] = {}
        for form in forms:
            size = gemm_bytes(_SIZED_AS[form], 0, n, k)
            copies = copies_beyond_cache(size, cache_bytes=cache_bytes, budget_bytes=budget)
            if not copies:
                raise EnvironmentProblem(
                    f"a {form} weight [{n}, {k}] ({size / 1e9:.1f} GB) does not fit the memory left on the GPU",
                    remedy="bench a smaller model, or free the GPU",
                )
            self._weights[form] = [self._make(form) for _ in range(copies)]
        torch.cuda.synchronize()  # kernels that overlap read weights ahead of what was enqueued

    def _form(self, name: str) -> str:
        """What variant `name` reads; the portable kernel reads int8 weights as `torch._int_mm` does."""
        return "int8" if name == "w8a8" and not self._is_hopper else _FORMS[name]

    def _make(self, form: str) -> dict[str, Tensor]:
        n, k, device = self._n, self._k, self._generator.device
        if form in ("g128", "chn"):
            packed = random_packed_linear(n, k, progressive=form == "g128", generator=self._generator)
            if not self._is_hopper:
                return packed
            unchanged = {name: tensor for name, tensor in packed.items() if name.startswith("s1_")}
            return {"tiles": tile_weights(packed), **unchanged}
        if form == "w8a8":
            made = self._make("int8")
            return {"tiles": tile_int8_weights(made["weight"]), "s1_scales": made["s1_scales"]}
        if form == "int8":
            weight = torch.empty(n, padded_in_features(k), dtype=torch.int8, device=device)
            scales = torch.rand(n, generator=self._generator, device=device) * 1e-4 + 1e-4
            return {"weight": weight.random_(-127, 128, generator=self._generator), "s1_scales": scales.half()}
        columns = padded_in_features(k) if form == "fp8" else k
        weight = torch.randn(n, columns, generator=self._generator, device=device, dtype=torch.float16)
        return {"weight": weight.mul_(0.02 if form != "fp8" else 1.0).to(_DTYPES[form])}

    def variants(self, m: int, skipped: dict[str, str]) -> Iterator[Variant]:
        """The calls for M tokens; those that cannot run here are told in `skipped`."""
        codes, scales, sums = random_act_codes(m, self._k, generator=self._generator)
        x = torch.randn(m, self._k, generator=self._generator, device=codes.device)
        tiles = tile_activations(codes) if self._is_hopper else codes
        operators = torch.ops.qoq
        for name in self._wanted:
            if name == "int8" and m < _INT_MM_ROWS:
                skipped["int8"] = f"torch._int_mm takes {_INT_MM_ROWS} rows or more"
                continue
            if name.startswith("fp8") and torch.cuda.get_device_capability() < (8, 9):
                skipped[name] = "this GPU has no float8"
                continue
            copies = self._weights[self._form(name)]
            call: Callable[[int], object]
            if name in OURS and self._is_hopper:
                call = _hopper_call(tiles, scales, sums, copies)
            elif name in ("w4a8-g128", "w4a8-chn"):
                call = _packed_call(operators.w4a8_gemm, codes, scales, sums, copies)
            elif name == "w8a8":
                call = _w8a8_call(operators.w8a8_gemm, codes, scales, copies)
            elif name == "int8":
                call = _int_mm_call(codes, copies)
            elif name in ("fp8", "fp8-row"):
                call = _scaled_mm_call(x, padded_in_features(self._k), copies, by_row=name == "fp8-row")
            else:
                call = _linear_call(x.to(_DTYPES[name]), copies)
            yield Variant(name, call, copies=len(copies), optional=name not in OURS)


_FORMS = {
    "w4a8-g128": "g128",
    "w4a8-chn": "chn",
    "w8a8": "w8a8",
    "int8": "int8",
    "fp8": "fp8",
    "fp8-row": "fp8",
    "fp16": "fp16",
    "bf16": "bf16",
}
_SIZED_AS = {form: name for name, form in _FORMS.items()}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

_Copies = Sequence[Mapping[str, Tensor]]


def _packed_call(
    operator: Callable[..., Tensor], codes: Tensor, scales: Tensor, sums: Tensor, copies: _Copies
) -> Callable[[int], object]:
    names = ("qweight", "s1_scales", "s2_scales", "s2_zeros", "s1_szeros", "bias")
    tensors = [[packed.get(name) for name in names] for packed in copies]
    return lambda i: operator(codes, scales, sums, *tensors[i], torch.float16)


def _hopper_call(act_tiles: Tensor, scales: Tensor, sums: Tensor, copies: _Copies) -> Callable[[int], object]:
    operators = torch.ops.qoq

    def call(i: int) -> object:
        tiles, s1_scales, s1_szeros = (copies[i].get(name) for name in ("tiles", "s1_scales", "s1_szeros"))
        if tiles is not None and tiles.shape[-1] == weight_block_bytes("int8"):
            return operators.w8a8_gemm_sm90(act_tiles, scales, tiles, s1_scales, None, torch.float16)
        return operators.w4a8_gemm_sm90(act_tiles, scales, sums, tiles, s1_scales, s1_szeros, None, torch.float16)

    return call


def _w8a8_call(
    operator: Callable[..., Tensor], codes: Tensor, scales: Tensor, copies: _Copies
) -> Callable[[int], object]:
    return lambda i: operator(codes, scales, copies[i]["weight"], copies[i]["s1_scales"], None, torch.float16)


def _int_mm_call(codes: Tensor, copies: _Copies) -> Callable[[int], object]:
    return lambda i: torch._int_mm(codes, copies[i]["weight"].t())


def _scaled_mm_call(x: Tensor, columns: int, copies: _Copies, *, by_row: bool) -> Callable[[int], object]:
    x = torch.nn.functional.pad(x, (0, columns - x.shape[1])).to(torch.float8_e4m3fn)
    shapes = ((x.shape[0], 1), (1, copies[0]["weight"].shape[0])) if by_row else ((), ())
    scale_a, scale_b = (torch.rand(shape, device=x.device) + 0.5 for shape in shapes)

    def call(i: int) -> object:
        return torch._scaled_mm(
            x,
            copies[i]["weight"].t(),
            scale_a=scale_a,
            scale_b=scale_b,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return call


def _linear_call(x: Tensor, copies: _Copies) -> Callable[[int], object]:
    return lambda i: torch.nn.functional.linear(x, copies[i]["weight"])
