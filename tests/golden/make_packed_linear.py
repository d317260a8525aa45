"""Write packed_linear.json: small linears and their packed bytes, placed one at a time by the index formulas.

    python tests/golden/make_packed_linear.py

It uses nothing but the standard library, so that no change to the project can change the answer. The formulas are
those of the layout that omniserve's W4A8 kernels read. Everything is written as hex: a digit a code, two a byte, and
16-bit numbers in little-endian order; logical matrices are lists of rows.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

GROUP_SIZE = 128
Rows = list[list[int]]


def qweight_place(n: int, k: int, columns: int) -> tuple[int, bool]:
    """Byte offset in the flat qweight of the code [n, k] out of `columns`, and whether it takes the high nibble."""
    tile = (n // 32) * (columns // 32) + k // 32
    half, b, r = n % 32 // 16, n % 16 // 8, n % 8
    c, lane, i = k % 32 // 16, k % 16 // 4, k % 4
    return 512 * tile + 64 * r + 16 * lane + 8 * c + 4 * b + i, half == 1


def s2_place(n: int) -> int:
    """Column of channel n in the packed s2_scales and s2_zeros: 0, 8, 16, 24, 1, 9, ... are neighbours."""
    return n // 32 * 32 + 4 * (n % 8) + n % 32 // 8


def pack_qweight(codes: Rows) -> bytes:
    """Codes [N, K] to the flat N * K / 2 bytes."""
    columns = len(codes[0])
    packed = bytearray(len(codes) * columns // 2)
    for n, row in enumerate(codes):
        for k, code in enumerate(row):
            offset, high = qweight_place(n, k, columns)
            packed[offset] |= code << 4 if high else code
    return bytes(packed)


def pack_s2(values: Rows) -> bytes:
    """Level-2 values [N, G], taken mod 256, to the flat G * N bytes."""
    channels, groups = len(values), len(values[0])
    packed = bytearray(groups * channels)
    for n, row in enumerate(values):
        for group, value in enumerate(row):
            packed[group * channels + s2_place(n)] = value % 256
    return bytes(packed)


def float16_bytes(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}e", *values)


def legal_codes(s2: int, offset: int) -> list[int]:
    """The codes of a group that decode into int8."""
    return [code for code in range(16) if -128 <= code * s2 - offset <= 127]


def make_case(rng: random.Random, mode: str, channels: int, in_features: int, *, has_bias: bool) -> dict[str, Any]:
    """One linear as `logical` fields of a QuantizedLinear, and as the `packed` tensors in hex."""

    def below(bound: int) -> int:  # random() is the same in every version of Python; randrange need not be
        return int(rng.random() * bound)

    groups = -(-in_features // GROUP_SIZE)
    scale_bytes = float16_bytes([(1 + rng.random()) * 2.0 ** -(5 + below(20)) for _ in range(channels)])
    s1_scales = struct.unpack(f"<{channels}e", scale_bytes)  # down to 2**-24, the smallest float16 there is
    logical: dict[str, Any] = {"in_features": in_features, "s1_scales": scale_bytes.hex()}
    packed = {"s1_scales": scale_bytes.hex()}
    if mode == "per_channel":
        zeros = [[below(16)] for _ in range(channels)]
        codes = [[below(16) for _ in range(groups * GROUP_SIZE)] for _ in range(channels)]
        packed["s1_szeros"] = float16_bytes([row[0] * scale for row, scale in zip(zeros, s1_scales, strict=True)]).hex()
    else:
        s2_scales = [[1 + below(16) for _ in range(groups)] for _ in range(channels)]
        offsets: Rows = []
        zeros = []
        codes = []
        for row in s2_scales:
            zeros.append([below(16) if mode == "pre_scale" else below(15 * s2 + 1) for s2 in row])
            offsets.append([z * s2 if mode == "pre_scale" else z for z, s2 in zip(zeros[-1], row, strict=True)])
            legal = [legal_codes(s2, offset) for s2, offset in zip(row, offsets[-1], strict=True)]
            codes.append([group[below(len(group))] for group in legal for _ in range(GROUP_SIZE)])
        logical["s2_scales"] = [bytes(row).hex() for row in s2_scales]
        packed["s2_scales"] = pack_s2(s2_scales).hex()
        packed["s2_zeros"] = pack_s2([[-offset for offset in row] for row in offsets]).hex()
    logical["zeros"] = [bytes(row).hex() for row in zeros]
    logical["codes"] = ["".join(f"{code:x}" for code in row) for row in codes]
    packed["qweight"] = pack_qweight(codes).hex()
    if has_bias:
        logical["bias"] = packed["bias"] = float16_bytes([below(4096) / 64 - 32 for _ in range(channels)]).hex()
    return {"mode": mode, "logical": logical, "packed": packed}


def make() -> dict[str, Any]:
    """Every case of the file: each mode, one and two tiles of channels, padded and whole in_features."""
    rng = random.Random(20240507)
    return {
        "pre_scale": make_case(rng, "pre_scale", 64, 200, has_bias=True),
        "post_scale": make_case(rng, "post_scale", 32, 256, has_bias=False),
        "per_channel": make_case(rng, "per_channel", 64, 72, has_bias=True),
    }


if __name__ == "__main__":
    target = Path(__file__).with_name("packed_linear.json")
    target.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
