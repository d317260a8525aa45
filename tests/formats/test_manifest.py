"""The manifest: its digest is of its meaning, its presence says "complete", its table guards every file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qoq.formats.manifest import (
    CARD_NAME,
    MANIFEST_NAME,
    canonical_digest,
    describe_files,
    is_intact,
    manifest_problems,
    read_manifest,
    write_manifest,
)
from qoq.recipes.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as far as a manifest goes."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", CARD_NAME):
        (tmp_path / name).write_text(f"content of {name}")
    names = [path.name for path in tmp_path.iterdir()]
    write_manifest(tmp_path, {"files": describe_files(tmp_path, names), "blocks": [{"output_error": 0.1}]})
    return tmp_path


def found(folder: Path) -> tuple[list[str], list[str]]:
    return manifest_problems(folder, read_manifest(folder))


def test_the_digest_is_of_the_canonical_json() -> None:
    """Written out, so that another program can compute it."""
    text = '{"a":[1,2.5,null],"b":{"c":"\\u00fc","d":true}}'
    content = {"b": {"d": True, "c": "ü"}, "a": [1, 2.5, None], "digest": "left out"}
    assert canonical_digest(content) == hashlib.sha256(text.encode()).hexdigest()


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_neither_order_nor_formatting_matter(content: dict[str, Any]) -> None:
    turned = dict(reversed(content.items()))
    assert canonical_digest(turned) == canonical_digest(content)
    assert canonical_digest(json.loads(json.dumps(content, indent=3))) == canonical_digest(content)
    assert canonical_digest(content | {"digest": "anything"}) == canonical_digest(content)


@given(st.dictionaries(st.text(), JSON, max_size=3), st.text().filter(lambda key: key != "digest"), JSON)
def test_any_change_matters(content: dict[str, Any], key: str, value: Any) -> None:
    changed = content | {key: value}
    same = json.dumps(changed, sort_keys=True) == json.dumps(content | {}, sort_keys=True)
    assert (
        canonical_digest(changed) == canonical_digest({k: v for k, v in content.items() if k != "digest"})
    ) == same or ("digest" in content)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_say_is_refused(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_digest({"blocks": [{"output_error": value}]})
    with pytest.raises(ValueError, match="JSON"):
        write_manifest(tmp_path, {"files": {}, "blocks": [value]})
    assert list(tmp_path.iterdir()) == []
    assert not is_intact({"files": {}, "blocks": [value], "digest": "0"})


def test_all_is_well(folder: Path) -> None:
    assert found(folder) == ([], [])
    assert is_intact(read_manifest(folder))
    assert sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp")) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_each_change_of_a_file_is_named(name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    for changed, words in ((content[:-1] + b"X", "sha256"), (content + b"X", "bytes"), (b"", "0 bytes")):
        (folder / name).write_bytes(changed)
        ((problem,), warnings) = found(folder)
        assert problem.startswith(f"{name}: ")
        assert words in problem
        assert warnings == []
    (folder / name).unlink()
    assert found(folder) == ([f"{name}: missing"], [])
    (folder / name).mkdir()
    assert found(folder) == ([f"{name}: missing"], [])


def test_the_card_is_only_warned_about(folder: Path) -> None:
    (folder / CARD_NAME).write_text("mine")
    problems, warnings = found(folder)
    assert problems == []
    assert len(warnings) == 1
    assert warnings[0].startswith(CARD_NAME)


@pytest.mark.parametrize(
    "name",
    [
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",
        "pytorch_model.bin",
        "special_tokens_map.json",
        "chat_template.jinja",
        "modeling_evil.py",
    ],
)
def test_files_that_a_loader_would_read_must_be_listed(name: str, folder: Path) -> None:
    (folder / name).write_text("more")
    assert found(folder) == ([f"{name}: not listed in {MANIFEST_NAME}"], [])


def test_files_that_no_loader_reads_may_lie_there(folder: Path) -> None:
    for name in ("notes.md", "results.json", ".gitattributes", "plot.png"):
        (folder / name).write_text("mine")
    assert found(folder) == ([], [])


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file", "x" * 5000, "nul\0", "..", ".", ""])
def test_entries_that_are_no_file_of_the_folder(name: str, folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    write_manifest(folder, manifest)
    ((problem,), _) = found(folder)
    assert name[:20] in problem or repr(name)[1:20] in problem


@pytest.mark.parametrize("entry", [None, 3, "sha", [], {}])
def test_entries_of_another_shape(entry: Any, folder: Path) -> None:
    manifest = read_manifest(folder)
    manifest["files"]["config.json"] = entry
    write_manifest(folder, manifest)
    ((problem,), _) = found(folder)
    assert "config.json" in problem


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"files": []}',
        "{}",
        '{"files": {}, "blocks": {}}',
        '{"files": {}, "source": "x"}',
        "[" * 99999,
    ],
)
def test_what_is_no_manifest(content: str, folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text(content)
    with pytest.raises(InputError, match=MANIFEST_NAME):
        read_manifest(folder)


def test_without_a_manifest_a_checkpoint_is_incomplete(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(InputError, match="not a complete qoq checkpoint"):
        read_manifest(folder)
    with pytest.raises(InputError, match="no such folder"):
        read_manifest(folder / "nowhere")
    with pytest.raises(InputError, match="no such folder"):
        read_manifest(folder / "config.json")


def test_describe_files(folder: Path) -> None:
    content = b"content of config.json"
    described = describe_files(folder, ["tokenizer.json", "config.json"])
    assert list(described) == ["config.json", "tokenizer.json"]
    assert described["config.json"] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
