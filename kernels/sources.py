"""CUDA sources and the files they include: what a compiled kernel depends on, byte for byte."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qoq.recipes.errors import EnvironmentProblem

CUDA_ROOT = Path(__file__).resolve().parent / "cuda"
"""Sources are named relative to it, in specs and in `#include "..."` lines."""

_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include\b(.*)$", re.MULTILINE)
_QUOTED = re.compile(r'^[ \t]+"([A-Za-z0-9_./]+)"[ \t]*(?://.*)?$')


class SourceProblem(EnvironmentProblem):
    """A source is missing, or includes what cannot be followed: the installation is damaged or a kernel is wrong."""


@dataclass(frozen=True)
class SourceClosure:
    """`text` of the source and of every file it includes, directly or not, by the name it is included by."""

    name: str
    text: str
    headers: Mapping[str, str]


def read_closure(name: str, root: Path = CUDA_ROOT) -> SourceClosure:
    """The source `name` and everything it includes.

    Only `#include "path"`, the path relative to `root`, is understood: the kernels need no header of the CUDA toolkit,
    and a file that the reader does not see would be missing from the cache key. Raises SourceProblem with file and
    line.
    """
    headers: dict[str, str] = {}
    text = _read(name, root, wanted_by=None)
    _follow(name, text, root, headers, chain=(name,))
    return SourceClosure(name, text, headers)


def _follow(name: str, text: str, root: Path, headers: dict[str, str], chain: tuple[str, ...]) -> None:
    for match in _INCLUDE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        quoted = _QUOTED.match(match.group(1))
        if quoted is None:
            raise SourceProblem(f'{name}:{line}: expected #include "file.cuh", got {match.group(0).strip()!r}')
        included = quoted.group(1)
        if included in chain:
            raise SourceProblem(f"{name}:{line}: {included} includes itself, through {' -> '.join(chain)}")
        if included not in headers:
            headers[included] = _read(included, root, wanted_by=f"{name}:{line}")
            _follow(included, headers[included], root, headers, (*chain, included))


def _read(name: str, root: Path, wanted_by: str | None) -> str:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
        where = f"{wanted_by}: " if wanted_by else ""
        raise SourceProblem(f"{where}{name}: no such file under {root}", remedy="reinstall qoq")
    return path.read_text(encoding="utf-8")
