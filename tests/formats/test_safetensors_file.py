"""Headers as an attacker or a broken download would write them, and round trips with the safetensors library."""

from __future__ import annotations

import json
import os
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qoq.formats.safetensors_file import SafetensorsFile, TensorInfo, read_header
from qoq.recipes.errors import InputError


def raw_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F16", shape: Any = (2, 3), offsets: Any = (0, 12), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def every_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(4, 6, generator=generator)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    dtypes += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
    tensors = {str(dtype): (values.abs() * 9).to(dtype) for dtype in dtypes}
    return tensors | {"empty": torch.empty(0, 5), "scalar": torch.tensor(2.5), "name with spaces é": values[:1].clone()}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_loads_what_the_safetensors_library_loads(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(every_dtype(), path, metadata={"format": "pt"})
    expected = load_file(path)
    opened = SafetensorsFile(path)
    assert opened.header.metadata == {"format": "pt"}
    assert opened.names() == sorted(expected)
    for name, tensor in expected.items():
        loaded = opened.load(name)
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded) == bits(tensor), name
        assert opened.info(name) == TensorInfo(tensor.dtype, tuple(tensor.shape))
        assert opened.info(name).nbytes == tensor.nbytes
        first, last = opened.header.spans[name]
        assert path.read_bytes()[first:last] == bits(tensor), name


def test_accepts_a_file_without_tensors_and_padding_after_the_header(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw_file(b"{}      "))
    assert SafetensorsFile(path).names() == []


def test_a_tensor_may_begin_at_an_odd_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [2], [1, 9])}
    path.write_bytes(raw_file(header, b"\1" + struct.pack("<ff", 1.5, -2.0)))
    assert SafetensorsFile(path).load("b").tolist() == [1.5, -2.0]


