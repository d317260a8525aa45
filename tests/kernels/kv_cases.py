"""Operands of the KV cache kernels with what must come of them: for tests on a GPU and on the emulated device."""

from __future__ import annotations

import torch
from torch import Tensor

from qoq.kernels.kv_oracles import append_oracle, rope_oracle, rotate_oracle, round_trip_oracle
from qoq.kernels.layouts import PAGE_SIZE, pack_pages, page_bytes, unpack_pages

DTYPES = (torch.float16, torch.bfloat16)
SHAPES = [(64, 4), (64, 8), (128, 4), (128, 8)]
MAX_POSITIONS = 300


class Case:
    """Random operands on the CPU: queries, keys and values are parts of a fused buffer, slots are shuffled, some tokens
    go nowhere, and the pages hold 0x7F bytes."""

    def __init__(
        self,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bits: int,
        dtype: torch.dtype,
        key_rotation: str = "none",
    ) -> None:
        generator = torch.Generator().manual_seed(tokens + heads + head_dim + bits)
        self.key_rotation = key_rotation
        self.heads, self.kv_heads, self.head_dim, self.bits, self.dtype = heads, kv_heads, head_dim, bits, dtype
        self.qkv = random_heads((tokens, heads + 2 * kv_heads, head_dim), dtype, generator)
        self.num_pages = tokens // PAGE_SIZE + 3
        self.pages = torch.full((self.num_pages, kv_heads, page_bytes(head_dim, bits)), 0x7F, dtype=torch.uint8)
        self.slots = torch.randperm(self.num_pages * PAGE_SIZE, generator=generator)[:tokens]
        self.slots[1::7] = -1
        self.slots[-1:] = self.num_pages * PAGE_SIZE - 1
        self.slots[:-1][self.slots[:-1] == self.slots[-1]] = -5
        self.positions = torch.randint(0, MAX_POSITIONS, (tokens,), generator=generator).int()
        self.positions[: tokens // 2] = torch.arange(tokens // 2) % MAX_POSITIONS
        frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.arange(MAX_POSITIONS).float()[:, None] * frequencies
        self.cos, self.sin = angles.cos() * 1.25, angles.sin() * 1.25

    def parts(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of queries, keys and values."""
        query, key, value = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return query, key, value

    def rope_append(self, device: torch.device) -> tuple[Tensor, ...]:
        """Outputs and pages of the operator, on the CPU."""
        pages = self.pages.to(device)
        outputs = torch.ops.qoq.rope_append_kv(
            *self.parts(self.qkv.to(device)),
            *(x.to(device) for x in (self.cos, self.sin, self.positions)),
            pages,
            self.slots.to(device),
            self.bits,
            self.key_rotation,
        )
        return tuple(x.cpu() for x in (*outputs, pages))

    def turned(self, x: Tensor) -> Tensor:
        """Queries or keys after RoPE as the cache's keys are rotated."""
        return x if self.key_rotation == "none" else rotate_oracle(x)

    def expected(self) -> tuple[Tensor, ...]:
        """Query, key, value and pages, from the oracles."""
        query, key, value = self.parts(self.qkv)
        query, key = (self.turned(rope_oracle(x, self.cos, self.sin, self.positions)) for x in (query, key))
        pages = append_oracle(self.pages, key, value, self.slots, self.bits)
        return query, round_trip_oracle(key, self.bits), round_trip_oracle(value, self.bits), pages


def random_heads(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random values, with heads of other sizes, with outliers and offsets, constant ones, and ones full of ties."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    heads = x.view(-1, shape[-1])
    heads[::3] *= 10 ** (torch.rand(len(heads[::3]), 1, generator=generator) * 6 - 3)
    heads[1::5, :2] *= 50
    heads[2::5] += 20
    heads[3::11] = 0
    heads[4::11] = heads[4::11, :1]
    heads[5::11] = torch.arange(shape[-1]) % 16 / 2
    heads[5::11, 0] = 15
    return x.clamp(-60000, 60000).to(dtype)


def assert_same(what: str, found: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, NaN in the same places, or the coordinate of the first difference."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    found, expected = found.cpu(), expected.cpu()
    equal = found == expected
    if found.is_floating_point():
        equal |= found.isnan() & expected.isnan()
    if not bool(equal.all()):
        place = tuple(int(i) for i in (~equal).nonzero()[0])
        wrong = int((~equal).sum())
        raise AssertionError(
            f"{what}: {wrong} of {equal.numel()} differ, first at {place}: {found[place]} instead of {expected[place]}"
        )


def assert_same_pages(found: Tensor, expected: Tensor, head_dim: int, bits: int) -> None:
    """Every byte, but for the sign of a zero that is 0, which depends on which 0 of a head is called the smallest, and
    for the bits of a NaN."""

    def canonical(pages: Tensor) -> Tensor:
        parts = unpack_pages(pages.cpu(), head_dim, bits)
        for kv in parts:
            kv.zeros[kv.zeros == 0] = 0
            for numbers in (kv.scales, kv.zeros):
                numbers[numbers.isnan()] = torch.nan
        return pack_pages(*parts, bits)

    assert_same("pages", canonical(found), canonical(expected))


def assert_all_same(case: Case, found: tuple[Tensor, ...]) -> None:
    *outputs, pages = case.expected()
    for what, ours, theirs in zip(("query", "key", "value"), found, outputs, strict=False):
        assert_same(what, ours, theirs)
    assert_same_pages(found[3], pages, case.head_dim, case.bits)
