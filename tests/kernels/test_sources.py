"""The include closure: what the cache key of a kernel sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from qoq.kernels.sources import CUDA_ROOT, SourceProblem, read_closure


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_cu", ".cu")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_closure_holds_every_file_once(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        a_cu='#include "lib/b.cuh"\n  #  include "lib/c.cuh"  // why\nint a;',
        lib__b_cuh='#pragma once\n#include "lib/c.cuh"\n',
        lib__c_cuh="int c;",
    )
    closure = read_closure("a.cu", root)
    assert closure.text.endswith("int a;")
    assert dict(closure.headers) == {"lib/b.cuh": '#pragma once\n#include "lib/c.cuh"\n', "lib/c.cuh": "int c;"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\n#include <cuda_fp16.h>", "a.cu:2: expected"),
        ("#include MACRO", "a.cu:1: expected"),
        ('#include "missing.cuh"', "a.cu:1: missing.cuh: no such file"),
        ('#include "../outside.cuh"', "a.cu:1: ../outside.cuh: no such file"),
        ('#include "a.cu"', "includes itself"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    root = write(tmp_path / "root", a_cu=text)
    (tmp_path / "outside.cuh").write_text("")
    with pytest.raises(SourceProblem, match=says.replace(".", r"\.")):
        read_closure("a.cu", root)


def test_every_source_of_the_package_can_be_followed() -> None:
    sources = sorted(path.relative_to(CUDA_ROOT).as_posix() for path in CUDA_ROOT.rglob("*.cu"))
    assert "sm80/gemm.cu" in sources
    for source in sources:
        assert "common/types.cuh" in read_closure(source).headers
