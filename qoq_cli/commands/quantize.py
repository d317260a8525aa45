"""`qoq quantize`: a model in, a verified W4A8KV4 checkpoint out."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qoq.recipes.errors import InputError
from qoq_cli import __version__
from qoq_cli.devices import resolve_device
from qoq_cli.model_location import EMBEDDED, builtin_texts, resolve_model
from qoq_cli.progress import duration, progress, size
from qoq_cli.sizes import parse_size
from qoq_cli.terminal import (
    DeviceOption,
    JsonOption,
    QuietOption,
    RevisionOption,
    Terminal,
    TracebackOption,
    TrustOption,
    guarded,
)

if TYPE_CHECKING:
    from qoq.calib.job import RunResult
    from qoq.calib.plan import Plan
    from qoq.recipes.models import ModelAlias
    from qoq.recipes.schema import Recipe

_BUILTIN_CALIBRATION = {"dataset": "builtin", "samples": 32, "seq_len": 512}
"""The embedded models come with their own calibration text and a context of 512 tokens."""

_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, Hugging Face id, .gguf file, or an alias such as `llama-3-8b`.")
]


@guarded
def quantize(
    model: _Model,
    g128: Annotated[
        bool | None,
        typer.Option("--g128/--per-channel", help="Two-level grid in groups of 128 (default), or one level a channel."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe by name (`qoq recipes`; qoq-g128-best loses least) or a YAML file.  "
            "[default: qoq-g128 or qoq-chn]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write.  [default: checkpoints/MODEL-SCHEME]")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: pileval, wikitext, c4 (hub), builtin, or a .txt, .jsonl or .parquet file.  "
            "[default: the recipe's, pileval]"
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Calibration windows.  [default: the recipe's, 128]")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens in a window.  [default: the recipe's, 1024]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Draws the calibration windows.  [default: 0]")] = None,
    kv_bits: Annotated[
        int | None, typer.Option(metavar="N", help="Bits of the KV cache: 4, 8 or 16.  [default: 4]")
    ] = None,
    act_bits: Annotated[
        int | None, typer.Option(metavar="N", help="Bits of activations: 8 or 16.  [default: 8]")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Quantize only linears whose name matches this regular expression."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Leave linears whose name matches this regular expression in 16 bit."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="Type of what stays in 16 bit: float16 or bfloat16.")
    ] = "float16",
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest weight file, such as 5GB or 500MB.")
    ] = "5GB",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Continue an unfinished run (default), or begin again.")
    ] = True,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Stop where GPTQ fails for a linear, instead of rounding it to nearest."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, memory, disk and time; touch nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Quantize MODEL into a W4A8KV4 checkpoint.

    An interrupted run is continued by the same command, with the same result. HF_TOKEN is used for gated models.

    Examples: `qoq quantize tiny`; `qoq quantize llama-3-8b --recipe qoq-g128-best --device cuda`;
    `qoq quantize ./my-model --calib my-text.txt --samples 64 -o out`.
    """
    from qoq.recipes.load import preset_names
    from qoq.recipes.models import alias_of

    terminal = Terminal(as_json, quiet)
    location = resolve_model(model, revision=revision, with_code=trust_remote_code, note=terminal.note)
    # Presets name calibration sets of the hub; the embedded models have text of their own.
    uses_builtin = location.kind == EMBEDDED and recipe in (None, *preset_names())
    alias = None if location.hub_id is None else alias_of(location.hub_id)
    chosen = build_recipe(
        recipe,
        g128,
        alias if recipe in (None, *preset_names()) else None,
        base_calibration=_BUILTIN_CALIBRATION if uses_builtin else {},
        calibration={"dataset": calib, "samples": samples, "seq_len": seq_len, "seed": seed},
        top={"kv_bits": kv_bits, "act_bits": act_bits, "include": include, "ignore": ignore},
    )
    target = output or Path("checkpoints") / f"{location.name}-{chosen.scheme}"

    from qoq.calib.plan import QuantizeRequest, make_plan
    from qoq.formats.work_folder import check_output

    if dtype not in ("float16", "bfloat16"):
        raise InputError(f"--dtype {dtype!r} is not supported", remedy="use float16 or bfloat16")
    plan = make_plan(
        QuantizeRequest(
            model=location.path,
            model_name=location.hub_id or location.name,
            output=target,
            recipe=chosen,
            revision=location.revision,
            device=resolve_device(device),
            kept_dtype="bfloat16" if dtype == "bfloat16" else "float16",
            max_shard_bytes=parse_size("--max-shard-size", max_shard_size),
            trust_remote_code=trust_remote_code,
            strict=strict,
        )
    )
    for warning in plan.warnings:
        terminal.warn(warning)
    if dry_run:
        check_output(target, restart=not resume)
        _check_calibration(plan)
        facts = _plan_facts(plan)
        terminal.result(facts, lambda console: _render_plan(console, plan, facts))
        return
    result = _run(terminal, plan, restart=not resume)
    terminal.result(
        {"output": str(target), "resumed_at_block": result.resumed_at, **result.manifest},
        lambda console: _render_result(console, plan, result),
    )


