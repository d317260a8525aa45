"""`qoq bench` on the GPU at hand: what is measured, and in which order."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq.recipes.shapes import ModelShape
from qoq_cli.bench_options import MAX_ROWS, attention_cases, choose, numbers, split
from qoq_cli.progress import progress
from qoq_cli.terminal import Terminal

if TYPE_CHECKING:
    from qoq.kernels.roofline import Roofline
    from qoq_cli.bench_served import ServedPlan

AGAINST = {
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "int8": ("int8",),
    "fp8": ("fp8", "fp8-row"),
    "w8a8": ("w8a8",),
    "sdpa": ("sdpa-fp16", "sdpa-bf16"),
}
"""Baselines by their name in --against, and the variants that each means."""
_PARTS = ("gemm", "attention", "e2e")
_DEFAULT_PARTS = ("gemm", "attention")
_ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
_MAX_REST = 100


class MeasuringPlan:
    """The options, checked. Raises InputError that names the option."""

    def __init__(
        self, what: str | None, batch: str | None, prompt_len: str | None, against: str, repeat: int, rest: float
    ) -> None:
        if repeat < 1:
            raise InputError(f"--repeat {repeat}: too small", remedy="pass at least 1")
        if not 0 <= rest <= _MAX_REST:
            raise InputError(f"--rest {rest}: out of range", remedy=f"pass 0 to {_MAX_REST}")
        self.repeat, self.rest = repeat, rest
        parts = list(_DEFAULT_PARTS) if what is None else split("--what", what)
        if parts == ["all"]:
            parts = list(_PARTS)
        self.parts = choose("--what", parts, _PARTS)
        baselines = [] if against == "none" else choose("--against", split("--against", against), tuple(AGAINST))
        variants = [variant for name in baselines for variant in AGAINST[name]]
        self.gemm_variants = ["w4a8-g128", "w4a8-chn", *(v for v in variants if not v.startswith("sdpa"))]
        self.attention_variants = ["kv4", "kv8", *(v for v in variants if v.startswith("sdpa"))]
        self.rows = list(_ROWS) if batch is None else numbers("--batch", batch, MAX_ROWS)
        if self.parts == ["gemm"] and prompt_len is not None:
            raise InputError(
                "--prompt-len: a product has no sequences", remedy="leave it out, or --what attention or e2e"
            )
        self.served: ServedPlan | None = None
        self.cases = attention_cases(self.parts, batch, prompt_len)


def served_plan(
    parts: list[str], batch: str | None, prompt_len: str | None, against: str, options: Mapping[str, Any]
) -> ServedPlan | None:
    """The plan of e2e, None where it is not asked for. Raises InputError for its options without it."""
    if "e2e" not in parts:
        for option, value in options.items():
            if value is not None:
                raise InputError(f"{option}: only e2e serves a model", remedy="leave it out, or add e2e to --what")
        return None
    from qoq_cli.bench_served import ServedPlan

    return ServedPlan.parse(
        batch,
        prompt_len,
        options["--output-len"],
        options["--precision"],
        against,
        options["--requests"],
        options["--memory"],
        options["--lm-head-bits"],
        options["--price"],
    )


def open_gpu(device: str) -> int:
    """Index of the CUDA device. Raises InputError for no CUDA device, EnvironmentProblem where there is none."""
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: not a device", remedy="use cuda, cuda:1, ...") from error
    if chosen.type != "cuda":
        raise InputError(f"--device {device}: the kernels run on CUDA devices only", remedy="use cuda, cuda:1, ...")
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            "qoq bench measures the GPU of this machine, and PyTorch sees no CUDA device",
            remedy="run it on a machine with a GPU; where there is one, `qoq doctor` says what is missing. --gpu NAME "
            "projects the speed of a GPU that is not here (`qoq gpus`)",
        )
    from qoq.calib.job import check_device

    check_device(device)
    given: int | None = chosen.index
    index = torch.cuda.current_device() if given is None else given
    torch.cuda.set_device(index)
    return index


def measure(terminal: Terminal, plan: MeasuringPlan, shape: ModelShape, index: int, seed: int) -> dict[str, Any]:
    from qoq.kernels.gpu_facts import read_facts, read_state
    from qoq.kernels.roofline import measure_roofline

    _compile(terminal, plan, shape, index)
    before = read_state(index)
    with progress(terminal, "roofline") as update:
        roofline = measure_roofline(on_step=lambda message: update(0, 1, message))
    data: dict[str, Any] = {
        "command": shlex.join(["qoq", *sys.argv[1:]]),
        "projected": False,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": asdict(read_facts(index)),
        "seed": seed,
        "repeat": plan.repeat,
        "rest": plan.rest,
        "shape": asdict(shape),
        "roofline": asdict(roofline),
    }
    if "gemm" in plan.parts:
        data["gemm"] = _gemms(terminal, plan, shape, roofline, seed)
    if "attention" in plan.parts:
        data["attention"] = _attention(terminal, plan, shape, roofline, seed)
    if plan.served is not None:
        from qoq_cli.bench_served import run_served

        data["e2e"] = run_served(terminal, plan.served, shape, index, roofline, seed)
    data["state"] = {"before": asdict(before), "after": asdict(read_state(index))}
    return data


def _gemms(terminal: Terminal, plan: MeasuringPlan, shape: ModelShape, roofline: Roofline, seed: int) -> dict[str, Any]:
    from qoq.kernels.bench import bench_gemms

    gemms = shape.layer_gemms()
    with progress(terminal, "products") as update:
        report = bench_gemms(
            gemms,
            plan.rows,
            plan.gemm_variants,
            roofline,
            repeat=plan.repeat,
            rest=plan.rest,
            seed=seed,
            on_step=update,
        )
    layers = [
        {"m": m, "variant": variant, "us": report.layer_us(m, variant, gemms)}
        for m in plan.rows
        for variant in plan.gemm_variants
    ]
    return {
        "variants": plan.gemm_variants,
        "layer": [layer for layer in layers if layer["us"] is not None],
        **asdict(report),
    }


def _attention(
    terminal: Terminal, plan: MeasuringPlan, shape: ModelShape, roofline: Roofline, seed: int
) -> dict[str, Any]:
    from qoq.kernels.bench_attention import DEFAULT_CASES, bench_attention

    with progress(terminal, "attention") as update:
        report = bench_attention(
            shape,
            plan.cases or DEFAULT_CASES,
            plan.attention_variants,
            roofline,
            repeat=plan.repeat,
            rest=plan.rest,
            seed=seed,
            on_step=update,
        )
    return {"variants": plan.attention_variants, **asdict(report)}


def _compile(terminal: Terminal, plan: MeasuringPlan, shape: ModelShape, index: int) -> None:
    """Compile what will be launched, in parallel, so that the first measurement need not wait."""
    from qoq.kernels.bench import gemm_kernels
    from qoq.kernels.launch import architecture
    from qoq_cli.kernel_cache import compile_with_progress

    arch = architecture(index)
    specs = []
    if "gemm" in plan.parts:
        specs += gemm_kernels(shape.layer_gemms(), plan.rows, plan.gemm_variants, arch)
    if "attention" in plan.parts or plan.served is not None:
        from qoq.kernels import attention, kv_cache

        specs += [*kv_cache.specs(arch), *attention.specs(arch)]
    if plan.served is not None:
        from qoq.kernels import act_quant
        from qoq.kernels.bench_served import gemm_rows

        kinds = {"g128": "w4a8-g128", "per_channel": "w4a8-chn", "int8": "w8a8"}
        variants = [kinds[p.weights] for p in plan.served.precisions if p.weights in kinds]
        rows = gemm_rows(max(plan.served.batches))
        specs += [*act_quant.specs(arch), *gemm_kernels(shape.layer_gemms(), rows, variants, arch)]
    compile_with_progress(terminal, [(spec, arch) for spec in specs])
