"""The journey of one decoder block: observe, transform, round, advance.

Rotation comes before it: calib.rotation gives the tensors of the rotated model.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qoq.calib import key_alignment, value_balance
from qoq.calib.attention import AttentionCall, observe
from qoq.calib.block_rounding import round_block
from qoq.calib.key_alignment import MeanKeyObserver
from qoq.calib.metrics import RelativeError, relative_error
from qoq.calib.mlp_transforms import InputObserver, choose_smoothing, reorder, smooth
from qoq.calib.plan import Plan
from qoq.calib.progress import Tick
from qoq.calib.smooth_attention import (
    KeyRanges,
    RangeObserver,
    Smoothing,
    StrengthSearch,
    candidate_scales,
    choose,
    fold,
)
from qoq.calib.streaming import BlockRunner, ServedLinear, build_block, load_block_tensors
from qoq.calib.value_balance import ValueMoments
from qoq.formats.arithmetic import IntegerWeight
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.recipes.errors import InputError

_PRESERVED = 1e-3
"""Relative change of a block's float32 output that a function-preserving transform may cause by rounding."""
_LINEAR_ERROR_TOKENS, _BLOCK_ERROR_TOKENS = 2048, 8192
"""Calibration tokens on which the output errors of each linear and of the block are measured."""


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
    """What a finished block leaves in the manifest. `output_error`: quantized against float, on the same input."""

    block: int
    output_error: float
    linears: dict[str, LinearRecord]
    smooth_alphas: tuple[float, ...] | None
    output_alpha: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FinishedBlock:
    """Quantized linears and 16-bit tensors of a block (names relative to it) and its record."""

    quantized: dict[str, QuantizedLinear]
    kept: dict[str, Tensor]
    record: BlockRecord


def quantize_block_(plan: Plan, index: int, streams: Tensor, runner: BlockRunner, tick: Tick) -> FinishedBlock:
    """Quantize block `index`; hidden states `streams` enter it and, on return, those that leave it are there.

    streams float32 [1 or 2, S, L, H] (CPU): first those of the model as it is served; then, if the recipe asks for
    them, those of the float model.
    Raises InputError naming the block or tensor when weights or activations are not finite or do not fit float16.
    """
    tensors = load_block_tensors(plan.source, plan.skeleton, index, runner.device)
    tensors, output_alpha = _transform_mlp(plan, index, tensors, streams[0], runner, tick)
    tensors = _transform_attention(plan, index, tensors, streams[0], runner, tick)
    tensors, smoothing = _smooth_attention(plan, index, tensors, streams[0], runner, tick)
    rounded = round_block(plan, index, tensors, streams, runner, tick)
    kept = _kept_tensors(plan, index, tensors, rounded.linears)
    output_error, linear_errors = _advance_(plan, index, tensors, rounded.decoded, kept, streams, runner, tick)
    linears = {
        name: LinearRecord(
            weight_error=relative_error(linear.dequantize(), tensors[f"{name}.weight"].cpu()),
            output_error=linear_errors[name].value,
            level1_absmax=int(linear.level1().abs().max()),
            fallback=rounded.fallbacks.get(name),
        )
        for name, linear in rounded.linears.items()
    }
    alphas = None if smoothing is None else smoothing.alphas
    return FinishedBlock(rounded.linears, kept, BlockRecord(index, output_error, linears, alphas, output_alpha))