def build_recipe(
    name: str | None,
    g128: bool | None,
    alias: ModelAlias | None = None,
    *,
    base_calibration: dict[str, Any],
    calibration: dict[str, Any],
    top: dict[str, Any],
) -> Recipe:
    """The recipe by name, tuned for a model if it has an alias, with what the command line changes.

    Raises InputError for values it does not allow.
    """
    from pydantic import ValidationError

    from qoq.recipes.load import load_recipe, tuned_for
    from qoq.recipes.schema import Recipe

    loaded = load_recipe(name or ("qoq-chn" if g128 is False else "qoq-g128"))
    data = (loaded if alias is None else tuned_for(loaded, alias)).model_dump()
    if g128 is not None:
        data["group_size"] = 128 if g128 else None
    data["calibration"] |= base_calibration
    data["calibration"] |= {key: value for key, value in calibration.items() if value is not None}
    data |= {key: value for key, value in top.items() if value is not None}
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        option = next((str(key).replace("_", "-") for key in first["loc"] if key != "calibration"), None)
        if option is None:  # of the recipe as a whole
            raise InputError(
                f"recipe {loaded.name} with these options: {said}",
                remedy="leave the option out, or choose another --recipe (`qoq recipes` lists them)",
            ) from error
        raise InputError(
            f"--{option} {first['input']!r}: {said}", remedy="`qoq quantize -h` says what each option takes"
        ) from error


def _run(terminal: Terminal, plan: Plan, *, restart: bool) -> RunResult:
    from qoq.calib.corpus import Windows, calibration_windows, load_corpus
    from qoq.calib.job import run
    from qoq.calib.progress import Progress
    from qoq.calib.skeleton import load_tokenizer

    calibration = plan.request.recipe.calibration

    def load_windows() -> Windows:
        tokenizer = load_tokenizer(plan.request.model, trust_remote_code=plan.request.trust_remote_code)
        corpus = load_corpus(calibration.dataset, builtin=builtin_texts(), purpose="calibration")
        windows = calibration_windows(
            corpus, tokenizer, samples=calibration.samples, seq_len=calibration.seq_len, seed=calibration.seed
        )
        if windows.is_short:
            terminal.warn(
                f"{windows.source} gives {len(windows.tokens)} of the {windows.requested} windows asked for; "
                "quantizing with those"
            )
        return windows

    terminal.note(f"writing {plan.request.output} (recipe {plan.request.recipe.name}, on {plan.request.device})")
    with progress(terminal, "quantizing") as update:

        def on_progress(state: Progress) -> None:
            update(state.done, state.total, state.message)

        try:
            return run(plan, load_windows, restart=restart, tool_version=__version__, on_progress=on_progress)
        except KeyboardInterrupt:
            how = "the same command without --restart" if restart else "the same command again"
            raise KeyboardInterrupt(f"finished blocks are kept: run {how} to continue") from None


def _check_calibration(plan: Plan) -> None:
    """Raise InputError when the tokenizer or a local calibration text cannot be used; sets of the hub stay there."""
    from qoq.calib.corpus import load_corpus, named_sets
    from qoq.calib.skeleton import load_tokenizer

    load_tokenizer(plan.request.model, trust_remote_code=plan.request.trust_remote_code)
    dataset = plan.request.recipe.calibration.dataset
    if dataset not in named_sets("calibration"):
        load_corpus(dataset, builtin=builtin_texts(), purpose="calibration")


def _plan_facts(plan: Plan) -> dict[str, Any]:
    from qoq.calib.finish import checkpoint_totals
    from qoq_cli.devices import measure_speed

    estimate = plan.estimate
    speed = measure_speed(plan.request.device)
    return {
        "model": str(plan.request.model),
        "family": plan.skeleton.family.name,
        "blocks": plan.skeleton.num_blocks,
        "output": str(plan.request.output),
        "device": plan.request.device,
        "recipe": plan.request.recipe.model_dump(mode="json"),
        "kept_in_16_bit": list(plan.config.modules_to_not_convert),
        "padded_linears": len(plan.config.padded),
        "shards": {shard.name: shard.nbytes for shard in plan.shards},
        "totals": checkpoint_totals(plan),
        "memory_bytes": {
            "total": estimate.memory,
            "hidden_states": estimate.hidden,
            "one_block": estimate.block,
            "decoded_and_rounding": estimate.decoded,
            "activations": estimate.activations,
            "embedding": estimate.embedding,
        },
        "disk_bytes": {"total": estimate.disk, "checkpoint": estimate.checkpoint, "resume_state": estimate.state},
        "seconds_estimate": round(estimate.operations / speed, 1),
        "warnings": list(plan.warnings),
    }


