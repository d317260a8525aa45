"""Whether vLLM with qoq's plug-in can be started on this machine, and how."""

from __future__ import annotations

import importlib.metadata
import os
import sys

from qoq.recipes.errors import EnvironmentProblem

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
"""vLLM's own command line, in the environment of this process."""
_BREAKS = "TQDM_DISABLE"
"""With it, vLLM 0.26's generate divides by the time of a progress bar that has none. `qoq` sets it for itself."""
_PLUGINS, _OURS = "vllm.general_plugins", "qoq"
_INSTALL = "pip install -c constraints-vllm.txt 'qoq[vllm]'"


def environment() -> dict[str, str]:
    """The environment variables that VLLM is run with."""
    return {name: value for name, value in os.environ.items() if name != _BREAKS}


def check_vllm() -> str:
    """The version of vLLM. Raises EnvironmentProblem where it, the plug-in or a GPU is missing, or the plug-in is left
    out."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentProblem("vLLM is not installed", remedy=_INSTALL) from error
    if _OURS not in {plugin.name for plugin in importlib.metadata.entry_points(group=_PLUGINS)}:
        raise EnvironmentProblem(
            "vLLM does not find qoq's plug-in: qoq is not installed in the environment of vLLM", remedy=_INSTALL
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _OURS not in allowed.split(","):
        raise EnvironmentProblem(
            f"VLLM_PLUGINS is {allowed!r} and leaves out qoq's plug-in", remedy="unset it, or add qoq to it"
        )
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            "vLLM needs a GPU, and PyTorch sees no CUDA device", remedy="`qoq doctor` says what is missing"
        )
    return version
