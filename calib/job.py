"""A whole run of `qoq quantize`: embedding, every block, the rest, with a state on disk after each block."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor

from qoq.calib.block_job import FinishedBlock, quantize_block_, to_kept
from qoq.calib.corpus import Windows
from qoq.calib.finish import finish_checkpoint
from qoq.calib.plan import Plan
from qoq.calib.progress import OnProgress, Progress
from qoq.calib.streaming import BlockRunner, embed, load_float
from qoq.formats.disk import sha256_file
from qoq.formats.work_folder import JobState, WorkFolder, check_output
from qoq.formats.writer import ShardWriter
from qoq.recipes.errors import EnvironmentProblem, InputError


@dataclass(frozen=True)
class RunResult:
    """A complete checkpoint: its manifest, and how many blocks were already there when this run began."""

    manifest: dict[str, Any]
    resumed_at: int


def run(
    plan: Plan, load_windows: Callable[[], Windows], *, restart: bool, tool_version: str, on_progress: OnProgress
) -> RunResult:
    """Carry out a plan; an unfinished run of the same plan in the output folder is continued.

    `load_windows` gives the calibration windows. Raises InputError (output folder in use or holding something else, a
    different unfinished run, bad weights, bad text) and EnvironmentProblem (disk, device). An interruption at any
    moment leaves a state from which the same call continues and ends with the same files.
    """
    started = time.monotonic()
    output, total = plan.request.output, plan.skeleton.num_blocks
    check_device(plan.request.device)
    # Reduced-precision float32 products would make results depend on the card's settings.
    torch.backends.cuda.matmul.allow_tf32 = False
    work = WorkFolder(output)
    work.tidy()
    check_output(output, restart=restart)
    with work.locked():
        check_output(output, restart=restart)  # again: another run may have ended meanwhile
        on_progress(Progress(0, total, "reading the calibration text"))
        windows = load_windows()
        on_progress(Progress(0, total, "hashing the model's files"))
        hashes = _source_hashes(plan)
        state = _find_state(work, plan.fingerprint(windows.fingerprint, hashes, tool_version), restart=restart)
        resumed_at = state.next_block
        writer = ShardWriter(work.path, plan.shards)
        if state.next_block < total:
            if state.next_block == 0:
                work.check_space(plan.estimate.disk)
            writer.prepare(must_exist=state.next_block > 0)
            streams = _first_states(plan, work, state, windows.tokens, writer)
            state = _quantize_blocks_(plan, work, state, streams, writer, started, on_progress)
        on_progress(Progress(total, total, "writing the manifest"))
        run_facts = _run_facts(plan, state, started)
        manifest = finish_checkpoint(plan, work, state, windows, hashes, tool_version=tool_version, run=run_facts)
        work.remove()
    return RunResult(manifest, resumed_at)


def check_device(device: str) -> None:
    """Raise EnvironmentProblem when `device` cannot be used, InputError when it is no device."""
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device!r}: not a device", remedy="use auto, cpu, cuda or cuda:1") from error
    if kind.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (kind.index or 0) >= count:
            raise EnvironmentProblem(
                f"--device {device}: PyTorch sees {count} CUDA device(s)",
                remedy="use --device cpu, or `qoq doctor` to see why",
            )
    elif kind.type != "cpu":
        raise InputError(f"--device {device!r} is not supported", remedy="use auto, cpu, cuda or cuda:1")


def _source_hashes(plan: Plan) -> dict[str, str]:
    """sha256 of the model's weight files and of its configuration, which decides what the weights mean."""
    model = plan.request.model
    files = [*plan.source.files(), *([model / "config.json"] if model.is_dir() else [])]
    return {path.name: sha256_file(path) for path in files}


def _find_state(work: WorkFolder, fingerprint: str, *, restart: bool) -> JobState:
    if restart:
        work.discard()
        return JobState(fingerprint)
    state = work.read_state()
    if state is None:
        return JobState(fingerprint)
    if state.fingerprint != fingerprint:
        raise InputError(
            f"{work.output}: holds an unfinished run of another plan (recipe, model, calibration or version differ)",
            remedy="repeat the command that began it, pass --restart to begin again, or choose another --output",
        )
    return replace(state, resumed=state.resumed + 1)


