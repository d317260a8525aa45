"""A checkpoint in the form that another server reads: checked first, written beside its place, renamed at the end."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qoq.formats.checkpoint import Checkpoint
from qoq.formats.disk import disk_errors, sync_folder, write_atomically
from qoq.formats.exporters.exporter import Exporter, in_features, kept_dtype
from qoq.formats.manifest import CARD_NAME, EXPORT_NAME, manifest_problems
from qoq.formats.packing import PACKED_PARTS
from qoq.formats.safetensors_file import TensorInfo
from qoq.formats.writer import ShardWriter, index_json, plan_shards
from qoq.recipes.errors import EnvironmentProblem, InputError, raise_problems

LARGEST_ERROR = 0.01
"""Relative: a form that changes weights more than that has not stored them."""
_OWN_FILES = ("config.json", "quant_config.json", CARD_NAME)


@dataclass(frozen=True)
class ExportReport:
    """error: of the linear `worst`, the largest of all: norm of the difference that storing makes, over that of W."""

    folder: Path
    nbytes: int
    linears: int
    error: float
    worst: str


def preflight(checkpoint: Checkpoint, exporter: Exporter, output: Path) -> None:
    """Everything that can be known before a byte is written; changes nothing.

    Raises InputError that lists what keeps the checkpoint from being exported so, or names an output folder that cannot
    be one, or files that are not as the manifest has them.
    """
    raise_problems(
        f"{checkpoint.folder} cannot be exported to {exporter.name}; problems",
        exporter.problems(checkpoint),
        remedy="quantize the model anew so that it fits, or choose another format: `qoq export` lists them",
        shown=10,
    )
    _check_output(checkpoint, output)
    problems, _ = manifest_problems(checkpoint.folder, checkpoint.manifest)
    raise_problems(f"{checkpoint.folder}: not as it was written", problems, remedy="`qoq verify` says more")


def export_checkpoint(
    checkpoint: Checkpoint,
    exporter: Exporter,
    output: Path,
    *,
    max_shard_bytes: int,
    tool_version: str,
    on_step: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> ExportReport:
    """Write the folder `output`, which must not exist or be empty.

    Every file of the checkpoint is compared with its manifest first, and every stored linear decoded again and compared
    with the checkpoint's. An interrupted or failed export leaves nothing. Raises InputError, EnvironmentProblem.
    """
    on_step(0, 1, "checking the files")
    preflight(checkpoint, exporter, output)
    shards = plan_shards(_planned(checkpoint, exporter), max_shard_bytes)
    with _beside(output) as folder:
        writer = ShardWriter(folder, shards)
        writer.prepare()
        error, worst = _write_tensors(checkpoint, exporter, writer, on_step)
        writer.sync()
        _write_json(folder / "config.json", exporter.config(checkpoint))
        index = index_json(shards)
        if index is not None:
            _write_json(folder / ShardWriter.index_name, index)
        for name in sorted(checkpoint.manifest["files"]):
            if name not in _OWN_FILES and not name.endswith((".safetensors", ".index.json")):
                with disk_errors(folder / name):
                    shutil.copyfile(checkpoint.folder / name, folder / name)
        report = ExportReport(
            output, sum(shard.nbytes for shard in shards), len(checkpoint.quantized_linears()), error, worst
        )
        write_atomically(folder / CARD_NAME, _card(checkpoint, exporter, report, tool_version).encode())
        _write_json(folder / EXPORT_NAME, _provenance(checkpoint, exporter, report, tool_version))
        with disk_errors(output):
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
            sync_folder(output.parent)
    return report


def _check_output(checkpoint: Checkpoint, output: Path) -> None:
    if output.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise InputError(
            f"{output}: lies in the checkpoint itself", remedy="choose another --output; nothing was changed"
        )
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise InputError(
                f"{output}: exists and is not an empty folder", remedy="choose another --output; nothing was changed"
            )
    except OSError as error:
        raise InputError(f"{output}: cannot be the output folder ({error.strerror or error})") from error


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A folder on the same file system, which is gone afterwards unless it was renamed."""
    with disk_errors(output):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
        folder = made / output.name
        folder.mkdir()
    try:
        yield folder
    except EnvironmentProblem as error:
        raise EnvironmentProblem(
            error.message.replace(str(folder), str(output)),
            remedy="nothing was left there; see to the disk, or choose another --output",
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _planned(checkpoint: Checkpoint, exporter: Exporter) -> dict[str, TensorInfo]:
    """Every tensor to be written, in the order of the checkpoint's names."""
    planned = {}
    for name in checkpoint.source.names():
        linear, _, part = name.rpartition(".")
        if not _is_packed(checkpoint, name):
            planned[name] = checkpoint.source.info(name)
        elif part == "qweight":
            shapes = exporter.shapes(checkpoint, linear)
            planned |= {f"{linear}.{stored}": info for stored, info in shapes.items()}
    return planned


def _is_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is part of a quantized linear."""
    linear, _, part = name.rpartition(".")
    return part in PACKED_PARTS and checkpoint.is_quantized(linear)


def _write_tensors(
    checkpoint: Checkpoint, exporter: Exporter, writer: ShardWriter, on_step: Callable[[int, int, str], None]
) -> tuple[float, str]:
    """Write all of them; the largest relative error of a linear, and its name."""
    linears, dtype = checkpoint.quantized_linears(), kept_dtype(checkpoint)
    largest, worst = 0.0, ""
    for name in checkpoint.source.names():
        if not _is_packed(checkpoint, name):
            writer.write(name, checkpoint.source.load(name))
    for done, name in enumerate(linears):
        on_step(done, len(linears), name)
        linear = checkpoint.linear(name, in_features=in_features(checkpoint, name))
        stored = exporter.tensors(linear, dtype)
        for part, tensor in stored.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{name}.{part}: does not fit {dtype}", remedy="quantize with another --dtype")
            writer.write(f"{name}.{part}", tensor)
        error = _relative(exporter.decode(stored, linear.in_features), linear.dequantize())
        if not error <= LARGEST_ERROR:
            raise InputError(
                f"{name}: stored for {exporter.name}, its weights are off by {error:.2%}", remedy="report this, please"
            )
        if error >= largest:
            largest, worst = error, name
    return largest, worst


def _relative(found: Tensor, exact: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(exact.double()))
    difference = float(torch.linalg.vector_norm((found - exact).double()))
    return difference / norm if norm else difference


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _provenance(
    checkpoint: Checkpoint, exporter: Exporter, report: ExportReport, tool_version: str
) -> dict[str, object]:
    return {
        "tool": {"name": "qoq", "version": tool_version},
        "format": exporter.name,
        "readers": exporter.readers,
        "relative_error": {"largest": report.error, "linear": report.worst},
        "checkpoint": {key: checkpoint.manifest.get(key) for key in ("digest", "tool", "recipe", "source")},
    }


def _card(checkpoint: Checkpoint, exporter: Exporter, report: ExportReport, tool_version: str) -> str:
    source, recipe = checkpoint.manifest.get("source") or {}, checkpoint.manifest.get("recipe") or {}
    notes = "\n".join(f"- {note}" for note in exporter.notes)
    return f"""# {source.get("model")} for {exporter.name}

{source.get("model")}, quantized with qoq {(checkpoint.manifest.get("tool") or {}).get("version")}, recipe
`{recipe.get("name")}`, and exported with qoq {tool_version}: {exporter.summary}.

Read by: {exporter.readers}.

{notes}

Storing changed no weight matrix by more than {report.error:.4%} of its norm. What this was made from is in
`{EXPORT_NAME}`.
"""
