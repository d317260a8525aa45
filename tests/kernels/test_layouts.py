"""KV pages on the CPU: packing against a loop written from the description, its inverse, and the device's addresses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV, quantize_kv
from qoq.kernels import layouts
from qoq.kernels.compiler import CompileError, KernelSpec, compile_kernel, nvrtc_version
from qoq.kernels.layouts import PAGE_SIZE, block_bytes, pack_pages, page_bytes, unpack_pages
from qoq.kernels.sources import CUDA_ROOT
from qoq.recipes.errors import EnvironmentProblem

SHAPES = [(64, 4), (64, 8), (128, 4), (128, 8)]


def random_kv(pages: int, heads: int, head_dim: int, bits: int, seed: int) -> QuantizedKV:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (pages, heads, PAGE_SIZE, head_dim), generator=generator)
    scales = torch.rand(pages, heads, PAGE_SIZE, 1, generator=generator)
    zeros = torch.randn(pages, heads, PAGE_SIZE, 1, generator=generator) * 8
    return QuantizedKV(codes.to(torch.uint8), scales.half(), zeros.half())


def nibbles_of_key_operand(step: int, lane: int, tile: int) -> list[tuple[int, int]]:
    """(token, dimension) of nibbles 0 .. 7 of the word, as performance.md section 5 says for 4 bits and D = 128."""
    g, t = lane // 4, lane % 4
    d = (step // 2) * 32 + t * 8 + (step % 2) * 4
    r0 = 16 * tile + g
    r1 = r0 + 8
    places = {0: (r0, d), 4: (r0, d + 1), 1: (r0, d + 2), 5: (r0, d + 3)}
    places |= {2: (r1, d), 6: (r1, d + 1), 3: (r1, d + 2), 7: (r1, d + 3)}
    return [places[i] for i in range(8)]


def nibbles_of_value_operand(step: int, lane: int, tile: int, head_dim: int) -> list[tuple[int, int]]:
    g, t = lane // 4, lane % 4
    d0 = head_dim // 8 * g + 2 * step
    d1 = d0 + 1
    first = 16 * tile
    places = {0: (2 * t, d0), 1: (2 * t, d1), 4: (2 * t + 1, d0), 5: (2 * t + 1, d1)}
    places |= {2: (2 * t + 8, d0), 3: (2 * t + 8, d1), 6: (2 * t + 9, d0), 7: (2 * t + 9, d1)}
    return [(first + places[i][0], places[i][1]) for i in range(8)]


def operand_words(codes: list[list[int]], is_key: bool, step: int, lane: int, tile: int, bits: int) -> bytes:
    """The word (4 bits) or the two words (8 bits) of an operand; codes [32][D]."""
    if is_key:
        places = nibbles_of_key_operand(step, lane, tile)
    else:
        places = nibbles_of_value_operand(step, lane, tile, len(codes[0]))
    values = [codes[token][dim] for token, dim in places]
    if bits == 4:
        return sum(value << 4 * i for i, value in enumerate(values)).to_bytes(4, "little")
    # Where 4 bits have a word, 8 bits have two, with a byte for every second nibble. Of keys word 0 is token r0
    # (nibbles 0, 1, 4, 5) and word 1 token r1; of values word 0 is dimension d0 (even nibbles) and word 1 is d1.
    return bytes(values[i] for i in ([0, 1, 4, 5, 2, 3, 6, 7] if is_key else [0, 2, 4, 6, 1, 3, 5, 7]))


def slow_block(keys: QuantizedKV, values: QuantizedKV, bits: int) -> list[int]:
    """Bytes of one sub-block; codes [32, D], scales and zeros [32, 1]."""
    steps = keys.codes.shape[1] // 16
    steps_of_chunk = 4 if bits == 4 else 2
    block = bytearray()
    for codes, is_key in ((keys.codes.tolist(), True), (values.codes.tolist(), False)):
        for chunk in range(2 * steps // steps_of_chunk):
            tile, first = divmod(chunk * steps_of_chunk, steps)
            for lane in range(32):
                for step in range(first, first + steps_of_chunk):
                    block += operand_words(codes, is_key, step, lane, tile, bits)
    for tile in range(2):
        for g in range(8):
            for token in (16 * tile + g, 16 * tile + g + 8):
                for number in (keys.scales, keys.zeros, values.scales, values.zeros):
                    block += number[token].view(torch.uint8).numpy().tobytes()
    return list(block)


def rows(kv: QuantizedKV, page: int, head: int, start: int) -> QuantizedKV:
    part = (page, head, slice(start, start + 32))
    return QuantizedKV(kv.codes[part], kv.scales[part], kv.zeros[part])


def test_sizes_are_those_of_the_design() -> None:
    assert [block_bytes(*shape) for shape in SHAPES] == [2304, 4352, 4352, 8448]
    assert [page_bytes(*shape) for shape in SHAPES] == [4608, 8704, 8704, 16896]


@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_packing_follows_the_description(head_dim: int, bits: int) -> None:
    keys, values = (random_kv(2, 2, head_dim, bits, seed) for seed in (0, 1))
    packed = pack_pages(keys, values, bits)
    assert packed.shape == (2, 2, page_bytes(head_dim, bits))
    for page, head in ((0, 0), (1, 0), (1, 1)):
        expected = [
            byte
            for start in (0, 32)
            for byte in slow_block(rows(keys, page, head, start), rows(values, page, head, start), bits)
        ]
        assert packed[page, head].tolist() == expected


@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_packing_is_a_bijection(head_dim: int, bits: int) -> None:
    keys, values = (random_kv(3, 2, head_dim, bits, seed) for seed in (2, 3))
    packed = pack_pages(keys, values, bits)
    for found, expected in zip(unpack_pages(packed, head_dim, bits), (keys, values), strict=True):
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)
        assert torch.equal(found.zeros, expected.zeros)
    generator = torch.Generator().manual_seed(4)
    pages = torch.randint(0, 256, packed.shape, generator=generator).to(torch.uint8)
    assert torch.equal(pack_pages(*unpack_pages(pages, head_dim, bits), bits), pages)


@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_a_byte_belongs_to_one_token(head_dim: int, bits: int) -> None:
    """So that tokens are appended without reading, and concurrently."""
    owners = torch.zeros(page_bytes(head_dim, bits), dtype=torch.int64)
    zero = QuantizedKV(
        torch.zeros(1, 1, PAGE_SIZE, head_dim, dtype=torch.uint8),
        torch.zeros(1, 1, PAGE_SIZE, 1, dtype=torch.float16),
        torch.zeros(1, 1, PAGE_SIZE, 1, dtype=torch.float16),
    )
    all_ones = torch.tensor(-1, dtype=torch.int16).view(torch.float16)
    for token in range(PAGE_SIZE):
        full = QuantizedKV(zero.codes.clone(), zero.scales.clone(), zero.zeros.clone())
        full.codes[:, :, token] = 2**bits - 1
        full.scales[:, :, token] = full.zeros[:, :, token] = all_ones
        found = pack_pages(full, full, bits)[0, 0]
        assert set(found.tolist()) == {0, 255}
        owners += found == 255
    assert bool((owners == 1).all())


def test_what_does_not_fit_is_refused() -> None:
    keys, values = (random_kv(1, 1, 64, 4, seed) for seed in (0, 1))
    with pytest.raises(ValueError, match="head_dim is 96"):
        page_bytes(96, 4)
    with pytest.raises(ValueError, match="bits is 16"):
        page_bytes(64, 16)
    with pytest.raises(ValueError, match=r"values.scales: expected torch.float16"):
        pack_pages(keys, QuantizedKV(values.codes, values.scales.float(), values.zeros), 4)
    with pytest.raises(ValueError, match=r"keys.codes: 16 does not fit"):
        pack_pages(QuantizedKV(keys.codes + (keys.codes == 15), keys.scales, keys.zeros), values, 4)
    with pytest.raises(ValueError, match=r"kv_pages: expected torch.uint8 \[pages, kv_heads, 8704\]"):
        unpack_pages(pack_pages(keys, values, 4), 64, 8)


# ---- the device's addresses, evaluated by the compiler

_CHECK = """
#include "common/kv_page.cuh"
using Page = KvPage<HEAD_DIM, BITS>;
static_assert(Page::kBytes == PAGE_BYTES && Page::kBlockBytes == BLOCK_BYTES, "sizes");

