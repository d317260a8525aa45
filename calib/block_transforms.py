"""What is done to a block before its linears are rounded, none of which changes what it computes.

Rotation comes before: calib.rotation gives the tensors of the rotated model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from qoq.calib import key_alignment
from qoq.calib.attention import observe
from qoq.calib.key_alignment import MeanKeyObserver
from qoq.calib.metrics import relative_error
from qoq.calib.mlp_transforms import InputObserver, choose_smoothing, reorder, smooth
from qoq.calib.moments import input_of
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
from qoq.calib.streaming import BlockRunner, build_block, tf32_products
from qoq.recipes.errors import InputError

_PRESERVED = 1e-3
"""Relative change of a block's float32 output that a transform may cause by rounding."""


@dataclass(frozen=True)
class TransformedBlock:
    """A block's tensors by name relative to it, and the strengths that were found, or None."""

    tensors: dict[str, Tensor]
    smooth_alphas: tuple[float, ...] | None
    output_alpha: float | None


def transform_block(
    plan: Plan, index: int, tensors: dict[str, Tensor], hidden: Tensor, runner: BlockRunner, tick: Tick
) -> TransformedBlock:
    """Transform a block as the recipe says; hidden float32 [S, L, H] enters it, and the input tensors are left alone.

    Raises InputError where what is observed is not finite, or where the block's output changed.
    """
    tensors, output_alpha = _transform_mlp(plan, index, tensors, hidden, runner, tick)
    tensors = _align_keys(plan, index, tensors, hidden, runner, tick)
    tensors, smoothing = _smooth_attention(plan, index, tensors, hidden, runner, tick)
    return TransformedBlock(tensors, None if smoothing is None else smoothing.alphas, output_alpha)


def _transform_mlp(
    plan: Plan, index: int, tensors: dict[str, Tensor], hidden: Tensor, runner: BlockRunner, tick: Tick
) -> tuple[dict[str, Tensor], float | None]:
    """Smooth and reorder the inputs of down_proj as the recipe says; also the alpha of the smoothing."""
    recipe, family = plan.request.recipe, plan.skeleton.family
    spec, down = recipe.smooth_output, family.roles["mlp_down"]
    if spec is None and recipe.reorder is None:
        return tensors, None
    block = build_block(plan.skeleton, index, tensors)
    observed = InputObserver(spec.search_tokens if spec is not None else 0)
    batches = -(-hidden.shape[0] // runner.batch)
    for _, batch in runner.batches(hidden):
        with tf32_products():
            observed.add(input_of(block, down, partial(runner, index, block, batch)))
        tick("observing the MLP", 0.08 / batches)
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


def _align_keys(
    plan: Plan, index: int, tensors: dict[str, Tensor], hidden: Tensor, runner: BlockRunner, tick: Tick
) -> dict[str, Tensor]:
    skeleton, recipe = plan.skeleton, plan.request.recipe
    # Gains of norms on keys and queries come after the projections: nothing can be folded past them.
    if recipe.align_keys is None or recipe.kv_bits == 16 or skeleton.family.key_fold == "norms":
        return tensors
    block = build_block(skeleton, index, tensors)
    attention = block.get_submodule(skeleton.family.attention)
    seen = MeanKeyObserver()
    batches = -(-hidden.shape[0] // runner.batch)
    for _, batch in runner.batches(hidden):
        with tf32_products():
            observe(attention, seen, partial(runner, index, block, batch))
        tick("observing keys", 0.04 / batches)
    if not bool(torch.isfinite(seen.total).all()):
        raise InputError(
            f"block {index}: NaN or infinite keys",
            remedy="the model is damaged, or its weights do not fit its configuration",
        )
    folded = key_alignment.fold(tensors, key_alignment.angles(seen.total), skeleton.family, skeleton.num_heads)
    _check_preserved(plan, index, "align_keys", folded, block, hidden, runner)
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
        with tf32_products():
            observe(attention, ranges_seen, partial(runner, index, block, batch))
        tick("observing", 0.05 / batches)
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
            tick("searching", 0.15 / batches)
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
