"""Norms and SiLU fused with the quantizers that follow them, in the graphs that vLLM compiles.

What vLLM would write in 16 bit and the quantizer read again then stays in registers. The graph is changed after PyTorch
has made it functional, and before vLLM gives its own operators the form that inductor compiles. Operators of vLLM are
known by name: nothing of it is imported here.
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import qoq.kernels.ops  # noqa: F401  (registers the operators)
from qoq.kernels.act_quant import MAX_K, MAX_NORM_K

_logger = logging.getLogger("vllm.qoq")  # below "vllm", whose handlers show it
_NORM, _ADD_NORM, _SILU_MUL = "vllm_ir::rms_norm", "vllm_ir::fused_add_rms_norm", "_C::silu_and_mul"
_SAME_VALUES = ("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::clone", "aten::contiguous")


def fuse_quantizers(graph: fx.Graph) -> None:
    """Replace quantizers in `graph`, and what they alone use, by operators that do both.

    What is of another form than expected stays as it is, and so does its result. The log tells how many were replaced.
    """
    quantizers = [node for node in graph.nodes if _name(node) == "qoq::quantize_activation"]
    fused = sum(_Pair.of(graph, node).fuse() for node in quantizers)
    graph.lint()
    if quantizers:
        _logger.info("qoq: %d of %d quantizers of a graph are fused with what they quantize", fused, len(quantizers))


@dataclass(frozen=True)
class _Pair:
    """A quantizer of rows, and what computes them: `maker`, whose values reach it through `chain`, the last node first.

    Its methods insert an operator that does both, before `maker`, and return it; None where there is none.
    """

    graph: fx.Graph
    quantizer: fx.Node
    chain: list[fx.Node]
    maker: fx.Node
    tiled: bool

    @staticmethod
    def of(graph: fx.Graph, quantizer: fx.Node) -> _Pair:
        asked = _arguments(quantizer)
        chain, node = [], asked["x"]
        while _name(node) in _SAME_VALUES and _form(node) == _form(node.args[0]):
            chain.append(node)
            node = node.args[0]
        if node.target is operator.getitem:
            chain.append(node)
            node = node.args[0]
        return _Pair(graph, quantizer, chain, node, asked["tiled"])

    def fuse(self) -> bool:
        """Whether there was something to fuse."""
        kinds = {_NORM: self._norm, _ADD_NORM: self._add_norm, _SILU_MUL: self._silu_mul}
        insert = kinds.get(_name(self.maker))
        if insert is None or any(len(node.users) != 1 for node in self.chain):
            return False
        fused = insert()
        if fused is None:
            return False
        self.quantizer.replace_all_uses_with(fused)
        for node in (self.quantizer, *self.chain, self.maker):
            if not node.users:
                self.graph.erase_node(node)
        return True

    def _norm(self) -> fx.Node | None:
        of = _arguments(self.maker)
        if len(self.maker.users) != 1 or not _is_plain(of, of["x"]):
            return None
        operands = (of["x"], of["weight"], of["epsilon"], self.tiled)
        return self._insert(torch.ops.qoq.rms_norm_quantize.default, operands)

    def _add_norm(self) -> fx.Node | None:
        of, norm = _arguments(self.maker), self.maker
        parts = {user.args[1]: user for user in norm.users if user.target is operator.getitem}
        is_alone = len(parts) == len(norm.users) and parts.get(0) is self.chain[-1]
        if not is_alone or not _is_plain(of, of["x"]) or _form(of["x"]) != _form(of["x_residual"]):
            return None
        operands = (of["x"], of["x_residual"], of["weight"], of["epsilon"], self.tiled)
        total = norm.meta["val"][1]
        fused = self._insert(torch.ops.qoq.add_rms_norm_quantize.default, operands, total)
        if 1 in parts:
            with self.graph.inserting_after(fused):
                last = self.graph.call_function(operator.getitem, (fused, 3))
            last.meta["val"] = total
            parts[1].replace_all_uses_with(last)
            self.graph.erase_node(parts[1])
        return fused

    def _silu_mul(self) -> fx.Node | None:
        names = [argument.name for argument in _operator(self.maker)._schema.arguments]
        gate_up: Any = self.maker.kwargs[names[1]]  # the other is the result, which comes back as number 1
        is_result = len(self.maker.users) == 1 and self.chain[-1].args[1] == 1
        if not is_result or not _are_rows(gate_up, 2 * MAX_K):
            return None
        return self._insert(torch.ops.qoq.silu_mul_quantize.default, (gate_up, self.tiled))

    def _insert(self, target: Any, operands: tuple[Any, ...], *more: Any) -> fx.Node:
        """The operator's results are those of the quantizer and `more`."""
        with self.graph.inserting_before(self.maker):
            node = self.graph.call_function(target, operands)
        node.meta["val"] = (*self.quantizer.meta["val"], *more)
        return node


def _is_plain(of: dict[str, Any], x: fx.Node) -> bool:
    """Whether a norm is one of whole rows, with a weight, that the fused kernel takes."""
    weight = of["weight"]
    if of["variance_size"] is not None or weight is None or not _are_rows(x, MAX_NORM_K):
        return False
    given: Tensor = weight.meta["val"]
    return given.dim() == 1 and given.dtype == x.meta["val"].dtype


def _are_rows(x: fx.Node, longest: int) -> bool:
    value: Tensor = x.meta["val"]
    return value.dim() == 2 and type(value.shape[1]) is int and value.shape[1] <= longest


def _form(node: Any) -> tuple[Any, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return (tuple(map(str, value.shape)), value.dtype) if isinstance(value, Tensor) else None  # no guards on sizes


def _name(node: Any) -> str:
    """The operator that a node calls; of those that write, in their functional form, only SiLU times up has a name."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    target = _operator(node)
    name = str(target._schema.name) if isinstance(target, torch._ops.OpOverload) else ""
    return name if (target is not node.target) == (name == _SILU_MUL) else ""


def _operator(node: fx.Node) -> Any:
    """Of a call, or of its functional form."""
    return node.args[0] if node.target is torch.ops.higher_order.auto_functionalized else node.target


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call of an operator, by name."""
    arguments = _operator(node)._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | dict(node.kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in arguments}
