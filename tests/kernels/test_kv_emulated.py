"""The kernels that write the KV cache as they are, run on the CPU: RoPE, rotation, codes, and where bytes go.

`emulation/` says what is emulated and checked; the tests on a GPU have the same operands and expected values.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qoq.kernels import kv_cache
from qoq.kernels.compiler import KernelSpec
from qoq.kernels.kv_oracles import append_oracle, rotate_oracle, round_trip_oracle
from qoq.kernels.sources import CUDA_ROOT
from tests.kernels.emulation.emulator import EmulatedKernel, EmulationError, Emulator, missing_compiler
from tests.kernels.kv_cases import DTYPES, SHAPES, Case, assert_all_same, assert_same, assert_same_pages, random_heads

SIZES = ((1, 1, 1), (5, 3, 1), (9, 9, 3), (3, 24, 4))
"""Tokens, heads, KV heads: warps with heads of every kind, and with fewer than they have room for; and several warps a
token."""


class Device:
    """What the launchers find in place of a GPU."""

    def __init__(self, emulator: Emulator, folder: Path, root: Path = CUDA_ROOT) -> None:
        self._emulator, self._folder, self._root = emulator, folder, root
        self._kernels: dict[KernelSpec, EmulatedKernel] = {}

    def load(self, spec: KernelSpec, _device: int | None) -> EmulatedKernel:
        if spec not in self._kernels:
            (self._kernels[spec],) = self._emulator.compile([spec], self._folder, self._root)
        return self._kernels[spec]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv_cache, "load_kernel", self.load)
        monkeypatch.setattr(kv_cache, "may_overlap", lambda _: True)
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())


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


def rope_append(case: Case) -> tuple[Tensor, ...]:
    """As `Case.rope_append`; the emulated device takes whole tensors only, so parts are made contiguous."""
    parts = [part.contiguous() for part in case.parts(case.qkv)]
    pages, outputs = case.pages.clone(), tuple(torch.full_like(part, 7) for part in parts)
    kv_cache.run_rope_append(
        *parts, case.cos, case.sin, case.positions, pages, case.slots, case.bits, outputs, case.key_rotation
    )
    return (*outputs, pages)


@pytest.mark.parametrize("key_rotation", ["none", "hadamard"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
@pytest.mark.parametrize("many_tokens", [1, 256])
@pytest.mark.usefixtures("device")
def test_rope_append_is_exact(
    monkeypatch: pytest.MonkeyPatch, many_tokens: int, head_dim: int, bits: int, dtype: torch.dtype, key_rotation: str
) -> None:
    monkeypatch.setattr(kv_cache, "MANY_TOKENS", many_tokens)
    for tokens, heads, kv_heads in SIZES:
        case = Case(tokens, heads, kv_heads, head_dim, bits, dtype, key_rotation)
        assert_all_same(case, rope_append(case))


@pytest.mark.parametrize("key_rotation", ["none", "hadamard"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
@pytest.mark.parametrize("many_tokens", [1, 256])
@pytest.mark.usefixtures("device")
def test_append_is_exact(
    monkeypatch: pytest.MonkeyPatch, many_tokens: int, head_dim: int, bits: int, dtype: torch.dtype, key_rotation: str
) -> None:
    monkeypatch.setattr(kv_cache, "MANY_TOKENS", many_tokens)
    for tokens, _, kv_heads in SIZES:
        case = Case(tokens, 0, kv_heads, head_dim, bits, dtype, key_rotation)
        _, key, value = (part.contiguous() for part in case.parts(case.qkv))
        pages = case.pages.clone()
        kv_cache.run_append(key, value, pages, case.slots, bits, key_rotation)
        expected = append_oracle(case.pages, case.turned(key), value, case.slots, bits)
        assert_same_pages(pages, expected, head_dim, bits)


@pytest.mark.parametrize("many_tokens", [1, 256])
@pytest.mark.usefixtures("device")
def test_keys_and_values_that_nobody_wants_are_not_handed_back(
    monkeypatch: pytest.MonkeyPatch, many_tokens: int
) -> None:
    monkeypatch.setattr(kv_cache, "MANY_TOKENS", many_tokens)
    case = Case(5, 6, 2, 128, 4, torch.float16)
    expected, *_, expected_pages = rope_append(case)
    parts = [part.contiguous() for part in case.parts(case.qkv)]
    pages, query = case.pages.clone(), torch.zeros_like(parts[0])
    kv_cache.run_rope_append(
        *parts, case.cos, case.sin, case.positions, pages, case.slots, case.bits, (query, None, None), settled=True
    )
    assert_same("query", query, expected)
    assert_same_pages(pages, expected_pages, 128, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), [(64, 4), (128, 8), (256, 4)])
@pytest.mark.usefixtures("device")
def test_round_trip_and_rotation_are_exact(head_dim: int, bits: int, dtype: torch.dtype) -> None:
    x = random_heads((23, head_dim), dtype, torch.Generator().manual_seed(head_dim))
    x[7, 3], x[8, 5] = torch.nan, torch.inf
    turned, out = rotate_oracle(x), torch.full_like(x, 7)
    kv_cache.run_rotate(x, out)
    assert_same("rotated", out, turned)
    for key_rotation, wanted in (("none", x), ("hadamard", turned)):
        kv_cache.run_round_trip(x, bits, out, key_rotation)
        assert_same(key_rotation, out, round_trip_oracle(wanted, bits))


@pytest.mark.usefixtures("device")
def test_a_slot_beyond_the_pages_stops_the_kernel() -> None:
    case = Case(3, 1, 1, 64, 4, torch.float16, "hadamard")
    case.slots[1] = case.num_pages * 64
    with pytest.raises(EmulationError, match="stops"):
        rope_append(case)


MISTAKES = {
    "values rotated too": ("sm80/kv_append.cu", "if (turns) v = rotated;", "v = rotated;"),
    "queries not rotated": ("sm80/kv_append.cu", "if (turns) v = rotated;", "if (is_key) v = rotated;"),
    "a wrong sign": ("common/hadamard.cuh", "!= 0 ? 0x80000000u : 0u", "!= 0 ? 0u : 0x80000000u"),
    "a step left out": ("common/hadamard.cuh", "lanes < kLanes; lanes *= 2", "lanes < kLanes / 2; lanes *= 2"),
    "terms off in the last place": (
        "common/hadamard.cuh",
        "x[2 * i] = low_value<Format>(v.pairs[i]);",
        "x[2 * i] = __fmul_rn(low_value<Format>(v.pairs[i]), 1.0000001f);",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mistake: str
) -> None:
    source, right, wrong = MISTAKES[mistake]
    root = tmp_path / "cuda"
    shutil.copytree(CUDA_ROOT, root)
    text = (root / source).read_text(encoding="utf-8")
    assert right in text, f"{source} changed: find another place for this mistake"
    (root / source).write_text(text.replace(right, wrong), encoding="utf-8")
    Device(emulator, tmp_path, root).install(monkeypatch)
    case = Case(9, 9, 3, 128, 4, torch.float16, "hadamard")
    with pytest.raises(AssertionError, match="differ"):
        assert_all_same(case, rope_append(case))
