"""Runs CUDA kernels on the CPU: g++ takes their own sources, with emulating headers before the real ones.

What the kernel may not do ends the launch with `EmulationError`: see memory.cc. Where the device has a choice (in which
order blocks and warps run) a seed decides; copies are done as late as possible.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from qoq.kernels.compiler import KernelSpec
from qoq.kernels.sources import CUDA_ROOT

HERE = Path(__file__).resolve().parent
RUNTIME = ("threads.cc", "memory.cc", "instructions.cc")
_OPTIONS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
_RUNTIME_OPTIONS = ("-O2", "-Wall", "-Wextra")
_KERNEL_OPTIONS = (
    "-O1",
    "-Wno-unknown-pragmas",  # unroll
    "-fwrapv",
    "-ftrivial-auto-var-init=pattern",  # registers begin as garbage
    "-fsanitize=thread,alignment,bounds",
)
_LINK_OPTIONS = ("-shared", "-pthread", "-Wl,-Bsymbolic,--no-undefined")
_JOBS = 2
_GAP = 1 << 20
"""Bytes of nothing between tensors."""
_MESSAGE_BYTES = 1024


class EmulationError(Exception):
    """The kernel did what it may not: which block and thread, and what."""


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("writable", ctypes.c_int32),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("arguments", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("num_buffers", ctypes.c_int32),
    )


def missing_compiler() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    if sys.platform != "linux":
        return "kernels are emulated on Linux only"
    if shutil.which("g++") is None:
        return "no g++, which compiles kernels for the CPU"
    probe = subprocess.run(
        ["g++", *_OPTIONS, *_KERNEL_OPTIONS, "-fsyntax-only", "-x", "c++", "/dev/null"], capture_output=True, text=True
    )
    return f"g++ is too old: {probe.stderr.strip()}" if probe.returncode else None


class Emulator:
    """The emulated device, compiled into `folder`, and what compiles kernels for it."""

    def __init__(self, folder: Path) -> None:
        def compile_runtime(name: str) -> str:
            made = str(folder / f"{name}.o")
            _run("g++", *_OPTIONS, *_RUNTIME_OPTIONS, "-c", str(HERE / name), "-o", made)
            return made

        with ThreadPoolExecutor(_JOBS) as pool:
            self._runtime = list(pool.map(compile_runtime, RUNTIME))

    def compile(self, specs: Sequence[KernelSpec], folder: Path, root: Path = CUDA_ROOT) -> list[EmulatedKernel]:
        """Kernels of the sources under `root`, compiled into `folder`, where these specs were not compiled before."""
        with ThreadPoolExecutor(_JOBS) as pool:
            return list(pool.map(lambda spec: self._compile(spec, folder, root), specs))

    def _compile(self, spec: KernelSpec, folder: Path, root: Path) -> EmulatedKernel:
        stem = "-".join([Path(spec.source).stem, *(str(value) for _, value in spec.defines)])
        compiled, library = str(folder / f"{stem}.o"), folder / f"{stem}.so"
        macros = [f"-D{name}={value}" for name, value in spec.defines]
        macros += [f'-DSOURCE="{spec.source}"', f"-DENTRY={spec.entry}"]
        includes = (f"-I{HERE}", f"-I{root}")
        _run("g++", *_OPTIONS, *_KERNEL_OPTIONS, *includes, *macros, "-c", str(HERE / "launch.cc"), "-o", compiled)
        _run("g++", *_LINK_OPTIONS, compiled, *self._runtime, "-o", str(library))
        return EmulatedKernel(spec, library, (root / spec.source).read_text(encoding="utf-8"))


class EmulatedKernel:
    """As `qoq.kernels.launch.Kernel`, for tensors on the CPU."""

    def __init__(self, spec: KernelSpec, library: Path, source: str) -> None:
        self.spec, self.seed = spec, 0
        self._emulate = ctypes.CDLL(str(library)).qoq_emulate
        self._parameters = _parameters(source, spec.entry)

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[Tensor | int | float | None],
        *,
        overlapping: bool = False,
    ) -> None:
        """Run the kernel to its end. Raises EmulationError where it does what it may not."""
        memory = _Memory([argument for argument in arguments if isinstance(argument, Tensor)])
        values: list[ctypes.c_void_p | ctypes.c_int32 | ctypes.c_float] = []
        buffers = []
        for (name, is_input), argument in zip(self._parameters, arguments, strict=True):
            match argument:
                case Tensor():
                    address, size = memory.place(argument)
                    buffers.append(_Buffer(name.encode(), address, size, not is_input))
                    values.append(ctypes.c_void_p(address))
                case None:
                    values.append(ctypes.c_void_p(0))
                case float():
                    values.append(ctypes.c_float(argument))
                case int():
                    values.append(ctypes.c_int32(argument))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        request = _Request(
            grid=grid,
            threads=self.spec.threads,
            shared_bytes=self.spec.shared_bytes,
            seed=self.seed,
            arguments=ctypes.addressof(pointers),
            buffers=(_Buffer * len(buffers))(*buffers),
            num_buffers=len(buffers),
        )
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        if self._emulate(ctypes.byref(request), message, _MESSAGE_BYTES):
            raise EmulationError(f"{self.spec.label}: {message.value.decode()}")
        memory.copy_back()


class _Memory:
    """Copies of tensors, far from each other and no better aligned than they must be (16 bytes)."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._all = torch.empty(sum(t.nbytes + 2 * _GAP for t in tensors) + _GAP, dtype=torch.uint8)
        at = _GAP - self._all.data_ptr() % _GAP
        for tensor in tensors:
            copy = self._all[at + 16 : at + 16 + tensor.nbytes]
            copy.copy_(tensor.reshape(-1).view(torch.uint8))
            self._copies.append((tensor, copy))
            at += -(-tensor.nbytes // _GAP) * _GAP + _GAP

    def place(self, tensor: Tensor) -> tuple[int, int]:
        """Address and bytes of the copy."""
        copy = next(copy for original, copy in self._copies if original is tensor)
        return copy.data_ptr(), copy.nbytes

    def copy_back(self) -> None:
        for original, copy in self._copies:
            original.view(-1).view(torch.uint8).copy_(copy)


def _parameters(source: str, entry: str) -> list[tuple[str, bool]]:
    """Name of each parameter of the kernel, and whether it is an input: a pointer to const."""
    found = re.search(rf"{entry}\(([^)]*)\)", source)
    if found is None:
        raise ValueError(f"no function {entry}")
    return [(words.split()[-1].lstrip("*"), "const" in words) for words in found.group(1).split(",")]


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
