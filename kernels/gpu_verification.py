"""Proof, on the GPU, that the kernels compute what a checkpoint means.

Expected values come from other code than the kernels': weights decoded by `oracles`, products summed in float64 by
cuBLAS, which is exact below 2**53. Integers are compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qoq.formats.arithmetic import quantize_activation
from qoq.formats.packing import padded_in_features
from qoq.kernels.dispatch import covering_tokens
from qoq.kernels.gemm_tiles import HOPPER, WeightFormat
from qoq.kernels.kv_verification import CacheCheck, check_cache_kernels, describe_differences
from qoq.kernels.launch import architecture, is_hopper
from qoq.kernels.modules import IN_FEATURES_STEP
from qoq.kernels.tiles import tile_activations, tile_weights
from qoq.recipes.schema import KeyRotation

ROWS = (1, 3, 17, 130, 300)
"""Values of M for every linear: no kernel may rely on whole tiles. The first linear of each shape also goes through
every kernel that dispatch has for it."""
_STRIPE = 2048
"""Output channels whose weights are float64 at a time."""
_OUT_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class KernelCheck:
    """How many outputs were compared, and what was wrong; `problems` is empty when all is well."""

    compared: int
    problems: tuple[str, ...]


class KernelProof:
    """Checks of one checkpoint's kernels on one GPU, and what they came to."""

    def __init__(self, device: str) -> None:
        import qoq.kernels.ops  # noqa: F401  (registers the operators)

        self._device = torch.device(device)
        self._seen: set[int] = set()
        self._shapes: set[tuple[int, int, bool]] = set()
        self._rows = set(ROWS)
        self._linears = self._compared = 0
        self._caches: list[CacheCheck] = []

    def check_linear(
        self, name: str, packed: Mapping[str, Tensor], emulated: Tensor, *, in_features: int
    ) -> tuple[str, ...]:
        """Problems of one linear (see `check_linear_kernels`), and of the quantizer for a new number of inputs."""
        rows = self._rows_for(packed)
        self._rows |= set(rows)
        checks = [check_linear_kernels(name, packed, emulated, in_features=in_features, device=self._device, rows=rows)]
        if in_features not in self._seen and in_features % IN_FEATURES_STEP == 0:
            self._seen.add(in_features)
            checks += [check_quantizer(in_features, dtype, device=self._device) for dtype in _OUT_DTYPES]
        self._linears += 1
        self._compared += sum(check.compared for check in checks)
        return tuple(problem for check in checks for problem in check.problems)

    def _rows_for(self, packed: Mapping[str, Tensor]) -> tuple[int, ...]:
        n, half_k = packed["qweight"].shape
        shape = (n, 2 * half_k, "s2_scales" in packed)
        if shape in self._shapes or self._device.type != "cuda":
            return ROWS
        self._shapes.add(shape)
        weights: WeightFormat = "g128" if shape[2] else "per_channel"
        given: int | None = self._device.index
        found = architecture(torch.cuda.current_device() if given is None else given)
        covering = covering_tokens(found, weights, n, 2 * half_k)
        if found == "sm_90":
            covering += covering_tokens(HOPPER, weights, n, 2 * half_k)
        return tuple(sorted({*ROWS, *covering}))

    def check_cache(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bits: int,
        *,
        key_rotation: KeyRotation,
        window: int | None,
    ) -> tuple[str, ...]:
        """Problems of the KV cache and of decode attention (see `kv_verification.check_cache_kernels`)."""
        checks = [
            check_cache_kernels(
                num_heads,
                num_kv_heads,
                head_dim,
                bits,
                dtype,
                key_rotation=key_rotation,
                window=window,
                device=self._device,
            )
            for dtype in _OUT_DTYPES
        ]
        self._caches += checks
        return tuple(problem for check in checks for problem in check.problems)

    def summary(self) -> dict[str, Any]:
        """What was compared, for a report."""
        return {
            "device": torch.cuda.get_device_name(self._device),
            "rows": sorted(self._rows),
            "linears": self._linears,
            "compared": self._compared,
            "caches": [
                {
                    "bits": check.bits,
                    "key_rotation": check.key_rotation,
                    "dtype": check.dtype,
                    "relative_error": check.relative_error,
                    "tolerance": check.tolerance,
                }
                for check in self._caches
            ],
        }


