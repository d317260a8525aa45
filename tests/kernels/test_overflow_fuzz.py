"""Tries to get a weight that overflows past the quantizer, the file and the reader, into a kernel.

Kernels decode four weights in one register and check nothing: code * s2 past a byte carries into the next weight, and
code * s2 - offset past int8 wraps. Here every byte is decoded in wide integers, which do neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qoq.calib.round.rtn import round_to_nearest
from qoq.formats.packing import ZeroDomain, pack_linear, unpack_linear
from qoq.kernels.modules import QoQLinear
from qoq.kernels.oracles import emulate_packed_level1
from qoq.kernels.random_weights import random_packed_linear
from qoq.recipes.errors import InputError

N, K = 64, 256
SEEDS = st.integers(0, 2**31 - 1)
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def wild_weight(seed: int) -> Tensor:
    """Sizes from float16's subnormals to its end, with outliers, constant groups, zeros and one-sided channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    weight *= 10 ** (torch.rand(N, 1, generator=generator) * 9 - 6)
    weight[torch.rand(N, K, generator=generator) < 0.01] *= 300
    weight[0] = 0
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3, :128] = weight[3, 0]
    weight[4] = weight[4].sign() * weight[4].abs().amax()
    return weight.clamp(-60000, 60000)


def plain_level1(packed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Products code * s2 and level-1 weights int64 [N, K], each byte read on its own."""
    bytes_ = packed["qweight"].view(torch.uint8).long().view(N // 32, K // 32, 8, 4, 2, 2, 4)  # nt kt r l c b i
    halves = torch.stack((bytes_ & 15, bytes_ >> 4), dim=1)  # nt h kt r l c b i
    codes = halves.permute(0, 1, 6, 3, 2, 5, 4, 7).reshape(N, K)  # n = nt h b r, k = kt c l i

    def by_channel(tensor: Tensor) -> Tensor:
        lanes = tensor.view(torch.uint8).long().view(K // 128, N // 32, 8, 4)  # lane r holds r, r + 8, r + 16, r + 24
        return lanes.transpose(2, 3).reshape(K // 128, N).t().repeat_interleave(128, dim=1)

    products = codes * by_channel(packed["s2_scales"])
    return products, products - (-by_channel(packed["s2_zeros"])) % 256


def overflows(packed: dict[str, Tensor]) -> bool:
    products, level1 = plain_level1(packed)
    return bool((products > 255).any() or (level1 < -128).any() or (level1 > 127).any())


@FUZZ
@given(SEEDS)
def test_the_quantizer_writes_nothing_that_overflows(tmp_path: Path, seed: int) -> None:
    packed = pack_linear(round_to_nearest(wild_weight(seed), None, 128))
    save_file(packed, tmp_path / "linear.safetensors")
    loaded = load_file(tmp_path / "linear.safetensors")
    assert not overflows(loaded)
    _, level1 = plain_level1(loaded)
    emulated = emulate_packed_level1(loaded["qweight"], loaded["s2_scales"], loaded["s2_zeros"])
    assert torch.equal(emulated.long(), level1)
    assert torch.equal(unpack_linear(loaded, in_features=K, zero_domain="pre_scale").level1().long(), level1)


def tampered(seed: int) -> dict[str, Tensor]:
    """Legal packed tensors with some bytes changed: any byte, or the ones that are nearly legal."""
    generator = torch.Generator().manual_seed(seed)
    packed = random_packed_linear(N, K, progressive=True, generator=generator)
    parts = ["qweight", "s2_scales", "s2_zeros"]
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        part = packed[parts[int(torch.randint(0, 3, (), generator=generator))]].view(torch.uint8).view(-1)
        place = int(torch.randint(0, part.numel(), (), generator=generator))
        near = int(part[place]) + int(torch.randint(-2, 3, (), generator=generator))
        wild = int(torch.randint(0, 256, (), generator=generator))
        part[place] = (near if seed % 2 else wild) % 256
    return packed


@FUZZ
@given(SEEDS, st.sampled_from(["pre_scale", "post_scale"]))
def test_the_reader_lets_nothing_through_that_overflows(seed: int, zero_domain: ZeroDomain) -> None:
    packed = tampered(seed)
    try:
        linear = unpack_linear(packed, in_features=K, zero_domain=zero_domain)
    except ValueError:
        return
    assert not overflows(packed)
    assert torch.equal(linear.level1().long(), plain_level1(packed)[1])


@FUZZ
@given(SEEDS)
def test_no_kernel_is_launched_on_what_overflows(cpu_operators: Any, seed: int) -> None:
    packed = tampered(seed)
    module = QoQLinear(K, N, progressive=True, has_bias=False, zero_domain="post_scale", name="fuzzed")
    module.load_state_dict(packed)
    cpu_operators.calls.clear()
    x = torch.ones(2, K, dtype=torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qoq.kernels.modules.is_on_gpu", lambda _: True)
        patch.setattr("qoq.kernels.ops.usable_device_problem", lambda: None)
        if overflows(packed):
            with pytest.raises(InputError, match="fuzzed"):
                module(x)
            assert not cpu_operators.calls
        else:
            try:
                module(x)
            except InputError:  # legal for the bytes, but not on disk: s2 of 17 with small codes
                assert not cpu_operators.calls
            else:
                assert cpu_operators.calls == ["quantize_activation", "w4a8_gemm"]


def test_the_fuzz_reaches_both_sides() -> None:
    """Else the tests above would prove nothing."""
    found = [overflows(tampered(seed)) for seed in range(200)]
    assert 20 < sum(found) < 180