__device__ constexpr unsigned fingerprint(int part) {
    unsigned sum = 17;
    for (int token = 0; token < kPageTokens; ++token)
        for (int dim = 0; dim < (part == 2 ? 1 : HEAD_DIM); ++dim) {
            const int byte = part == 0 ? Page::key_byte(token, dim)
                           : part == 1 ? Page::value_byte(token, dim) : Page::entry(token);
            sum = sum * 1000003u + static_cast<unsigned>(byte);
        }
    return sum;
}
static_assert(fingerprint(0) == KEYS, "keys");
static_assert(fingerprint(1) == VALUES, "values");
static_assert(fingerprint(2) == ENTRIES, "entries");
extern "C" __global__ void check() {}
"""


def fingerprint(addresses: Tensor) -> int:
    total = 17
    for address in addresses.reshape(-1).tolist():
        total = (total * 1000003 + address) & 0xFFFFFFFF
    return total


def addresses_by_packing(head_dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Byte of each (token, dimension) of keys and of values, and of each token's entry, found out from `unpack_pages`:
    byte i of a page holds i in base 16 (or 256), a digit at a time."""
    size = page_bytes(head_dim, bits)
    codes = [torch.zeros(PAGE_SIZE, head_dim, dtype=torch.int64) for _ in range(2)]
    entry = torch.zeros(PAGE_SIZE, dtype=torch.int64)
    for digit in range(4):
        page = (torch.arange(size) >> 4 * digit) & 0xF
        bytes_ = page | page << 4 if bits == 4 else page
        unpacked = unpack_pages(bytes_.to(torch.uint8).view(1, 1, size), head_dim, bits)
        for address, kv in zip(codes, unpacked, strict=True):
            address.add_(kv.codes[0, 0].long() << 4 * digit)
        low = unpacked[0].scales.view(torch.uint8)[0, 0, :, 0].long() & 0xF
        entry += low << 4 * digit
    return codes[0], codes[1], entry


