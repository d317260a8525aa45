"""Launches that may overlap: what the driver is asked for, and what is said when it refuses. Nothing is launched."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from qoq.kernels import launch

driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments of launches; `answer.status` of the bindings is what the driver says."""
    calls: list[Any] = []
    answer = SimpleNamespace(status=driver.CUresult.CUDA_SUCCESS)

    def record(*arguments: Any) -> tuple[Any]:
        calls.append(arguments)
        return (answer.status,)

    names = ("CUlaunchConfig", "CUlaunchAttribute", "CUlaunchAttributeID", "CUresult")
    bindings = SimpleNamespace(
        **{name: getattr(driver, name) for name in names}, cuLaunchKernelEx=record, answer=answer
    )
    monkeypatch.setattr(launch, "_driver_bindings", lambda: bindings)
    monkeypatch.setattr(launch, "_overlap_attribute", launch._overlap_attribute.__wrapped__)
    return calls


def test_an_overlapping_launch_has_the_attribute_and_the_sizes(asked: list[Any]) -> None:
    pointers = (ctypes.c_void_p * 1)(None)
    launch.launch_overlapping(1234, (7, 2, 1), 288, 4096, 99, pointers)
    config, handle, parameters, extra = asked[0]
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (7, 2, 1)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (288, 1, 1)
    assert (config.sharedMemBytes, int(config.hStream), config.numAttrs) == (4096, 99, 1)
    (attribute,) = config.attrs
    assert attribute.id == driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert attribute.value.programmaticStreamSerializationAllowed == 1
    assert (handle, parameters, extra) == (1234, ctypes.addressof(pointers), 0)


def test_a_refused_launch_is_an_error(asked: list[Any]) -> None:
    launch._driver_bindings().answer.status = driver.CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
    with pytest.raises(RuntimeError, match="refused a launch: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        launch.launch_overlapping(1, (1, 1, 1), 32, 0, 0, (ctypes.c_void_p * 1)(None))
    assert len(asked) == 1
