"""Value balance: values of each KV head in a basis where the noise of the 4-bit cache weighs least in o_proj's output.

Attention is linear in the values, so any invertible T may be applied to those of a head by v_proj and undone by o_proj.
The cache adds noise of one size to all channels of T v, in proportion to their range. Out of o_proj comes the noise
times W T^-1, with W the columns of that head. Among all T, those with T^T T = S^-1 (S M S)^(1/2) S^-1 make its energy
least for the energy of T v, where S^2 = E[v v^T] and M = W^T W; the symmetric one is taken, which changes values least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qoq.calib.attention import AttentionCall
from qoq.recipes.families import Family

_FLOOR = 1e-4
"""Of the mean eigenvalue: what E[v v^T] and W^T W are raised by, so that T and its inverse stay moderate."""


class ValueMoments:
    """Sums v v^T over values, float64 [kv_heads, D, D]."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        rows = value.transpose(0, 1).flatten(1, 2)
        total = (rows.transpose(1, 2) @ rows).double()
        self.total = total if self.total is None else self.total + total


def balance(moments: Tensor, out_weight: Tensor) -> Tensor:
    """T float64 [kv_heads, D, D] for moments of values, of the same shape, and o_proj's weight [N, heads * D]."""
    kv_heads, head_dim, _ = moments.shape
    columns = out_weight.double().view(len(out_weight), kv_heads, -1, head_dim)
    weights = torch.einsum("nhgd,nhge->hde", columns, columns)
    root = _root(_raised(moments))
    inverse = torch.linalg.inv(root)
    square = inverse @ _root(root @ _raised(weights) @ root) @ inverse
    # One factor for a whole head changes no code of its values.
    return _root(square / square.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None])


def fold(tensors: dict[str, Tensor], transform: Tensor, family: Family) -> dict[str, Tensor]:
    """Apply T to rows and bias of v_proj, and its inverse to columns of o_proj, of a block; the input is left alone."""
    folded = dict(tensors)
    kv_heads, head_dim, _ = transform.shape
    value, out = family.roles["attn_v"], f"{family.roles['attn_out']}.weight"
    for name in (f"{value}.weight", f"{value}.bias"):
        if name in tensors:
            rows = tensors[name].double().view(kv_heads, head_dim, -1)
            folded[name] = (transform @ rows).reshape(tensors[name].shape).float()
    columns = tensors[out].double().view(len(tensors[out]), kv_heads, -1, head_dim)
    undone = torch.einsum("nhgd,hde->nhge", columns, torch.linalg.inv(transform))
    folded[out] = undone.reshape(tensors[out].shape).float()
    return folded


def _raised(matrix: Tensor) -> Tensor:
    mean = matrix.diagonal(dim1=1, dim2=2).mean(dim=1)
    # A head that is never used, or never read, has nothing to balance.
    return matrix + torch.where(mean > 0, mean * _FLOOR, 1.0)[:, None, None] * torch.eye(
        matrix.shape[1], dtype=matrix.dtype, device=matrix.device
    )


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of symmetric positive definite matrices [B, D, D]."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.transpose(1, 2)
    return root
