"""From a CUDA source to a cubin: one function, the same in continuous integration and at run time.

NVRTC compiles for an explicit architecture, without a GPU or a driver. CuPy's own compile path is not used: it appends
an architecture of its own, and its cache does not see edits of included files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from qoq.kernels.sources import CUDA_ROOT, SourceClosure, read_closure
from qoq.recipes.errors import EnvironmentProblem

_OPTIONS = ("-default-device", "--std=c++17", "-lineinfo", "--ptxas-options=-v")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_LOG_LINES = 40
"""Of a compiler's log in an error; the assembler repeats one mistake hundreds of times."""
_REPORT = "this is not expected of qoq's own sources: report it with the output of `qoq doctor`"


class CompileError(EnvironmentProblem):
    """NVRTC refused a source; the message holds its log, with file and line."""


@dataclass(frozen=True)
class KernelSpec:
    """One instantiation of a kernel.

    source        file under kernels/cuda, e.g. "sm80/gemm.cu"
    entry         name of its `extern "C" __global__` function
    defines       template arguments, given as macros
    threads       threads of a block
    shared_bytes  dynamic shared memory of a block
    """

    source: str
    entry: str
    defines: tuple[tuple[str, int], ...]
    threads: int
    shared_bytes: int = 0

    @property
    def label(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.defines)
        return f"{self.source}:{self.entry}<{arguments}>"


@dataclass(frozen=True)
class Resources:
    """Of one thread, from the assembler's log: registers, and bytes in local memory (stack) and spilled to it.

    waits: the assembler made every wgmma wait for the one before, as it does where it cannot follow their registers.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    waits: bool = False


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel in the cache."""

    path: Path
    resources: Resources


def cache_folder() -> Path:
    """Where cubins are kept: $QOQ_CACHE/kernels, or the user's cache folder."""
    configured = os.environ.get("QOQ_CACHE")
    return (Path(configured) if configured else user_cache_path("qoq")) / "kernels"


def compile_kernel(spec: KernelSpec, arch: str, *, folder: Path | None = None, root: Path = CUDA_ROOT) -> Cubin:
    """The cubin of `spec` for `arch` ("sm_80", "sm_100a", ...), from the cache or compiled into it.

    The key covers the texts of the source and of all it includes, every option, the architecture and the compiler's
    version. Two processes that want the same kernel compile it once; one that is there needs no lock, and so no cache
    that can be written; a damaged one is compiled again. Raises CompileError with NVRTC's log, SourceProblem, or
    EnvironmentProblem where NVRTC is missing or the cache cannot be used.
    """
    nvrtc = _nvrtc()
    arch = compiled_for(spec, arch)
    closure = read_closure(spec.source, root)
    options = (*_OPTIONS, f"-arch={arch}", *(f"-D{name}={value}" for name, value in spec.defines))
    key = _key(closure, options, nvrtc.getVersion(), spec.entry)
    folder = folder or cache_folder()
    stem = f"{Path(spec.source).stem}-{arch}-{key[:24]}"
    try:
        found = _read_entry(folder, stem)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{stem}.lock"):
                found = _read_entry(folder, stem)  # another process may have been faster
                if found is None:
                    code, log = _compile(nvrtc, closure, options, spec, arch)
                    found = _write_entry(folder, stem, code, {"spec": spec.label, "arch": arch, "log": log})
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder}: the kernel cache cannot be used: {error}",
            remedy="set QOQ_CACHE to a folder that can be written, on a disk with room",
        ) from error
    return found


def compiled_for(spec: KernelSpec, arch: str) -> str:
    """The `-arch` of `spec` on devices of `arch`: sources in sm90/ use instructions that only sm_90a has."""
    return "sm_90a" if arch == "sm_90" and spec.source.startswith("sm90/") else arch


def compile_all(
    jobs: Iterable[tuple[KernelSpec, str]],
    *,
    on_done: Callable[[KernelSpec, str], None] | None = None,
    workers: int | None = None,
) -> dict[tuple[KernelSpec, str], Cubin]:
    """Compile many kernels for their architectures in parallel threads: NVRTC leaves the interpreter while it works."""

    def one(job: tuple[KernelSpec, str]) -> Cubin:
        cubin = compile_kernel(*job)
        if on_done is not None:
            on_done(*job)
        return cubin

    distinct = list(dict.fromkeys(jobs))
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return dict(zip(distinct, pool.map(one, distinct), strict=True))


