"""Decoder blocks, one on the device at a time: load, build, run.

Peak memory is one block and the hidden states of the windows, whatever the depth of the model. Arithmetic is
float32, so that what is measured is quantization and not the rounding of the calibration machine; `tf32_products` says
where a GPU may do less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from qoq.calib.attention import set_kv_bits, sliding_mask
from qoq.calib.skeleton import Skeleton, fill
from qoq.formats.arithmetic import IntegerWeight, linear_forward
from qoq.formats.checkpoint import Checkpoint
from qoq.formats.sources import TensorSource
from qoq.recipes.errors import InputError
from qoq.recipes.schema import KeyRotation

_PASS_BYTES = 2 << 30
"""Hidden states that an evaluation keeps at once; more windows are evaluated in several passes over the blocks."""

_DAMAGED = "the model is damaged: download it again, or ask its authors"


@contextmanager
def tf32_products() -> Iterator[None]:
    """On a GPU, factors of float32 products are rounded to 11 bits within, like float16, and run on tensor cores.

    For what only observes: six times as fast, and less than a hundredth of what quantization changes.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class ServedLinear(nn.Module):
    """A quantized linear as it is served: int8 (or 16-bit) activations times the decoded weight."""

    def __init__(self, weight: IntegerWeight, act_bits: int) -> None:
        super().__init__()
        self.weight, self.act_bits = weight, act_bits

    def forward(self, x: Tensor) -> Tensor:
        return linear_forward(x, self.weight, act_bits=self.act_bits)


def load_finite(source: TensorSource, name: str, device: torch.device | str = "cpu") -> Tensor:
    """One tensor on `device`, in its own type. Raises InputError naming it when it holds a NaN or an infinity."""
    tensor = source.load(name).to(device)
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"{source.location}: tensor {name} holds {bad} NaN or infinite value(s) of {tensor.numel()}",
            remedy=_DAMAGED,
        )
    return tensor


def load_float(source: TensorSource, name: str, device: torch.device | str = "cpu") -> Tensor:
    """One tensor as float32 on `device`. Raises InputError naming it when it holds a NaN or an infinity."""
    return load_finite(source, name, device).float()


def load_block_tensors(source: TensorSource, skeleton: Skeleton, index: int, device: torch.device) -> dict[str, Tensor]:
    """The float32 tensors of block `index`, by name relative to the block."""
    prefix = skeleton.family.block_prefix(index)
    return {name: load_float(source, prefix + name, device) for name in skeleton.block(index).state_dict()}


def build_block(
    skeleton: Skeleton,
    index: int,
    tensors: Mapping[str, Tensor],
    *,
    quantized: Mapping[str, IntegerWeight] | None = None,
    act_bits: int = 16,
    kv_bits: int = 16,
    key_rotation: KeyRotation = "none",
) -> nn.Module:
    """Block `index` with its weights; linears named in `quantized` (relative names) run as they are served."""
    block = skeleton.block(index)
    for name, weight in (quantized or {}).items():
        block.set_submodule(name, ServedLinear(weight, act_bits))
    expected = block.state_dict().keys()
    fill(block, {name: tensors[name] for name in expected})
    set_kv_bits(block.get_submodule(skeleton.family.attention), kv_bits, key_rotation)
    return block


