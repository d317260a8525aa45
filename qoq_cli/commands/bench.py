"""`qoq bench`: what the kernels gain in speed, beside what a user would use instead. Measured on the GPU at hand, or
projected for another one."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq.recipes.gpus import Gpu, find_gpu, is_called
from qoq.recipes.shapes import ModelShape, find_shape, model_shapes
from qoq_cli.bench_options import MAX_ROWS, attention_cases, choose, numbers, split
from qoq_cli.progress import progress
from qoq_cli.terminal import JsonOption, QuietOption, Terminal, TracebackOption, TrustOption, guarded

if TYPE_CHECKING:
    from qoq.kernels.roofline import Roofline
    from qoq_cli.bench_served import ServedPlan

_DEFAULT_SHAPE = "llama-3-8b"
_PARTS = ("gemm", "attention", "e2e")
_DEFAULT_PARTS = ("gemm", "attention")
_AGAINST = {
    "fp16": ("fp16",),
    "bf16": ("bf16",),
    "int8": ("int8",),
    "fp8": ("fp8", "fp8-row"),
    "w8a8": ("w8a8",),
    "sdpa": ("sdpa-fp16", "sdpa-bf16"),
}
_ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
_MAX_REST = 100


@guarded
def bench(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Take the sizes of this checkpoint, folder, hub id or known name.  [default: llama-3-8b]",
        ),
    ] = None,
    what: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="gemm (the products of a layer), attention (one decode step), e2e (throughput of the whole model), "
            "all of these, or vllm.  [default: gemm,attention; projected, all]",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tokens in a product (M); for e2e and with --prompt-len, also how many sequences.  [default: 1,8,16,"
            "32,64,128,256,1024,4096; for e2e as many as fit, up to 512]",
        ),
    ] = None,
    prompt_len: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tokens in the cache, for each of --batch (or 1,16,64,128) sequences, and of e2e's prompts.  "
            "[default: 64 x 1024, 128 x 1536, 128 x 4096, 1 x 8192, 8 x 32768; for e2e 1024]",
        ),
    ] = None,
    output_len: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tokens that e2e generates for a prompt: one number, or one for each of --prompt-len.  [default: 512]",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="What e2e serves: w4a8kv4-g128, w4a8kv4-chn, w4a8kv8-g128, w4a8kv8-chn.  [default: w4a8kv4-g128 and "
            "w4a8kv8-g128; projected, the first two]",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Requests that e2e answers; all come at once.  [default: as many as fit together]",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of the GPU, for e2e: 73GB, ...  [default: most of what is free]"),
    ] = None,
    against: Annotated[
        str, typer.Option(metavar="LIST", help="Baselines: fp16, bf16, int8, fp8, w8a8, sdpa; or none.")
    ] = ",".join(_AGAINST),
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="h100, l40s, ... (`qoq gpus`): measured if it is the GPU of this machine, else projected from a data "
            "sheet, without any GPU.",
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="X", help="Dollars an hour of that GPU, for tokens per dollar in e2e.")
    ] = None,
    repeat: Annotated[int, typer.Option(metavar="N", help="Measurements of each variant, in turns.")] = 20,
    rest: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="After each measurement the GPU idles X times as long; 0 shows it under sustained load, where large "
            "products meet its power limit.",
        ),
    ] = 3.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Draws weights, inputs and caches.")] = 0,
    details: Annotated[
        bool, typer.Option("--details", help="Print rates of the baselines too, not just ours.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the results into FILE, .svg or .png.")] = None,
    device: Annotated[str, typer.Option(metavar="DEV", help="cuda, cuda:1, ...")] = "cuda",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Time the kernels on the GPU of this machine, side by side with PyTorch's; or project them for another GPU.

    The products of one decoder layer (qkv, o, gate_up, down), and one decode step of attention over a paged KV4 or KV8
    cache. Random data in MODEL's sizes; no weights are read. Calls run from CUDA graphs over more data than the L2
    cache holds; variants take turns, and the GPU rests in between (--rest).

    Times are medians, with their 10th to 90th percentile. The last column compares them with the best that this GPU
    could do (its roofline): the bytes that must move at the measured bandwidth, or the operations at the measured peak,
    whichever takes longer. `--json` keeps all of it, with clocks, power and versions.

    With `--gpu` of a GPU that is not here, the same tables and the throughput of the whole model are projected: counted
    bytes and operations over the GPU's data sheet, at the efficiency that the kernels reached on an H100. All of it is
    labelled "projected", and has error bars.

    `--what e2e` serves random weights in MODEL's sizes on qoq's own runtime, at each precision in the same memory: a
    closed set of requests of `--prompt-len` tokens, each answered with `--output-len`, `--batch` of them at a time at
    most. Time runs from the first prompt to the last token. fp16, w8a8 and fp8 of `--against` run on the same runtime.
    `--precision`, `--requests`, `--memory`, `--output-len` and `--price` belong to e2e.

    `--what vllm` runs vLLM's own throughput benchmark with qoq's plug-in and, for `--against` fp8 and bf16, with what
    vLLM has; the first configuration once more at the end.

    Examples: `qoq bench`; `qoq bench llama-2-7b --what gemm --batch 1,16,64 --against fp16`;
    `qoq bench --what attention --batch 32 --prompt-len 2048 --json`; `qoq bench --what e2e --memory 73GB`;
    `qoq bench llama-3-70b --gpu l40s --price 1.2`.
    """
    terminal = Terminal(as_json, quiet)
    target = None if gpu is None else _projected(device, gpu)
    if target is not None:
        from qoq_cli.bench_projection import ProjectionPlan, run_projection

        if plot is not None:
            raise InputError("--plot: a projection is not drawn", remedy="leave it out; --json has all figures")
        _refuse_measuring(context, ("requests", "memory", "repeat", "rest", "seed", "details"), "a projection")
        run_projection(
            terminal,
            ProjectionPlan.parse(what, batch, prompt_len, output_len, precision, against, price),
            lambda: _shape(terminal, model, trust_remote_code),
            target,
        )
        return
    if "vllm" in split("--what", what or "gemm"):
        _refuse_measuring(context, ("memory", "repeat", "rest", "details", "batch", "plot"), "vLLM's own benchmark")
        given = None if _is_default(context, "against") else against
        vllm_plan = (prompt_len, output_len, precision, given, requests, price)
        _run_vllm(terminal, what, vllm_plan, lambda: _shape(terminal, model, trust_remote_code), seed)
        return
    plan = _Plan(what, batch, prompt_len, against, repeat, rest)
    served: dict[str, Any] = {"--output-len": output_len, "--precision": precision, "--price": price}
    served |= {"--requests": requests, "--memory": memory}
    plan.served = _served_plan(plan.parts, batch, prompt_len, against, served)
    if plot is not None:
        from qoq_cli.bench_plot import check_plot

        check_plot(plot)
    shape = _shape(terminal, model, trust_remote_code)
    index = _open_gpu(device)
    if model is None:
        terminal.note(f"sizes of {_DEFAULT_SHAPE}; name another model to take its sizes")
    data = _run(terminal, plan, shape, index, seed)

    from qoq_cli.bench_tables import render

    terminal.result(data, lambda console: render(console, data, details=details))
    if plot is not None:
        from qoq_cli.bench_plot import draw

        draw(data, plot)
        terminal.note(f"drawn into {plot}")


