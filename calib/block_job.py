"""The journey of one decoder block: observe, transform, round, advance.

Rotation comes before it: calib.rotation gives the tensors of the rotated model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qoq.calib.block_rounding import round_block
from qoq.calib.block_transforms import transform_block
from qoq.calib.block_tuning import tune_block_
from qoq.calib.metrics import RelativeError, relative_error
from qoq.calib.plan import Plan
from qoq.calib.progress import Tick
from qoq.calib.streaming import BlockRunner, ServedLinear, build_block, load_block_tensors, tf32_products
from qoq.formats.arithmetic import IntegerWeight
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.recipes.errors import InputError

_LINEAR_ERROR_TOKENS, _BLOCK_ERROR_TOKENS = 2048, 8192
"""Calibration tokens on which the output errors of each linear and of the block are measured."""

_TUNING_SHARE = 0.7
"""Of the time of a block."""


@dataclass(frozen=True)
class LinearRecord:
    """Relative errors of one linear: of its weight, and of its output for the inputs it gets when served.

    `fallback`: why it was rounded to nearest although the recipe says GPTQ, or None.
    """

    weight_error: float
    output_error: float
    level1_absmax: int
    fallback: str | None


@dataclass(frozen=True)
class BlockRecord:
    """What a finished block leaves in the manifest.

    `output_error`: quantized against float, on the same input. `tuned_loss`: what tuning left of the block's loss, as a
    share; None where the recipe does not tune.
    """

    block: int
    output_error: float
    linears: dict[str, LinearRecord]
    smooth_alphas: tuple[float, ...] | None
    output_alpha: float | None
    tuned_loss: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FinishedBlock:
    """Quantized linears and 16-bit tensors of a block (names relative to it) and its record."""

    quantized: dict[str, QuantizedLinear]
    kept: dict[str, Tensor]
    record: BlockRecord


def quantize_block_(
    plan: Plan, index: int, streams: Tensor, runner: BlockRunner, tick: Tick, before_advancing: Callable[[], None]
) -> FinishedBlock:
    """Quantize block `index`; hidden states `streams` enter it and, on return, those that leave it are there.

    streams float32 [1 or 2, S, L, H] (CPU): first those of the model as it is served; then, if the recipe asks for
    them, those of the float model. `before_advancing` is called before they are overwritten.
    Raises InputError naming the block or tensor when weights or activations are not finite or do not fit float16.
    """
    tick, tick_tuning = _share_out(plan, tick)
    tensors = load_block_tensors(plan.source, plan.skeleton, index, runner.device)
    transformed = transform_block(plan, index, tensors, streams[0], runner, tick)
    tensors = transformed.tensors
    rounded = round_block(plan, index, tensors, streams, runner, tick)
    before_advancing()
    exact_block = build_block(plan.skeleton, index, tensors)
    if len(streams) == 2:
        _advance_exact_(index, exact_block, streams[1], runner, tick)
    tuned_loss = tune_block_(plan, index, tensors, rounded, streams, runner, tick_tuning)
    kept = _kept_tensors(plan, index, tensors, rounded.linears)
    served_block = _served_block(plan, index, rounded.decoded, kept, runner.device)
    output_error, linear_errors = _advance_served_(index, served_block, exact_block, tensors, streams[0], runner, tick)
    linears = {
        name: LinearRecord(
            weight_error=relative_error(rounded.decoded[name].dequantize(), tensors[f"{name}.weight"]),
            output_error=linear_errors[name].value,
            level1_absmax=int(linear.level1().abs().max()),
            fallback=rounded.fallbacks.get(name),
        )
        for name, linear in rounded.linears.items()
    }
    record = BlockRecord(index, output_error, linears, transformed.smooth_alphas, transformed.output_alpha, tuned_loss)
    return FinishedBlock(rounded.linears, kept, record)


def _share_out(plan: Plan, tick: Tick) -> tuple[Tick, Tick]:
    """Ticks of the work on a block but for its tuning, and of that."""
    share = 0.0 if plan.request.recipe.tuning is None else _TUNING_SHARE

    def of(share: float) -> Tick:
        return lambda message, part: tick(message, part * share)

    return of(1 - share), of(share)


def _kept_tensors(
    plan: Plan, index: int, tensors: dict[str, Tensor], quantized: dict[str, QuantizedLinear]
) -> dict[str, Tensor]:
    """The tensors that stay in 16 bit, on the CPU. Raises InputError where a value does not fit the type."""
    own = {f"{name}.{part}" for name in quantized for part in ("weight", "bias")}
    prefix = plan.skeleton.family.block_prefix(index)
    return {
        name: to_kept(prefix + name, tensor, plan.kept_dtype) for name, tensor in tensors.items() if name not in own
    }


def to_kept(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the type of what stays in 16 bit, on the CPU; InputError when a value overflows it."""
    kept = tensor.to(dtype).cpu()
    if not bool(torch.isfinite(kept).all()):
        raise InputError(
            f"{name}: {float(tensor.abs().max()):g} does not fit {dtype}",
            remedy="pass --dtype bfloat16" if dtype == torch.float16 else "the model holds NaN or infinite values",
        )
    return kept


