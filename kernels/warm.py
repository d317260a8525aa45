"""Which kernels a checkpoint needs: what `qoq doctor --warm` compiles before a server is started."""

from __future__ import annotations

from qoq.formats.quantization_config import QuantizationConfig
from qoq.kernels.compiler import KernelSpec
from qoq.kernels.dispatch import all_specs
from qoq.kernels.gemm_tiles import OUT_FORMATS, WEIGHT_FORMATS, OutFormat, WeightFormat

_GEMMS = ("sm80/gemm.cu", "sm90/gemm.cu", "sm90/gemm_decode.cu", "sm90/gemm_split.cu")


def needed_specs(architecture: str, quantization: QuantizationConfig | None, dtype: str | None) -> list[KernelSpec]:
    """Kernels for `architecture` that a checkpoint may launch, or every one when `quantization` is None.

    Its GEMMs have one weight format, and give `dtype` ("float16" or "bfloat16") or the sums that `qoq verify` compares.
    """
    specs = [spec for spec, _ in all_specs(architecture)]
    if quantization is None:
        return specs
    weights: WeightFormat = "per_channel" if quantization.group_size is None else "g128"
    outputs: list[OutFormat] = ["int32", *(out for out in OUT_FORMATS if out == dtype)]
    wanted = {
        ("WEIGHT_FORMAT", WEIGHT_FORMATS.index(weights)),
        *(("OUT_FORMAT", OUT_FORMATS.index(out)) for out in outputs),
    }

    def is_needed(spec: KernelSpec) -> bool:
        return spec.source not in _GEMMS or all(
            define in wanted for define in spec.defines if define[0] in ("WEIGHT_FORMAT", "OUT_FORMAT")
        )

    return [spec for spec in specs if is_needed(spec)]
