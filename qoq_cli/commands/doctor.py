"""`qoq doctor`: what this machine has, one line each, with the fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qoq_cli import __version__
from qoq_cli.progress import size
from qoq_cli.terminal import JsonOption, Terminal, TracebackOption, guarded

Status = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Finding:
    """One line: `missing` needs the fix, `note` is worth knowing."""

    what: str
    status: Status
    detail: str
    fix: str = ""


@guarded
def doctor(as_json: JsonOption = False, traceback: TracebackOption = False) -> None:
    """Look at Python, packages, GPU, memory and network settings, and say how to mend what is missing.

    Exit code 3 when something that qoq cannot do without is missing; a GPU is not needed.
    """
    import typer

    findings = [_python(), *_packages(), _gpu(), *_room(), _hub(), _shadowing()]
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

    Terminal(as_json).result({"ok": ok, "qoq": __version__, "findings": [asdict(f) for f in findings]}, render)
    if not ok:
        raise typer.Exit(3)


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
