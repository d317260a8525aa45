"""Load a compiled kernel and launch it on PyTorch's current stream, on PyTorch's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qoq.kernels.compiler import KernelSpec, compile_kernel
from qoq.recipes.errors import EnvironmentProblem

_FAMILY_SPECIFIC = {(10, 0): "sm_100a", (10, 3): "sm_103a", (12, 0): "sm_120a", (12, 1): "sm_121a"}

Argument = Tensor | int | float | None
"""A tensor (its data pointer), a 32-bit integer, a 32-bit float, or a null pointer."""


class Kernel:
    """A kernel loaded on one device."""

    def __init__(self, spec: KernelSpec, device: int) -> None:
        refuse_capture()
        self._launch = _launch_function()  # says what to install where there is no CuPy
        import cupy

        self.spec = spec
        cubin = compile_kernel(spec, architecture(device))
        with torch.cuda.device(device), cupy.cuda.Device(device):
            torch.cuda.current_stream()  # the context that both share
            try:
                self._module = cupy.RawModule(path=str(cubin.path))
                function = self._module.get_function(spec.entry)
                # CuPy gives the same function to all specs of a cubin: what one has asked for must not be taken back.
                function.max_dynamic_shared_size_bytes = max(function.max_dynamic_shared_size_bytes, spec.shared_bytes)
            except cupy.cuda.driver.CUDADriverError as error:
                raise EnvironmentProblem(
                    f"{spec.label}: the driver does not load it: {error}",
                    remedy="the driver may be older than the CUDA version of the qoq[cu13] or qoq[cu12] you installed; "
                    "`qoq doctor` shows both",
                ) from error
            self.handle: int = function.kernel.ptr

    def launch(self, grid: tuple[int, int, int], arguments: Sequence[Argument], *, overlapping: bool = False) -> None:
        """Enqueue on the current stream of the current device; grid in blocks. Nothing is copied or allocated.

        overlapping: programmatic dependent launch. The kernel may start before the one enqueued last has ended, and
        waits for that by itself before it reads what it wrote. Without cuda-bindings it starts afterwards.
        """
        values = [_as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = torch.cuda.current_stream().cuda_stream
        if overlapping and _driver_bindings() is not None:
            launch_overlapping(self.handle, grid, self.spec.threads, self.spec.shared_bytes, stream, pointers)
            return
        self._launch(
            self.handle,
            *grid,
            self.spec.threads,
            1,
            1,
            self.spec.shared_bytes,
            stream,
            ctypes.addressof(pointers),
            0,
        )


@cache
def load_kernel(spec: KernelSpec, device: int) -> Kernel:
    """`spec` on CUDA device `device`, compiled and loaded at its first use; load before capturing a CUDA graph."""
    return Kernel(spec, device)


def refuse_capture() -> None:
    """Raise RuntimeError while a CUDA graph is captured, which what an operator's first call does would spoil."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call the operator once before capturing a CUDA graph: it loads the kernel then")


@cache
def architecture(device: int) -> str:
    """The `-arch` that kernels are compiled with for this device. Raises EnvironmentProblem before Ampere."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise EnvironmentProblem(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; the kernels "
            "need 8.0 (Ampere) or newer",
            remedy="use the reference backend",
        )
    return architecture_name(capability)


def architecture_name(capability: tuple[int, int]) -> str:
    """The `-arch` of kernels for devices of this compute capability."""
    return _FAMILY_SPECIFIC.get(capability, f"sm_{capability[0]}{capability[1]}")


def is_hopper(device: int) -> bool:
    """Whether the kernels in cuda/sm90 run on this device."""
    return architecture(device) == "sm_90"


@cache
def may_overlap(device: int) -> bool:
    """Whether kernels that wait for the one before may be launched overlapping: from Hopper on."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def num_sms(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _launch_function() -> Any:
    try:
        from cupy_backends.cuda.api import driver
    except ImportError as error:
        raise EnvironmentProblem(
            f"CuPy is not usable: {error}",
            remedy="pip install 'qoq[cu13]' (or cu12, matching the CUDA version of your PyTorch)",
        ) from error
    return driver.launchKernel


def launch_overlapping(
    handle: int, grid: tuple[int, int, int], threads: int, shared_bytes: int, stream: int, pointers: Any
) -> None:
    """cuLaunchKernelEx with programmatic stream serialization (CUDA driver API, "CUlaunchAttributeID").

    Raises RuntimeError when the driver refuses the launch.
    """
    driver = _driver_bindings()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    config.attrs, config.numAttrs = [_overlap_attribute()], 1
    (status,) = driver.cuLaunchKernelEx(config, handle, ctypes.addressof(pointers), 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver refused a launch: {status.name}")


@cache
def _overlap_attribute() -> Any:
    driver = _driver_bindings()
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


@cache
def _driver_bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


def _as_c(argument: Argument) -> Any:
    match argument:
        case None:
            return ctypes.c_void_p(0)
        case Tensor():
            return ctypes.c_void_p(argument.data_ptr())
        case float():
            return ctypes.c_float(argument)
        case _:
            return ctypes.c_int32(argument)
