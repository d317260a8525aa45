"""Load a checkpoint, or a 16-bit model, through transformers; and run it over windows of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import qoq.kernels.hf
from qoq.formats.checkpoint import is_checkpoint, open_checkpoint
from qoq.formats.sources import is_gguf
from qoq.kernels.modules import Backend
from qoq.recipes.errors import InputError

_BATCH_TOKENS = 4096
"""Tokens that go through the model at once; bounds the logits of large vocabularies."""


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
        raise InputError(
            f"{path}: cannot be loaded: {error}",
            remedy="check that it is a whole model of a kind that transformers reads",
        ) from error
    torch.nn.Module.to(model, torch.device(device))  # transformers' own `to` is not typed for a device
    model.eval()
    return model


def load_as_served(
    path: Path, *, device: str, kv_bits: int, act_bits: int, backend: Backend, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model at `path` with its cache and the inputs of its quantized linears at so many bits, on `backend`.

    A 16-bit model has no quantized linears, and `act_bits` changes nothing there. Raises InputError as `load_model`.
    """
    model = load_model(path, device=device, trust_remote_code=trust_remote_code)
    qoq.kernels.hf.set_act_bits(model, act_bits)
    qoq.kernels.hf.set_kv_bits(model, kv_bits)
    qoq.kernels.hf.set_backend(model, backend)
    return model


class KernelModel:
    """A checkpoint as it is served: 16-bit activations between linears, everything quantized on the kernels.

    It is loaded when its first logits are asked for, and given back after the last.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        kv_bits: int,
        on_windows: Callable[[int], None] = lambda _: None,
        trust_remote_code: bool = False,
    ) -> None:
        self._path, self._device, self._kv_bits = path, device, kv_bits
        self._on_windows, self._trust = on_windows, trust_remote_code

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """Logits float32 [L, V] of each window of token ids [S, L], in order.

        Raises EnvironmentProblem when the kernels cannot run, InputError when the checkpoint cannot be loaded.
        """
        model = load_as_served(
            self._path,
            device=self._device,
            kv_bits=self._kv_bits,
            act_bits=8,
            backend="kernels",
            trust_remote_code=self._trust,
        )
        batch = max(1, _BATCH_TOKENS // windows.shape[1])
        for tokens in windows.split(batch):
            with torch.no_grad():  # not around the yield: the mode is global, and would be the caller's meanwhile
                logits = model(input_ids=tokens.to(self._device), use_cache=False).logits
            self._on_windows(len(tokens))
            for window in logits:
                yield window.float()
