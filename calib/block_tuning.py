"""Tuning: the codes and scales of a rounded block, changed together so that its output comes closer to what is meant.

GPTQ rounds one linear after the other, each for a loss of its own. Here gradient descent goes through the whole block
as it is served, int8 activations and 4-bit cache included; rounding passes gradients straight through. Every code
starts where GPTQ left it, as near to its neighbours as the weight is, so that it moves where the block gains from it
(in the manner of AdaRound, Nagel et al., 2020, and SignRound, Cheng et al., 2023, which start from plain rounding).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qoq.calib.block_rounding import RoundedBlock
from qoq.calib.gradients import straight_through
from qoq.calib.plan import Plan
from qoq.calib.progress import Tick
from qoq.calib.round.grid import Grid
from qoq.calib.streaming import BlockRunner, build_block, tf32_products
from qoq.formats.arithmetic import IntegerWeight, quantize_activation
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.recipes.schema import Tuning

_REACH = 0.45
"""How far from its code, in codes, a weight may start: where GPTQ chose a code that is not the nearest, at its edge."""
_BETAS = (0.9, 0.99)
_LOSS_TOKENS = 8192
"""Calibration tokens on which the block before and after is compared."""


def tune_block_(
    plan: Plan,
    index: int,
    tensors: dict[str, Tensor],
    rounded: RoundedBlock,
    streams: Tensor,
    runner: BlockRunner,
    tick: Tick,
) -> float | None:
    """Change the linears of `rounded` as the recipe's `tuning` says; None where it says nothing.

    streams float32 [2, S, L, H]: what enters the block as it is served, and what is to leave it. Returns the loss (the
    mean over tokens of the relative squared error) as a share of what it was, on the first windows; a block that does
    not gain is left as it was, and 1 returned.
    """
    spec, recipe = plan.request.recipe.tuning, plan.request.recipe
    if spec is None or not rounded.linears:
        return None
    block = build_block(plan.skeleton, index, tensors, kv_bits=recipe.kv_bits, key_rotation=recipe.key_rotation)
    tuned = {
        name: TunedLinear(linear, tensors[f"{name}.weight"], recipe.act_bits)
        for name, linear in rounded.linears.items()
    }
    for name, module in tuned.items():
        block.set_submodule(name, module)
    losses = _Losses(index, block, streams, runner)
    before = losses.first()
    # The gradients of other attention kernels are sums in no fixed order on a GPU, and differ from run to run.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        _descend(spec, list(tuned.values()), losses, seed=recipe.calibration.seed, tick=tick)
    linears = {name: module.rounded() for name, module in tuned.items()}
    for name, linear in linears.items():
        block.set_submodule(name, TunedLinear(linear, linear.dequantize(), recipe.act_bits))
    after = losses.first()
    if not after < before:
        return 1.0
    rounded.linears.update(linears)
    rounded.decoded.update({name: IntegerWeight.decode(linear, runner.device) for name, linear in linears.items()})
    return after / before


class TunedLinear(nn.Module):
    """A linear whose codes and level-1 scales can be learnt.

    positions  float32 [N, G, 128] (per channel [N, 1, K_padded]), in codes: rounded and clamped, they are the codes
    log_scale  float32 [N]: of what s1 is multiplied by
    """

    def __init__(self, linear: QuantizedLinear, weight: Tensor, act_bits: int) -> None:
        """`linear` is where it starts; weight float32 [N, K], on its device, what it was rounded from."""
        super().__init__()
        self._linear, self._act_bits, self._grid = linear, act_bits, Grid.of_linear(linear)
        self._low, self._high = self._grid.code_range()
        codes = self._grid.grouped(linear.codes.float())
        exact = self._grid.grouped(self._grid.positions(self._grid.units(weight)))
        self.positions = nn.Parameter(codes + (exact - codes).clamp(-_REACH, _REACH))
        self.log_scale = nn.Parameter(torch.zeros_like(linear.s1_scales, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if self._act_bits == 8:
            act = quantize_activation(x.detach().reshape(-1, x.shape[-1]))
            x = straight_through((act.codes.float() * act.scales.unsqueeze(1)).view_as(x), x)
        weight = self.weight()[:, : self._linear.in_features]
        bias = self._linear.bias
        return nn.functional.linear(x, weight, None if bias is None else bias.float())

    def weight(self) -> Tensor:
        """What the codes and scales decode to now, float32 [N, K_padded]."""
        grid = self._grid
        unit = grid.s1.float().view(-1, 1, 1) * grid.group_scales
        inputs = (self.positions, self.log_scale, unit, grid.group_zeros, self._low, self._high)
        decoded: Tensor = _Decode.apply(*inputs)  # type: ignore[no-untyped-call]
        return decoded.flatten(1)

    @torch.no_grad()
    def rounded(self) -> QuantizedLinear:
        """The linear with its codes and scales as they are now."""
        limits = torch.finfo(torch.float16)
        s1 = self._grid.s1.float() * self.log_scale.exp()
        s1 = s1.clamp(limits.smallest_normal * limits.eps, limits.max).to(torch.float16)
        codes = torch.round(self.positions).clamp(self._low, self._high).flatten(1)
        return replace(self._linear, codes=codes.to(torch.uint8), s1_scales=s1)


class _Decode(torch.autograd.Function):
    """(codes - zero) * unit * exp(log_scale); the gradient passes rounding and clamping as if they were not there."""

    @staticmethod
    def forward(
        ctx: Any, positions: Tensor, log_scale: Tensor, unit: Tensor, zero: Tensor, low: Tensor, high: Tensor
    ) -> Tensor:
        unit = unit * log_scale.exp().view(-1, 1, 1)
        weight = torch.round(positions).clamp_(low, high).sub_(zero).mul_(unit)
        ctx.save_for_backward(unit, weight)
        return weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        unit, weight = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * unit, (gradient * weight).sum(dim=(1, 2)), None, None, None, None


class _Losses:
    """Losses of a block that is being tuned, on windows of the calibration text."""

    def __init__(self, index: int, block: nn.Module, streams: Tensor, runner: BlockRunner) -> None:
        self._index, self._block, self._runner = index, block, runner
        self._entering, self._leaving = streams
        self.windows, self.length = self._entering.shape[:2]

    def of(self, rows: Tensor) -> Tensor:
        """Mean over the tokens of windows `rows` int64 [B] of ||out - meant||^2 / ||meant||^2."""
        entering, meant = (self._on_device(stream, rows) for stream in (self._entering, self._leaving))
        out = self._runner.differentiable(self._index, self._block, entering)
        floor = torch.finfo(torch.float32).tiny
        errors: Tensor = (out - meant).square().sum(dim=-1) / meant.square().sum(dim=-1).clamp(min=floor)
        return errors.mean()

    def _on_device(self, stream: Tensor, rows: Tensor) -> Tensor:
        # Window by window: what is contiguous in pinned memory is copied at the speed of the bus.
        return torch.stack([stream[row].to(self._runner.device) for row in rows.tolist()])

    @torch.no_grad()
    def first(self) -> float:
        """The same of the first windows."""
        rows = torch.arange(min(self.windows, max(1, _LOSS_TOKENS // self.length)))
        parts = rows.split(self._runner.batch)
        return sum(float(self.of(part)) * len(part) for part in parts) / len(rows)


def _descend(spec: Tuning, linears: list[TunedLinear], losses: _Losses, *, seed: int, tick: Tick) -> None:
    adam = torch.optim.Adam(
        [
            {"params": [linear.positions for linear in linears], "lr": spec.code_rate},
            {"params": [linear.log_scale for linear in linears], "lr": spec.scale_rate},
        ],
        betas=_BETAS,
    )
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=spec.steps)
    generator = torch.Generator().manual_seed(seed)
    size = min(losses.windows, max(1, spec.tokens // losses.length))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(spec.steps):
        while len(order) < size:
            order = torch.cat((order, torch.randperm(losses.windows, generator=generator)))
        rows, order = order[:size], order[size:]
        adam.zero_grad()
        with tf32_products():
            losses.of(rows).backward()
        adam.step()
        falling.step()
        tick("tuning", 1 / spec.steps)
