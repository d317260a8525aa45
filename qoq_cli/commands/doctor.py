"""`qoq doctor`: what this machine has, one line each, with the fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qoq.recipes.errors import EnvironmentProblem, InputError, QoQError
from qoq_cli import __version__
from qoq_cli.progress import duration, size
from qoq_cli.terminal import JsonOption, QuietOption, Terminal, TracebackOption, guarded, print_text

if TYPE_CHECKING:
    from qoq.kernels.compiler import KernelSpec

_ARCHITECTURE = re.compile(r"sm_(\d{1,2})(\d)[af]?")
_OLDEST = (8, 0)
Status = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Finding:
    """One line: `missing` needs the fix, `note` is worth knowing."""

    what: str
    status: Status
    detail: str
    fix: str = ""


@guarded
def doctor(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CKPT", help="With --warm: compile what this checkpoint needs.  [default: everything]"),
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Compile the CUDA kernels into the cache now, not at their first use.")
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH",
            help="With --warm: compile for sm_80 (A100), sm_89 (L40S), sm_90 (H100), ...; needs no GPU.  "
            "[default: this GPU's]",
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Look at Python, packages, GPU, memory and network settings, and say how to mend what is missing.

    A line is ok, a note (worth knowing: no GPU, for one), or missing: then qoq does not run, and the exit code is 3.

    With --warm, compile the kernels instead, on all cores: a server that starts afterwards need not wait for them. They
    are kept in `$QOQ_CACHE/kernels` (by default under ~/.cache/qoq), by the content of their sources: an update of qoq
    compiles what it changed. The folder can be deleted at any time.

    Examples: `qoq doctor`; `qoq doctor --warm checkpoints/llama-3-8b-w4a8kv4-g128`; `qoq doctor --warm --arch sm_90`.
    """
    terminal = Terminal(as_json, quiet)
    if warm:
        _warm(terminal, checkpoint, arch)
        return
    for name, value in (("CKPT", checkpoint), ("--arch", arch)):
        if value is not None:
            raise InputError(f"{name} {value}: only --warm takes it", remedy="add --warm")
    findings = [_python(), *_packages(), _gpu(), *_kernel_tools(), _kernel_cache(), *_room(), _hub(), _shadowing()]
    ok = not any(finding.status == "missing" for finding in findings)

    def render(console: Console) -> None:
        marks = {"ok": Text("ok", "green"), "missing": Text("missing", "bold red"), "note": Text("note", "yellow")}
        table = Table(show_header=False, box=None)
        table.add_column()
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for finding in findings:
            fix = f"  -> {finding.fix}" if finding.fix else ""
            table.add_row(marks[finding.status], finding.what, finding.detail + fix)
        console.print(table)

    terminal.result({"ok": ok, "qoq": __version__, "findings": [asdict(f) for f in findings]}, render)
    if not ok:
        raise typer.Exit(3)


def _warm(terminal: Terminal, checkpoint: Path | None, arch: str | None) -> None:
    from qoq.kernels.compiler import cache_folder
    from qoq_cli.kernel_cache import compile_with_progress

    target = _target(arch)
    specs = _specs(checkpoint, target)
    cubins, seconds = compile_with_progress(terminal, [(spec, target) for spec in specs])
    spilled = [cubin.path.name for cubin in cubins if cubin.resources.spill_bytes]
    for name in spilled:
        terminal.warn(f"{name} spills registers to memory: it is right, but slower than meant")
    data: dict[str, Any] = {
        "architecture": target,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "kernels": len(cubins),
        "seconds": round(seconds, 1),
        "spilled": spilled,
        "cache": str(cache_folder()),
    }
    terminal.result(
        data,
        lambda console: print_text(
            console, f"{len(cubins)} kernels for {target} are in {cache_folder()} ({duration(seconds)})"
        ),
    )


def _target(arch: str | None) -> str:
    """The architecture to compile for, as launches will ask for it: sm_100 becomes sm_100a.

    Raises InputError for no architecture or one that cannot be compiled for, EnvironmentProblem without a GPU.
    """
    from qoq.kernels.launch import architecture, architecture_name

    if arch is not None:
        from qoq.kernels.compiler import known_capabilities

        known = [capability for capability in known_capabilities() if capability >= _OLDEST]
        given = _ARCHITECTURE.fullmatch(arch)
        capability = (int(given[1]), int(given[2])) if given else None
        if capability not in known:
            what = "not an architecture" if capability is None else "not known to this NVRTC"
            if capability is not None and capability < _OLDEST:
                what = "the kernels need compute capability 8.0 (sm_80, Ampere) or newer"
            names = ", ".join(architecture_name(each) for each in known)
            raise InputError(f"--arch {arch}: {what}", remedy=f"use one of {names}")
        return architecture_name(capability)
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            "--warm compiles for the GPU of this machine, and PyTorch sees no CUDA device",
            remedy="name the architecture to compile for: --arch sm_90 (H100), sm_89 (L40S, 4090), sm_80 (A100), ...",
        )
    return architecture(torch.cuda.current_device())


def _specs(checkpoint: Path | None, target: str) -> list[KernelSpec]:
    from qoq.kernels.warm import needed_specs

    if checkpoint is None:
        return needed_specs(target, None, None)
    from qoq.formats.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    dtype = opened.config.get("dtype") or opened.config.get("torch_dtype")
    return needed_specs(target, opened.quantization, str(dtype))