@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_the_device_has_the_same_addresses(tmp_path: Path, head_dim: int, bits: int) -> None:
    try:
        nvrtc_version()
    except EnvironmentProblem as error:
        pytest.skip(str(error))
    keys, values, entries = addresses_by_packing(head_dim, bits)
    assert entries.unique().numel() == PAGE_SIZE
    shutil.copytree(CUDA_ROOT / "common", tmp_path / "common")
    (tmp_path / "check.cu").write_text(_CHECK, encoding="utf-8")
    defines = {
        "HEAD_DIM": head_dim,
        "BITS": bits,
        "PAGE_BYTES": page_bytes(head_dim, bits),
        "BLOCK_BYTES": block_bytes(head_dim, bits),
        "KEYS": fingerprint(keys),
        "VALUES": fingerprint(values),
        "ENTRIES": fingerprint(entries),
    }
    spec = KernelSpec("check.cu", "check", tuple((name, value) for name, value in defines.items()), 32)
    compile_kernel(spec, "sm_80", folder=tmp_path / "cubins", root=tmp_path)
    wrong = tuple((name, value + (name == "VALUES")) for name, value in defines.items())
    with pytest.raises(CompileError, match="values"):
        compile_kernel(KernelSpec("check.cu", "check", wrong, 32), "sm_80", folder=tmp_path / "cubins", root=tmp_path)


def test_the_layout_holds_what_is_quantized() -> None:
    x = torch.randn(1, 2, PAGE_SIZE, 64, generator=torch.Generator().manual_seed(5))
    kv = quantize_kv(x, 4)
    assert torch.equal(unpack_pages(pack_pages(kv, kv, 4), 64, 4)[1].codes, kv.codes)
    assert layouts.PAGE_SIZE == 64
