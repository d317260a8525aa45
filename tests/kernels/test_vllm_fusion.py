"""Graphs as vLLM compiles them: what is fused, what is not, and that results stay what they were.

Graphs are PyTorch's own, after it has made them functional. Where vLLM is not installed, its operators have stand-ins
of the same names and signatures.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import rms_norm, silu

from qoq.kernels.act_quant import MAX_NORM_K
from qoq.kernels.vllm.fusion import fuse_quantizers
from tests.kernels.hf_cases import edit_config, write_checkpoint

pytestmark = pytest.mark.usefixtures("cpu_operators")
EPS = 1e-5
H = 256
LAST_PASS = "post_grad_custom_post_pass"
_DEFINED: list[torch.library.Library] = []
"""Stand-ins live as long as their library does."""


@pytest.fixture(scope="module", autouse=True)
def vllms_operators() -> None:
    if find_spec("vllm") is not None:
        import vllm.ir.ops  # noqa: F401
    elif not _DEFINED:
        library = torch.library.Library("vllm_ir", "FRAGMENT")
        library.define("rms_norm(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor")
        library.define(
            "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, SymInt? variance_size=None)"
            " -> (Tensor, Tensor)"
        )
        library.impl("rms_norm", _norm, "CompositeExplicitAutograd")
        library.impl("fused_add_rms_norm", _add_norm, "CompositeExplicitAutograd")
        _DEFINED.append(library)
    if not hasattr(torch.ops._C, "silu_and_mul"):  # of vLLM's compiled part, which needs CUDA
        library = torch.library.Library("_C", "FRAGMENT")
        library.define("silu_and_mul(Tensor! result, Tensor input) -> ()")
        library.impl("silu_and_mul", _silu_and_mul, "CPU")
        library.impl("silu_and_mul", lambda *_: None, "Meta")
        _DEFINED.append(library)


def _norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    assert variance_size is None
    plain = rms_norm(x, (x.shape[-1],), None, epsilon)
    return plain if weight is None else plain * weight


def _add_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    total = x + x_residual
    return _norm(total, weight, epsilon, variance_size), total


def _silu_and_mul(result: Tensor, x: Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    result.copy_(silu(gate) * up)


class Compiled:
    """`function` compiled for `example`; `names` are the operators of qoq and vLLM in its graph after fusing.

    dynamic   for any number of rows, as vLLM's graphs are
    change    what is done to the graph
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *example: Tensor,
        dynamic: bool = True,
        change: Callable[[fx.Graph], None] = fuse_quantizers,
    ) -> None:
        self.names: list[str] = []

        def compiler(module: fx.GraphModule, _: Any) -> Any:
            change(module.graph)
            module.recompile()
            for node in module.graph.nodes:
                target = node.args[0] if node.target is torch.ops.higher_order.auto_functionalized else node.target
                if isinstance(target, torch._ops.OpOverload) and target.namespace in {"qoq", "vllm_ir", "_C"}:
                    self.names.append(target._schema.name)
            return module.forward

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler)
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        for tensor in example:
            if tensor.dim() == 2 and dynamic:
                torch._dynamo.mark_dynamic(tensor, 0)
        with torch.no_grad(), torch._inductor.config.patch(enable_auto_functionalized_v2=False):
            self.found = compiled(*example)
            self.expected = function(*example)


