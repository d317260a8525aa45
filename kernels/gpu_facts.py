"""What a measurement must say about the GPU it was made on."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GpuFacts:
    """The card and the software between it and us; sizes in bytes."""

    name: str
    capability: str
    num_sms: int
    l2_bytes: int
    memory_bytes: int
    driver: str | None
    cuda: str | None
    torch: str
    nvrtc: str | None


@dataclass(frozen=True)
class GpuState:
    """Clocks (MHz), power (W) and temperature (Celsius) at one moment; None where they cannot be read."""

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_w: float | None = None
    celsius: float | None = None


def read_facts(device: int) -> GpuFacts:
    """Facts about CUDA device `device`."""
    from qoq.kernels.compiler import nvrtc_version
    from qoq.recipes.errors import EnvironmentProblem

    properties = torch.cuda.get_device_properties(device)
    try:
        nvrtc = ".".join(map(str, nvrtc_version()))
    except EnvironmentProblem:
        nvrtc = None
    return GpuFacts(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        num_sms=properties.multi_processor_count,
        l2_bytes=int(properties.L2_cache_size),
        memory_bytes=int(properties.total_memory),
        driver=_ask(device, "driver_version")[0],
        cuda=torch.version.cuda,
        torch=torch.__version__,
        nvrtc=nvrtc,
    )


def read_state(device: int) -> GpuState:
    """Clocks, power and temperature right now, from nvidia-smi where there is one."""
    answers = _ask(device, "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return GpuState(*(_number(answer) for answer in answers))


def _ask(device: int, *fields: str) -> list[str | None]:
    """What nvidia-smi says; it counts cards in its own order, so the card is named by its UUID."""
    nothing: list[str | None] = [None] * len(fields)
    program = shutil.which("nvidia-smi")
    if program is None:
        return nothing
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    query = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", f"GPU-{uuid}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return nothing
    values = [value.strip() for value in answer.strip().split(",")]
    return [*values] if len(values) == len(fields) else nothing


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # "[N/A]"
        return None
