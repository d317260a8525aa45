"""The data sheet of GPUs: plausible, found by the names people use, and told apart from the GPU at hand."""

from __future__ import annotations

import dataclasses

import pytest

from qoq.recipes.errors import InputError
from qoq.recipes.gpus import Gpu, find_gpu, gpus, is_called

PROMISED = {
    "l4",
    "l40s",
    "a10",
    "a100-40gb",
    "a100-80gb",
    "rtx-3090",
    "rtx-4090",
    "rtx-5090",
    "rtx-6000-ada",
    "h100-pcie",
    "h100-sxm",
    "h100-nvl",
    "h200",
    "b200",
}
INT8_OPERATIONS = {"sm_80": 4096, "sm_86": 2048, "sm_89": 2048, "sm_90": 8192, "sm_100": 16384, "sm_120": 2048}
"""Dense operations an SM and clock, by NVIDIA's architecture papers."""


def test_the_promised_gpus_are_there() -> None:
    assert set(gpus()) == PROMISED


@pytest.mark.parametrize("gpu", gpus().values(), ids=lambda gpu: gpu.name)
def test_sheets_agree_with_themselves(gpu: Gpu) -> None:
    """The rate of the tensor cores is SMs times clock times what an SM does, within the clocks that vendors choose."""
    for field in dataclasses.fields(gpu):
        assert getattr(gpu, field.name) is not None or field.name == "fp8_tops"
    by_clock = gpu.sms * gpu.boost_ghz * INT8_OPERATIONS[gpu.architecture] * 1e-3
    assert gpu.int8_tops == pytest.approx(by_clock, rel=0.2)
    assert gpu.int8_tops / gpu.fp16_tops == pytest.approx(
        4 if gpu.name.startswith("rtx-") and "ada" not in gpu.name else 2, rel=0.02
    )
    has_fp8 = gpu.architecture not in ("sm_80", "sm_86")
    assert (gpu.fp8_tops is not None) == has_fp8
    assert gpu.tops("fp8") == gpu.fp8_tops
    assert 60 < gpu.bandwidth_gb_s / (gpu.memory_mib / 1024) ** 0.5 < 800
    assert 50 <= gpu.watts <= 1200


def test_names_and_aliases_are_unique() -> None:
    names = [name.replace("-", "") for gpu in gpus().values() for name in (gpu.name, *gpu.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("L40S", "l40s"),
        ("a100", "a100-80gb"),
        ("A100 40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("h100", "h100-sxm"),
        ("RTX 6000 Ada", "rtx-6000-ada"),
    ],
)
def test_found_as_people_write_it(name: str, found: str) -> None:
    assert find_gpu(name).name == found


def test_an_unknown_name_gets_the_closest() -> None:
    with pytest.raises(InputError, match=r"GPU 'l40x': not in the data sheet") as caught:
        find_gpu("l40x")
    assert "l40s" in str(caught.value.remedy)
    assert "`qoq gpus`" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("device", "name", "called"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", True),
        ("NVIDIA H100 80GB HBM3", "h100-sxm", True),
        ("NVIDIA H100 PCIe", "h100", True),
        ("NVIDIA H100 PCIe", "h100-sxm", False),
        ("NVIDIA H100 PCIe", "H100-PCIe", True),
        ("NVIDIA L40S", "l4", False),
        ("NVIDIA L40S", "L40S", True),
        ("NVIDIA A100-SXM4-80GB", "a100", True),
        ("NVIDIA A100-SXM4-80GB", "a100-40gb", False),
        ("NVIDIA GeForce RTX 4090", "4090", True),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada", True),
        ("NVIDIA GB300", "gb300", True),
        ("NVIDIA GB300", "b200", False),
    ],
)
def test_the_gpu_at_hand_is_recognised(device: str, name: str, called: bool) -> None:
    assert is_called(device, name) == called