def _render_plan(console: Console, plan: Plan, facts: dict[str, Any]) -> None:
    recipe = plan.request.recipe
    memory, totals = facts["memory_bytes"], facts["totals"]
    table = Table(title="Plan (nothing was written)", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", f"{facts['model']} ({facts['family']}, {facts['blocks']} blocks)")
    table.add_row("output", facts["output"])
    table.add_row("recipe", f"{recipe.name}: {recipe.description}")
    calibration = recipe.calibration
    table.add_row("calibration", f"{calibration.dataset}, {calibration.samples} x {calibration.seq_len} tokens")
    table.add_row("linears", f"{totals['quantized_linears']} quantized, {facts['padded_linears']} of them padded")
    table.add_row("bits per weight", _bits(totals["bits_per_weight"]))
    table.add_row("checkpoint", f"{size(totals['checkpoint_bytes'])} (16 bit: {size(totals['model_bytes_16bit'])})")
    table.add_row(
        "memory",
        f"{size(memory['total'])} on {plan.request.device} and host = hidden states {size(memory['hidden_states'])} "
        f"+ the larger of: embedding {size(memory['embedding'])}; one block {size(memory['one_block'])} + rounding "
        f"{size(memory['decoded_and_rounding'])} + activations {size(memory['activations'])}; "
        "libraries come on top",
    )
    disk = facts["disk_bytes"]
    table.add_row("disk", f"{size(disk['total'])} while running, {size(disk['checkpoint'])} after")
    table.add_row("time", f"about {duration(facts['seconds_estimate'])} on {plan.request.device} (from its speed now)")
    console.print(table)


def _render_result(console: Console, plan: Plan, result: RunResult) -> None:
    manifest = result.manifest
    title = "Relative error by block (quantized against 16 bit, same input)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)  # fits 80 columns
    table.add_column("block", justify="right", no_wrap=True)
    table.add_column("output", justify="right", style="bold", no_wrap=True)
    roles = list(plan.skeleton.family.roles.values())
    for role in roles:
        table.add_column(role.rpartition(".")[2].removesuffix("_proj"), justify="right", no_wrap=True)
    has_alphas = any(record["smooth_alphas"] for record in manifest["blocks"])
    if has_alphas:
        table.add_column("alpha", justify="right")
    for record in manifest["blocks"]:
        errors = [record["linears"].get(role) for role in roles]
        cells = [f"{error['output_error']:.3f}" if error else "-" for error in errors]
        alphas = [_mean_alpha(record["smooth_alphas"])] if has_alphas else []
        table.add_row(str(record["block"]), f"{record['output_error']:.4f}", *cells, *alphas)
    console.print(table)
    totals, run = manifest["totals"], manifest["run"]
    summary = Table(show_header=False, box=None)
    summary.add_column(style="bold")
    summary.add_column(overflow="fold")
    summary.add_row("checkpoint", str(plan.request.output))
    share = totals["checkpoint_bytes"] / totals["model_bytes_16bit"]
    summary.add_row(
        "size",
        f"{size(totals['checkpoint_bytes'])}, {share:.0%} of {size(totals['model_bytes_16bit'])} in 16 bit",
    )
    summary.add_row("bits per weight", f"{_bits(totals['bits_per_weight'])} in {totals['quantized_linears']} linears")
    resumed = f", continued at block {result.resumed_at}" if result.resumed_at else ""
    tuned = [record["tuned_loss"] for record in manifest["blocks"] if record["tuned_loss"] is not None]
    if tuned:
        unchanged = f"; {tuned.count(1.0)} of {len(tuned)} blocks gained nothing and stay" if 1.0 in tuned else ""
        summary.add_row("tuning", f"left {statistics.mean(tuned):.0%} of the loss of a block, on average{unchanged}")
    summary.add_row("time", duration(run["seconds"]) + resumed)
    peaks = ", ".join(f"{size(count)} {where}" for where, count in sorted(run["peak_bytes"].items()))
    summary.add_row("peak memory", peaks)
    console.print(summary)
    _render_fallbacks(console, plan, manifest)
    console.print("\nNext:", Text(f"qoq verify {shlex.quote(str(plan.request.output))}", "bold"), soft_wrap=True)


def _render_fallbacks(console: Console, plan: Plan, manifest: dict[str, Any]) -> None:
    """Name the linears that were rounded to nearest although the recipe says GPTQ, by reason."""
    by_reason: dict[str, list[str]] = {}
    for record in manifest["blocks"]:
        prefix = plan.skeleton.family.block_prefix(record["block"])
        for name, linear in record["linears"].items():
            if linear["fallback"] is not None:
                by_reason.setdefault(linear["fallback"], []).append(prefix + name)
    if by_reason:
        count, total = sum(map(len, by_reason.values())), manifest["totals"]["quantized_linears"]
        console.print(f"\n{count} of {total} linears were rounded to nearest instead of with GPTQ:")
    for reason, names in by_reason.items():
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        console.print(f"  {reason}: {some}", soft_wrap=True)


def _bits(bits: float | None) -> str:
    return "16 (nothing quantized)" if bits is None else f"{bits:.3f}"


def _mean_alpha(alphas: list[float] | None) -> str:
    return f"{sum(alphas) / len(alphas):.2f}" if alphas else "-"
