"""Models that were named to be evaluated: opened, with the bits and the backend that they run at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qoq.recipes.errors import InputError
from qoq_cli.backends import KERNELS, REFERENCE, resolve_backend
from qoq_cli.model_location import EMBEDDED, TINY, TINY_OUTLIER, resolve_model
from qoq_cli.terminal import Terminal

if TYPE_CHECKING:
    import torch

    from qoq.calib.perplexity import Forward
    from qoq.kernels.modules import Backend

_UNKNOWN_POSITIONS = 2048


@dataclass(frozen=True)
class Candidate:
    """A model, and how it is run.

    weights       4 or 16 bit
    key_rotation  of keys in a cache of 4 or 8 bits; see `served_key_rotation`
    positions     the longest text, in tokens, that the model knows
    """

    label: str
    path: Path
    weights: int
    act_bits: int
    kv_bits: int
    key_rotation: str
    backend: Backend
    positions: int
    is_baseline: bool = False

    @property
    def scheme(self) -> str:
        return f"w{self.weights}a{self.act_bits}kv{self.kv_bits}"

    @property
    def served_key_rotation(self) -> str:
        """How keys are rotated while the model runs; a cache of 16 bits leaves them as they are."""
        return "none" if self.kv_bits == 16 else self.key_rotation

    @property
    def is_quantized(self) -> bool:
        return self.weights == 4


@dataclass(frozen=True)
class OpenedModel:
    """A candidate and its logits; `make_forward` takes what to call with the blocks that were done since the last."""

    candidate: Candidate
    blocks: int
    make_forward: Callable[[Callable[[float], None]], Forward]


class Opener:
    """Opens models, all with the same options; `backend` is that of the checkpoints, for `reason`."""

    def __init__(
        self,
        terminal: Terminal,
        backend: str,
        device: str,
        kv_bits: int | None,
        act_bits: int | None,
        revision: str | None,
        trust_remote_code: bool,
    ) -> None:
        self.backend, self.device, self.reason = resolve_backend(backend, device)
        if self.backend == KERNELS and act_bits == 16:
            self.backend, self.reason = REFERENCE, "the kernels take 8-bit activations only"
        self._must_run_kernels = backend == KERNELS
        self._terminal = terminal
        self._kv_bits, self._act_bits = kv_bits, act_bits
        self._revision, self._trust = revision, trust_remote_code
        self.all_embedded = True

    def open(self, name: str, *, is_baseline: bool) -> OpenedModel:
        """Open a checkpoint or a 16-bit model; only the KV cache of the latter can be told to have fewer bits."""
        from torch import device as torch_device

        from qoq.calib.plan import open_model
        from qoq.calib.served import open_served
        from qoq.calib.streaming import StreamedModel
        from qoq.formats.checkpoint import is_checkpoint

        location = resolve_model(name, hub_revision=self._revision, with_code=self._trust, note=self._terminal.note)
        target = torch_device(self.device)
        if is_checkpoint(location.path):
            served = open_served(location.path, trust_remote_code=self._trust)
            config = served.checkpoint.quantization
            made_from = str(served.checkpoint.manifest.get("source", {}).get("model"))
            self.all_embedded &= made_from in (TINY, TINY_OUTLIER)
            skeleton, source, checkpoint = served.skeleton, served.checkpoint.source, served.checkpoint
            kv_bits = self._kv_bits or config.kv_bits
            # Only quantized linears take 8-bit activations, so without any there are none.
            act_bits = (self._act_bits or config.act_bits) if served.quantized else 16
            weights, key_rotation = 4 if served.quantized else 16, config.key_rotation
        else:
            self.all_embedded &= location.kind == EMBEDDED
            skeleton, source = open_model(location.path, trust_remote_code=self._trust)
            kv_bits = 16 if is_baseline else self._kv_bits or 16
            checkpoint, act_bits, weights, key_rotation = None, 16, 16, "none"

        backend: Backend = (
            KERNELS if self.backend == KERNELS and checkpoint is not None and act_bits == 8 else REFERENCE
        )
        if checkpoint is not None and self._must_run_kernels and backend != KERNELS:
            raise InputError(
                f"--backend kernels: {name} has {act_bits}-bit activations, and the kernels take 8-bit ones only",
                remedy="pass --act-bits 8, or --backend reference",
            )

        def make_forward(on_blocks: Callable[[float], None]) -> Forward:
            if backend == KERNELS:
                return self._kernel_forward(location.path, kv_bits, skeleton.num_blocks, on_blocks)
            return StreamedModel(
                skeleton,
                source,
                device=target,
                checkpoint=checkpoint,
                act_bits=act_bits,
                kv_bits=kv_bits,
                on_block=lambda _: on_blocks(1),
            ).logits

        candidate = Candidate(
            name,
            location.path,
            weights=weights,
            act_bits=act_bits,
            kv_bits=kv_bits,
            key_rotation=key_rotation,
            backend=backend,
            positions=int(getattr(skeleton.config, "max_position_embeddings", _UNKNOWN_POSITIONS)),
            is_baseline=is_baseline,
        )
        return OpenedModel(candidate, skeleton.num_blocks, make_forward)

    def _kernel_forward(self, path: Path, kv_bits: int, blocks: int, on_blocks: Callable[[float], None]) -> Forward:
        from transformers.utils.logging import disable_progress_bar

        from qoq.kernels.loading import KernelModel
        from qoq.kernels.runtime.model import Options
        from qoq.kernels.runtime.scoring import RuntimeWindows

        disable_progress_bar()  # of loading weights; it would write to stderr

        def forward(windows: torch.Tensor) -> Iterator[torch.Tensor]:
            def on_windows(count: int) -> None:
                on_blocks(blocks * count / len(windows))

            if self._trust:  # the model's own code may compute something else than its family does
                model = KernelModel(
                    path, device=self.device, kv_bits=kv_bits, on_windows=on_windows, trust_remote_code=True
                )
                return model.logits(windows)
            options = Options(device=self.device, kv_bits=kv_bits, act_bits=8)
            return RuntimeWindows(path, options, on_windows=on_windows).logits(windows)

        return forward