def _python() -> Finding:
    version = platform.python_version()
    return Finding("Python", "ok", f"{version} on {platform.system()} {platform.machine()}")


def _packages() -> list[Finding]:
    """What qoq's own metadata asks for, the optional extras left out."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in importlib.metadata.requires("qoq") or ()]
    except importlib.metadata.PackageNotFoundError:
        return [Finding("qoq", "note", "runs from its sources, not as an installed package", "pip install .")]
    findings = []
    for requirement in sorted(needed, key=lambda requirement: requirement.name.lower()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(requirement.name, "missing", "not installed", f"pip install '{requirement}'"))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            findings.append(Finding(requirement.name, "ok", version))
        else:
            detail = f"{version}, expected {requirement.specifier}"
            findings.append(Finding(requirement.name, "missing", detail, f"pip install '{requirement}'"))
    return findings


def _gpu() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("GPU", "missing", f"PyTorch does not import: {error}", "reinstall torch")
    if torch.cuda.is_available():
        names = [
            f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}, "
            f"{size(torch.cuda.get_device_properties(i).total_memory)})"
            for i in range(torch.cuda.device_count())
        ]
        return Finding("GPU", "ok", f"{', '.join(names)}, CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        detail, fix = "none usable: this PyTorch is a CPU build", "on a GPU machine, install PyTorch with CUDA"
    elif shutil.which("nvidia-smi") is None:
        detail, fix = "none found; everything runs on the CPU", ""
    else:
        detail = "nvidia-smi is there, but PyTorch sees no GPU"
        fix = f"the driver is too old for CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES hides it"
    return Finding("GPU", "note", detail, fix)


def _kernel_tools() -> list[Finding]:
    """CuPy and NVRTC, of which only the kernels make use."""
    try:
        import torch

        cuda = torch.version.cuda
    except ImportError:
        cuda = None
    extra = f"cu{cuda.partition('.')[0]}" if cuda else "cu13"
    install = f"pip install 'qoq[{extra}]'"
    needed = "only the kernels need it"
    found = {
        name: importlib.metadata.version(name)
        for name in ("cupy-cuda12x", "cupy-cuda13x", "cupy")
        if importlib.util.find_spec("cupy") is not None and _is_installed(name)
    }
    if not found:
        return [Finding("CuPy", "note", f"not installed ({needed})", install)]
    (package, version), *_ = found.items()
    findings = [Finding("CuPy", "ok", f"{version} ({package})")]
    if len(found) > 1:
        detail = f"several are installed ({', '.join(found)}), and they share one folder"
        findings = [Finding("CuPy", "note", detail, f"pip uninstall {' '.join(found)}; {install}")]
    elif cuda and package != "cupy" and package != f"cupy-cuda{extra[2:]}x":
        detail = f"{version} ({package}), but PyTorch has CUDA {cuda}"
        findings = [Finding("CuPy", "note", detail, f"pip uninstall {package}; {install}")]
    if _is_installed("cuda-bindings"):
        findings.append(Finding("cuda-bindings", "ok", importlib.metadata.version("cuda-bindings")))
    else:
        detail = "not installed: on Hopper each kernel starts when the one before has ended"
        findings.append(Finding("cuda-bindings", "note", detail, install))
    try:
        from qoq.kernels.compiler import nvrtc_version

        compiler = ".".join(map(str, nvrtc_version()))
        return [*findings, Finding("NVRTC", "ok", f"{compiler}: compiles the kernels at their first use")]
    except (QoQError, ImportError) as error:
        detail = error.message if isinstance(error, QoQError) else str(error)
        return [*findings, Finding("NVRTC", "note", f"{detail} ({needed})".replace("\n", " "), install)]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _kernel_cache() -> Finding:
    try:
        from qoq.kernels.compiler import cache_folder
    except ImportError as error:
        return Finding("kernel cache", "note", f"not readable: {error}")
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    is_writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    cubins = list(folder.glob("*.cubin")) if folder.is_dir() else []
    held = f"{len(cubins)} kernels, {size(sum(path.stat().st_size for path in cubins))}" if cubins else "empty"
    if not is_writable:
        fix = "set QOQ_CACHE to a folder that can be written"
        return Finding("kernel cache", "note", f"{folder}: {held}, and cannot be written", fix)
    how = "" if cubins else "filled at the first use of a kernel, or now by `qoq doctor --warm`"
    return Finding("kernel cache", "ok", f"{folder}: {held}", how)


def _room() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("disk", "ok" if free > 10**9 else "note", f"{size(free)} free here"),
        Finding("machine", "ok", f"{cores} cores, {size(memory)} memory"),
    ]


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding("hub", "note", "HF_HUB_OFFLINE is set: only local models and files are used")
    token = "with HF_TOKEN" if os.environ.get("HF_TOKEN") else "without HF_TOKEN (gated models need it)"
    return Finding("hub", "ok", token)


def _shadowing() -> Finding:
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is None:
        where = ", ".join(spec.submodule_search_locations or [])
        return Finding("kernels", "note", f"a folder named kernels is importable ({where})", "run qoq elsewhere")
    return Finding("kernels", "ok", "the name is Hugging Face's or free")
