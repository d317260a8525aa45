"""Random weights of benchmarks and tests are legal on disk, and reach both ends of the range."""

from __future__ import annotations

import pytest
import torch

from qoq.formats.packing import packed_shapes, unpack_linear
from qoq.kernels.random_weights import random_act_codes, random_packed_linear


@pytest.mark.parametrize("progressive", [True, False])
@pytest.mark.parametrize(("n", "k"), [(32, 128), (256, 576), (2048, 1024)])
def test_random_linears_are_legal(n: int, k: int, progressive: bool) -> None:
    packed = random_packed_linear(n, k, progressive=progressive, generator=torch.Generator().manual_seed(n))
    expected = packed_shapes(n, k, progressive=progressive, has_bias=False)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()} == expected
    linear = unpack_linear(packed, in_features=k, zero_domain="pre_scale")
    assert set(linear.codes.unique().tolist()) == set(range(16))
    if progressive and n == 2048:
        # 127 is no product of a code and an s2.
        assert (int(linear.level1().min()), int(linear.level1().max())) == (-128, 126)
        assert set(linear.s2_scales.unique().tolist()) == set(range(1, 17))  # type: ignore[union-attr]


def test_random_linears_differ_from_draw_to_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (random_packed_linear(32, 128, progressive=True, generator=generator) for _ in range(2))
    assert not torch.equal(first["qweight"], second["qweight"])


def test_random_activations() -> None:
    codes, scales, sums = random_act_codes(5, 192, generator=torch.Generator().manual_seed(0))
    assert codes.shape == (5, 256)
    assert not codes[:, 192:].any()
    assert int(codes.min()) >= -127
    assert torch.equal(sums, codes.int().sum(dim=1).int())
    assert (scales.dtype, sums.dtype) == (torch.float32, torch.int32)