def _is_default(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is None or source.name != "COMMANDLINE"


def _refuse_measuring(context: typer.Context, parameters: Sequence[str], who: str) -> None:
    """Raise InputError for an option that `who` does not have, if it was given."""
    for parameter in parameters:
        if not _is_default(context, parameter):
            raise InputError(
                f"--{parameter}: {who} has none",
                remedy="leave it out; it is for what qoq times itself on the GPU of this machine",
            )


def _run_vllm(
    terminal: Terminal, what: str | None, options: tuple[Any, ...], find: Callable[[], ModelShape], seed: int
) -> None:
    """`--what vllm`, which nothing of ours shares the GPU with. Raises InputError where it is not alone."""
    from qoq_cli.bench_vllm import VllmPlan, render_vllm, run_vllm

    if split("--what", what or "") != ["vllm"]:
        raise InputError(f"--what {what}: vllm takes the GPU for itself", remedy="run it alone: --what vllm")
    plan, shape = VllmPlan.parse(*options), find()
    data = run_vllm(terminal, plan, shape, seed)
    result = {
        "command": shlex.join(["qoq", *sys.argv[1:]]),
        "projected": False,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "shape": asdict(shape),
        "vllm": data,
    }
    terminal.result(result, lambda console: render_vllm(console, data, asdict(shape)))


class _Plan:
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
        baselines = [] if against == "none" else choose("--against", split("--against", against), tuple(_AGAINST))
        variants = [variant for name in baselines for variant in _AGAINST[name]]
        self.gemm_variants = ["w4a8-g128", "w4a8-chn", *(v for v in variants if not v.startswith("sdpa"))]
        self.attention_variants = ["kv4", "kv8", *(v for v in variants if v.startswith("sdpa"))]
        self.rows = list(_ROWS) if batch is None else numbers("--batch", batch, MAX_ROWS)
        if self.parts == ["gemm"] and prompt_len is not None:
            raise InputError(
                "--prompt-len: a product has no sequences", remedy="leave it out, or --what attention or e2e"
            )
        self.served: ServedPlan | None = None
        self.cases = attention_cases(self.parts, batch, prompt_len)


def _served_plan(
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
        options["--price"],
    )


def _shape(terminal: Terminal, model: str | None, trust_remote_code: bool) -> ModelShape:
    """Sizes of a known name without a download; of any other model from its configuration."""
    if model is None:
        return find_shape(_DEFAULT_SHAPE)
    if model.lower() in model_shapes() and not Path(model).exists():
        return find_shape(model)
    from qoq.calib.skeleton import build_skeleton, load_config
    from qoq_cli.model_location import resolve_model

    location = resolve_model(model, with_code=trust_remote_code, note=terminal.note)
    config = load_config(location.path, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(config, where=str(location.path))
    return ModelShape(
        name=location.name,
        hidden_size=skeleton.hidden_size,
        intermediate_size=int(config.intermediate_size),
        num_heads=skeleton.num_heads,
        num_kv_heads=skeleton.num_kv_heads,
        head_dim=skeleton.head_dim,
        num_layers=skeleton.num_blocks,
        vocab_size=int(config.vocab_size),
        tied_embeddings=bool(config.tie_word_embeddings),
    )


def _projected(device: str, wanted: str) -> Gpu | None:
    """The data sheet of a GPU that is not here; None where `device` is the one that is wanted.

    Raises InputError for a name that neither the data sheet nor this machine knows.
    """
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        from qoq.calib.job import check_device

        check_device(device)
        if is_called(torch.cuda.get_device_name(torch.device(device)), wanted):
            return None
    return find_gpu(wanted)


def _open_gpu(device: str) -> int:
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


def _run(terminal: Terminal, plan: _Plan, shape: ModelShape, index: int, seed: int) -> dict[str, Any]:
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


def _gemms(terminal: Terminal, plan: _Plan, shape: ModelShape, roofline: Roofline, seed: int) -> dict[str, Any]:
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


def _attention(terminal: Terminal, plan: _Plan, shape: ModelShape, roofline: Roofline, seed: int) -> dict[str, Any]:
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


def _compile(terminal: Terminal, plan: _Plan, shape: ModelShape, index: int) -> None:
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
