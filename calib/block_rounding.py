"""The linears of a block, rounded in the order in which they run, each for the inputs that those before it leave it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from qoq.calib.moments import MomentObserver, input_of
from qoq.calib.plan import Plan
from qoq.calib.progress import Tick
from qoq.calib.round.gptq import Inputs, gptq
from qoq.calib.round.rtn import round_to_nearest
from qoq.calib.streaming import BlockRunner, build_block, tf32_products
from qoq.formats.arithmetic import IntegerWeight
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.recipes.errors import InputError


@dataclass
class RoundedBlock:
    """What is rounded so far, by name relative to the block, as it is stored and decoded.

    `fallbacks`: why linears were rounded to nearest although the recipe says GPTQ.
    """

    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    decoded: dict[str, IntegerWeight] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)


def round_block(
    plan: Plan, index: int, tensors: dict[str, Tensor], streams: Tensor, runner: BlockRunner, tick: Tick
) -> RoundedBlock:
    """Round what the plan says of block `index`; `streams` [1 or 2, S, L, H] as for `quantize_block_`.

    Raises InputError naming the linear where weights or inputs are not finite, or, with --strict, where GPTQ fails.
    """
    recipe, family = plan.request.recipe, plan.skeleton.family
    prefix = family.block_prefix(index)
    done = RoundedBlock()
    for roles in family.shared_inputs:
        names = [name for role in roles if prefix + (name := family.roles[role]) in plan.quantized]
        inputs = None
        if names and recipe.rounding == "gptq":
            inputs = _observe(plan, index, tensors, names, done, streams, runner, tick)
        for name in names:
            try:
                _round_one(plan, name, tensors, inputs, done)
            except ValueError as error:
                raise InputError(f"{prefix}{name}: {error}") from error
            if name in done.fallbacks and plan.request.strict:
                raise InputError(
                    f"{prefix}{name}: GPTQ failed: {done.fallbacks[name]}",
                    remedy="calibrate on more text, or leave out --strict to round this linear to nearest",
                )
            done.decoded[name] = IntegerWeight.decode(done.linears[name], runner.device)
            tick(f"rounding {name}", 0.14 / len(family.roles))
    return done


def _round_one(plan: Plan, name: str, tensors: dict[str, Tensor], inputs: Inputs | None, done: RoundedBlock) -> None:
    recipe = plan.request.recipe
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    options: dict[str, Any] = {
        "search": recipe.grid == "search",
        "zero_domain": recipe.zero_domain,
        "symmetric": recipe.symmetric,
    }
    if inputs is None:
        done.linears[name] = round_to_nearest(weight, bias, recipe.group_size, **options)
        return
    result = gptq(weight, bias, recipe.group_size, inputs, **options)
    done.linears[name] = result.linear
    if result.fallback is not None:
        done.fallbacks[name] = result.fallback


def _observe(
    plan: Plan,
    index: int,
    tensors: dict[str, Tensor],
    names: list[str],
    done: RoundedBlock,
    streams: Tensor,
    runner: BlockRunner,
    tick: Tick,
) -> Inputs:
    """The inputs that the linears `names` share, when those before them are quantized."""
    recipe, family = plan.request.recipe, plan.skeleton.family
    spec = recipe.gptq
    exact = build_block(plan.skeleton, index, tensors)
    served = build_block(
        plan.skeleton,
        index,
        tensors,
        quantized=done.decoded,
        act_bits=recipe.act_bits,
        kv_bits=recipe.kv_bits,
        key_rotation=recipe.key_rotation,
    )
    observer = MomentObserver()
    batches = -(-streams.shape[1] // runner.batch)
    for _, batch in runner.batches(streams):
        with tf32_products():
            seen = [
                input_of(block, names[0], partial(runner, index, block, hidden))
                for block, hidden in zip((served, exact), batch, strict=False)
            ]
            observer.add(*seen)
        tick("observing inputs", 0.06 / batches)
    try:
        return Inputs.of(observer.moments(), damping=spec.damping)
    except ValueError as error:
        raise InputError(
            f"{family.block_prefix(index)}{names[0]}: {error}",
            remedy="the model is damaged, or its weights do not fit its configuration",
        ) from error