def _same(found: Any, expected: Any) -> None:
    """Codes may differ by one where a 16-bit value is rounded otherwise."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype == torch.int8:
            assert int((a.int() - b.int()).abs().max()) <= 1
        elif a.dtype == torch.int32:
            assert float((a - b).abs().max()) <= 0.01 * H
        else:
            differs = (a - b).abs() > 2e-3 + 2e-3 * b.abs()
            assert float(differs.float().mean()) < 0.01  # where a code differs, and went on


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.qoq.quantize_activation(x.reshape(-1, x.shape[-1]).contiguous())
    return result


def rows(count: int, width: int = H, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).half()


@pytest.fixture
def weight() -> Tensor:
    return rows(1, H, 9)[0] + 1


def test_a_norm_is_fused(weight: Tensor) -> None:
    made = Compiled(lambda x, w: quantize(torch.ops.vllm_ir.rms_norm(x, w, EPS)), rows(5), weight)
    assert made.names == ["qoq::rms_norm_quantize"]
    _same(made.found, made.expected)


def test_a_sum_and_norm_are_fused_and_the_sum_goes_on(weight: Tensor) -> None:
    def function(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        normed, total = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, w, EPS)
        return *quantize(normed), total * 2

    made = Compiled(function, rows(5), rows(5, seed=1), weight)
    assert made.names == ["qoq::add_rms_norm_quantize"]
    _same(made.found, made.expected)


def test_a_sum_that_nobody_wants_is_fused_too(weight: Tensor) -> None:
    def function(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return quantize(torch.ops.vllm_ir.fused_add_rms_norm(x, residual, w, EPS)[0])

    made = Compiled(function, rows(3), rows(3, seed=1), weight)
    assert made.names == ["qoq::add_rms_norm_quantize"]
    _same(made.found, made.expected)


def test_silu_is_fused() -> None:
    def function(gate_up: Tensor) -> tuple[Tensor, ...]:
        result = torch.empty(gate_up.shape[0], H, dtype=gate_up.dtype)
        torch.ops._C.silu_and_mul(result, gate_up)
        return quantize(result)

    made = Compiled(function, rows(5, 2 * H))
    assert made.names == ["qoq::silu_mul_quantize"]
    _same(made.found, made.expected)


def test_a_block_is_fused_throughout(weight: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    """Two norms and SiLU in one graph, as between two attentions of a model; sums of one are operands of the next."""

    def function(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        normed, residual = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, w, EPS)
        codes, scales, _ = quantize(normed)
        gate_up = torch.cat([codes.half() * scales.half()[:, None]] * 2, dim=1)
        result = torch.empty(gate_up.shape[0], H, dtype=gate_up.dtype)
        torch.ops._C.silu_and_mul(result, gate_up)
        codes, scales, _ = quantize(result)
        normed, residual = torch.ops.vllm_ir.fused_add_rms_norm(codes.half() * scales.half()[:, None], residual, w, EPS)
        return *quantize(normed), residual

    with caplog.at_level("INFO", logger="vllm.qoq"):
        made = Compiled(function, rows(7), rows(7, seed=1), weight)
    assert "3 of 3 quantizers of a graph are fused" in caplog.text
    assert made.names == ["qoq::add_rms_norm_quantize", "qoq::silu_mul_quantize", "qoq::add_rms_norm_quantize"]
    _same(made.found, made.expected)


def test_tiles_stay_tiles(weight: Tensor) -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.qoq.quantize_activation(
            torch.ops.vllm_ir.rms_norm(x, w, EPS), tiled=True
        )
        return result

    made = Compiled(function, rows(5), weight)
    assert made.names == ["qoq::rms_norm_quantize"]
    assert made.found[0].shape == made.expected[0].shape


def _both(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    normed = torch.ops.vllm_ir.rms_norm(x, w, EPS)
    return *quantize(normed), normed


def _first_of_two(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    normed, total = torch.ops.vllm_ir.fused_add_rms_norm(x, x, w, EPS)
    return *quantize(normed), normed, total


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(_both, id="a norm that is used otherwise too"),
        pytest.param(_first_of_two, id="a norm after a sum that is used otherwise too"),
        pytest.param(lambda x, w: quantize(torch.ops.vllm_ir.rms_norm(x, None, EPS)), id="no weight"),
        pytest.param(lambda x, w: quantize(torch.ops.vllm_ir.rms_norm(x, w.float(), EPS)), id="a weight in float32"),
        pytest.param(lambda x, w: quantize(torch.ops.vllm_ir.rms_norm(x, w, EPS).flip(1)), id="something in between"),
        pytest.param(
            lambda x, w: quantize(torch.ops.vllm_ir.rms_norm(x, w, EPS).view(-1, 2 * H)), id="rows of another length"
        ),
        pytest.param(lambda x, w: quantize(x), id="no norm"),
    ],
)
def test_what_is_otherwise_stays(weight: Tensor, function: Callable[..., Any]) -> None:
    made = Compiled(function, rows(6), weight, dynamic=False)
    assert "qoq::quantize_activation" in made.names
    assert not any("norm_quantize" in name for name in made.names)
    _same(made.found, made.expected)


def test_rows_that_the_fused_kernel_does_not_take_stay() -> None:
    k = MAX_NORM_K + 128
    made = Compiled(lambda x, w: quantize(torch.ops.vllm_ir.rms_norm(x, w, EPS)), rows(2, k), rows(1, k)[0])
    assert made.names == ["vllm_ir::rms_norm", "qoq::quantize_activation"]


# ---- in vLLM


@pytest.fixture
def of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """vLLM's configuration of a checkpoint, after the plug-in saw it, as on a GPU."""
    pytest.importorskip("vllm")
    from tests.kernels.test_vllm_cache import config_of

    import_module("qoq.kernels.vllm.plugin").register()
    platform = type(import_module("vllm.platforms").current_platform)
    folder = write_checkpoint(tmp_path / "model", "llama").folder

    def make(*, is_ours: bool = True, asked: str = "1", **compilation: Any) -> Any:
        if not is_ours:
            edit_config(folder, lambda data: data.pop("quantization_config"))
        settings = import_module("vllm.config").CompilationConfig(**compilation)
        config = config_of(folder, compilation_config=settings)
        assert compilation or LAST_PASS not in config.compilation_config.inductor_compile_config
        with monkeypatch.context() as patch:
            patch.setenv("QOQ_VLLM_FUSE", asked)
            patch.setattr(platform, "is_cuda", lambda _: True)
            import_module("qoq.kernels.vllm.config").prepare(config)
        return config

    return make


