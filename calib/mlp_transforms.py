"""Transforms of the MLP that keep what it computes: output smoothing and channel reorder, both of down_proj's input.

Smoothing divides inputs of down_proj by lambda, through the rows of up_proj, and multiplies its columns: outliers of
the activations move into weights (QServe paper, section 4.3.2). Reorder sorts the inputs by their size, so that those
of a group of 128, which share a scale, are alike (section 4.3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qoq.calib.round.rtn import round_to_nearest
from qoq.formats.arithmetic import IntegerWeight, linear_forward
from qoq.recipes.families import Family
from qoq.recipes.schema import OutputSmoothing

Tensors = dict[str, Tensor]
"""Of a block, by name relative to it."""


class InputObserver:
    """absmax [K] of the inputs of a linear, and the first of them."""

    def __init__(self, token_limit: int) -> None:
        self._limit = token_limit
        self._absmax: Tensor | None = None
        self._rows: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """One batch of inputs, [..., K]."""
        rows = inputs.flatten(0, -2)
        absmax = rows.abs().amax(dim=0)
        self._absmax = absmax if self._absmax is None else torch.maximum(self._absmax, absmax)
        left = self._limit - sum(len(seen) for seen in self._rows)
        if left > 0:
            self._rows.append(rows[:left].clone())

    @property
    def absmax(self) -> Tensor:
        if self._absmax is None:
            raise ValueError("no input was observed")
        return self._absmax

    @property
    def rows(self) -> Tensor:
        """[tokens, K], as many as the limit allows."""
        return torch.cat(self._rows)


def smoothing_scale(inputs: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """lambda [K] = absmax(inputs)^alpha / absmax(weight)^beta, with a geometric mean of 1; 1 where that is no number.

    inputs [K]: absmax of each input; weight [N, K].
    """
    scale = inputs**alpha / weight.abs().amax(dim=0) ** beta
    usable = torch.isfinite(scale) & torch.isfinite(1.0 / scale)
    mean = scale[usable].log().mean().exp() if bool(usable.any()) else scale.new_ones(())
    return torch.where(usable, scale / mean, torch.ones_like(scale))


def choose_smoothing(
    spec: OutputSmoothing, observed: InputObserver, weight: Tensor, group_size: int | None, act_bits: int
) -> tuple[Tensor, float | None]:
    """lambda [K] and its alpha; None where leaving the inputs as they are is best.

    A search rounds the smoothed weight [N, K] to nearest, multiplies the observed inputs, quantized as they will be,
    and compares with the product that is meant.
    """
    if spec.mode == "fixed":
        return smoothing_scale(observed.absmax, weight, spec.alpha, spec.beta), spec.alpha
    rows = observed.rows
    exact = rows @ weight.t()
    best, chosen, least = torch.ones_like(observed.absmax), None, float("inf")
    for alpha in (None, *spec.alphas):
        scale = best if alpha is None else smoothing_scale(observed.absmax, weight, alpha, 1.0 - alpha)
        quantized = IntegerWeight.decode(round_to_nearest(weight * scale, None, group_size), weight.device)
        served = linear_forward(rows / scale, quantized, act_bits=act_bits)
        error = float((served - exact).double().square().sum())
        if error < least:
            best, chosen, least = scale, alpha, error
    return best, chosen


def smooth(tensors: Tensors, scale: Tensor, family: Family) -> Tensors:
    """Fold lambda [K] into up_proj's rows (and bias) and down_proj's columns; the input is left alone."""
    up, down = family.roles["mlp_up"], family.roles["mlp_down"]
    folded = dict(tensors)
    folded[f"{up}.weight"] = tensors[f"{up}.weight"] / scale.unsqueeze(1)
    folded[f"{down}.weight"] = tensors[f"{down}.weight"] * scale
    if f"{up}.bias" in tensors:
        folded[f"{up}.bias"] = tensors[f"{up}.bias"] / scale
    return folded


def reorder(tensors: Tensors, order: Tensor, family: Family) -> Tensors:
    """Put the inputs of down_proj into `order` (int64 [K]): its columns, and the rows of gate_proj and up_proj."""
    ordered = dict(tensors)
    for role in ("mlp_gate", "mlp_up"):
        for part in ("weight", "bias"):
            name = f"{family.roles[role]}.{part}"
            if name in tensors:
                ordered[name] = tensors[name][order].contiguous()
    down = f"{family.roles['mlp_down']}.weight"
    ordered[down] = tensors[down][:, order].contiguous()
    return ordered
