"""Writing so that a file has its final name only when it is whole."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from qoq.formats.disk import disk_errors, sha256_file, sync_folder, write_atomically
from qoq.recipes.errors import EnvironmentProblem, InputError, QoQError


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    for data in (b"first", b"", b"x" * 100_000):
        write_atomically(tmp_path / "file.json", data)
        assert (tmp_path / "file.json").read_bytes() == data
        assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, b"old")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if moment == "fsync" else (Path, "replace")), fail)
        with pytest.raises(EnvironmentProblem, match="no space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_what_is_synced_and_in_which_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content before the name, the name before anything that relies on it."""
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("rename"), replace(self, to)))
    write_atomically(tmp_path / "a", b"data")
    assert order == ["a.tmp", "rename", tmp_path.name]


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, EnvironmentProblem, "no space left on the disk"),
        (errno.EDQUOT, EnvironmentProblem, "no space left on the disk"),
        (errno.EACCES, EnvironmentProblem, "not allowed to write"),
        (errno.EROFS, EnvironmentProblem, "not allowed to write"),
        (errno.EPERM, EnvironmentProblem, "not allowed to write"),
        (errno.EIO, EnvironmentProblem, "Input/output error"),
        (errno.ENOTDIR, InputError, "Not a directory"),
        (errno.ENAMETOOLONG, InputError, "File name too long"),
        (errno.EEXIST, InputError, "File exists"),
    ],
)
def test_each_error_of_the_system(code: int, kind: type[QoQError], words: str) -> None:
    with pytest.raises(kind) as caught, disk_errors(Path("some/where")):
        raise OSError(code, os.strerror(code))
    assert caught.value.message.startswith("some/where: ")
    assert words in caught.value.message
    assert caught.value.remedy


def test_other_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="not of the disk"), disk_errors(Path("x")):
        raise ValueError("not of the disk")
    with pytest.raises(InputError, match="ours"), disk_errors(Path("x")):
        raise InputError("ours")


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_hashes_of_any_size(size: int, tmp_path: Path) -> None:
    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data[:size]).hexdigest()


def test_sync_folder_leaks_nothing(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        sync_folder(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "nowhere")
