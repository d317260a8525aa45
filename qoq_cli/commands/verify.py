"""`qoq verify`: proof that a checkpoint is right, or the name of the tensor that is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qoq.recipes.errors import CheckFailed, InputError, QoQError
from qoq_cli.backends import KERNELS, BackendOption, resolve_backend
from qoq_cli.model_location import builtin_texts, resolve_model
from qoq_cli.progress import progress
from qoq_cli.terminal import (
    JsonOption,
    QuietOption,
    RevisionOption,
    Terminal,
    TracebackOption,
    TrustOption,
    guarded,
    print_text,
)

if TYPE_CHECKING:
    from qoq.calib.served import ServedModel
    from qoq.kernels.gpu_verification import KernelProof

_SHOWN = 20
"""Problems that the error lists."""
_NOT_THIS_MODEL = 0.9
"""Relative weight error of an unrelated weight is about 1; outliers can bring rounding per channel to 0.7."""


@guarded
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Folder that `qoq quantize` wrote.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The 16-bit model: adds the error of each block and linear.")
    ] = None,
    backend: BackendOption = "auto",
    device: Annotated[
        str, typer.Option(metavar="DEV", help="Where kernels and --against run: auto, cpu, cuda, cuda:1, ...")
    ] = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Prove that a checkpoint is right.

    Checks the hash of every file; names, types and shapes of all tensors; that scales are finite; that no level-1
    weight leaves int8, computed without wrapping; and that the packed-register arithmetic of the kernels gives exactly
    the integers meant. Exit code 1, and the tensor's name, when anything is off.

    On a GPU (see --backend), every linear also goes through the CUDA kernels, with 1 to 300 tokens, and the first of
    each shape through every kernel that could serve it: integer sums must equal the oracle's bit for bit, outputs must
    be rounded once. The activation quantizer and the bytes of the KV cache (its keys rotated, if they are when served)
    must be equal too, and attention over the cache within a stated tolerance.

    Examples: `qoq verify checkpoints/tiny-w4a8kv4-g128 --against tiny`; `qoq verify CKPT --backend kernels`.
    """
    terminal = Terminal(as_json, quiet)
    chosen, target, reason = resolve_backend(backend, device)
    terminal.note(f"backend: {chosen} ({reason})")
    report = _check(terminal, checkpoint, trust_remote_code, target if chosen == KERNELS else None)
    report["backend"] = chosen
    if against is not None and not report["problems"]:
        report["against"] = _compare(terminal, report, checkpoint, against, target, revision, trust_remote_code)
    report["ok"] = not report["problems"]
    for warning in report["warnings"]:
        terminal.warn(warning)
    terminal.result(report, lambda console: _render(console, report))
    if report["problems"]:
        shown = "\n".join(_entry(problem) for problem in report["problems"][:_SHOWN])
        more = len(report["problems"]) - _SHOWN
        shown += f"\n  ... and {more} more (--json lists all)" if more > 0 else ""
        raise CheckFailed(
            f"{checkpoint}: {len(report['problems'])} problem(s):\n{shown}",
            remedy="do not serve this checkpoint; copy it again or quantize the model again",
        )


def _entry(problem: str) -> str:
    return "  - " + problem.replace("\n", "\n    ")


def _check(terminal: Terminal, folder: Path, trust_remote_code: bool, gpu: str | None) -> dict[str, Any]:
    """Everything but --against; `gpu` is the device of the kernels, None to leave them out."""
    from qoq.calib.served import open_served
    from qoq.formats.manifest import manifest_problems, read_manifest

    manifest = read_manifest(folder)
    report: dict[str, Any] = {
        "checkpoint": str(folder),
        "files": len(manifest["files"]),
        "linears": {},
        "kernels": None,
    }
    report["problems"], report["warnings"] = manifest_problems(folder, manifest)
    try:
        served = open_served(folder, trust_remote_code=trust_remote_code)
    except InputError as error:
        report["problems"].append(error.message)
        return report
    config = served.checkpoint.quantization
    report["progressive"] = config.group_size is not None
    report["kv_bits"], report["key_rotation"] = config.kv_bits, config.key_rotation
    if gpu is None:
        _check_linears(terminal, served, report, None)
    else:
        from qoq.kernels.gpu_verification import KernelProof

        proof = KernelProof(gpu)
        _check_linears(terminal, served, report, proof)
        _check_attention(served, report, proof)
        report["kernels"] = proof.summary()
    _check_kept(served, report)
    return report


def _check_linears(terminal: Terminal, served: ServedModel, report: dict[str, Any], proof: KernelProof | None) -> None:
    from qoq.kernels.verification import check_linear, emulate_weight

    checkpoint = served.checkpoint
    with progress(terminal, "verifying") as update:
        for i, (name, linear) in enumerate(served.quantized.items()):
            update(i, len(served.quantized), name)
            try:
                decoded = checkpoint.linear(name, in_features=linear.in_features)
                packed = checkpoint.packed(name, in_features=linear.in_features)
                emulated = emulate_weight(packed)
                check = check_linear(decoded, emulated)
                if proof is not None:  # only now: the packed values are legal
                    report["problems"] += proof.check_linear(name, packed, emulated, in_features=linear.in_features)
            except QoQError as error:
                report["problems"].append(error.message)
                continue
            report["problems"] += [f"{name}: {problem}" for problem in check.problems]
            report["linears"][name] = {
                "level1_min": check.level1_min,
                "level1_max": check.level1_max,
                "margin": check.margin,
            }


