"""The header of a GGUF file (llama.cpp), read as hostile input: metadata, and where each tensor lies.

A file is, little-endian: "GGUF", version u32, tensor count u64, metadata count u64; the metadata (key, type u32,
value); per tensor its name, rank u32, sizes u64 (fastest axis first), type u32, offset u64; padding; the data.
The header is walked here rather than by `gguf.GGUFReader`: that one makes an array object of every element of the
vocabulary, and believes counts (an array said to have 2**60 elements keeps it busy for ever).
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from qoq.formats.safetensors_file import COPY_AGAIN, check_tensor_name, regular_file_size, sorted_spans
from qoq.recipes.errors import InputError

MetadataValue = str | int | float | bool

_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 100_000_000
_MAX_ENTRIES = 100_000
_MAX_RANK = 4
_MAX_DIM = 2**63 - 1

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in the file; `shape` has the slowest axis first, as in torch."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """A checked header. `metadata` holds scalars and strings; arrays (the vocabulary) are left out."""

    metadata: dict[str, MetadataValue]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads a header front to back and never beyond `limit`."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.limit = min(size, _MAX_HEADER_BYTES)
        self.offset = 0

    def advance(self, count: int) -> int:
        """Move on by `count` bytes and return where they begin; InputError when there are not as many."""
        begin, end = self.offset, self.offset + count
        if end > self.limit:
            what = (
                f"the header ends at byte {self.size}, where {count} more bytes should follow byte {begin}"
                if end > self.size
                else f"the header is larger than {_MAX_HEADER_BYTES} bytes"
            )
            raise InputError(f"{self.path}: {what}", remedy=COPY_AGAIN)
        self.offset = end
        return begin

    def number(self, code: str) -> Any:
        form = f"<{code}"
        return struct.unpack_from(form, self.data, self.advance(struct.calcsize(form)))[0]

    def count(self, what: str, least_bytes: int, most: int | None = None) -> int:
        """A count that the bytes left can hold, at `least_bytes` each."""
        value = int(self.number("Q"))
        left = self.limit - self.offset
        if value * least_bytes > left:
            raise InputError(
                f"{self.path}: {value} {what}, of which the {left} bytes that follow can hold {left // least_bytes}",
                remedy=COPY_AGAIN,
            )
        if most is not None and value > most:
            raise InputError(f"{self.path}: {value} {what}, expected at most {most}", remedy=COPY_AGAIN)
        return value

    def text(self, what: str) -> str:
        length = self.number("Q")
        begin = self.advance(length)
        try:
            return str(self.data[begin : begin + length], "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what} at byte {begin} is not UTF-8", remedy=COPY_AGAIN) from error

    def value(self, key: str) -> MetadataValue | None:
        """One metadata value; None for an array, which is stepped over."""
        kind = self._value_type(key)
        if kind == GGUFValueType.STRING:
            return self.text(f"the value of {key!r}")
        if kind != GGUFValueType.ARRAY:
            number: MetadataValue = self.number(_SCALARS[kind])
            return number
        kind = self._value_type(key)
        if kind == GGUFValueType.ARRAY:
            raise InputError(f"{self.path}: {key!r} is an array of arrays, which GGUF does not have", remedy=COPY_AGAIN)
        if kind == GGUFValueType.STRING:
            self._skip_strings(self.count(f"strings in {key!r}", 8))
        else:
            width = struct.calcsize(f"<{_SCALARS[kind]}")
            self.advance(self.count(f"elements in {key!r}", width) * width)
        return None

    def _skip_strings(self, count: int) -> None:
        """Step over a vocabulary of hundreds of thousands of strings: hence without a call for each."""
        length_at = struct.Struct("<Q").unpack_from
        offset, last = self.offset, self.limit - 8
        for _ in range(count):
            if offset > last:
                break
            offset += 8 + length_at(self.data, offset)[0]
        else:
            self.advance(offset - self.offset)
            return
        self.advance(offset + 8 - self.offset)  # raises: the next length lies beyond the end

    def _value_type(self, key: str) -> GGUFValueType:
        number = self.number("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise InputError(
                f"{self.path}: {key!r} has value type {number}, expected 0 to {max(GGUFValueType)}", remedy=COPY_AGAIN
            ) from None


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check metadata and tensor table; memory is bounded by the header's size.

    Raises InputError, naming file and tensor, for anything that cannot be read or lies outside the file.
    """
    size = regular_file_size(path)
    if size < 4:
        raise InputError(f"{path}: {size} bytes are no GGUF file", remedy=COPY_AGAIN)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(_Cursor(path, data, min(size, len(data))))
    except (OSError, ValueError) as error:  # ValueError: the file became empty meanwhile
        raise InputError(f"{path}: cannot be read ({error})", remedy="check the permissions and the disk") from error


