"""Which arithmetic a command uses: the CUDA kernels, or the reference that runs anywhere."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq_cli.devices import resolve_device

REFERENCE: Final = "reference"
KERNELS: Final = "kernels"
_BACKENDS = ("auto", REFERENCE, KERNELS)

BackendOption = Annotated[
    str, typer.Option(metavar="NAME", help="reference, kernels (a CUDA GPU), or auto: kernels where they can run.")
]


def resolve_backend(backend: str, device: str) -> tuple[str, str, str]:
    """What `--backend` and `--device` come to on this machine: backend, device, and the reason.

    Raises InputError for an unknown name or when the two contradict each other, EnvironmentProblem when the kernels
    were asked for and cannot run here.
    """
    from qoq.calib.job import check_device

    if backend not in _BACKENDS:
        raise InputError(f"--backend {backend}: not known", remedy=f"use one of {', '.join(_BACKENDS)}")
    if backend == KERNELS and device.startswith("cpu"):
        raise InputError(f"--backend kernels: --device is {device}", remedy="leave --device out, or use cuda")
    resolved = resolve_device(device)
    if backend == REFERENCE:
        check_device(resolved)
        return REFERENCE, resolved, "as asked"
    problem = kernel_problem(resolved)
    if problem is None:
        return KERNELS, resolved, gpu_name(resolved)
    if backend == KERNELS:
        raise EnvironmentProblem(
            f"--backend kernels: {problem}",
            remedy="`qoq doctor` says what is missing; --backend reference runs anywhere",
        )
    check_device(resolved)
    return REFERENCE, resolved, problem


def kernel_problem(device: str) -> str | None:
    """Why the kernels cannot run on `device`; None when they can."""
    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if not device.startswith("cuda"):
        return f"--device is {device}"
    from qoq.calib.job import check_device

    check_device(device)
    index: int | None = torch.device(device).index
    if index is not None:
        torch.cuda.set_device(index)
    from qoq.kernels.ops import usable_device_problem

    return usable_device_problem()


def gpu_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device)
