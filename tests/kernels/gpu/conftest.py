"""A CUDA device that the kernels can run on, or a reason why the tests are skipped."""

from __future__ import annotations

import pytest
import torch

from qoq.kernels.ops import usable_device_problem


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    problem = usable_device_problem()
    if problem is not None:
        pytest.skip(problem)
    return torch.device("cuda", torch.cuda.current_device())
