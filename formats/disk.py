"""Writing to disk so that a crash, a kill or a full disk never leaves a half-written file under its final name."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qoq.recipes.errors import EnvironmentProblem, InputError

_CHUNK = 1 << 22


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors into one error that names the path and the remedy.

    EnvironmentProblem; InputError where the path itself is one that cannot be.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentProblem(
                f"{path}: no space left on the disk",
                remedy="free some space, then the same command (without --restart) continues where it stopped",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise EnvironmentProblem(f"{path}: not allowed to write here", remedy="choose another --output") from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(
                f"{path}: cannot be written ({error.strerror or error})", remedy="choose another --output"
            ) from error
        raise EnvironmentProblem(
            f"{path}: cannot be written ({error.strerror or error})",
            remedy="check the disk, or choose another --output",
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`: temporary file beside it, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
