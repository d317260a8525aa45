"""`qoq bench`: what the kernels gain in speed, beside what a user would use instead. Measured on the GPU at hand, or
projected for another one."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from qoq.recipes.errors import InputError
from qoq.recipes.gpus import Gpu, find_gpu, is_called
from qoq.recipes.shapes import ModelShape, find_shape, model_shapes
from qoq_cli.bench_measured import AGAINST, MeasuringPlan, measure, open_gpu, served_plan
from qoq_cli.bench_options import split
from qoq_cli.terminal import JsonOption, QuietOption, Terminal, TracebackOption, TrustOption, guarded

_DEFAULT_SHAPE = "llama-3-8b"


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
        typer.Option(metavar="SIZE", help="Of the GPU, for e2e and vllm: 73GB, ...  [default: most of it]"),
    ] = None,
    lm_head_bits: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of lm_head in e2e, at every precision: 16, or 8 for int8 with int8 inputs.  [default: 16]",
        ),
    ] = None,
    against: Annotated[
        str, typer.Option(metavar="LIST", help="Baselines: fp16, bf16, int8, fp8, w8a8, sdpa; or none.")
    ] = ",".join(AGAINST),
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
    `--precision`, `--requests`, `--memory`, `--lm-head-bits`, `--output-len` and `--price` belong to e2e, all
    but `--lm-head-bits` to vllm too.

    `--what vllm` runs vLLM's own throughput benchmark with qoq's plug-in (`--precision` w4a8kv4-g128, w4a8kv4-chn) and
    with what vLLM has (`--against` fp8, bf16, and w4a8-int4kv, its own 4 bits), each in the same `--memory`. `none` for
    one of the two leaves it out; where several are left, the first runs once more at the end.

    Examples: `qoq bench`; `qoq bench llama-2-7b --what gemm --batch 1,16,64 --against fp16`;
    `qoq bench --what attention --batch 32 --prompt-len 2048 --json`; `qoq bench --what e2e --memory 73GB`;
    `qoq bench --what vllm --precision none --against fp8 --memory 73GB`;
    `qoq bench llama-3-70b --gpu l40s --price 1.2`.
    """
    terminal = Terminal(as_json, quiet)
    target = None if gpu is None else _projected(device, gpu)
    if target is not None:
        from qoq_cli.bench_projection import ProjectionPlan, run_projection

        if plot is not None:
            raise InputError("--plot: a projection is not drawn", remedy="leave it out; --json has all figures")
        _refuse_measuring(
            context, ("requests", "memory", "lm_head_bits", "repeat", "rest", "seed", "details"), "a projection"
        )
        run_projection(
            terminal,
            ProjectionPlan.parse(what, batch, prompt_len, output_len, precision, against, price),
            lambda: _shape(terminal, model, trust_remote_code),
            target,
        )
        return
    if "vllm" in split("--what", what or "gemm"):
        _refuse_measuring(
            context, ("lm_head_bits", "repeat", "rest", "details", "batch", "plot"), "vLLM's own benchmark"
        )
        given = None if _is_default(context, "against") else against
        vllm_plan = (prompt_len, output_len, precision, given, requests, memory, price)
        _run_vllm(terminal, what, vllm_plan, lambda: _shape(terminal, model, trust_remote_code), seed)
        return
    plan = MeasuringPlan(what, batch, prompt_len, against, repeat, rest)
    served: dict[str, Any] = {"--output-len": output_len, "--precision": precision, "--price": price}
    served |= {"--requests": requests, "--memory": memory, "--lm-head-bits": lm_head_bits}
    plan.served = served_plan(plan.parts, batch, prompt_len, against, served)
    if plot is not None:
        from qoq_cli.bench_plot import check_plot

        check_plot(plot)
    shape = _shape(terminal, model, trust_remote_code)
    index = open_gpu(device)
    if model is None:
        terminal.note(f"sizes of {_DEFAULT_SHAPE}; name another model to take its sizes")
    data = measure(terminal, plan, shape, index, seed)

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
                f"--{parameter.replace('_', '-')}: {who} has none",
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
