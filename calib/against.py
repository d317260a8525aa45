"""A checkpoint held against the 16-bit model it was made from, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.calib.metrics import RelativeError
from qoq.calib.served import ServedModel
from qoq.calib.skeleton import Skeleton
from qoq.calib.streaming import BlockRunner, StreamedModel, build_block, embed, load_block_tensors, load_float
from qoq.formats.sources import TensorSource
from qoq.recipes.errors import InputError

_DIRECTIONS = 128
"""In so many, two rows that have nothing to do with each other are never as close as a row and its quantized form."""


@dataclass(frozen=True)
class BlockComparison:
    """output_error: the served block against the 16-bit one on the same input, relative.

    weight_errors: of each quantized linear's weight, relative, up to what transforms may move: one factor a row, or a
    column of down_proj, and one 2 x 2 matrix a RoPE pair of keys and queries.
    """

    block: int
    output_error: float
    weight_errors: dict[str, float]


def compare(
    served: ServedModel,
    skeleton: Skeleton,
    source: TensorSource,
    windows: Tensor,
    *,
    reordered: bool,
    device: torch.device,
    on_block: Callable[[int], None],
) -> Iterator[BlockComparison]:
    """Compare every block on token windows [S, L]; `reordered`: inputs of down_proj are in another order.

    Raises InputError when the two are not of one shape.
    """
    if skeleton.tensor_shapes() != served.skeleton.tensor_shapes():
        raise InputError(
            f"{source.location}: not the shape of {served.checkpoint.folder}",
            remedy="pass the model that the checkpoint was made from",
        )
    config = served.checkpoint.quantization
    streamed = StreamedModel(
        served.skeleton,
        served.checkpoint.source,
        device=device,
        checkpoint=served.checkpoint,
        act_bits=config.act_bits,
        kv_bits=config.kv_bits,
    )
    runner = BlockRunner(skeleton, windows.shape[1], device)
    hidden = embed(source, skeleton, windows)
    for index in range(skeleton.num_blocks):
        exact_block = build_block(skeleton, index, load_block_tensors(source, skeleton, index, device))
        served_block = streamed.block(index)
        error = RelativeError()
        for rows, batch in runner.batches(hidden):
            exact = runner(index, exact_block, batch)
            error.update(runner(index, served_block, batch), exact)
            hidden[rows] = exact.cpu()
        yield BlockComparison(index, error.value, _weight_errors(served, source, index, reordered=reordered))
        on_block(index)


def _weight_errors(served: ServedModel, source: TensorSource, index: int, *, reordered: bool) -> dict[str, float]:
    family, skeleton = served.skeleton.family, served.skeleton
    prefix = family.block_prefix(index)
    roles = {prefix + name: role for role, name in family.roles.items()}
    decoded = {
        name: served.checkpoint.linear(name, in_features=linear.in_features).dequantize()
        for name, linear in skeleton.linears(index).items()
        if name in served.quantized
    }
    order = None
    if reordered:
        gate = prefix + family.roles["mlp_gate"]
        name = f"{gate}.weight"
        # It may be one of those that stay in 16 bit.
        own = decoded[gate] if gate in decoded else load_float(served.checkpoint.source, name)
        order = _order(own, load_float(source, name))
    errors = {}
    for name, linear in decoded.items():
        found, weight, role = linear, load_float(source, f"{name}.weight"), roles[name]
        if order is not None and role in ("mlp_gate", "mlp_up"):
            weight = weight[order]
        if role == "mlp_down":
            # Its columns are scaled, as inputs of one factor each.
            found, weight = found.t(), (weight if order is None else weight[:, order]).t()
        # RoPE pairs of keys and queries may be turned: the two rows of a pair are fitted together.
        together = skeleton.head_dim // 2 if role in ("attn_q", "attn_k") else None
        error = RelativeError()
        error.update(_fitted(found, weight, together), weight)
        errors[name] = error.value
    return errors


def _fitted(found: Tensor, weight: Tensor, half: int | None) -> Tensor:
    """`found` [N, K], times the factor of each row, or the 2 x 2 matrix of each RoPE pair, that fits `weight` best.

    half: of the head dimension, for rows of keys or queries.
    """
    if half is None:
        rows, wanted = found.unsqueeze(1), weight.unsqueeze(1)
    else:
        rows, wanted = (of.view(-1, 2, half, of.shape[1]).transpose(1, 2).flatten(0, 1) for of in (found, weight))
    squares = rows @ rows.transpose(1, 2)
    squares.diagonal(dim1=1, dim2=2).add_(1e-30)
    fit: Tensor = (wanted @ rows.transpose(1, 2)) @ torch.linalg.pinv(squares) @ rows
    if half is not None:
        fit = fit.view(-1, half, 2, found.shape[1]).transpose(1, 2)
    return fit.reshape(found.shape)


def _order(gate: Tensor, known: Tensor) -> Tensor:
    """Where each row of a reordered gate_proj [N, K] was in the known one, told by some random directions."""
    directions = torch.randn(gate.shape[1], _DIRECTIONS, generator=torch.Generator().manual_seed(0))
    found, among = (torch.nn.functional.normalize(of @ directions, dim=1) for of in (gate, known))
    return torch.cat([(some @ among.t()).argmax(dim=1) for some in found.split(2048)])
