"""Runs cut off anywhere continue with the same command and end with the same files, byte for byte."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

QOQ = Path(sys.executable).with_name("qoq")
WORK = ".qoq-work"
MANIFEST = "qoq_manifest.json"
BLOCKS = 6


class Killed(BaseException):
    """The process ends here. No `except Exception` and no clean-up for OSError sees it."""


@pytest.fixture(scope="module")
def long_run(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path], text_file: Path
) -> tuple[object, ...]:
    """A command of about a second's work on six blocks, in several shards; its --output is still to be given."""
    model = make_model(tmp_path_factory.mktemp("six") / "six blocks", blocks=BLOCKS, intermediate_size=512)
    sizes = ("--samples", 24, "--seq-len", 128, "--max-shard-size", "1MB", "--device", "cpu")
    return ("quantize", model, "--calib", text_file, *sizes)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, long_run: tuple[object, ...], qoq: Any, contents: Any
) -> tuple[dict[str, Any], float]:
    """What the run makes when nobody disturbs it, and how many seconds that takes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    started = time.monotonic()
    outcome = qoq(*long_run, "-o", folder)
    assert outcome.code == 0, outcome.stderr
    return contents(folder), time.monotonic() - started


@pytest.fixture(scope="module")
def whole_small(tmp_path_factory: pytest.TempPathFactory, small_run: Any, qoq: Any, contents: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "out"
    outcome = qoq(*small_run, "-o", folder)
    assert outcome.code == 0, outcome.stderr
    return contents(folder)


@pytest.fixture(scope="module")
def small_run(small_model: Path, quick: tuple[object, ...]) -> tuple[object, ...]:
    """The quickest command that still has two blocks and several shards."""
    return ("quantize", small_model, *quick, "--max-shard-size", "700KB", "--device", "cpu")


# ---- processes that are really killed


def start(*args: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [str(QOQ), *map(str, args)]
    # The background jobs of a shell ignore Ctrl-C, and would hand that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_until_it_writes(process: subprocess.Popen[str], output: Path) -> None:
    """Until the weights' files are there: what comes before (imports, the plan) leaves nothing to resume."""
    deadline = time.monotonic() + 120
    while not any((output / WORK).glob("*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def progress_of(output: Path) -> str:
    try:
        state = json.loads((output / WORK / "state.json").read_bytes())
    except (OSError, ValueError):
        return f"before block 1, or after the end (complete: {(output / MANIFEST).is_file()})"
    published = len(list(output.glob("*.safetensors")))
    return f"{state['next_block']} of {BLOCKS} blocks written, {published} shards published"


def blocks_on_disk(output: Path) -> int:
    try:
        return int(json.loads((output / WORK / "state.json").read_bytes())["next_block"])
    except (OSError, ValueError):
        return 0


def is_over(output: Path) -> bool:
    """Whether the process had nothing left to do but to exit."""
    return (output / MANIFEST).is_file() and not (output / WORK).exists()


@pytest.mark.parametrize("blocks", [0, 2])
def test_kill_and_resume(
    blocks: int, long_run: Any, uninterrupted: tuple[dict[str, Any], float], qoq: Any, contents: Any, tmp_path: Path
) -> None:
    expected, _ = uninterrupted
    output = tmp_path / "out"
    process = start(*long_run, "-o", output)
    wait_until_it_writes(process, output)
    while blocks_on_disk(output) < blocks:  # by what is on disk: a busy machine knows no shares of a time
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    time.sleep(random.Random(blocks).uniform(0, 0.03))
    process.kill()
    process.communicate()
    where = progress_of(output)
    assert process.returncode == -signal.SIGKILL, where
    assert not is_over(output), where
    outcome = qoq(*long_run, "-o", output)
    assert outcome.code == 0, f"{where}: {outcome.stderr}"
    assert contents(output) == expected, where


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_in_one_run_and_ten_runs(
    long_run: Any, uninterrupted: tuple[dict[str, Any], float], contents: Any, tmp_path: Path
) -> None:
    """Each of ten runs is killed at moments spread over its whole length, and resumed by a new process."""
    expected, seconds = uninterrupted
    draw = random.Random(2405)
    killed = 0
    seen: list[str] = []
    for i in range(10):
        output = tmp_path / f"out {i}"
        process = start(*long_run, "-o", output)
        wait_until_it_writes(process, output)
        time.sleep(seconds * (i + draw.random()) / 10)
        process.kill()
        process.communicate()
        seen.append(progress_of(output))
        if not is_over(output):
            assert process.returncode == -signal.SIGKILL
            killed += 1
            resumed = start(*long_run, "-o", output)
            _, stderr = resumed.communicate(timeout=300)
            assert resumed.returncode == 0, stderr
        assert contents(output) == expected
        shutil.rmtree(output)
    assert killed >= 6, seen
    assert len(set(seen)) >= 4, seen  # the moments were different ones


def test_a_second_process_is_kept_off_and_ctrl_c_is_no_loss(
    long_run: Any, uninterrupted: Any, qoq: Any, fails: Any, contents: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(*long_run, "-o", output)
    try:
        wait_until_it_writes(process, output)
        process.send_signal(signal.SIGSTOP)  # it holds its lock all the same
        for extra in ((), ("--restart",)):
            message = fails(2, *long_run, "-o", output, *extra)
            assert "another `qoq quantize` is writing here" in message
            assert str(output) in message
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "run the same command again to continue" in " ".join(stderr.split())
    assert (output / WORK / "lock").exists()
    assert not (output / MANIFEST).exists()
    outcome = qoq(*long_run, "-o", output)
    assert outcome.code == 0, outcome.stderr
    assert contents(output) == uninterrupted[0]


@pytest.mark.slow
def test_a_terminated_run_continues(long_run: Any, uninterrupted: Any, qoq: Any, contents: Any, tmp_path: Path) -> None:
    """SIGTERM, as batch systems and containers send it, is like a kill."""
    output = tmp_path / "out"
    process = start(*long_run, "-o", output)
    wait_until_it_writes(process, output)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert qoq(*long_run, "-o", output).code == 0
    assert contents(output) == uninterrupted[0]


# ---- every point at which something is written


class Disk:
    """Counts what changes the disk and, at one such moment, fails or ends the process."""

    def __init__(self, at: int | None, error: Callable[[], BaseException]) -> None:
        self.at, self.error = at, error
        self.count = 0
        self.moments: list[str] = []

    def touch(self, what: str, path: object) -> None:
        if self.count == self.at:
            self.at = None
            raise self.error()
        self.count += 1
        self.moments.append(f"{what} {pathlib.Path(str(path)).name}")


@contextmanager
def watched(disk: Disk) -> Iterator[Disk]:
    """Within the context, every change of the disk that qoq makes is announced to `disk` before it happens."""
    with pytest.MonkeyPatch.context() as patch:

        def announce(owner: Any, name: str, what: str) -> None:
            original = getattr(owner, name)

            def wrapper(*args: Any, **kwargs: Any) -> Any:
                disk.touch(what, args[0])
                return original(*args, **kwargs)

            patch.setattr(owner, name, wrapper)

        announce(os, "fsync", "fsync")
        announce(os, "posix_fallocate", "allocate")
        announce(pathlib.Path, "replace", "rename")
        announce(pathlib.Path, "unlink", "unlink")
        announce(pathlib.Path, "mkdir", "mkdir")
        announce(shutil, "rmtree", "rmtree")
        from qoq.formats.writer import ShardWriter

        write = ShardWriter.write

        def write_and_tell(self: ShardWriter, name: str, tensor: Any) -> None:
            disk.touch("write", name)
            write(self, name, tensor)

        patch.setattr(ShardWriter, "write", write_and_tell)
        yield disk


def moments_of(run: Any, qoq: Any, output: Path) -> list[str]:
    with watched(Disk(None, Killed)) as disk:
        outcome = qoq(*run, "-o", output)
    assert outcome.code == 0, outcome.stderr
    return disk.moments


def points(moments: list[str]) -> list[int]:
    """Where to cut: everywhere but between the many tensors of one block, of which the ends are enough."""
    is_write = [moment.startswith("write") for moment in moments] + [False]
    return [i for i in range(len(moments)) if not (is_write[i] and is_write[i + 1] and i > 0 and is_write[i - 1])]


def never_looks_complete(output: Path, fails: Any, expected: dict[str, Any]) -> None:
    """A folder is complete to the last byte, or nothing takes it for a checkpoint."""
    if (output / MANIFEST).exists():
        found = {path.name for path in output.iterdir()} - {WORK}
        assert found == {name for name in expected if not name.startswith(WORK)}
    elif output.exists():
        fails(2, "inspect", output)


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_point(
    step: int, small_run: Any, whole_small: dict[str, Any], qoq: Any, contents: Any, fails: Any, tmp_path: Path
) -> None:
    moments = moments_of(small_run, qoq, tmp_path / "counted")
    assert {moment.split()[0] for moment in moments} >= {"fsync", "allocate", "rename", "write", "rmtree"}
    assert len(moments) > 60
    for at in points(moments)[::step]:
        output = tmp_path / "out"
        with watched(Disk(at, Killed)) as disk, pytest.raises(Killed):
            qoq(*small_run, "-o", output)
        assert disk.count >= at  # letting go of the lock may still tidy up
        never_looks_complete(output, fails, whole_small)
        outcome = qoq(*small_run, "-o", output)
        if outcome.code == 2:  # it was complete, and all that was missing was to clean up
            assert "already holds a complete checkpoint" in outcome.error, f"{at}: {moments[at]}: {outcome.error}"
        else:
            assert outcome.code == 0, f"{at}: {moments[at]}: {outcome.error}"
        assert contents(output) == whole_small, f"{at}: {moments[at]}"
        shutil.rmtree(output)


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_full_disk_at_every_point(
    step: int, small_run: Any, whole_small: dict[str, Any], qoq: Any, contents: Any, fails: Any, tmp_path: Path
) -> None:
    moments = moments_of(small_run, qoq, tmp_path / "counted")
    grows = [at for at in points(moments) if moments[at].split()[0] in ("fsync", "allocate", "rename", "mkdir")]
    for at in grows[::step]:
        output = tmp_path / "out"
        with watched(Disk(at, lambda: OSError(errno.ENOSPC, "No space left on device"))):
            outcome = qoq(*small_run, "-o", output)
        where = f"{at}: {moments[at]}"
        assert outcome.code == 3, f"{where}: {outcome.code} {outcome.stderr}"
        assert "no space left" in outcome.error, where
        assert "free some space" in outcome.error, where
        assert str(output) in outcome.error, where
        never_looks_complete(output, fails, whole_small)
        again = qoq(*small_run, "-o", output)
        assert again.code == 0, f"{where}: {again.stderr}"
        assert contents(output) == whole_small, where
        shutil.rmtree(output)


def test_killed_again_and_again(small_run: Any, whole_small: Any, qoq: Any, contents: Any, tmp_path: Path) -> None:
    """Every process lives a little longer than the one before it, and the run ends all the same."""
    output = tmp_path / "out"
    for lives in range(5, 200, 3):
        with watched(Disk(lives, Killed)):
            try:
                outcome = qoq(*small_run, "-o", output)
            except Killed:
                continue
        assert outcome.code == 0, outcome.stderr
        break
    assert lives > 20
    assert contents(output) == whole_small


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_restart_killed_at_every_point(
    step: int, small_run: Any, small_model: Path, whole_small: Any, qoq: Any, contents: Any, fails: Any, tmp_path: Path
) -> None:
    """What the old checkpoint had and the new one has not is gone in the end, wherever the restart was cut off."""
    old = tmp_path / "old"
    one_shard = [arg if arg != "700KB" else "1GB" for arg in small_run]
    assert qoq(*one_shard, "-o", old, "--per-channel").code == 0
    moments = []
    counted = tmp_path / "counted"
    shutil.copytree(old, counted)
    with watched(Disk(None, Killed)) as disk:
        assert qoq(*small_run, "-o", counted, "--restart").code == 0
    moments = disk.moments
    assert contents(counted) == whole_small
    removal = next(i for i, moment in enumerate(moments) if moment.startswith("allocate"))
    for at in range(0, removal + 2, step):
        output = tmp_path / "out"
        shutil.copytree(old, output)
        with watched(Disk(at, Killed)), pytest.raises(Killed):
            qoq(*small_run, "-o", output, "--restart")
        if (output / MANIFEST).exists():  # the old checkpoint is still whole
            assert qoq("verify", output).code == 0
        outcome = qoq(*small_run, "-o", output, "--restart")
        assert outcome.code == 0, f"{at}: {moments[at]}: {outcome.error}"
        assert contents(output) == whole_small, f"{at}: {moments[at]}"
        shutil.rmtree(output)


def test_a_restart_of_a_run_cut_off_at_the_end(
    small_run: Any, whole_small: Any, qoq: Any, contents: Any, tmp_path: Path
) -> None:
    """Shards that were already published under other names do not stay."""
    one_shard = [arg if arg != "700KB" else "1GB" for arg in small_run]
    moments = moments_of(one_shard, qoq, tmp_path / "counted")
    at = moments.index("rename README.md.tmp")
    output = tmp_path / "out"
    with watched(Disk(at, Killed)), pytest.raises(Killed):
        qoq(*one_shard, "-o", output)
    assert (output / "model.safetensors").exists()
    assert qoq(*small_run, "-o", output, "--restart").code == 0
    assert contents(output) == whole_small


def test_cut_off_between_the_manifest_and_the_end(
    small_run: Any, whole_small: Any, qoq: Any, contents: Any, fails: Any, tmp_path: Path
) -> None:
    moments = moments_of(small_run, qoq, tmp_path / "counted")
    last = len(moments) - 1 - moments[::-1].index(f"rename {MANIFEST}.tmp")
    output = tmp_path / "out"
    with watched(Disk(last + 1, Killed)), pytest.raises(Killed):
        qoq(*small_run, "-o", output)
    assert (output / WORK).exists()
    assert qoq("verify", output).code == 0
    assert qoq(*small_run, "-o", output).code == 0
    assert contents(output) == whole_small
    assert "already holds a complete checkpoint" in fails(2, *small_run, "-o", output)


# ---- what may and what may not be continued or replaced


def cut_off(qoq: Any, run: Any, output: Path, *, blocks: int = 1) -> None:
    """Leave an unfinished run with `blocks` blocks on disk."""
    from qoq.calib import job

    real = job.quantize_block_

    def quantize_block(plan: Any, index: int, *rest: Any) -> Any:
        if index == blocks:
            raise Killed
        return real(plan, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "quantize_block_", quantize_block)
        with pytest.raises(Killed):
            qoq(*run, "-o", output)
    assert json.loads((output / WORK / "state.json").read_bytes())["next_block"] == blocks


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_twice_and_another_seed(
    small_run: Any, whole_small: Any, qoq: Any, contents: Any, tmp_path: Path
) -> None:
    assert qoq(*small_run, "-o", "twice").code == 0
    assert contents(tmp_path / "twice") == whole_small
    assert qoq(*small_run, "-o", "other", "--seed", 1).code == 0
    other = contents(tmp_path / "other")
    assert other[MANIFEST]["calibration"]["fingerprint"] != whole_small[MANIFEST]["calibration"]["fingerprint"]


def test_resuming_starts_at_the_block_it_was_in(small_run: Any, whole_small: Any, qoq: Any, contents: Any) -> None:
    output = Path("out").absolute()
    cut_off(qoq, small_run, output)
    outcome = qoq(*small_run, "-o", "out", "--json")  # relative this time
    assert outcome.json["resumed_at_block"] == 1
    assert outcome.json["run"]["resumed"] == 1
    assert contents(output) == whole_small


@pytest.mark.parametrize(
    "change",
    [("--seed", 7), ("--samples", 1), ("--kv-bits", 8), ("--per-channel",), ("--max-shard-size", "1GB")],
    ids=lambda change: change[0],
)
def test_another_plan_is_not_continued(change: Any, small_run: Any, qoq: Any, fails: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    cut_off(qoq, small_run, output)
    before = snapshot(output)
    message = fails(2, *small_run, *change, "-o", output)
    assert "unfinished run of another plan" in message
    assert "--restart" in message
    assert snapshot(output) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_that_changed_meanwhile_is_not_continued(
    name: str, small_model: Path, copied: Any, quick: Any, qoq: Any, fails: Any, tmp_path: Path
) -> None:
    model, output = copied(small_model), tmp_path / "out"
    run = ("quantize", model, *quick)
    cut_off(qoq, run, output)
    if name == "config.json":
        config = json.loads((model / name).read_bytes())
        config["rms_norm_eps"] = 1e-3
        (model / name).write_text(json.dumps(config))
    else:
        data = bytearray((model / name).read_bytes())
        data[-1] ^= 1
        (model / name).write_bytes(data)
    assert "unfinished run of another plan" in fails(2, *run, "-o", output)


def test_restart_of_an_unfinished_run(
    small_run: Any, whole_small: Any, qoq: Any, contents: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    cut_off(qoq, [*small_run, "--seed", 7], output)
    outcome = qoq(*small_run, "-o", output, "--restart", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["resumed_at_block"] == 0
    assert contents(output) == whole_small


def test_a_complete_checkpoint_is_not_touched(
    small_run: Any, qoq: Any, fails: Any, contents: Any, tmp_path: Path, whole_small: Any
) -> None:
    output = tmp_path / "out"
    assert qoq(*small_run, "-o", output).code == 0
    before = snapshot(output)
    for extra in ((), ("--seed", 3), ("--dry-run",)):
        message = fails(2, *small_run, *extra, "-o", output)
        assert "already holds a complete checkpoint" in message
        assert "--restart" in message
    assert snapshot(output) == before
    assert qoq(*small_run, "-o", output, "--restart").code == 0
    assert contents(output) == whole_small


@pytest.mark.parametrize("state", ["complete", "unfinished", "foreign"])
def test_restart_never_deletes_what_qoq_did_not_write(
    state: str, small_run: Any, qoq: Any, fails: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    if state == "complete":
        assert qoq(*small_run, "-o", output).code == 0
    elif state == "unfinished":
        cut_off(qoq, small_run, output)
    output.mkdir(exist_ok=True)
    (output / "thesis.txt").write_text("years of work")
    (output / "photos").mkdir()
    (output / "photos" / "one.jpg").write_bytes(b"jpg")
    before = snapshot(output)
    if state == "unfinished":  # nothing of it is in the way
        assert qoq(*small_run, "-o", output, "--restart").code == 0
    else:
        message = fails(2, *small_run, "-o", output, "--restart")
        assert "photos, thesis.txt" in message
        assert snapshot(output) == before
    assert (output / "thesis.txt").read_text() == "years of work"
    assert (output / "photos" / "one.jpg").read_bytes() == b"jpg"


def test_a_file_in_the_way_of_an_unfinished_run_is_not_overwritten(
    small_run: Any, qoq: Any, fails: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    cut_off(qoq, small_run, output)
    (output / "README.md").write_text("notes of mine")
    message = fails(2, *small_run, "-o", output)
    assert "README.md" in message
    assert (output / "README.md").read_text() == "notes of mine"
    assert not (output / MANIFEST).exists()
    (output / "README.md").unlink()
    assert qoq(*small_run, "-o", output).code == 0


def test_a_hostile_manifest_does_not_lead_restart_outside(
    small_run: Any, qoq: Any, contents: Any, whole_small: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert qoq(*small_run, "-o", output).code == 0
    (tmp_path / "precious").write_text("precious")
    manifest = json.loads((output / MANIFEST).read_bytes())
    for name in ("../precious", "..", ".", "", str(tmp_path / "precious"), "a" * 5000, "nul\0"):
        manifest["files"][name] = {"bytes": 8, "sha256": "0" * 64}
    (output / MANIFEST).write_text(json.dumps(manifest))
    assert qoq("verify", output).code == 1
    assert qoq(*small_run, "-o", output, "--restart").code == 0
    assert (tmp_path / "precious").read_text() == "precious"
    assert contents(output) == whole_small


def test_restart_over_a_manifest_that_cannot_be_read(small_run: Any, qoq: Any, fails: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert qoq(*small_run, "-o", output).code == 0
    (output / MANIFEST).write_text("{")
    before = snapshot(output)
    message = fails(2, *small_run, "-o", output, "--restart")
    assert "remove the folder yourself" in message
    assert snapshot(output) == before


@pytest.mark.parametrize("damage", ["state", "counts", "hidden", "shard gone", "shard cut"])
def test_a_damaged_unfinished_run_asks_for_restart(
    damage: str, small_run: Any, whole_small: Any, qoq: Any, fails: Any, contents: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    cut_off(qoq, small_run, output)
    work = output / WORK
    state = work / "state.json"
    if damage == "state":
        state.write_text(state.read_text()[:-10])
    elif damage == "counts":
        state.write_text(json.dumps(json.loads(state.read_text()) | {"next_block": 0}))
    elif damage == "hidden":
        hidden = work / "hidden-00001.npy"
        hidden.write_bytes(hidden.read_bytes()[:-100])
    else:
        shard = min(work.glob("*.safetensors"))
        shard.unlink() if damage == "shard gone" else shard.write_bytes(shard.read_bytes()[:-1])
    assert "--restart" in fails(2, *small_run, "-o", output)
    assert qoq(*small_run, "-o", output, "--restart").code == 0
    assert contents(output) == whole_small


def test_a_stale_lock_file_is_no_lock(
    small_run: Any, whole_small: Any, qoq: Any, contents: Any, tmp_path: Path
) -> None:
    work = tmp_path / "out" / WORK
    work.mkdir(parents=True)
    (work / "lock").write_text("4711")
    assert qoq(*small_run, "-o", "out").code == 0
    assert contents(tmp_path / "out") == whole_small


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_that_cannot_begin_leaves_nothing(exists: bool, small_model: Path, fails: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if exists:
        output.mkdir()
    (tmp_path / "short.txt").write_text("Too short.")
    fails(2, "quantize", small_model, "--calib", "short.txt", "-o", output)
    assert output.exists() == exists
    assert not exists or list(output.iterdir()) == []


def test_a_failed_restart_does_not_cost_the_old_checkpoint(
    small_run: Any, qoq: Any, fails: Any, contents: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert qoq(*small_run, "-o", output).code == 0
    before = snapshot(output)
    (tmp_path / "short.txt").write_text("Too short.")
    fails(2, *small_run, "-o", output, "--restart", "--calib", "short.txt")
    assert snapshot(output) == before


def test_an_unfinished_folder_is_no_checkpoint(small_run: Any, qoq: Any, fails: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    cut_off(qoq, small_run, output)
    for command in (("verify", output), ("inspect", output), ("eval", output), ("generate", output, "x")):
        message = fails(2, *command)
        assert str(output) in message
        assert "same `qoq quantize` again" in message, command
