"""Compilation without a GPU: the cache's key, its concurrency, and errors that name file and line."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qoq.kernels import compiler
from qoq.kernels.compiler import CompileError, KernelSpec, compile_all, compile_kernel, nvrtc_version
from qoq.recipes.errors import EnvironmentProblem, QoQError

HEADER = "#pragma once\n__device__ int twice(int x) { return 2 * x; }\n"
KERNEL = '#include "twice.cuh"\nextern "C" __global__ void k(int* x) { x[0] = twice(x[0]) + MORE; }\n'

try:
    nvrtc_version()
except QoQError as error:
    pytestmark = pytest.mark.skip(reason=error.message)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "twice.cuh").write_text(HEADER)
    (folder / "k.cu").write_text(KERNEL)
    return folder


def spec(more: int = 1) -> KernelSpec:
    return KernelSpec("k.cu", "k", (("MORE", more),), 32)


def test_a_cubin_is_whole_and_says_its_resources(root: Path, tmp_path: Path) -> None:
    cubin = compile_kernel(spec(), "sm_80", folder=tmp_path / "cache", root=root)
    data = cubin.path.read_bytes()
    assert data.startswith(b"\x7fELF")
    assert compiler._whole_elf(data[:-1]) == data
    assert 1 <= cubin.resources.registers <= 255
    assert (cubin.resources.stack_bytes, cubin.resources.spill_bytes) == (0, 0)


def test_the_key_sees_options_architecture_source_and_headers(root: Path, tmp_path: Path) -> None:
    def path(more: int = 1, arch: str = "sm_80") -> Path:
        return compile_kernel(spec(more), arch, folder=tmp_path / "cache", root=root).path

    first = path()
    assert path() == first
    others = {path(more=2), path(arch="sm_90")}
    (root / "twice.cuh").write_text(HEADER.replace("2 * x", "x + x"))
    others.add(path())
    (root / "k.cu").write_text(KERNEL + "// a remark\n")
    others.add(path())
    assert len(others | {first}) == 5


def test_many_threads_compile_one_kernel_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compile_once = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *a: calls.append(a) or compile_once(*a))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(compile_kernel, spec(), "sm_80", folder=tmp_path / "cache", root=root) for _ in range(8)]
    assert len({job.result() for job in jobs}) == 1
    assert len(calls) == 1


def test_what_is_in_the_cache_needs_neither_lock_nor_room(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a cache that another user filled, and that may only be read."""
    first = compile_kernel(spec(), "sm_80", folder=tmp_path / "cache", root=root)
    assert first.path.stat().st_mode & 0o444 == 0o666 & ~read_umask() & 0o444
    monkeypatch.setattr(compiler, "FileLock", lambda _: pytest.fail("locked"))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("made a folder"))
    assert compile_kernel(spec(), "sm_80", folder=tmp_path / "cache", root=root) == first


@pytest.mark.parametrize("suffix", [".json", ".cubin"])
@pytest.mark.parametrize("damage", ["cut_short", "emptied", "altered", "gone"])
def test_a_damaged_entry_is_compiled_again(suffix: str, damage: str, root: Path, tmp_path: Path) -> None:
    whole = compile_kernel(spec(), "sm_80", folder=tmp_path / "cache", root=root)
    path = whole.path.with_suffix(suffix)
    data = path.read_bytes()
    broken = {"cut_short": data[: len(data) // 2], "emptied": b"", "altered": b"[]" + data[2:]}
    path.write_bytes(broken[damage]) if damage in broken else path.unlink()
    assert compile_kernel(spec(), "sm_80", folder=tmp_path / "cache", root=root) == whole
    assert suffix == ".json" or path.read_bytes() == data  # the log of the other holds times
    assert not list((tmp_path / "cache").glob("*.tmp"))


def read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_compile_all_reports_each_and_drops_repetitions(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QOQ_CACHE", str(tmp_path))
    real = compiler.compile_kernel
    monkeypatch.setattr(compiler, "compile_kernel", lambda s, a: real(s, a, root=root))
    done = []
    cubins = compile_all(
        [(spec(1), "sm_80"), (spec(2), "sm_80"), (spec(1), "sm_80")], on_done=lambda *j: done.append(j)
    )
    assert len(cubins) == len(done) == 2
    assert all(cubin.path.parent == tmp_path / "kernels" for cubin in cubins.values())


def test_an_error_names_file_line_and_instantiation(root: Path, tmp_path: Path) -> None:
    (root / "twice.cuh").write_text("#pragma once\n\n__device__ int twice(int x) { return wrong; }\n")
    with pytest.raises(CompileError) as caught:
        compile_kernel(spec(), "sm_80", folder=tmp_path / "cache", root=root)
    assert "twice.cuh(3): error" in caught.value.message
    assert "k.cu:k<MORE=1>" in caught.value.message
    assert not list((tmp_path / "cache").glob("*.cubin"))


def test_a_long_log_is_cut(root: Path, tmp_path: Path) -> None:
    unknown = "\n".join(f"  x += unknown{i};" for i in range(90))
    (root / "twice.cuh").write_text(f"#pragma once\n__device__ int twice(int x) {{\n{unknown}\n  return x;\n}}\n")
    with pytest.raises(CompileError, match="more lines") as caught:
        compile_kernel(spec(), "sm_80", folder=tmp_path / "cache", root=root)
    assert len(caught.value.message.splitlines()) < 50
    assert "twice.cuh(3): error" in caught.value.message
    assert "qoq doctor" in str(caught.value.remedy)


def test_a_cache_that_cannot_be_written_names_the_remedy(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="QOQ_CACHE"):
        compile_kernel(spec(), "sm_80", folder=tmp_path / "file", root=root)


def test_a_missing_compiler_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EnvironmentProblem("none", remedy="pip install 'qoq[cu13]'")

    monkeypatch.setattr(compiler, "_nvrtc", missing)
    with pytest.raises(EnvironmentProblem, match="cu13"):
        nvrtc_version()