def check_linear_kernels(
    name: str,
    packed: Mapping[str, Tensor],
    emulated: Tensor,
    *,
    in_features: int,
    device: torch.device,
    rows: Sequence[int] | None = None,
    seed: int = 0,
) -> KernelCheck:
    """Run one packed linear through its GEMM kernels, on Hopper those of both kinds, for every M of `rows` (ROWS if
    None).

    packed    tensors as on disk, already found legal;  emulated: `verification.emulate_weight` of them

    The int32 sums must equal the oracle's bit for bit, and the 16-bit output must be the float64 value rounded once
    (twice with a bias, which is added after the rounding), apart from the last bits of the float32 products before it.
    """
    rows = rows or ROWS
    on_gpu = {part: tensor.to(device) for part, tensor in packed.items()}
    codes, sums = extreme_act_codes(max(rows), in_features, device=device, seed=seed)
    exact = _exact_product(codes, emulated.to(device))
    scales, unbiased = _scaled_output(exact, sums, on_gpu, seed=seed)
    bias = on_gpu.get("bias")
    compared, problems = 0, list[str]()
    products = [_portable_product(on_gpu)]
    if device.type == "cuda" and is_hopper(on_gpu["qweight"].device.index):
        products.append(_hopper_product(on_gpu))
    for product in products:
        for m in rows:
            acts = (codes[:m], scales[:m], sums[:m])
            _poison(exact[:m].numel() * 4, device)
            got, expected = product(*acts, torch.int32), exact[:m].to(torch.int32)
            problems += describe_differences(f"{name}: int32, M = {m}: sum", got, expected, got == expected)
            compared += got.numel()
            for dtype in _OUT_DTYPES:
                _poison(exact[:m].numel() * 2, device)
                got = product(*acts, dtype)
                slack = _float32_error(exact[:m], scales[:m], sums[:m], on_gpu)
                problems += _compare_output(f"{name}: {dtype}, M = {m}", got, unbiased[:m], bias, slack)
                compared += got.numel()
    return KernelCheck(compared, tuple(problems))


_Product = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
"""Sums (int32) or outputs of act_codes [M, K], act_scales and act_sums."""