def _first_states(plan: Plan, work: WorkFolder, state: JobState, tokens: Tensor, writer: ShardWriter) -> Tensor:
    """Hidden states [1 or 2, S, L, H] that enter the next block, as `quantize_block_` takes them.

    A new run first writes everything outside the blocks.
    """
    if state.next_block > 0:
        return work.load_hidden(state.next_block)
    for name in plan.skeleton.tensor_shapes():
        if not name.startswith(f"{plan.skeleton.family.blocks}."):
            writer.write(name, to_kept(name, load_float(plan.source, name), plan.kept_dtype))
    writer.sync()
    embedded = embed(plan.source, plan.skeleton, tokens, plan.kept_dtype)
    return embedded.expand(plan.streams, *embedded.shape).clone()


def _quantize_blocks_(
    plan: Plan,
    work: WorkFolder,
    state: JobState,
    streams: Tensor,
    writer: ShardWriter,
    started: float,
    on_progress: OnProgress,
) -> JobState:
    total = plan.skeleton.num_blocks
    if torch.device(plan.request.device).type == "cuda":
        streams = streams.pin_memory()  # they cross the bus a dozen times for each block
    runner = BlockRunner(plan.skeleton, streams.shape[2], torch.device(plan.request.device))
    before = state.seconds
    with _Background() as background:
        for index in range(state.next_block, total):
            done = float(index)

            def tick(message: str, share: float, index: int = index) -> None:
                nonlocal done
                done = min(done + share, index + 1.0)
                on_progress(Progress(done, total, f"block {index}: {message}"))

            # A block is written while the next one is quantized, up to where its hidden states are replaced.
            finished = quantize_block_(plan, index, streams, runner, tick, background.wait)
            state = replace(
                state,
                next_block=index + 1,
                records=(*state.records, finished.record.to_dict()),
                seconds=before + time.monotonic() - started,
                peak_bytes=_peak(state.peak_bytes, plan.request.device),
            )
            hidden = streams if index + 1 < total else None
            background.start(partial(_save_block, plan, index, finished, writer, work, state, hidden))
            on_progress(Progress(index + 1, total, f"block {index}: done"))
        background.wait()
    return state


class _Background:
    """One piece of work at a time in a thread of its own; what it raises is raised by `wait`.

    Left early, by whatever exception, the piece that runs is still finished.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def start(self, work: Callable[[], None]) -> None:
        self.wait()
        self._running = self._pool.submit(work)

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()


def _save_block(
    plan: Plan,
    index: int,
    block: FinishedBlock,
    writer: ShardWriter,
    work: WorkFolder,
    state: JobState,
    hidden: Tensor | None,
) -> None:
    prefix = plan.skeleton.family.block_prefix(index)
    for name, tensor in block.kept.items():
        writer.write(prefix + name, tensor)
    for name, linear in block.quantized.items():
        writer.write_linear(prefix + name, linear)
    writer.sync()
    work.commit(state, hidden)


def _peak(earlier: dict[str, int], device: str) -> dict[str, int]:
    peak = {"host": max(_host_peak(), earlier.get("host", 0))}
    if torch.device(device).type == "cuda":
        peak["cuda"] = max(torch.cuda.max_memory_allocated(device), earlier.get("cuda", 0))
    return peak


def _host_peak() -> int:
    """Largest resident set of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        # Elsewhere than Linux, where this counts in bytes; on Linux it would include the process that started this one.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _run_facts(plan: Plan, state: JobState, started: float) -> dict[str, Any]:
    """What may differ between two runs of one plan."""
    return {
        "seconds": round(max(state.seconds, time.monotonic() - started), 1),
        "peak_bytes": state.peak_bytes or _peak({}, plan.request.device),
        "resumed": state.resumed,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
