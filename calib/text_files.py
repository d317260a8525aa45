"""Documents from .txt, .jsonl and .parquet files; whatever is wrong with a file is said with its name and line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qoq.recipes.errors import InputError

_BLANK_LINES = re.compile(r"\n\s*\n")
_ONE_A_LINE = 'expected one {"text": "..."} a line'


class Documents(Protocol):
    """A sized, indexable collection of texts: a list, or rows that are read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


@dataclass(frozen=True)
class Rows:
    """Texts read by row number; a missing text counts as empty."""

    count: int
    read: Callable[[int], str | None]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> str:
        return self.read(index) or ""


def read_documents(path: Path) -> Documents:
    """Documents of a file, by its suffix: parts between blank lines (.txt), or the column `text` (.jsonl, .parquet).

    Raises InputError when the file cannot be read, is empty, or is not what its suffix says.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: not a text that can be read here", remedy=f"give a {', '.join(TEXT_SUFFIXES)} file")
    try:
        documents = reader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not len(documents):
        raise InputError(f"{path}: is empty", remedy="give a text of at least one window of tokens")
    return documents


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start})",
            remedy="give plain text; if only the encoding differs: iconv -f UTF-16 -t UTF-8 OLD > NEW",
        ) from error
    if "\0" in text:
        raise InputError(f"{path}: holds binary data, expected text", remedy="give plain text in UTF-8")
    return text.replace("\r\n", "\n")


def _text_documents(path: Path) -> Documents:
    parts = (part.strip("\n") for part in _BLANK_LINES.split(_read_text(path)))
    return [part for part in parts if part.strip()]


def _jsonl_documents(path: Path) -> Documents:
    # Not splitlines(): JSON strings may hold other line separators as they are, such as U+2028.
    lines = enumerate(_read_text(path).split("\n"), start=1)
    return [_text_of_line(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _text_of_line(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})", remedy=_ONE_A_LINE) from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}, expected an object", remedy=_ONE_A_LINE)
    _require_text_column(where, list(row))
    text = row["text"]
    if not isinstance(text, str):
        raise InputError(f"{where}: `text` is {type(text).__name__}, expected a string", remedy=_ONE_A_LINE)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of an escaped surrogate pair: JSON admits it, tokenizers do not
        raise InputError(f"{where}: `text` is not valid Unicode ({error.reason})", remedy="remove the line") from error
    return text


def _parquet_documents(path: Path) -> Documents:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
        _require_text_column(str(path), schema.names)
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"{path}: column `text` holds {kind}, expected strings")
        column = parquet.read_table(path, columns=["text"]).column("text")
    except pa.ArrowException as error:
        raise InputError(
            f"{path}: not a readable parquet file ({str(error).splitlines()[0]})", remedy="copy or make the file again"
        ) from error
    return Rows(len(column), lambda index: column[index].as_py())


def _require_text_column(where: str, columns: list[str]) -> None:
    if "text" not in columns:
        found = ", ".join(columns) or "none"
        raise InputError(f"{where}: no column `text`; columns found: {found}", remedy="rename the column to `text`")


_READERS: Mapping[str, Callable[[Path], Documents]] = {
    ".txt": _text_documents,
    ".jsonl": _jsonl_documents,
    ".parquet": _parquet_documents,
}
TEXT_SUFFIXES = tuple(_READERS)
