"""`qoq doctor`: what it says of the kernels, and compiling them ahead."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from qoq.kernels.compiler import Cubin, KernelSpec, Resources
from qoq.recipes.errors import EnvironmentProblem
from qoq_cli.commands import doctor

KNOWN = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
"""Compute capabilities of the compiler."""


def findings(qoq: Any) -> dict[str, dict[str, str]]:
    return {finding["what"]: finding for finding in qoq("doctor", "--json").json["findings"]}


def test_the_kernel_cache_is_described(qoq: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQ_CACHE", str(tmp_path))
    assert "empty" in findings(qoq)["kernel cache"]["detail"]
    (tmp_path / "kernels").mkdir()
    for name in ("a.cubin", "b.cubin", "a.json"):
        (tmp_path / "kernels" / name).write_bytes(bytes(1500))
    assert f"{tmp_path / 'kernels'}: 2 kernels, 3.0 kB" in findings(qoq)["kernel cache"]["detail"]


def test_a_cache_that_cannot_be_written_is_a_note(qoq: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QOQ_CACHE", str(tmp_path / "file" / "cache"))
    found = findings(qoq)["kernel cache"]
    assert (found["status"], "cannot be written" in found["detail"]) == ("note", True)
    assert "QOQ_CACHE" in found["fix"]


def fake_packages(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], cuda: str | None) -> None:
    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr("torch.version.cuda", cuda)


def test_cupy_that_is_missing_or_of_another_cuda_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_packages(monkeypatch, {}, "12.8")
    (missing,) = doctor._kernel_tools()
    assert (missing.status, missing.fix) == ("note", "pip install 'qoq[cu12]'")
    fake_packages(monkeypatch, {"cupy-cuda12x": "14.0"}, "13.0")
    other, *_ = doctor._kernel_tools()
    assert (other.status, "PyTorch has CUDA 13.0" in other.detail) == ("note", True)
    assert "pip uninstall cupy-cuda12x" in other.fix
    fake_packages(monkeypatch, {"cupy-cuda12x": "14.0", "cupy-cuda13x": "14.0"}, "13.0")
    both, *_ = doctor._kernel_tools()
    assert "several are installed" in both.detail
    fake_packages(monkeypatch, {"cupy-cuda13x": "14.0"}, "13.0")
    right, bindings, *_ = doctor._kernel_tools()
    assert right.status == "ok"
    assert (bindings.what, bindings.status, bindings.fix) == ("cuda-bindings", "note", "pip install 'qoq[cu13]'")
    fake_packages(monkeypatch, {"cupy-cuda13x": "14.0", "cuda-bindings": "13.0"}, "13.0")
    assert doctor._kernel_tools()[1] == doctor.Finding("cuda-bindings", "ok", "13.0")


def test_an_unusable_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[int, int]:
        raise EnvironmentProblem("libnvrtc.so is missing", remedy="install it")

    fake_packages(monkeypatch, {"cupy-cuda13x": "14.0"}, "13.0")
    monkeypatch.setattr("qoq.kernels.compiler.nvrtc_version", broken)
    *_, nvrtc = doctor._kernel_tools()
    assert (nvrtc.what, nvrtc.status) == ("NVRTC", "note")
    assert "libnvrtc.so is missing" in nvrtc.detail


# ---- --warm


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """Source and architecture of what was compiled; nothing really is."""
    done: list[tuple[str, str]] = []

    def compile_all(
        jobs: Iterable[tuple[KernelSpec, str]], *, on_done: Callable[[KernelSpec, str], None]
    ) -> dict[tuple[KernelSpec, str], Cubin]:
        cubins = {}
        for spec, arch in jobs:
            on_done(spec, arch)
            done.append((spec.label, arch))
            spills = 8 if spec.source == "spills.cu" else 0
            cubins[spec, arch] = Cubin(tmp_path / f"{spec.source}.cubin", Resources(32, 0, spills))
        return cubins

    monkeypatch.setenv("QOQ_CACHE", str(tmp_path))
    monkeypatch.setattr("qoq.kernels.compiler.compile_all", compile_all)
    monkeypatch.setattr("qoq.kernels.compiler.known_capabilities", lambda: KNOWN)
    return done


def test_warm_compiles_everything_for_the_named_architecture(
    qoq: Any, compiled: list[tuple[str, str]], tmp_path: Path
) -> None:
    from qoq.kernels.dispatch import all_specs

    outcome = qoq("doctor", "--warm", "--arch", "sm_89")
    assert outcome.code == 0, outcome.stderr
    assert len(compiled) == len(all_specs("sm_89")) > 10
    assert {arch for _, arch in compiled} == {"sm_89"}
    assert f"{len(compiled)} kernels for sm_89 are in {tmp_path / 'kernels'}" in outcome.stdout
    data = qoq("doctor", "--warm", "--arch", "sm_89", "--json").json
    assert (data["kernels"], data["architecture"], data["spilled"]) == (len(compiled) // 2, "sm_89", [])


def test_warm_compiles_what_a_checkpoint_needs(
    qoq: Any, compiled: list[tuple[str, str]], tiny_checkpoint: Path
) -> None:
    assert qoq("doctor", tiny_checkpoint, "--warm", "--arch", "sm_90").code == 0
    gemms = [label for label, _ in compiled if label.startswith("sm80/gemm.cu")]
    assert gemms
    assert all("WEIGHT_FORMAT=0" in label for label in gemms), "tiny is g128"
    assert {label.partition("OUT_FORMAT=")[2][0] for label in gemms} == {"0", "2"}, "float16, and sums for verify"


@pytest.mark.parametrize(("given", "meant"), [("sm_100", "sm_100a"), ("sm_120f", "sm_120a"), ("sm_90a", "sm_90")])
def test_warm_compiles_what_launches_will_ask_for(
    given: str, meant: str, qoq: Any, compiled: list[tuple[str, str]]
) -> None:
    assert qoq("doctor", "--warm", "--arch", given, "--json").json["architecture"] == meant
    assert {arch for _, arch in compiled} == {meant}


def test_spills_are_warned_of(qoq: Any, compiled: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KernelSpec("spills.cu", "entry", (), 32)
    monkeypatch.setattr("qoq.kernels.warm.needed_specs", lambda *args: [spec])
    outcome = qoq("doctor", "--warm", "--arch", "sm_90")
    assert outcome.code == 0
    assert "spills.cu.cubin spills registers" in outcome.stderr


def test_warm_needs_a_gpu_or_an_architecture(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("qoq.kernels.compiler.known_capabilities", lambda: KNOWN)
    assert "--arch sm_90" in fails(3, "doctor", "--warm")
    assert "use one of sm_80, sm_86" in fails(2, "doctor", "--warm", "--arch", "sm_75")
    assert "8.0 (sm_80, Ampere) or newer" in fails(2, "doctor", "--warm", "--arch", "sm_75")
    assert "--arch sm_999: not known to this NVRTC" in fails(2, "doctor", "--warm", "--arch", "sm_999")
    assert "--arch hopper: not an architecture" in fails(2, "doctor", "--warm", "--arch", "hopper")
    assert "--arch sm_90: only --warm takes it" in fails(2, "doctor", "--arch", "sm_90")
    assert "only --warm takes it" in fails(2, "doctor", "some/checkpoint")
    assert "no-such-folder" in fails(2, "doctor", "--warm", "--arch", "sm_90", "no-such-folder")
