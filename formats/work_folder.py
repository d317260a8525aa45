"""The folder an unfinished run works in: its lock, the state to resume from, and the shards until they are complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from qoq.formats.disk import disk_errors, sync_folder, write_atomically
from qoq.formats.manifest import CARD_NAME, MANIFEST_NAME, WORK_NAME, read_manifest
from qoq.recipes.errors import EnvironmentProblem, InputError

_STATE_NAME = "state.json"
_CLAIMS_NAME = "claims.json"
_LOCK_NAME = "lock"


@dataclass(frozen=True)
class JobState:
    """Where a run stands: `next_block` is the first one not yet on disk; `records` has one entry per finished block."""

    fingerprint: str
    next_block: int = 0
    records: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0
    resumed: int = 0
    peak_bytes: dict[str, int] = field(default_factory=dict)


def check_output(output: Path, *, restart: bool) -> None:
    """Refuse an output folder that holds something else, or a complete checkpoint unless `restart` asks to replace it.

    A run that was cut off after its manifest was written, with its state still there, counts as unfinished: to carry it
    on only repeats the last step. Changes nothing. Raises InputError.
    """
    try:
        if output.is_symlink() and not output.exists():
            raise InputError(f"{output}: a link to something that does not exist", remedy="choose another --output")
        if not output.exists():
            return
        if not output.is_dir():
            raise InputError(f"{output}: exists and is not a folder", remedy="choose another --output")
        present = {entry.name for entry in output.iterdir()}
        is_unfinished = (output / WORK_NAME / _STATE_NAME).is_file()
    except OSError as error:
        raise InputError(
            f"{output}: cannot be the output folder ({error.strerror or error})", remedy="choose another --output"
        ) from error
    if MANIFEST_NAME in present:
        if not restart and not is_unfinished:
            raise InputError(
                f"{output}: already holds a complete checkpoint",
                remedy="pass --restart to make it again, or choose another --output",
            )
        ours = {*_listed_files(output), MANIFEST_NAME, CARD_NAME, WORK_NAME}
        _refuse_foreign(output, present - ours)
    elif WORK_NAME not in present:
        _refuse_foreign(output, present)


def _listed_files(output: Path) -> list[str]:
    """Files of a complete checkpoint, by its manifest. Raises InputError when that cannot be read."""
    try:
        names = read_manifest(output)["files"]
    except InputError as error:
        raise InputError(
            f"{error.message}: so it does not say which files --restart may replace",
            remedy="choose another --output, or remove the folder yourself",
        ) from error
    return [name for name in names if _is_plain(name)]


def _is_plain(name: object) -> bool:
    """Whether a name read from a file can only mean an entry of the folder itself."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        return False
    return len(os.fsencode(name)) < 250  # what file systems allow, with room for a suffix


def _refuse_foreign(output: Path, names: set[str]) -> None:
    if names:
        some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        raise InputError(
            f"{output}: holds files that qoq did not write ({some})",
            remedy="choose another --output, or move them away; nothing was changed",
        )