def test_vllm_is_given_the_pass_and_sends_it_to_its_processes(of_vllm: Callable[..., Any]) -> None:
    config = of_vllm()
    for each in (config, pickle.loads(pickle.dumps(config))):  # noqa: S301  (as vLLM does)
        assert each.compilation_config.inductor_compile_config[LAST_PASS].callable is fuse_quantizers
        assert "+silu_and_mul" in each.compilation_config.custom_ops
        assert each.compute_hash() == config.compute_hash()


def test_vllms_own_passes_run_around_it(of_vllm: Callable[..., Any], weight: Tensor) -> None:
    managers = import_module("vllm.compilation.passes.pass_manager")
    passes = import_module("vllm.compilation.passes.inductor_pass")
    config = of_vllm()
    config.compilation_config.pass_config.fuse_act_quant = False  # for fp8, and imported on a GPU only
    manager = managers.PostGradPassManager()
    manager.configure(config)
    manager.fix_functionalization = lambda _: None  # wants the part of vLLM that needs CUDA
    manager.add(config.compilation_config.inductor_compile_config[LAST_PASS])

    def change(graph: fx.Graph) -> None:
        with passes.pass_context(import_module("vllm.config.utils").Range(1, 8192)):
            manager(graph)

    def function(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        normed, residual = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, w, EPS)
        return *quantize(normed), torch.ops.vllm_ir.rms_norm(residual, w, EPS)

    made = Compiled(function, rows(5), rows(5, seed=1), weight, change=change)
    assert made.names == ["qoq::add_rms_norm_quantize"]  # and the last norm has become PyTorch's
    _same(made.found, made.expected)


def test_what_was_chosen_stays(of_vllm: Callable[..., Any]) -> None:
    other = import_module("vllm.compilation.passes.inductor_pass").CallableInductorPass(lambda _: None, "other")
    config = of_vllm(inductor_compile_config={LAST_PASS: other})
    assert config.compilation_config.inductor_compile_config[LAST_PASS] is other
    assert "+silu_and_mul" not in config.compilation_config.custom_ops
    assert "+silu_and_mul" not in of_vllm(custom_ops=["-silu_and_mul"]).compilation_config.custom_ops


def test_otherwise_models_are_compiled_as_ever(of_vllm: Callable[..., Any]) -> None:
    for config in (of_vllm(asked="0"), of_vllm(is_ours=False)):
        assert LAST_PASS not in config.compilation_config.inductor_compile_config
        assert "+silu_and_mul" not in config.compilation_config.custom_ops