def _served_block(
    plan: Plan, index: int, quantized: dict[str, IntegerWeight], kept: dict[str, Tensor], device: torch.device
) -> nn.Module:
    recipe = plan.request.recipe
    return build_block(
        plan.skeleton,
        index,
        {name: tensor.to(device).float() for name, tensor in kept.items()},
        quantized=quantized,
        act_bits=recipe.act_bits,
        kv_bits=recipe.kv_bits,
        key_rotation=recipe.key_rotation,
    )


def _advance_exact_(index: int, block: nn.Module, hidden: Tensor, runner: BlockRunner, tick: Tick) -> None:
    """Replace hidden states [S, L, H] of the float model by what leaves the block."""
    is_finite = torch.ones((), dtype=torch.bool, device=runner.device)
    batches = -(-len(hidden) // runner.batch)
    for rows, batch in runner.batches(hidden):
        with tf32_products():
            leaving = runner(index, block, batch)
        is_finite &= torch.isfinite(leaving).all()
        hidden[rows].copy_(leaving)
        tick("advancing", 0.1 / batches)
    _check_finite(index, is_finite)


def _advance_served_(
    index: int,
    block: nn.Module,
    exact_block: nn.Module,
    tensors: dict[str, Tensor],
    hidden: Tensor,
    runner: BlockRunner,
    tick: Tick,
) -> tuple[float, dict[str, RelativeError]]:
    """Replace hidden states [S, L, H] by what leaves the block, so that later blocks see what they will be served.

    Returns the block's relative output error and each linear's, measured on the first windows.
    """
    linear_errors = {
        name: RelativeError() for name, module in block.named_modules() if isinstance(module, ServedLinear)
    }
    block_error = RelativeError()
    batches, length = -(-len(hidden) // runner.batch), hidden.shape[1]
    is_finite = torch.ones((), dtype=torch.bool, device=runner.device)
    for rows, batch in runner.batches(hidden):
        with ExitStack() as hooks, tf32_products():
            if rows.start * length < _LINEAR_ERROR_TOKENS:
                _measure_linears(block, tensors, linear_errors, hooks)
            leaving = runner(index, block, batch)
        if rows.start * length < _BLOCK_ERROR_TOKENS:
            block_error.update(leaving, runner(index, exact_block, batch))
        is_finite &= torch.isfinite(leaving).all()
        hidden[rows].copy_(leaving)
        tick("advancing", 0.2 / batches)
    _check_finite(index, is_finite)
    return block_error.value, linear_errors


def _check_finite(index: int, is_finite: Tensor) -> None:
    if not bool(is_finite):
        raise InputError(
            f"block {index}: NaN or infinite activations",
            remedy="the model is damaged, or its weights do not fit its configuration",
        )


def _measure_linears(
    block: nn.Module, tensors: dict[str, Tensor], errors: dict[str, RelativeError], hooks: ExitStack
) -> None:
    """Within `hooks`, compare every quantized linear of `block` with its float weight on the inputs it gets."""
    for name, error in errors.items():
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")

        def compare(
            _module: nn.Module,
            inputs: tuple[Tensor, ...],
            output: Tensor,
            *,
            weight: Tensor = weight,
            bias: Tensor | None = bias,
            error: RelativeError = error,
        ) -> None:
            error.update(output, nn.functional.linear(inputs[0], weight, bias))

        linear = block.get_submodule(name)
        if not isinstance(linear, ServedLinear):
            raise TypeError(f"{name} is {type(linear).__name__}, expected a quantized linear")
        hooks.callback(linear.register_forward_hook(compare).remove)
