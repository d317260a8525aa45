"""Load a checkpoint, or a 16-bit model, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import qoq.kernels.hf  # noqa: F401  (registers the format)
from qoq.formats.checkpoint import is_checkpoint, open_checkpoint
from qoq.formats.sources import is_gguf
from qoq.recipes.errors import InputError


def load_model(path: Path, *, device: str = "cpu", trust_remote_code: bool = False) -> PreTrainedModel:
    """The model at `path` (checkpoint, folder or .gguf file) in float32 on the CPU, in its own 16-bit type on a GPU.

    Raises InputError when a checkpoint is incomplete or the model cannot be loaded.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    options["dtype"] = torch.float32 if device == "cpu" else "auto"
    folder = path
    if is_gguf(path):
        folder, options["gguf_file"] = path.parent, path.name
    elif is_checkpoint(path):
        open_checkpoint(path)  # complete, and its headers sound, before transformers reads a byte
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be loaded: {error}") from error
    torch.nn.Module.to(model, torch.device(device))  # transformers' own `to` is not typed for a device
    model.eval()
    return model