def nvrtc_version() -> tuple[int, int]:
    """Version of the compiler in use. Raises EnvironmentProblem where there is none."""
    version: tuple[int, int] = _nvrtc().getVersion()
    return version


def known_capabilities() -> tuple[tuple[int, int], ...]:
    """Compute capabilities that the compiler in use can compile for. Raises EnvironmentProblem where there is none."""
    return tuple(divmod(number, 10) for number in _nvrtc().getSupportedArchs())


def _nvrtc() -> Any:
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        raise EnvironmentProblem(
            f"the CUDA run-time compiler is not usable: {error}",
            remedy="pip install 'qoq[cu13]' (or cu12, matching the CUDA version of your PyTorch)",
        ) from error
    return nvrtc


def _key(closure: SourceClosure, options: tuple[str, ...], version: tuple[int, int], entry: str) -> str:
    facts = [closure.name, closure.text, sorted(closure.headers.items()), options, version, entry]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _compile(
    nvrtc: Any, closure: SourceClosure, options: tuple[str, ...], spec: KernelSpec, arch: str
) -> tuple[bytes, str]:
    names = [name.encode() for name in closure.headers]
    texts = [text.encode() for text in closure.headers.values()]
    program = nvrtc.createProgram(closure.text, closure.name, texts, names)
    # A kernel from NVRTC's own cache (12.9 and later) comes without the assembler's log.
    uncached = ["--no-cache"] if nvrtc.getVersion() >= (12, 9) else []
    try:
        nvrtc.compileProgram(program, [*options, *uncached])
        return _whole_elf(nvrtc.getCUBIN(program)), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = _excerpt(nvrtc.getProgramLog(program))
        raise CompileError(f"{spec.label} does not compile for {arch}: {error}\n{log}", remedy=_REPORT) from error
    finally:
        nvrtc.destroyProgram(program)


def _whole_elf(cubin: bytes) -> bytes:
    """CuPy drops the last byte, as of a C string; the driver forgives that, disassemblers do not. It was a zero."""
    program_headers, sections = struct.unpack_from("<2Q", cubin, 32)
    size, count, section_size, section_count = struct.unpack_from("<4H", cubin, 54)
    whole = max(program_headers + size * count, sections + section_size * section_count)
    return cubin + bytes(max(0, whole - len(cubin)))


def _resources(log: str) -> Resources:
    registers, frames = _REGISTERS.findall(log), _SPILLS.findall(log)
    if not registers or not frames:
        raise CompileError(f"the assembler reported no resources:\n{_excerpt(log)}", remedy=_REPORT)
    return Resources(
        registers=max(int(count) for count in registers),
        stack_bytes=max(int(stack) for stack, _, _ in frames),
        spill_bytes=max(int(stores) + int(loads) for _, stores, loads in frames),
        waits="wgmma.mma_async instructions are serialized" in log,
    )


def _excerpt(log: str) -> str:
    """The beginning of a log, a C string: errors come before the assembler's remarks."""
    lines = [line for line in log.strip("\0").strip().splitlines() if not line.startswith("ptxas info")]
    more = len(lines) - _LOG_LINES
    return "\n".join([*lines[:_LOG_LINES], *([f"... and {more} more lines"] if more > 0 else [])])


def _read_entry(folder: Path, stem: str) -> Cubin | None:
    """What the cache holds; None when that is nothing, or was cut short or altered."""
    path = folder / f"{stem}.cubin"
    try:
        facts = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        registers, stack, spilled = (int(facts[name]) for name in ("registers", "stack_bytes", "spill_bytes"))
        resources = Resources(registers, stack, spilled, waits=bool(facts["waits"]))
        is_whole = hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return Cubin(path, resources) if is_whole else None


def _write_entry(folder: Path, stem: str, code: bytes, about: dict[str, str]) -> Cubin:
    """`about` holds the log, from which the resources are read."""
    cubin = Cubin(folder / f"{stem}.cubin", _resources(about["log"]))
    facts = {**about, **asdict(cubin.resources), "sha256": hashlib.sha256(code).hexdigest()}
    _write(cubin.path, code)
    _write(folder / f"{stem}.json", json.dumps(facts).encode())
    return cubin


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, also under a crash; readable by whom the user's umask allows, who may be a server."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