def test_writing_into_a_loaded_tensor_changes_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(1024)}, path)
    before = path.read_bytes()
    opened = SafetensorsFile(path)
    opened.load("w").fill_(7)
    assert torch.equal(opened.load("w"), torch.ones(1024))
    assert path.read_bytes() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_memory_holds_the_tensors_in_use_and_not_the_file(tmp_path: Path) -> None:
    count, each = 16, 16 << 20
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw_file({f"t{i}": entry("F32", [each // 4], [i * each, (i + 1) * each]) for i in range(count)}))
    os.truncate(path, path.stat().st_size + count * each)  # sparse: zeros that take no disk

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    opened = SafetensorsFile(path)
    opened.load("t0").sum()
    before = resident()
    for name in opened.names():
        tensor = opened.load(name)
        assert float(tensor.sum()) == 0
        assert resident() - before < 4 * each
    del tensor
    assert resident() - before < each


GOOD = raw_file({"a": entry(), "b": entry("U8", [4], [12, 16])}, bytes(range(16)))
CASES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes, expected at least 8"),
    "seven bytes": (GOOD[:7], "7 bytes, expected at least 8"),
    "length zero": (struct.pack("<Q", 0), "header length 0, expected 2 to 100000000"),
    "huge length": (struct.pack("<Q", 2**63) + b"{}", f"header length {2**63}, expected 2 to 100000000"),
    "length over the limit": (struct.pack("<Q", 100_000_001) + b"{}", "header length 100000001, expected"),
    "cut in the header": (GOOD[:20], "the file has 20: at least [0-9]+ bytes are missing"),
    "cut in the data": (GOOD[:-5], "5 bytes are missing"),
    "excess": (GOOD + b"xyz", "3 bytes too many"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*\n.*git lfs pull"),
    "not UTF-8": (raw_file(b'{"\xff":1}'), "header: not UTF-8 at byte 2"),
    "UTF-16": (raw_file("{}".encode("utf-16")), "not UTF-8"),
    "not JSON": (raw_file(b"{nonsense}"), "header: not valid JSON"),
    "deep JSON": (raw_file(b"[" * 200_000), "header: not valid JSON"),
    "long number": (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "header: not valid JSON"),
    "array": (raw_file([]), "expected a JSON object, got list"),
    "twice": (raw_file(b'{"a": {}, "a": {}}'), "the key 'a' occurs twice"),
    "twice inside": (raw_file(b'{"a": {"dtype": "U8", "dtype": "F32"}}'), "the key 'dtype' occurs twice"),
    "metadata list": (raw_file({"__metadata__": []}), "__metadata__ is no object of strings"),
    "metadata number": (raw_file({"__metadata__": {"a": 1}}), "__metadata__ is no object of strings"),
    "no name": (raw_file({"": entry()}), "tensor name '' of 0 characters"),
    "escape in name": (raw_file({"a\x1b[31m": entry()}), r"tensor name 'a\\x1b\[31m'"),
    "surrogate in name": (raw_file(b'{"\\ud800": {}}'), r"tensor name '\\ud800'"),
    "long name": (raw_file({"a" * 600: entry()}), "of 600 characters; expected 1 to 512"),
    "entry is a list": (raw_file({"a": []}), "tensor 'a': expected an object, got list"),
    "entry is empty": (raw_file({"a": {}}), "tensor 'a': dtype None, expected one of"),
    "unknown dtype": (raw_file({"a": entry("F4")}), "tensor 'a': dtype 'F4', expected one of BOOL, U8"),
    "dtype is a list": (raw_file({"a": entry(["F16"])}), "tensor 'a': dtype"),
    "long dtype": (raw_file({"a": entry("F" * 10_000)}), r"dtype 'F{70,76}\.\.\., expected"),
    "negative size": (raw_file({"a": entry(shape=[-1, 6])}), r"shape \[-1, 6\], expected"),
    "float size": (raw_file({"a": entry(shape=[2.0, 3])}), r"shape \[2.0, 3\], expected"),
    "true as size": (raw_file({"a": entry(shape=[True, 6])}), r"shape \[True, 6\], expected"),
    "no shape": (raw_file({"a": entry(shape=None)}), "shape None, expected"),
    "huge size": (raw_file({"a": entry(shape=[2**63])}), "shape .* expected"),
    "huge product": (raw_file({"a": entry(shape=[2**62, 2**62])}, bytes(12)), "hold 12 bytes, F16 .* needs"),
    "high rank": (raw_file({"a": entry(shape=[2**62] * 100_000)}), "expected at most 32 whole numbers"),
    "offsets backwards": (raw_file({"a": entry(offsets=[12, 0])}, bytes(12)), r"data_offsets \[12, 0\], expected"),
    "offsets negative": (raw_file({"a": entry(offsets=[-12, 0])}, bytes(12)), r"data_offsets \[-12, 0\], expected"),
    "three offsets": (raw_file({"a": entry(offsets=[0, 6, 12])}), r"data_offsets \[0, 6, 12\], expected"),
    "wrong byte count": (raw_file({"a": entry(offsets=[0, 10])}, bytes(10)), r"hold 10 bytes, F16 \[2, 3\] needs 12"),
    "hole at the start": (raw_file({"a": entry(offsets=[4, 16])}, bytes(16)), "'a' leaves a hole before it of 4 bytes"),
    "hole": (
        raw_file({"a": entry(), "b": entry("U8", [1], [14, 15])}, bytes(15)),
        "'b' leaves a hole before it of 2 bytes",
    ),
    "overlap": (
        raw_file({"a": entry(), "b": entry("U8", [4], [8, 12])}, bytes(12)),
        "'b' overlaps the tensor before it by 4 bytes",
    ),
    "same bytes twice": (raw_file({"a": entry(), "b": entry()}, bytes(12)), "'b' overlaps the tensor before it by 12"),
    "beyond the end": (
        raw_file({"a": entry("U8", [2**40], [0, 2**40])}),
        "the file has [0-9]+: 1099511627776 bytes are missing\n  -> .*download it again",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses_with_file_cause_and_remedy(case: str, tmp_path: Path) -> None:
    content, message = CASES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(content) + 1_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in caught.value.message
    assert caught.value.remedy
    assert len(str(caught.value)) < 2000


def test_the_file_the_cases_are_made_from_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    assert read_header(path).tensors["a"] == TensorInfo(torch.float16, (2, 3))
    assert SafetensorsFile(path).load("b").tolist() == [12, 13, 14, 15]


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="expected a file, got a folder"):
        read_header(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_header(Path("a\0b"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a regular file"):
        read_header(tmp_path / "pipe")  # opening it would wait for a writer for ever


def test_unknown_name_and_a_file_that_changes_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(GOOD)
    opened = SafetensorsFile(path)
    with pytest.raises(InputError, match="no tensor 'c'"):
        opened.load("c")
    path.write_bytes(raw_file({"a": entry("F32", [3])}, bytes(12)))
    with pytest.raises(InputError, match=r"'a' is torch.float32 \[3\], it was torch.float16 \[2, 3\]"):
        opened.load("a")
    path.write_bytes(raw_file({"a": entry("BF16")}, bytes(12)))
    with pytest.raises(InputError, match=r"'a' is torch.bfloat16 \[2, 3\], it was torch.float16 \[2, 3\]"):
        opened.load("a")
    path.write_bytes(GOOD[:-1])
    with pytest.raises(InputError, match="'a' cannot be loaded"):
        opened.load("a")
    path.unlink()
    with pytest.raises(InputError, match="'a' cannot be loaded"):
        opened.load("a")


SEED = raw_file(
    {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("U8", [4], [12, 16]), "c": entry("F32", [], [16, 20])},
    bytes(range(20)),
)
HOSTILE = st.sampled_from([b"\0", b"\xff" * 8, b'"', b"{", b"}", b"-", b"9" * 20, b"null", b"1e9", b"\xff", b"true"])


@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(SEED)), st.integers(0, 8), HOSTILE | st.binary(max_size=4)), max_size=4
    ),
    keep=st.none() | st.integers(0, len(SEED)),
)
def test_no_mutation_raises_anything_but_input_errors(
    edits: list[tuple[int, int, bytes]], keep: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = SEED
    for position, removed, inserted in edits:
        content = content[:position] + inserted + content[position + removed :]
    content = content[:keep]
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        opened = SafetensorsFile(path)
        assert sum(opened.info(name).nbytes for name in opened.names()) <= len(content)
        for name in opened.names():
            opened.load(name)
    except InputError:
        return
    loaded = load_file(path)  # what we accept, the library accepts
    assert sorted(loaded) == opened.names()
    assert all(bits(loaded[name]) == bits(opened.load(name)) for name in loaded)