class WorkFolder:
    """`OUTPUT/.qoq-work` of one run, held under a lock."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / WORK_NAME

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock for the whole run; a process that dies, however it dies, lets go of it. Raises InputError.

        Where nothing was begun, or everything is complete, nothing is left behind.
        """
        is_new = not self.output.exists()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / _LOCK_NAME)
        with disk_errors(self.path):
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout as error:  # an OSError too
                raise InputError(
                    f"{self.output}: another `qoq quantize` is writing here",
                    remedy="wait for it, or choose another --output",
                ) from error
        try:
            yield
        finally:
            with suppress(OSError):
                if [entry.name for entry in self.path.iterdir()] == [_LOCK_NAME]:
                    shutil.rmtree(self.path)
                    if is_new:
                        self.output.rmdir()
            lock.release()

    def claim(self, names: Iterable[str]) -> None:
        """Note on disk that files of these names in the output folder are this run's, before they are written there.

        What is claimed may be replaced and, by `discard`, removed. Raises InputError for a file that someone else put
        there.
        """
        claimed = self._claims()
        new = set(names) - claimed
        foreign = sorted(name for name in new if os.path.lexists(self.output / name))
        if foreign:
            _refuse_foreign(self.output, set(foreign))
        self._write_claims(claimed | new)

    def _claims(self) -> set[str]:
        try:
            names = json.loads((self.path / _CLAIMS_NAME).read_bytes())
        except FileNotFoundError:
            return set()
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path / _CLAIMS_NAME}: cannot be read ({error})",
                remedy="choose another --output, or remove the folder yourself",
            ) from error
        return {name for name in names if _is_plain(name)} if isinstance(names, list) else set()

    def _write_claims(self, names: set[str]) -> None:
        write_atomically(self.path / _CLAIMS_NAME, json.dumps(sorted(names)).encode())

    def discard(self) -> None:
        """Remove what an earlier run left, finished or not; files that qoq did not write stay (see `check_output`).

        May be cut off anywhere: what is still to be removed is on disk until it is gone.
        """
        claimed = self._claims()
        with disk_errors(self.output):
            if (self.output / MANIFEST_NAME).is_file():
                claimed |= {CARD_NAME, *_listed_files(self.output)}
                self._write_claims(claimed)
                (self.output / MANIFEST_NAME).unlink()
            for name in claimed:
                for path in (self.output / name, self.output / f"{name}.tmp"):
                    if path.is_file() or path.is_symlink():
                        path.unlink()
            self._empty()

    def check_space(self, needed: int) -> None:
        """Raise EnvironmentProblem when the disk has less than `needed` bytes for this run, before it does any work."""
        with disk_errors(self.path):
            held = sum(path.stat().st_blocks * 512 for path in self.path.iterdir())
            free = shutil.disk_usage(self.path).free
        if free + held < needed:
            raise EnvironmentProblem(
                f"{self.output}: {free / 1e6:,.1f} MB are free on this disk, and the run needs {needed / 1e6:,.1f} MB",
                remedy="free some space, or choose another --output; nothing was written",
            )

    def remove(self) -> None:
        """Remove the folder when the checkpoint is complete."""
        with suppress(OSError):
            self._empty()
            shutil.rmtree(self.path)

    def tidy(self) -> None:
        """Remove the folder if a run was cut off while it removed it. Raises InputError where one is running."""
        try:
            is_complete = (self.output / MANIFEST_NAME).is_file() and not (self.path / _STATE_NAME).is_file()
        except OSError:  # a name that no folder can have; `check_output` says so
            return
        if is_complete and self.path.is_dir():
            with self.locked():
                self.remove()

    def _empty(self) -> None:
        """Remove all but the lock, in an order that can be cut off: the state, then the claims, come last."""
        last = ("", _STATE_NAME, _CLAIMS_NAME)
        names = [path.name for path in self.path.iterdir() if path.name != _LOCK_NAME]
        for name in sorted(names, key=lambda name: last.index(name) if name in last else 0):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def read_state(self) -> JobState | None:
        """The state of an unfinished run, or None. Raises InputError when it cannot be understood."""
        path = self.path / _STATE_NAME
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_bytes())
            state = JobState(**{**data, "records": tuple(data["records"])})
            if type(state.next_block) is not int or state.next_block != len(state.records):
                raise ValueError(f"next_block {state.next_block!r} with {len(state.records)} records")
            return state
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}: the state of an unfinished run cannot be read ({error})",
                remedy="pass --restart to begin again",
            ) from error

    def commit(self, state: JobState, hidden: Tensor | None) -> None:
        """Make `state` the one to resume from, with the hidden states [..., S, L, H] that enter its next block.

        The state file's rename is the commit: before it, the previous state and its hidden states are still whole.
        """
        if hidden is not None:
            path = self._hidden(state.next_block)
            temporary = path.with_suffix(".tmp")
            with disk_errors(path):
                with temporary.open("wb") as file:
                    np.save(file, hidden.numpy())
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
                sync_folder(self.path)
        write_atomically(self.path / _STATE_NAME, json.dumps(asdict(state)).encode())
        for old in self.path.glob("hidden-*.npy"):
            if hidden is None or old != self._hidden(state.next_block):
                old.unlink()

    def load_hidden(self, next_block: int) -> Tensor:
        """Hidden states float32 [..., S, L, H] that enter block `next_block`. Raises InputError when they are gone."""
        path = self._hidden(next_block)
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: cannot be read ({error})", remedy="pass --restart to begin again") from error

    def publish(self, shard_names: list[str]) -> None:
        """Move finished shards into the output folder; those already moved are left alone."""
        for name in shard_names:
            if (self.path / name).is_file():
                with disk_errors(self.output / name):
                    (self.path / name).replace(self.output / name)
            elif not (self.output / name).is_file():
                raise InputError(f"{self.output}: shard {name} is gone", remedy="pass --restart to begin again")
        with disk_errors(self.output):
            sync_folder(self.output)

    def _hidden(self, next_block: int) -> Path:
        return self.path / f"hidden-{next_block:05d}.npy"
