"""What is compiled ahead for a checkpoint: all that it may launch, and no products of other formats."""

from __future__ import annotations

from typing import cast

import pytest

from qoq.formats.quantization_config import QuantizationConfig
from qoq.kernels.dispatch import all_specs, choose_gemm
from qoq.kernels.gemm_tiles import HOPPER, WEIGHT_FORMATS, OutFormat, WeightFormat
from qoq.kernels.warm import needed_specs
from qoq.recipes.shapes import find_shape


@pytest.mark.parametrize("group_size", [128, None])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_checkpoint_gets_its_own_products_and_all_of_them(architecture: str, group_size: int | None) -> None:
    weights = cast("WeightFormat", "g128" if group_size else "per_channel")
    needed = needed_specs(architecture, QuantizationConfig(group_size), "bfloat16")
    products = [spec for spec in needed if "gemm" in spec.source]
    assert {dict(spec.defines)["WEIGHT_FORMAT"] for spec in products} == {WEIGHT_FORMATS.index(weights)}
    kernels = HOPPER if architecture == "sm_90" else architecture
    for shape in ("llama-3-8b", "llama-2-7b", "smollm2-135m"):
        for n, k in find_shape(shape).layer_gemms().values():
            for m in (1, 8, 16, 17, 64, 200, 300, 1000, 5000):
                for out in ("bfloat16", "int32"):
                    tile = choose_gemm(kernels, weights, m, n, -(-k // 128) * 128).tile
                    assert tile.spec(kernels, weights, cast("OutFormat", out)) in products


def test_without_a_checkpoint_it_is_everything() -> None:
    assert needed_specs("sm_90", None, None) == [spec for spec, _ in all_specs("sm_90")]
