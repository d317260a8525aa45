"""Rotation: the model in another basis of its hidden states, in which no channel is an outlier.

Norm gains are folded into the linears that follow, which leaves norms that commute with rotations. Then hidden states
are multiplied by R, an orthogonal matrix with entries of one size (QServe paper, section 4.3.1; QuaRot): what writes
them (embedding, o_proj, down_proj) is multiplied by R, what reads them by R^T. Values are rotated within each head, by
v_proj, and back by o_proj. All of it is folded into weights: the rotated model is one of the same kind, and computes
the same.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from qoq.calib.hadamard import rotate, split_order
from qoq.calib.skeleton import Skeleton, build_skeleton
from qoq.calib.streaming import load_finite
from qoq.formats.safetensors_file import TensorInfo
from qoq.formats.sources import TensorSource
from qoq.recipes.errors import InputError

_TABLE_ROWS = 8192


class RotatedSource:
    """The tensors of a model after rotation, worked out when asked for, on a device: in float64, given in float32.

    Those of blocks are given on that device, all others on the CPU.
    `load` raises InputError for a tensor of the model, by its own name, that is not finite.

    It has an lm_head of its own even where the model's is its embedding: the final norm's gain is folded into it.
    """

    def __init__(self, source: TensorSource, skeleton: Skeleton, device: torch.device | str) -> None:
        self._source, self._skeleton, self._device = source, skeleton, device
        family = skeleton.family
        self._head, self._embedding = f"{family.lm_head}.weight", f"{family.embedding}.weight"
        self._roles = {name: role for role, name in family.roles.items()}
        readers = dict.fromkeys(("attn_q", "attn_k", "attn_v"), family.input_norm)
        self._gains = readers | dict.fromkeys(("mlp_gate", "mlp_up"), family.mlp_norm)

    @property
    def location(self) -> Path:
        return self._source.location

    def names(self) -> list[str]:
        return sorted({*self._source.names(), self._head})

    def info(self, name: str) -> TensorInfo:
        info = self._source.info(self._embedding if name == self._head and self._skeleton.is_tied else name)
        return TensorInfo(torch.float32, info.shape) if name in self._skeleton.model.state_dict() else info

    def files(self) -> list[Path]:
        return self._source.files()

    def load(self, name: str) -> Tensor:
        family = self._skeleton.family
        if name == self._head:
            gain = self._exact(f"{family.final_norm}.weight")
            return self._rotated_table(self._embedding if self._skeleton.is_tied else name, gain)
        if name == self._embedding:
            return self._rotated_table(name, None)
        if name == f"{family.final_norm}.weight":
            return torch.ones_like(load_finite(self._source, name), dtype=torch.float32)
        inside = self._inside_block(name)
        return self._source.load(name) if inside is None else self._load_of_block(*inside)

    def _load_of_block(self, prefix: str, owner: str, part: str) -> Tensor:
        exact = self._exact(f"{prefix}{owner}.{part}")
        family = self._skeleton.family
        if owner in (family.input_norm, family.mlp_norm):
            return torch.ones_like(exact).float()
        role = self._roles.get(owner)
        if role in self._gains and part == "weight":
            exact = rotate(exact * self._exact(f"{prefix}{self._gains[role]}.weight"))
        if role == "attn_v":
            exact = self._rotate_heads(exact.t()).t() if part == "weight" else self._rotate_heads(exact)
        if role == "attn_out" and part == "weight":
            exact = self._rotate_heads(exact)
        if role in ("attn_out", "mlp_down"):
            exact = rotate(exact.t()).t() if part == "weight" else rotate(exact)
        return exact.float().contiguous()

    def _rotate_heads(self, x: Tensor) -> Tensor:
        """x [..., heads * D], each head's part rotated."""
        return rotate(x.reshape(*x.shape[:-1], -1, self._skeleton.head_dim)).reshape(x.shape)

    def _inside_block(self, name: str) -> tuple[str, str, str] | None:
        """Prefix, module and part of a tensor of a block that the model has."""
        blocks = f"{self._skeleton.family.blocks}."
        if not name.startswith(blocks) or name not in self._skeleton.model.state_dict():
            return None
        index, _, rest = name.removeprefix(blocks).partition(".")
        owner, _, part = rest.rpartition(".")
        return f"{blocks}{index}.", owner, part

    def _exact(self, name: str) -> Tensor:
        return load_finite(self._source, name, self._device).double()

    def _rotated_table(self, name: str, gain: Tensor | None) -> Tensor:
        """A table [V, H], times gain [H] if any, rotated: float32, some rows at a time, since tables are large."""
        table = load_finite(self._source, name)
        result = torch.empty(table.shape, dtype=torch.float32)
        for start in range(0, table.shape[0], _TABLE_ROWS):
            rows = table[start : start + _TABLE_ROWS].to(self._device).double()
            result[start : start + _TABLE_ROWS] = rotate(rows if gain is None else rows * gain)
        return result


def rotated(
    skeleton: Skeleton, source: TensorSource, device: torch.device | str = "cpu"
) -> tuple[Skeleton, TensorSource]:
    """The rotated model, worked out on `device`. Raises InputError where its sizes have no Hadamard matrix."""
    for size in (skeleton.hidden_size, skeleton.head_dim):
        try:
            split_order(size)
        except ValueError as error:
            raise InputError(
                f"{source.location}: cannot be rotated: {error}", remedy="use a recipe without rotation"
            ) from error
    config = copy.deepcopy(skeleton.config)
    config.tie_word_embeddings = False
    return build_skeleton(config, where=str(source.location)), RotatedSource(source, skeleton, device)