def _read_header(cursor: _Cursor) -> GGUFHeader:
    path = cursor.path
    _check_version(cursor)
    tensor_count = cursor.count("tensors", 33, _MAX_ENTRIES)
    metadata: dict[str, MetadataValue] = {}
    seen = set()
    for _ in range(cursor.count("metadata entries", 13, _MAX_ENTRIES)):
        key = cursor.text("a metadata key")
        if key in seen:
            raise InputError(f"{path}: the metadata key {key[:200]!r} occurs twice", remedy=COPY_AGAIN)
        seen.add(key)
        value = cursor.value(key[:200])
        if value is not None:
            metadata[key] = value
    parts = metadata.get("split.count", 0)  # joining the parts leaves a 0
    if parts not in (0, 1):
        raise InputError(
            f"{path}: one of {str(parts)[:40]} parts of a split model",
            remedy="join them first: llama-gguf-split --merge",
        )
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment.bit_count() != 1:
        raise InputError(
            f"{path}: general.alignment {str(alignment)[:40]!r}, expected a power of two from 8", remedy=COPY_AGAIN
        )
    entries: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
    for _ in range(tensor_count):
        name = cursor.text("a tensor name")
        check_tensor_name(path, name)
        if name in entries:
            raise InputError(f"{path}: tensor {name!r} occurs twice", remedy=COPY_AGAIN)
        entries[name] = _tensor_entry(cursor, f"{path}: tensor {name!r}", alignment)
    data_start = -(-cursor.offset // alignment) * alignment
    tensors = {
        name: GGUFTensor(kind, shape, data_start + offset, _data_bytes(kind, shape))
        for name, (kind, shape, offset) in entries.items()
    }
    _check_layout(path, tensors, cursor.size)
    return GGUFHeader(metadata, tensors)


def _check_version(cursor: _Cursor) -> None:
    magic = cursor.data[cursor.advance(4) : cursor.offset]
    if magic != b"GGUF":
        remedy = "fetch the files: git lfs pull" if magic == b"vers" else "check that this is a GGUF file"
        raise InputError(f"{cursor.path}: starts with {magic!r}, expected b'GGUF'", remedy=remedy)
    version = cursor.number("I")
    if version not in _VERSIONS:
        what = "is for big-endian machines" if version and version & 0xFFFF == 0 else f"has GGUF version {version}"
        raise InputError(
            f"{cursor.path}: {what}, expected little-endian version 2 or 3",
            remedy="convert the model again with a current llama.cpp, or use its safetensors",
        )


def _tensor_entry(cursor: _Cursor, where: str, alignment: int) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
    rank = cursor.number("I")
    if not 1 <= rank <= _MAX_RANK:
        raise InputError(f"{where}: {rank} dimensions, expected 1 to {_MAX_RANK}", remedy=COPY_AGAIN)
    shape = tuple(reversed([int(cursor.number("Q")) for _ in range(rank)]))
    if min(shape) < 1 or math.prod(shape) > _MAX_DIM:
        raise InputError(f"{where}: shape {list(shape)} is empty or too large", remedy=COPY_AGAIN)
    number = cursor.number("I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        kind = None
    if kind is None or not _is_readable(kind):
        readable = ", ".join(known.name for known in GGMLQuantizationType if _is_readable(known))
        raise InputError(
            f"{where}: quantization type {number if kind is None else kind.name} cannot be read",
            remedy=f"use a GGUF of the model in BF16 or F16, or its safetensors (readable: {readable})",
        )
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        raise InputError(
            f"{where}: rows of {shape[-1]}, expected a multiple of {block} for {kind.name}", remedy=COPY_AGAIN
        )
    offset = int(cursor.number("Q"))
    if offset % alignment:
        raise InputError(f"{where}: offset {offset} is no multiple of {alignment}", remedy=COPY_AGAIN)
    return kind, shape, offset


@functools.cache
def _is_readable(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf package can decode the type; asked of one block, since it has no list of them."""
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _data_bytes(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, width = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * width


def _check_layout(path: Path, tensors: Mapping[str, GGUFTensor], size: int) -> None:
    end = 0
    for name, (first, last) in sorted_spans({n: (t.start, t.start + t.nbytes) for n, t in tensors.items()}):
        if first < end:
            raise InputError(
                f"{path}: tensor {name!r} overlaps the tensor before it by {end - first} bytes", remedy=COPY_AGAIN
            )
        end = last
    if end > size:
        raise InputError(
            f"{path}: the header describes {end} bytes, the file has {size}: {end - size} bytes are missing",
            remedy=COPY_AGAIN,
        )
