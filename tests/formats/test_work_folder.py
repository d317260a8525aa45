"""The folder of an unfinished run: lock, state, shards, and what may be removed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qoq.formats.manifest import CARD_NAME, MANIFEST_NAME, WORK_NAME, describe_files, write_manifest
from qoq.formats.work_folder import JobState, WorkFolder, check_output
from qoq.recipes.errors import InputError


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def work(output: Path) -> WorkFolder:
    """A work folder that exists, without a lock held."""
    folder = WorkFolder(output)
    folder.path.mkdir(parents=True)
    return folder


def complete(output: Path, *names: str) -> None:
    output.mkdir(exist_ok=True)
    for name in (*names, CARD_NAME):
        (output / name).write_text(name)
    write_manifest(output, {"files": describe_files(output, [*names, CARD_NAME])})


def state(blocks: int, fingerprint: str = "f") -> JobState:
    return JobState(fingerprint, blocks, tuple({"block": i} for i in range(blocks)), 1.5, 0, {"host": 7})


def test_a_state_comes_back_as_it_was(work: WorkFolder) -> None:
    assert work.read_state() is None
    hidden = torch.randn(2, 3, 4)
    work.commit(state(1), hidden)
    assert work.read_state() == state(1)
    assert torch.equal(work.load_hidden(1), hidden)


def test_only_the_newest_hidden_states_stay(work: WorkFolder) -> None:
    for i in (1, 2, 3):
        work.commit(state(i), torch.full((1, 1, 1), float(i)))
    assert sorted(path.name for path in work.path.iterdir()) == ["hidden-00003.npy", "state.json"]
    work.commit(state(4), None)
    assert sorted(path.name for path in work.path.iterdir()) == ["state.json"]


def test_a_commit_cut_off_leaves_the_state_before_it(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    work.commit(state(1), torch.ones(1, 1, 1))
    replace = Path.replace

    def no_state(self: Path, target: Path) -> Path:
        if target.name == "state.json":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", no_state)
        with pytest.raises(KeyboardInterrupt):
            work.commit(state(2), torch.full((1, 1, 1), 2.0))
    assert work.read_state() == state(1)
    assert work.load_hidden(1).item() == 1.0


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"fingerprint": "f", "records": [], "surprise": 1}',
     '{"fingerprint": "f", "records": 3}', '{"fingerprint": "f", "records": [], "next_block": "0"}',
     '{"fingerprint": "f", "records": [], "next_block": 2}', '{"fingerprint": "f", "records": [], "next_block": true}'],
)  # fmt: skip
def test_a_state_that_cannot_be_understood(content: str, work: WorkFolder) -> None:
    (work.path / "state.json").write_text(content)
    with pytest.raises(InputError, match="--restart"):
        work.read_state()


def test_hidden_states_that_are_gone_or_hostile(work: WorkFolder) -> None:
    with pytest.raises(InputError, match="--restart"):
        work.load_hidden(1)
    np.save(work.path / "hidden-00001.npy", np.array([{"a": "pickle"}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="--restart"):
        work.load_hidden(1)


# ---- the lock


def test_one_at_a_time(output: Path) -> None:
    with WorkFolder(output).locked():
        with pytest.raises(InputError, match="another `qoq quantize` is writing here"), WorkFolder(output).locked():
            pass
        (output / WORK_NAME / "state.json").write_text("{}")
    with WorkFolder(output).locked():
        pass
    assert (output / WORK_NAME / "state.json").exists()


def test_nothing_begun_leaves_nothing(output: Path) -> None:
    with pytest.raises(ValueError, match="early"), WorkFolder(output).locked():
        raise ValueError("early")
    assert not output.exists()
    output.mkdir()
    with WorkFolder(output).locked():
        pass
    assert list(output.iterdir()) == []


def test_a_work_folder_that_is_a_file(output: Path) -> None:
    output.mkdir()
    (output / WORK_NAME).write_text("mine")
    with pytest.raises(InputError, match="cannot be written"), WorkFolder(output).locked():
        pass
    assert (output / WORK_NAME).read_text() == "mine"


# ---- whose files


def test_check_output(output: Path) -> None:
    check_output(output, restart=False)
    output.mkdir()
    check_output(output, restart=False)
    (output / "mine.txt").write_text("x")
    for restart in (False, True):
        with pytest.raises(InputError, match=r"did not write \(mine\.txt\)"):
            check_output(output, restart=restart)
    (output / WORK_NAME).mkdir()
    check_output(output, restart=False)


def test_check_output_of_a_complete_checkpoint(output: Path) -> None:
    complete(output, "config.json")
    with pytest.raises(InputError, match="already holds a complete checkpoint"):
        check_output(output, restart=False)
    check_output(output, restart=True)
    (output / WORK_NAME).mkdir()
    with pytest.raises(InputError, match="already holds a complete checkpoint"):
        check_output(output, restart=False)
    (output / WORK_NAME / "state.json").write_text("{}")
    check_output(output, restart=False)  # only the very end is missing
    (output / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"did not write \(mine\.txt\)"):
        check_output(output, restart=True)


def test_tidy(output: Path) -> None:
    work = WorkFolder(output)
    work.tidy()
    complete(output, "config.json")
    work.tidy()
    work.path.mkdir()
    (work.path / "claims.json").write_text("[]")
    work.tidy()
    assert not work.path.exists()
    work.path.mkdir()
    (work.path / "state.json").write_text("{}")
    work.tidy()
    assert work.path.exists()


def test_claims(work: WorkFolder, output: Path) -> None:
    work.claim(["a", "b"])
    (output / "a").write_text("ours")
    work.claim(["a", "c"])
    (output / "d").write_text("theirs")
    with pytest.raises(InputError, match=r"did not write \(d\)"):
        work.claim(["d"])
    work.discard()
    assert sorted(path.name for path in output.iterdir()) == [WORK_NAME, "d"]
    assert list(work.path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", '["../precious", "..", "", ".", 3, null, "a/b"]', '{"../precious": 1}'])
def test_hostile_claims(content: str, work: WorkFolder, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (work.path / "claims.json").write_text(content)
    if content == "{":
        with pytest.raises(InputError, match="cannot be read"):
            work.discard()
    else:
        work.discard()
    assert (tmp_path / "precious").read_text() == "precious"


def test_discard_of_a_complete_checkpoint(work: WorkFolder, output: Path) -> None:
    complete(output, "config.json", "model.safetensors")
    (output / "config.json.tmp").write_text("half")
    (work.path / "tokenizer-x").mkdir()
    (work.path / "tokenizer-x" / "file").write_text("x")
    work.discard()
    assert [path.name for path in output.iterdir()] == [WORK_NAME]
    assert list(work.path.iterdir()) == []


def test_discard_keeps_the_checkpoint_whole_until_it_has_noted_its_files(
    work: WorkFolder, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(output, "config.json", "model.safetensors")
    unlink = Path.unlink
    for cut in range(6):
        left = cut

        def stop(self: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            unlink(self, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", stop)
            try:
                work.discard()
            except KeyboardInterrupt:
                claims = set(json.loads((work.path / "claims.json").read_bytes()))
                present = {path.name for path in output.iterdir()} - {WORK_NAME, MANIFEST_NAME}
                assert present <= claims
    assert [path.name for path in output.iterdir()] == [WORK_NAME]


def test_publish(work: WorkFolder, output: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (work.path / name).write_text(name)
    work.publish(["a.safetensors"])
    work.publish(["a.safetensors", "b.safetensors"])  # what was moved already stays
    assert (output / "a.safetensors").read_text() == "a.safetensors"
    assert list(work.path.iterdir()) == []
    with pytest.raises(InputError, match=r"c\.safetensors is gone"):
        work.publish(["c.safetensors"])


def test_remove(work: WorkFolder) -> None:
    work.commit(state(1), torch.ones(1, 1, 1))
    work.remove()
    assert not work.path.exists()
    work.remove()
