"""GGUF headers as an attacker or a broken download would write them."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from qoq.formats.gguf_file import GGUFSource
from qoq.recipes.errors import InputError
from qoq.recipes.families.qwen2 import QWEN2


def small(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "qwen2")
    for block in range(12):
        writer.add_uint32(f"qwen2.some_number.{block}", block)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("output_norm.weight", np.arange(32, dtype=np.float32))
    ones = gguf.quantize(np.ones((4, 32), np.float32), Kind.Q8_0)
    writer.add_tensor("output.weight", ones, raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def open_as_qwen2(path: Path) -> GGUFSource:
    return GGUFSource(path, names=QWEN2.gguf_names, blocks=QWEN2.blocks, permuted=QWEN2.gguf_permuted)


def patched(content: bytes, after: bytes, skip: int, form: str, value: int) -> bytes:
    """`content` with one number replaced, `skip` bytes behind the only occurrence of `after`."""
    assert content.count(after) == 1
    place = content.index(after) + len(after) + skip
    new = struct.pack(f"<{form}", value)
    return content[:place] + new + content[place + len(new) :]


def header(tensors: int, entries: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


NAME = struct.pack("<Q", 13) + b"output.weight"  # then: rank u32, sizes u64 u64, type u32, offset u64
Damage = Callable[[bytes], bytes]
DAMAGED: dict[str, tuple[Damage, str]] = {
    "empty": (lambda c: b"", "0 bytes are no GGUF file"),
    "magic": (lambda c: b"GGML" + c[4:], "starts with b'GGML', expected b'GGUF'"),
    "git lfs": (lambda c: b"version https://git-lfs", "starts with b'vers'(.|\n)*git lfs pull"),
    "version 1": (lambda c: c[:4] + struct.pack("<I", 1) + c[8:], "has GGUF version 1, expected .* 2 or 3"),
    "big endian": (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], "is for big-endian machines"),
    "cut in the header": (lambda c: c[:500], "the header ends at byte 500"),
    "cut in the data": (lambda c: c[:-64], "[0-9]+ bytes are missing"),
    "many tensors": (lambda c: header(2**60, 0), "1152921504606846976 tensors, of which the 8 bytes .* hold 0"),
    "more tensors than a model has": (
        lambda c: header(200_000, 0, bytes(7_000_000)),
        "200000 tensors, expected at most",
    ),
    "many entries": (
        lambda c: header(0, 2**60) + bytes(100),
        "1152921504606846976 metadata entries, of which the 100 bytes that follow can hold 7",
    ),
    "long key": (lambda c: header(0, 1, struct.pack("<Q", 2**63) + bytes(99)), "where 9223372036854775808 more bytes"),
    "key twice": (lambda c: header(0, 2, pair(b"k", 0, b"\1") * 2), "metadata key 'k' occurs twice"),
    "key not UTF-8": (lambda c: header(0, 1, pair(b"\xff", 0, b"\1")), "a metadata key at byte 32 is not UTF-8"),
    "value type": (lambda c: header(0, 1, pair(b"k", 13, bytes(8))), "'k' has value type 13, expected 0 to 12"),
    "array type": (lambda c: header(0, 1, pair(b"k", 9, struct.pack("<IQ", 99, 1))), "'k' has value type 99"),
    "array in array": (lambda c: header(0, 1, pair(b"k", 9, struct.pack("<IQ", 9, 1))), "array of arrays"),
    "endless array": (
        lambda c: header(0, 1, pair(b"k", 9, struct.pack("<IQ", 4, 2**60))),
        "1152921504606846976 elements in 'k', of which the 0 bytes",
    ),
    "endless strings": (
        lambda c: header(0, 1, pair(b"k", 9, struct.pack("<IQ", 8, 2**60) + bytes(80))),
        "1152921504606846976 strings in 'k', of which the 80 bytes that follow can hold 10",
    ),
    "long string in array": (
        lambda c: header(0, 1, pair(b"k", 9, struct.pack("<IQQQ", 8, 2, 2**60, 0))),
        "the header ends at byte",
    ),
    "cut in strings": (lambda c: header(0, 1, pair(b"k", 9, struct.pack("<IQQ", 8, 2, 4) + bytes(11))), "header ends"),
    "no architecture": (lambda c: header(0, 0), "no general.architecture"),
    "architecture is a number": (lambda c: header(0, 1, pair(b"general.architecture", 4, bytes(4))), "no general.arch"),
    "alignment": (
        lambda c: header(0, 1, pair(b"general.alignment", 4, struct.pack("<I", 24))),
        "general.alignment '24', expected a power of two from 8",
    ),
    "negative alignment": (
        lambda c: header(0, 1, pair(b"general.alignment", 5, struct.pack("<i", -8))),
        "general.alignment '-8'",
    ),
    "rank": (lambda c: patched(c, NAME, 0, "I", 2**31), "'output.weight': 2147483648 dimensions, expected 1 to 4"),
    "rank zero": (lambda c: patched(c, NAME, 0, "I", 0), "'output.weight': 0 dimensions"),
    "size zero": (lambda c: patched(c, NAME, 12, "Q", 0), r"'output.weight': shape \[0, 32\] is empty"),
    "huge size": (lambda c: patched(c, NAME, 12, "Q", 2**62), r"'output.weight': shape .* is empty or too large"),
    "larger than the file": (lambda c: patched(c, NAME, 12, "Q", 2**40), "[0-9]{13,} bytes are missing"),
    "not whole blocks": (lambda c: patched(c, NAME, 4, "Q", 31), "rows of 31, expected a multiple of 32 for Q8_0"),
    "unknown type": (
        lambda c: patched(c, NAME, 20, "I", 999),
        r"type 999 cannot be read(.|\n)*readable: F32, F16, Q4_0",
    ),
    "unreadable type": (lambda c: patched(c, NAME, 20, "I", Kind.F64), "type F64 cannot be read"),
    "offset unaligned": (lambda c: patched(c, NAME, 24, "Q", 129), "offset 129 is no multiple of 32"),
    "offset beyond the end": (lambda c: patched(c, NAME, 24, "Q", 2**62), "bytes are missing"),
    "overlap": (lambda c: patched(c, NAME, 24, "Q", 96), "'output.weight' overlaps .* by 32 bytes"),
    "name twice": (
        lambda c: c.replace(NAME, struct.pack("<Q", 18) + b"output_norm.weight"),
        "tensor 'output_norm.weight' occurs twice",
    ),
    "unprintable name": (lambda c: c.replace(NAME, NAME[:-1] + b"\x1b"), r"tensor name 'output.weigh\\x1b'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[case]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(small(tmp_path / "good.gguf")))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            open_as_qwen2(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message
    assert caught.value.remedy


def test_the_file_that_gets_damaged_is_good(tmp_path: Path) -> None:
    small(tmp_path / "good.gguf")
    source = open_as_qwen2(tmp_path / "good.gguf")
    assert source.load("model.norm.weight").tolist() == list(range(32))
    assert torch.allclose(source.load("lm_head.weight"), torch.ones(4, 32), rtol=1e-3)