def _portable_product(packed: Mapping[str, Tensor]) -> _Product:
    s2 = (packed.get("s2_scales"), packed.get("s2_zeros"))

    def product(codes: Tensor, scales: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.int32:
            result: Tensor = torch.ops.qoq.w4a8_gemm_int32(codes, sums, packed["qweight"], *s2)
        else:
            rest = (packed["s1_scales"], *s2, packed.get("s1_szeros"), packed.get("bias"), dtype)
            result = torch.ops.qoq.w4a8_gemm(codes, scales, sums, packed["qweight"], *rest)
        return result

    return product


def _hopper_product(packed: Mapping[str, Tensor]) -> _Product:
    tiles = tile_weights(packed)
    torch.cuda.synchronize(tiles.device)  # the kernels read weights ahead of what was enqueued
    rest = (tiles, packed["s1_scales"], packed.get("s1_szeros"), packed.get("bias"))

    def product(codes: Tensor, scales: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
        result: Tensor = torch.ops.qoq.w4a8_gemm_sm90(tile_activations(codes), scales, sums, *rest, dtype)
        return result

    return product


def check_quantizer(in_features: int, dtype: torch.dtype, *, device: torch.device, seed: int = 0) -> KernelCheck:
    """The activation quantizer against `formats.arithmetic`, bit for bit, on tokens of very different sizes."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = 67
    x = torch.randn(rows, in_features, generator=generator, device=device)
    x *= torch.logspace(-6, 3, rows, device=device).unsqueeze(1)
    x[0] = 0
    x[1] = x[1, 0]
    x[2, 1:] = 0
    x = x.to(dtype)
    expected = quantize_activation(x.cpu())  # on CUDA, PyTorch divides by 127 through its rounded reciprocal
    padding = (0, padded_in_features(in_features) - in_features)
    wanted = {
        "codes": torch.nn.functional.pad(expected.codes, padding).to(device),
        "scales": expected.scales.to(device),
        "sums": expected.sums.to(device),
    }
    problems = []
    for what, got in zip(wanted, torch.ops.qoq.quantize_activation(x), strict=True):
        problems += describe_differences(
            f"activation quantizer, {dtype}, K = {in_features}: {what}", got, wanted[what], got == wanted[what]
        )
    return KernelCheck(sum(tensor.numel() for tensor in wanted.values()), tuple(problems))


def extreme_act_codes(rows: int, in_features: int, *, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Activations int8 [rows, K_pad] (padding zero) and their sums: random ones, among them the ends of the range."""
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.zeros(rows, padded_in_features(in_features), dtype=torch.int8, device=device)
    inner = codes[:, :in_features]
    inner.random_(-127, 128, generator=generator)
    inner[1] = 127
    inner[2] = 0
    inner[3] = -127
    inner[4, ::2], inner[4, 1::2] = 127, -127
    inner[5] = 0
    inner[5, -1] = -127
    inner[6] = inner[6].sign() * 127
    return codes, codes.sum(dim=1, dtype=torch.int32)


def _poison(nbytes: int, device: torch.device) -> None:
    """Fill the block that the allocator will hand out next for `nbytes`: what is left unwritten must not look right."""
    torch.full((nbytes,), 0x7F, dtype=torch.uint8, device=device)


def _exact_product(codes: Tensor, weight: Tensor) -> Tensor:
    """float64 [M, N], every value an exact integer."""
    rows = codes.double()
    stripes = [rows @ weight[i : i + _STRIPE].double().t() for i in range(0, weight.shape[0], _STRIPE)]
    return torch.cat(stripes, dim=1)


def _scaled_output(exact: Tensor, sums: Tensor, packed: Mapping[str, Tensor], *, seed: int) -> tuple[Tensor, Tensor]:
    """Activation scales float32 [M] that give outputs of sizes from 0.001 to 1000, and the outputs float64 [M, N]."""
    y = exact * packed["s1_scales"].double()
    if "s1_szeros" in packed:
        y -= sums.double().unsqueeze(1) * packed["s1_szeros"].double()
    largest = y.abs().amax(dim=1)
    generator = torch.Generator(exact.device).manual_seed(seed)
    drawn = torch.rand(len(y), generator=generator, device=y.device, dtype=torch.float64)
    sizes = 10 ** (6 * drawn - 3)
    scales = torch.where(largest > 0, sizes / largest, torch.ones_like(sizes)).float()
    return scales, y * scales.double().unsqueeze(1)


def _float32_error(exact: Tensor, scales: Tensor, sums: Tensor, packed: Mapping[str, Tensor]) -> Tensor:
    """Bound of the rounding before the store: four float32 roundings of each of at most two terms."""
    size = exact.abs() * packed["s1_scales"].double()
    if "s1_szeros" in packed:
        size += sums.double().abs().unsqueeze(1) * packed["s1_szeros"].double().abs()
    return size * scales.double().unsqueeze(1) * 2.0**-22


def _compare_output(what: str, got: Tensor, unbiased: Tensor, bias: Tensor | None, slack: Tensor) -> list[str]:
    expected, size = unbiased, unbiased.abs()
    if bias is not None:
        expected = unbiased + bias.double()
        size = size + bias.double().abs() + expected.abs()  # the product, the bias and their sum are rounded
    info = torch.finfo(got.dtype)
    # Half a step of a normal number is at most eps / 2 of it; of a subnormal one, half the smallest number.
    bound = (size + slack) * (info.eps / 2) * (1 + 2.0**-10) + slack + info.smallest_normal * info.eps
    close = (got.double() - expected).abs() <= bound
    return describe_differences(f"{what}: output", got, expected, close)