def _check_attention(served: ServedModel, report: dict[str, Any], proof: KernelProof) -> None:
    """The kernels' KV cache, in the sizes, bits and key rotation of this model."""
    skeleton, config = served.skeleton, served.checkpoint.quantization
    if config.kv_bits != 16:
        report["problems"] += proof.check_cache(
            skeleton.num_heads,
            skeleton.num_kv_heads,
            skeleton.head_dim,
            config.kv_bits,
            key_rotation=config.key_rotation,
            window=skeleton.sliding_window(0),
        )


def _check_kept(served: ServedModel, report: dict[str, Any]) -> None:
    from qoq.calib.streaming import load_float
    from qoq.formats.packing import PACKED_PARTS

    packed = {f"{name}.{part}" for name in served.quantized for part in PACKED_PARTS}
    for name in served.checkpoint.source.names():
        if name not in packed:
            try:
                load_float(served.checkpoint.source, name)
            except QoQError as error:
                report["problems"].append(error.message)


def _compare(
    terminal: Terminal,
    report: dict[str, Any],
    folder: Path,
    against: str,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
) -> list[dict[str, Any]]:
    import torch

    from qoq.calib.against import compare
    from qoq.calib.corpus import evaluation_windows, load_corpus
    from qoq.calib.job import check_device
    from qoq.calib.plan import open_model
    from qoq.calib.rotation import rotated
    from qoq.calib.served import open_served
    from qoq.calib.skeleton import load_tokenizer
    from qoq.formats.manifest import read_manifest

    check_device(device)
    location = resolve_model(against, hub_revision=revision, with_code=trust_remote_code, note=terminal.note)
    skeleton, source = open_model(location.path, trust_remote_code=trust_remote_code)
    recipe = read_manifest(folder)["recipe"]
    if recipe.get("rotation") is not None:
        skeleton, source = rotated(skeleton, source, device)
    served = open_served(folder, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    corpus = load_corpus("builtin", builtin=builtin_texts("evaluation"), purpose="evaluation")
    windows = evaluation_windows(corpus, tokenizer, seq_len=256, limit=4).tokens
    rows = []
    with progress(terminal, "comparing") as update:
        total = skeleton.num_blocks
        comparisons = compare(
            served,
            skeleton,
            source,
            windows,
            reordered=recipe.get("reorder") is not None,
            device=torch.device(device),
            on_block=lambda index: update(index + 1, total, f"block {index}"),
        )
        for comparison in comparisons:
            rows.append(
                {
                    "block": comparison.block,
                    "output_error": comparison.output_error,
                    "weight_errors": comparison.weight_errors,
                }
            )
            report["problems"] += [
                f"{name}: differs from {against} by {error:.2f}; it was not made from this model"
                for name, error in comparison.weight_errors.items()
                if not error < _NOT_THIS_MODEL
            ]
    return rows


def _render(console: Console, report: dict[str, Any]) -> None:
    blocks: dict[str, list[dict[str, int]]] = {}
    for name, check in report["linears"].items():
        blocks.setdefault(name.rsplit(".", 2)[0], []).append(check)
    compared = {row["block"]: row for row in report.get("against", [])}
    if blocks:
        what = "Level-1 weights" if report["progressive"] else "Codes minus zeros"
        table = Table(title=f"{what}, reconstructed without wrapping (int8 is -128..127)", title_justify="left")
        table.add_column("block", justify="right")
        for heading in ("linears", "smallest", "largest", "margin"):
            table.add_column(heading, justify="right")
        if compared:
            table.add_column("output error", justify="right")
            table.add_column("largest weight error", justify="right")
        for prefix, checks in blocks.items():
            cells = [
                str(len(checks)),
                str(min(check["level1_min"] for check in checks)),
                str(max(check["level1_max"] for check in checks)),
                str(min(check["margin"] for check in checks)),
            ]
            if compared:
                row = compared[int(prefix.rpartition(".")[2])]
                cells += [f"{row['output_error']:.4f}", f"{max(row['weight_errors'].values()):.4f}"]
            table.add_row(prefix.rpartition(".")[2], *cells)
        console.print(table)
    if not report["problems"]:
        if report.get("kernels"):
            _render_kernels(console, report["kernels"])
        margin = min((check["margin"] for check in report["linears"].values()), default=None)
        room = "" if margin is None or not report["progressive"] else f", smallest margin to int8 {margin}"
        found = f"{report['files']} files and {len(report['linears'])} quantized linears are right{room}"
        found += f"; KV cache of {report['kv_bits']} bit, key rotation {report['key_rotation']}"
        print_text(console, f"{report['checkpoint']}: {found}", label="ok", label_style="bold green")


def _render_kernels(console: Console, kernels: dict[str, Any]) -> None:
    print_text(
        console,
        f"kernels on {kernels['device']}: {kernels['linears']} linears, M = "
        f"{', '.join(map(str, kernels['rows']))}: all {kernels['compared']:,} values agree with the oracle",
    )
    for cache in kernels["caches"]:
        rotation = "" if cache["key_rotation"] == "none" else f", key rotation {cache['key_rotation']}"
        print_text(
            console,
            f"KV{cache['bits']} cache, {cache['dtype']}{rotation}: bytes equal; attention differs from float64 by "
            f"{cache['relative_error']:.1e} (at most {cache['tolerance']:.0e} is allowed)",
        )