def _transform_mlp(
    plan: Plan, index: int, tensors: dict[str, Tensor], hidden: Tensor, runner: BlockRunner, tick: Tick
) -> tuple[dict[str, Tensor], float | None]:
    """Smooth and reorder the inputs of down_proj as the recipe says; also the alpha of the smoothing."""
    recipe, family = plan.request.recipe, plan.skeleton.family
    spec, down = recipe.smooth_output, family.roles["mlp_down"]
    if spec is None and recipe.reorder is None:
        return tensors, None
    block = build_block(plan.skeleton, index, tensors)
    observed = InputObserver(block.get_submodule(down), spec.search_tokens if spec is not None else 0)
    batches = -(-hidden.shape[0] // runner.batch)
    for _, batch in runner.batches(hidden):
        observed.run(partial(runner, index, block, batch))
        tick("observing the MLP", 0.1 / batches)
    absmax, alpha, transformed = observed.absmax, None, tensors
    if not bool(torch.isfinite(absmax).all()):
        raise InputError(
            f"{family.block_prefix(index)}{down}: NaN or infinite inputs",
            remedy="the model is damaged, or its weights do not fit its configuration",
        )
    if spec is not None:
        weight = tensors[f"{down}.weight"]
        scale, alpha = choose_smoothing(spec, observed, weight, recipe.group_size, recipe.act_bits)
        transformed, absmax = smooth(transformed, scale, family), absmax / scale
    if recipe.reorder is not None:
        transformed = reorder(transformed, torch.argsort(absmax, stable=True), family)
    _check_preserved(plan, index, "smooth_output and reorder", transformed, block, hidden, runner)
    return transformed, alpha


def _transform_attention(
    plan: Plan, index: int, tensors: dict[str, Tensor], hidden: Tensor, runner: BlockRunner, tick: Tick
) -> dict[str, Tensor]:
    """Turn keys and balance values as the recipe says."""
    skeleton, recipe = plan.skeleton, plan.request.recipe
    # Gains of norms on keys and queries come after the projections: nothing can be folded past them.
    aligns = recipe.align_keys is not None and skeleton.family.key_fold == "projections"
    balances = recipe.balance_values is not None
    if recipe.kv_bits == 16 or not (aligns or balances):
        return tensors
    block = build_block(skeleton, index, tensors)
    attention = block.get_submodule(skeleton.family.attention)
    keys, values = MeanKeyObserver(), ValueMoments()

    def see(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        keys(query, key, value, call)
        values(query, key, value, call)

    batches = -(-hidden.shape[0] // runner.batch)
    for _, batch in runner.batches(hidden):
        observe(attention, see, partial(runner, index, block, batch))
        tick("observing keys and values", 0.05 / batches)
    if keys.total is None or values.total is None or not bool((keys.total.sum() + values.total.sum()).isfinite()):
        raise InputError(
            f"block {index}: NaN or infinite keys or values",
            remedy="the model is damaged, or its weights do not fit its configuration",
        )
    folded = tensors
    if aligns:
        folded = key_alignment.fold(folded, key_alignment.angles(keys.total), skeleton.family, skeleton.num_heads)
    if balances:
        out = folded[f"{skeleton.family.roles['attn_out']}.weight"]
        folded = value_balance.fold(folded, value_balance.balance(values.total, out), skeleton.family)
    _check_preserved(plan, index, "align_keys and balance_values", folded, block, hidden, runner)
    return folded


def _smooth_attention(
    plan: Plan, index: int, tensors: dict[str, Tensor], hidden: Tensor, runner: BlockRunner, tick: Tick
) -> tuple[dict[str, Tensor], Smoothing | None]:
    spec = plan.request.recipe.smooth_attention
    if spec is None or plan.request.recipe.kv_bits == 16:
        return tensors, None
    skeleton = plan.skeleton
    block = build_block(skeleton, index, tensors)
    attention = block.get_submodule(skeleton.family.attention)
    batches = -(-hidden.shape[0] // runner.batch)
    ranges_seen = RangeObserver()
    for _, batch in runner.batches(hidden):
        observe(attention, ranges_seen, partial(runner, index, block, batch))
        tick("observing", 0.1 / batches)
    if not ranges_seen.is_finite:
        raise InputError(
            f"block {index}: NaN or infinite keys or queries",
            remedy="the model is damaged, or its weights do not fit its configuration",
        )
    is_shared = skeleton.family.key_fold == "norms"
    ranges = KeyRanges.from_observer(ranges_seen, shared=is_shared)
    candidates = candidate_scales(ranges, spec)
    if spec.mode == "search":
        recipe = plan.request.recipe
        search = StrengthSearch(candidates, recipe.kv_bits, spec.search_tokens, recipe.key_rotation)
        for _, batch in runner.batches(hidden):
            if not search.is_done:
                observe(attention, search, partial(runner, index, block, batch))
            tick("searching", 0.3 / batches)
        smoothing = choose(candidates, search.errors, spec, shared=is_shared)
    else:
        smoothing = Smoothing(candidates[0], (spec.alpha,) * candidates.shape[1])
    smoothing = replace(smoothing, scale=ranges.balanced(smoothing.scale))
    folded = fold(tensors, smoothing.scale, skeleton.family, skeleton.num_heads)
    _check_preserved(plan, index, "smooth_attention", folded, block, hidden, runner)
    return folded, smoothing


def _check_preserved(
    plan: Plan, index: int, what: str, tensors: dict[str, Tensor], block: nn.Module, hidden: Tensor, runner: BlockRunner
) -> None:
    """Raise InputError unless a block of `tensors` gives what `block` gives, on the first window."""
    first = hidden[:1].to(runner.device)
    change = relative_error(
        runner(index, build_block(plan.skeleton, index, tensors), first), runner(index, block, first)
    )
    if not change < _PRESERVED:
        raise InputError(
            f"block {index}: {what} changed the block's output by {change:.1e} (at most {_PRESERVED:g} is rounding)",
            remedy=f"quantize with a recipe without {what}, and report this model",
        )


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


def _advance_(
    plan: Plan,
    index: int,
    tensors: dict[str, Tensor],
    quantized: dict[str, IntegerWeight],
    kept: dict[str, Tensor],
    streams: Tensor,
    runner: BlockRunner,
    tick: Tick,
) -> tuple[float, dict[str, RelativeError]]:
    """Replace `streams` by what leaves the block, so that later blocks see what they will be served.

    Returns the block's relative output error and each linear's, measured on the first windows.
    """
    recipe = plan.request.recipe
    device = runner.device
    exact_block = build_block(plan.skeleton, index, tensors)
    served_block = build_block(
        plan.skeleton,
        index,
        {name: tensor.to(device).float() for name, tensor in kept.items()},
        quantized=quantized,
        act_bits=recipe.act_bits,
        kv_bits=recipe.kv_bits,
        key_rotation=recipe.key_rotation,
    )
    linear_errors = {name: RelativeError() for name in quantized}
    block_error = RelativeError()
    batches, length = -(-streams.shape[1] // runner.batch), streams.shape[2]
    for rows, batch in runner.batches(streams):
        with ExitStack() as hooks:
            if rows.start * length < _LINEAR_ERROR_TOKENS:
                _measure_linears(served_block, tensors, linear_errors, hooks)
            served = runner(index, served_block, batch[0])
        if rows.start * length < _BLOCK_ERROR_TOKENS:
            block_error.update(served, runner(index, exact_block, batch[0]))
        streams[0, rows] = served.cpu()
        if len(streams) == 2:
            streams[1, rows] = runner(index, exact_block, batch[1]).cpu()
        tick("advancing", 0.5 / batches)
    if not bool(torch.isfinite(streams).all()):
        raise InputError(
            f"block {index}: NaN or infinite activations",
            remedy="the model is damaged, or its weights do not fit its configuration",
        )
    return block_error.value, linear_errors


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
