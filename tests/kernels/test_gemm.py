"""The GEMM operators without a GPU: what they refuse, their fakes, and that instantiations compile without spills."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qoq.kernels import gemm
from qoq.kernels.compiler import compile_all, nvrtc_version
from qoq.kernels.dispatch import choose_gemm
from qoq.kernels.gemm_tiles import HOPPER
from qoq.recipes.errors import QoQError

M, N, K = 5, 64, 256


def operands(**changed: Tensor | None) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {
        "act_codes": torch.zeros(M, K, dtype=torch.int8),
        "act_scales": torch.zeros(M),
        "act_sums": torch.zeros(M, dtype=torch.int32),
        "qweight": torch.zeros(N, K // 2, dtype=torch.int8),
        "s1_scales": torch.zeros(N, dtype=torch.float16),
        "s2_scales": torch.zeros(K // 128, N, dtype=torch.int8),
        "s2_zeros": torch.zeros(K // 128, N, dtype=torch.int8),
        "s1_szeros": None,
        "bias": None,
    }
    assert not changed.keys() - found.keys()
    return found | changed


WRONG = {
    "act_codes: expected": {"act_codes": torch.zeros(M, K - 128, dtype=torch.int8)},
    "act_scales: expected": {"act_scales": torch.zeros(M, dtype=torch.float16)},
    "act_sums: expected": {"act_sums": torch.zeros(M + 1, dtype=torch.int32)},
    "act_codes: expected two axes": {"act_codes": torch.zeros(K, dtype=torch.int8)},
    "qweight: expected two axes": {"qweight": torch.zeros(N * K // 2, dtype=torch.int8)},
    "qweight: expected it on cpu, got meta": {"qweight": torch.zeros(N, K // 2, dtype=torch.int8, device="meta")},
    "act_sums: expected it on cpu, got meta": {"act_sums": torch.zeros(M, dtype=torch.int32, device="meta")},
    "qweight: N is 48": {"qweight": torch.zeros(48, K // 2, dtype=torch.int8)},
    "qweight: N is 0": {"qweight": torch.zeros(0, K // 2, dtype=torch.int8)},
    "s1_scales: expected": {"s1_scales": torch.zeros(N)},
    "s2_zeros: expected": {"s2_zeros": torch.zeros(K // 128, N, dtype=torch.uint8)},
    "expected s2_scales and s2_zeros": {"s2_zeros": None},
    "bias: expected": {"bias": torch.zeros(N)},
    "a contiguous tensor": {"qweight": torch.zeros(K // 2, N, dtype=torch.int8).t()},
    "multiple of 16 bytes": {"act_codes": torch.zeros(M * K + 1, dtype=torch.int8)[1:].view(M, K)},
    "K is 192": {
        "act_codes": torch.zeros(M, 192, dtype=torch.int8),
        "qweight": torch.zeros(N, 96, dtype=torch.int8),
        "s2_scales": torch.zeros(1, N, dtype=torch.int8),
        "s2_zeros": torch.zeros(1, N, dtype=torch.int8),
    },
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_operands_are_refused_before_any_launch(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "run_gemm", lambda *_: pytest.fail("launched"))
    with pytest.raises(ValueError, match=re.escape(says)):
        gemm.w4a8_gemm._init_fn(**operands(**WRONG[says]), out_dtype=torch.float16)


def test_an_output_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"out_dtype is torch\.float32"):
        gemm.w4a8_gemm._init_fn(**operands(), out_dtype=torch.float32)
    with pytest.raises(ValueError, match="out_dtype"):
        gemm.w8a8_gemm._init_fn(
            torch.zeros(M, K, dtype=torch.int8),
            torch.zeros(M),
            torch.zeros(N, K, dtype=torch.int8),
            torch.zeros(N, dtype=torch.float16),
            None,
            torch.int32,
        )


def test_right_operands_are_launched_as_their_format(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(gemm, "run_gemm", lambda weights, *_: launched.append(weights))
    gemm.w4a8_gemm._init_fn(**operands(), out_dtype=torch.float16)
    szeros = torch.zeros(N, dtype=torch.float16)
    gemm.w4a8_gemm._init_fn(**operands(s2_scales=None, s2_zeros=None, s1_szeros=szeros), out_dtype=torch.bfloat16)
    gemm.w8a8_gemm_int32._init_fn(torch.zeros(M, K, dtype=torch.int8), torch.zeros(N, K, dtype=torch.int8))
    assert launched == ["g128", "per_channel", "int8"]


def test_fakes_give_shape_and_type() -> None:
    with FakeTensorMode():
        fake = {name: None if t is None else torch.empty(t.shape, dtype=t.dtype) for name, t in operands().items()}
        y = torch.ops.qoq.w4a8_gemm(*fake.values(), torch.bfloat16)
        assert (y.shape, y.dtype) == ((M, N), torch.bfloat16)
        sums = torch.ops.qoq.w4a8_gemm_int32(
            fake["act_codes"], fake["act_sums"], fake["qweight"], fake["s2_scales"], fake["s2_zeros"]
        )
        assert (sums.shape, sums.dtype) == ((M, N), torch.int32)
        weight = torch.empty(N, K, dtype=torch.int8)
        y = torch.ops.qoq.w8a8_gemm(
            fake["act_codes"], fake["act_scales"], weight, fake["s1_scales"], None, torch.float16
        )
        assert (y.shape, y.dtype) == ((M, N), torch.float16)
        assert torch.ops.qoq.w8a8_gemm_int32(fake["act_codes"], weight).dtype == torch.int32


def test_a_kernel_of_each_format_compiles_without_spills() -> None:
    """Every instantiation for every architecture is the work of `make kernels`."""
    try:
        nvrtc_version()
    except QoQError as error:
        pytest.skip(error.message)
    jobs = [
        (choose_gemm(arch, weights, m, 4096, 4096).tile.spec(arch, weights, "float16"), arch)
        for arch in ("sm_80", "sm_90", HOPPER)
        for weights, m in (("g128", 1), ("per_channel", 64), ("int8", 4096))
    ]
    for (spec, _), cubin in compile_all(jobs).items():
        assert cubin.resources.spill_bytes == 0, spec.label
        assert not cubin.resources.waits, spec.label
