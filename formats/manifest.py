"""qoq_manifest.json: what a checkpoint was made from and how, and the digest of every file. Its presence = complete."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qoq.formats.disk import sha256_file, write_atomically
from qoq.recipes.errors import InputError

MANIFEST_NAME = "qoq_manifest.json"
CARD_NAME = "README.md"
"""The model card: people edit it, so a change there is worth a warning and no more."""
EXPORT_NAME = "qoq_export.json"
"""In an exported folder: what it was made from."""
WORK_NAME = ".qoq-work"
"""The folder of an unfinished run."""
MANIFEST_VERSION = 1
_SECTIONS = {
    "tool": dict,
    "recipe": dict,
    "source": dict,
    "calibration": dict,
    "totals": dict,
    "blocks": list,
    "run": dict,
}
_READ_BY_LOADERS = (
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "*config.json",
    "tokenizer*",
    "*.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.py",
)
"""What must be listed in the manifest if it is there, because someone who loads the checkpoint would believe it."""


def canonical_digest(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest's canonical JSON (sorted keys, no spaces), its own `digest` left out."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the named files of a checkpoint."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in sorted(names)
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Add the digest and write the manifest, last of all files."""
    complete = {**manifest, "digest": canonical_digest(manifest)}
    write_atomically(folder / MANIFEST_NAME, (json.dumps(complete, indent=2, sort_keys=True) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest without checking its digest.

    Raises InputError when it is missing (the checkpoint is incomplete, or not one of qoq's) or no JSON object.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", remedy="pass the folder that `qoq quantize` wrote")
    if not path.is_file():
        if (folder / EXPORT_NAME).is_file():
            raise InputError(
                f"{folder}: an export for another server", remedy="pass the checkpoint that it was made from"
            )
        remedy = "pass the folder that `qoq quantize` wrote"
        if (folder / WORK_NAME).is_dir():
            remedy = "run the same `qoq quantize` again to complete it, or pass another folder"
        raise InputError(f"{folder}: no {MANIFEST_NAME}, so this is not a complete qoq checkpoint", remedy=remedy)
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})", remedy="quantize the model again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError(f"{path}: not a manifest of qoq (no table of files)", remedy="quantize the model again")
    for key, kind in _SECTIONS.items():
        if not isinstance(manifest.get(key, kind()), kind):
            raise InputError(
                f"{path}: not a manifest of qoq ({key!r} is no {kind.__name__})", remedy="quantize the model again"
            )
    return manifest


def is_intact(manifest: dict[str, Any]) -> bool:
    """Whether a manifest's content fits its own digest."""
    try:
        return manifest.get("digest") == canonical_digest(manifest)
    except ValueError:  # NaN, which Python's JSON reader lets through
        return False


def manifest_problems(folder: Path, manifest: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(problems, warnings) of the manifest's own digest and of every file it lists."""
    problems: list[str] = []
    warnings: list[str] = []
    if not is_intact(manifest):
        problems.append(f"{MANIFEST_NAME}: its content does not match its own digest; it was changed after writing")
    for name, expected in sorted(manifest["files"].items()):
        found = warnings if name == CARD_NAME else problems
        path = folder / name
        if Path(name).name != name or len(name) > 255 or not isinstance(expected, dict):
            problems.append(f"{MANIFEST_NAME}: entry {name!r} does not name a file of this folder")
        elif not path.is_file():
            found.append(f"{name}: missing")
        elif path.stat().st_size != expected.get("bytes"):
            found.append(f"{name}: {path.stat().st_size} bytes, the manifest says {expected.get('bytes')}")
        elif sha256_file(path) != expected.get("sha256"):
            found.append(f"{name}: its sha256 differs from the manifest's; the file was changed after writing")
    read = {path.name for pattern in _READ_BY_LOADERS for path in folder.glob(pattern)}
    problems += [f"{name}: not listed in {MANIFEST_NAME}" for name in sorted(read - manifest["files"].keys())]
    return problems, warnings
