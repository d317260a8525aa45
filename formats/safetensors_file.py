"""One safetensors file, read as hostile input: the header is checked whole before anything else is believed.

A file is an 8-byte little-endian header length N, N bytes of JSON, and the tensors' bytes:
    {"name": {"dtype": "BF16", "shape": [N, K], "data_offsets": [begin, end]}, ..., "__metadata__": {str: str}}
Offsets count from the end of the header; the tensors fill the rest of the file without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qoq.recipes.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library too
MAX_RANK = 32
MAX_NAME = 512
_MAX_DIM = 2**63 - 1  # what an int64 size can say
_LENGTH_BYTES = 8

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

COPY_AGAIN = "the file is incomplete or damaged: copy or download it again"


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """A checked header; `spans` are the first byte and one past the last of each tensor, from the file's start."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    spans: dict[str, tuple[int, int]]


def regular_file_size(path: Path) -> int:
    """Size in bytes. Raises InputError for anything but a regular file: reading a pipe or a device could hang."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", remedy="check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{path}: cannot be read ({error})", remedy="check the path and its permissions") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "neither a regular file nor a link to one"
        raise InputError(f"{path}: expected a file, got {kind}", remedy="name the weight file itself")
    return status.st_size


def check_tensor_name(path: Path, name: str) -> None:
    """Raise InputError for an empty, overlong or unprintable name: names end up in messages and new files."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise InputError(
            f"{path}: tensor name {name[:40]!r} of {len(name)} characters; expected 1 to {MAX_NAME}, all printable",
            remedy=COPY_AGAIN,
        )


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse untrusted JSON that must be one object in UTF-8 without duplicate keys; InputError otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise InputError(f"{where}: the key {twice[:MAX_NAME]!r} occurs twice in one object", remedy=COPY_AGAIN)
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}", remedy=COPY_AGAIN) from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise InputError(f"{where}: not valid JSON ({error})", remedy=COPY_AGAIN) from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(value).__name__}", remedy=COPY_AGAIN)
    return value


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; memory is bounded by the header's size.

    Raises InputError, naming file and tensor, for anything the format does not allow.
    """
    size = regular_file_size(path)
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            if start == b"version ":  # how a pointer file begins; as a length it would be absurd
                raise InputError(
                    f"{path}: a Git LFS pointer of {size} bytes, not the weights",
                    remedy="fetch the files: git lfs pull",
                )
            length = _header_length(path, start, size)
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})", remedy="check the permissions and the disk") from error
    if len(raw) != length:
        raise InputError(f"{path}: header of {length} bytes ends after {len(raw)}", remedy=COPY_AGAIN)

    entries = parse_json_object(raw, f"{path}: header")
    metadata = _metadata(path, entries.pop("__metadata__", None))
    tensors: dict[str, TensorInfo] = {}
    spans: dict[str, tuple[int, int]] = {}
    data_start = _LENGTH_BYTES + length
    for name, entry in entries.items():
        check_tensor_name(path, name)
        tensors[name], (begin, end) = _entry(f"{path}: tensor {name!r}", entry)
        spans[name] = (data_start + begin, data_start + end)
    _check_layout(path, spans, data_start, size)
    return Header(tensors, metadata, spans)


def _header_length(path: Path, start: bytes, size: int) -> int:
    if len(start) < _LENGTH_BYTES:
        raise InputError(
            f"{path}: {size} bytes, expected at least {_LENGTH_BYTES} (the header's length)", remedy=COPY_AGAIN
        )
    length = int.from_bytes(start, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise InputError(
            f"{path}: header length {length}, expected 2 to {MAX_HEADER_BYTES}: not a safetensors file, or damaged",
            remedy="check that this is a safetensors file; copy or download it again",
        )
    missing = _LENGTH_BYTES + length - size
    if missing > 0:
        raise InputError(
            f"{path}: the header alone needs {_LENGTH_BYTES + length} bytes, the file has {size}: "
            f"at least {missing} bytes are missing",
            remedy=COPY_AGAIN,
        )
    return length


def _metadata(path: Path, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(f"{path}: __metadata__ is no object of strings", remedy=COPY_AGAIN)
    return value


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_DIM  # not isinstance: true is an int too


def _entry(where: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    """Dtype, shape and data offsets of one tensor, each checked by itself and against the others."""
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object, got {type(entry).__name__}", remedy=COPY_AGAIN)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(
            f"{where}: dtype {_brief(dtype)}, expected one of {', '.join(_DTYPES)}",
            remedy="use the model in 16 or 32 bit: an already quantized one cannot be read",
        )
    # The rank comes first: the product of a million huge sizes would take hours.
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        raise InputError(
            f"{where}: shape {_brief(shape)}, expected at most {MAX_RANK} whole numbers from 0", remedy=COPY_AGAIN
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise InputError(
            f"{where}: data_offsets {_brief(offsets)}, expected [begin, end] with 0 <= begin <= end", remedy=COPY_AGAIN
        )
    info = TensorInfo(_DTYPES[dtype], tuple(shape))
    begin, end = offsets
    if end - begin != info.nbytes:
        raise InputError(
            f"{where}: data_offsets [{begin}, {end}] hold {end - begin} bytes, {dtype} {shape} needs {info.nbytes}",
            remedy=COPY_AGAIN,
        )
    return info, (begin, end)


def _brief(value: object) -> str:
    """What a message shows of an untrusted value: never all of a huge one."""
    if isinstance(value, list):
        value = value[: MAX_RANK + 1]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_layout(path: Path, spans: dict[str, tuple[int, int]], data_start: int, size: int) -> None:
    """The tensors must tile the file from `data_start` to its end."""
    end = data_start
    for name, (first, last) in sorted_spans(spans):
        if first != end:
            what = "overlaps the tensor before it by" if first < end else "leaves a hole before it of"
            raise InputError(f"{path}: tensor {name!r} {what} {abs(first - end)} bytes", remedy=COPY_AGAIN)
        end = last
    if end > size:
        raise InputError(
            f"{path}: the header describes {end} bytes, the file has {size}: {end - size} bytes are missing",
            remedy=COPY_AGAIN,
        )
    if end < size:
        raise InputError(
            f"{path}: the header describes {end} bytes, the file has {size}: {size - end} bytes too many",
            remedy=COPY_AGAIN,
        )


def sorted_spans(spans: dict[str, tuple[int, int]]) -> Iterable[tuple[str, tuple[int, int]]]:
    """Names and byte spans in the order of the file, an empty span before the one that starts at the same byte."""
    return sorted(spans.items(), key=lambda item: item[1])


class SafetensorsFile:
    """A safetensors file whose tensors are mapped into memory one at a time.

    Nothing stays open between calls: a tensor's pages belong to that tensor alone, are clean (the system may drop
    and re-read them), and go with it. Writing into a loaded tensor changes neither the file nor what `load` returns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)

    def names(self) -> list[str]:
        return sorted(self.header.tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape. Raises InputError when the file has no such tensor."""
        try:
            return self.header.tensors[name]
        except KeyError:
            raise InputError(f"{self.path}: no tensor {name!r}", remedy="check that this is the right model") from None

    def load(self, name: str) -> Tensor:
        """The tensor on the CPU, in the file's dtype, backed by the file.

        Raises InputError when there is none of that name, or when the file is no longer what it was when opened.
        """
        info = self.info(name)
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.path}: tensor {name!r} cannot be loaded ({error})", remedy=COPY_AGAIN) from error
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise InputError(
                f"{self.path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, it was {info.dtype} "
                f"{list(info.shape)}: the file has changed while in use",
                remedy="start again once the file is complete",
            )
        return tensor
