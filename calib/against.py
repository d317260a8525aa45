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


@dataclass(frozen=True)
class BlockComparison:
    """output_error: the served block against the 16-bit one on the same input, relative.

    weight_errors: of each quantized linear's weight, relative, up to one factor a row (which transforms may move).
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
    device: torch.device,
    on_block: Callable[[int], None],
) -> Iterator[BlockComparison]:
    """Compare every block on token windows [S, L]. Raises InputError when the two are not of one shape."""
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
        yield BlockComparison(index, error.value, _weight_errors(served, source, index))
        on_block(index)


def _weight_errors(served: ServedModel, source: TensorSource, index: int) -> dict[str, float]:
    errors = {}
    for name, linear in served.skeleton.linears(index).items():
        if name in served.quantized:
            weight = load_float(source, f"{name}.weight")
            decoded = served.checkpoint.linear(name, in_features=linear.in_features).dequantize()
            norms = decoded.square().sum(dim=1, keepdim=True)
            factors = (decoded * weight).sum(dim=1, keepdim=True) / norms.clamp(min=1e-30)
            error = RelativeError()
            error.update(decoded * factors, weight)
            errors[name] = error.value
    return errors