class BlockRunner:
    """Runs blocks over windows of one length; rotary embeddings and masks are made once."""

    def __init__(self, skeleton: Skeleton, length: int, device: torch.device) -> None:
        self._skeleton, self._length, self.device = skeleton, length, device
        self.batch = max(1, (2048 if device.type == "cpu" else 16384) // length)
        positions = torch.arange(length, device=device)[None]
        probe = torch.zeros(1, length, 1, device=device)
        with torch.no_grad():
            self._rotary = skeleton.rotary(device)(probe, positions)
        self._positions = positions

    def __call__(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Output [B, L, H] of block `index` for hidden states [B, L, H] on the device."""
        with torch.no_grad():
            return self.differentiable(index, block, hidden)

    def differentiable(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """The same, with gradients if they are enabled."""
        mask = sliding_mask(self._length, self._skeleton.sliding_window(index), self.device)
        output = block(
            hidden,
            attention_mask=mask,
            position_embeddings=self._rotary,
            position_ids=self._positions,
        )
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def batches(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Split hidden states [..., S, L, H] into batches on the device, with the rows of S each one covers."""
        streams = hidden.reshape(-1, *hidden.shape[-3:])
        for start in range(0, hidden.shape[-3], self.batch):
            rows = slice(start, start + self.batch)
            # One stream at a time: what is contiguous in pinned memory is copied at the speed of the bus.
            batch = torch.stack([stream[rows].to(self.device) for stream in streams])
            yield rows, batch.reshape(*hidden.shape[:-3], *batch.shape[1:])


def embed(source: TensorSource, skeleton: Skeleton, windows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Hidden states float32 [S, L, H] (CPU) that enter the first block, for token ids [S, L].

    `dtype` is the 16-bit type that the table will be stored in, if it is to be rounded to one first.
    """
    name = f"{skeleton.family.embedding}.weight"
    table = source.load(name)
    if int(windows.max()) >= table.shape[0]:
        raise InputError(
            f"{source.location}: the tokenizer gives token {int(windows.max())}, the model knows {table.shape[0]}",
            remedy="the tokenizer and the model do not belong together",
        )
    states = table[windows]
    states = (states if dtype is None else states.to(dtype)).float()
    if not bool(torch.isfinite(states).all()):
        raise InputError(f"{source.location}: tensor {name} holds NaN or infinite values", remedy=_DAMAGED)
    return states


class StreamedModel:
    """A model that is evaluated block by block, from 16-bit weights or from a checkpoint.

    With a quantized KV cache, `key_rotation` is what the checkpoint says (None), or as given.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: TensorSource,
        *,
        device: torch.device,
        checkpoint: Checkpoint | None = None,
        act_bits: int = 16,
        kv_bits: int = 16,
        key_rotation: KeyRotation | None = None,
        on_block: Callable[[int], None] | None = None,
    ) -> None:
        self._skeleton, self._source, self._device = skeleton, source, device
        self._checkpoint, self._act_bits, self._kv_bits = checkpoint, act_bits, kv_bits
        if key_rotation is None:
            key_rotation = "none" if checkpoint is None else checkpoint.quantization.key_rotation
        self._key_rotation: KeyRotation = key_rotation
        self._on_block = on_block or (lambda _: None)

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """Logits float32 [L, V] of each window of token ids [S, L], in order."""
        length = windows.shape[1]
        per_pass = max(1, _PASS_BYTES // (length * self._skeleton.hidden_size * 4))
        for start in range(0, windows.shape[0], per_pass):
            yield from self._one_pass(windows[start : start + per_pass])

    def _one_pass(self, windows: Tensor) -> Iterator[Tensor]:
        skeleton = self._skeleton
        runner = BlockRunner(skeleton, windows.shape[1], self._device)
        hidden = embed(self._source, skeleton, windows)
        for index in range(skeleton.num_blocks):
            block = self.block(index)
            for rows, batch in runner.batches(hidden):
                hidden[rows] = runner(index, block, batch).cpu()
            if not bool(torch.isfinite(hidden).all()):
                raise InputError(f"{self._source.location}: block {index} gives NaN or infinite activations")
            self._on_block(index)
        norm = fill(skeleton.final_norm(), {"weight": self._outside(f"{skeleton.family.final_norm}.weight")})
        head = self._outside(f"{skeleton.family.embedding if skeleton.is_tied else skeleton.family.lm_head}.weight")
        for window in hidden:
            with torch.no_grad():  # not around the yield: the mode is global, and would be the caller's meanwhile
                logits = torch.nn.functional.linear(norm(window.to(self._device)), head)
            yield logits

    def _outside(self, name: str) -> Tensor:
        return load_float(self._source, name, self._device)

    def block(self, index: int) -> nn.Module:
        """Block `index` as it is served, on the device."""
        skeleton = self._skeleton
        prefix = skeleton.family.block_prefix(index)
        quantized: dict[str, IntegerWeight] = {}
        if self._checkpoint is not None:
            for name, linear in skeleton.linears(index).items():
                if self._checkpoint.is_quantized(name):
                    decoded = self._checkpoint.linear(name, in_features=linear.in_features)
                    quantized[name.removeprefix(prefix)] = IntegerWeight.decode(decoded, self._device)
        own = {f"{name}.{part}" for name in quantized for part in ("weight", "bias")}
        tensors = {
            name: load_float(self._source, prefix + name, self._device)
            for name in skeleton.block(index).state_dict()
            if name not in own
        }
        return build_block(
            skeleton,
            index,
            tensors,
            quantized=quantized,
            act_bits=self._act_bits,
            kv_bits=self._kv_bits,
            key_rotation=self._key_rotation,
        )
