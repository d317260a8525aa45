"""Where the weights of a model come from: a Hugging Face folder of safetensors, or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qoq.formats.safetensors_file import COPY_AGAIN, SafetensorsFile, TensorInfo, parse_json_object, regular_file_size
from qoq.recipes.errors import InputError, raise_problems
from qoq.recipes.families import Family

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
_MAX_INDEX_BYTES = 100_000_000
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

_GIVE_FOLDER = "give a Hugging Face model folder (config.json and *.safetensors), a .gguf file or a model's name"
_DOWNLOAD_AGAIN = "finish the download: the same `hf download` command fetches only what is missing"


class TensorSource(Protocol):
    """A model's weights under the names that transformers gives them; every method may raise InputError."""

    @property
    def location(self) -> Path:
        """The folder or file that was opened."""

    def names(self) -> list[str]:
        """Sorted."""

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape as `load` will return them, without reading the tensor."""

    def load(self, name: str) -> Tensor:
        """The tensor; on the CPU, but where an implementation says otherwise."""

    def files(self) -> list[Path]:
        """The weight files and their index, sorted: what a fingerprint of the source must cover."""


class FolderSource:
    """Safetensors files of one folder; made by `open_folder`, which checks them."""

    def __init__(self, location: Path, shards: Mapping[str, SafetensorsFile], index: Path | None) -> None:
        self._location = location
        self._files = sorted([shard.path for shard in shards.values()] + ([] if index is None else [index]))
        self._shard_of = {name: shard for shard in shards.values() for name in shard.header.tensors}

    @property
    def location(self) -> Path:
        return self._location

    def names(self) -> list[str]:
        return sorted(self._shard_of)

    def info(self, name: str) -> TensorInfo:
        return self._shard(name).info(name)

    def load(self, name: str) -> Tensor:
        return self._shard(name).load(name)

    def files(self) -> list[Path]:
        return list(self._files)

    def _shard(self, name: str) -> SafetensorsFile:
        try:
            return self._shard_of[name]
        except KeyError:
            raise InputError(
                f"{self._location}: no tensor {name!r} in its safetensors files",
                remedy="check that config.json belongs to these weights",
            ) from None


def is_gguf(path: Path) -> bool:
    """Whether a path is taken for a GGUF file: by its name, unless it is a folder."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def open_source(path: Path, family: Family) -> TensorSource:
    """Open a model folder or a `.gguf` file; `family` gives the tensor names of the latter.

    Raises InputError for whatever cannot be read, or for a GGUF file of another architecture than the family's.
    """
    if not is_gguf(path):
        return open_folder(path)
    from qoq.formats.gguf_file import GGUFSource, gguf_architecture

    architecture = gguf_architecture(path)
    if architecture != family.gguf_arch:
        raise InputError(
            f"{path}: architecture {architecture[:40]!r}, expected {family.gguf_arch!r} for the family {family.name}",
            remedy="check that the file is of the model you mean",
        )
    return GGUFSource(path, names=family.gguf_names, blocks=family.blocks, permuted=family.gguf_permuted)


def open_folder(path: Path) -> FolderSource:
    """Open a Hugging Face folder: headers only, all of them checked, no tensor read.

    Like transformers it takes `model.safetensors` first, then the index and its shards; failing both, the only
    `*.safetensors` there is. The names are those of the files' headers, and the index must agree with them.
    Raises InputError.
    """
    entries = _list_folder(path)
    if SINGLE_NAME not in entries and INDEX_NAME in entries:
        return _open_indexed(path, path / INDEX_NAME)
    name = SINGLE_NAME if SINGLE_NAME in entries else _only_safetensors(path, entries)
    return FolderSource(path, {name: _open_shard(path, name)}, None)


def _list_folder(path: Path) -> list[str]:
    try:
        if path.is_file():
            raise InputError(f"{path}: expected a model folder, got a file", remedy=_GIVE_FOLDER)
        entries = sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder", remedy=f"check the path; {_GIVE_FOLDER}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{path}: cannot be read ({error})", remedy="check the path and its permissions") from error
    if not entries:
        raise InputError(f"{path}: the folder is empty", remedy=_GIVE_FOLDER)
    return entries


def _only_safetensors(path: Path, entries: list[str]) -> str:
    found = [name for name in entries if name.endswith(".safetensors")]
    if found == [ADAPTER_NAME]:
        raise InputError(
            f"{path}: {ADAPTER_NAME} is an adapter, not a whole model",
            remedy="merge it into its base model (peft: merge_and_unload) and save that",
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{path}: {len(found)} safetensors files ({', '.join(found[:4])}{', ...' if len(found) > 4 else ''}) but "
            f"neither {SINGLE_NAME} nor {INDEX_NAME}",
            remedy=f"download {INDEX_NAME} too, or keep only the model's own file in the folder",
        )
    pickles = [name for name in entries if Path(name).suffix.lower() in _PICKLE_SUFFIXES]
    if pickles:
        raise InputError(
            f"{path}: only pickle files ({', '.join(pickles[:4])}{', ...' if len(pickles) > 4 else ''}); loading a "
            "pickle runs whatever code it holds, so they are not read",
            remedy="convert to safetensors where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
        )
    ggufs = [name for name in entries if name.lower().endswith(".gguf")]
    if ggufs:
        raise InputError(f"{path}: no safetensors files", remedy=f"for GGUF name the file: {path / ggufs[0]}")
    raise InputError(f"{path}: no weights (*.safetensors) in this folder", remedy=_GIVE_FOLDER)


def _open_indexed(folder: Path, index: Path) -> FolderSource:
    weight_map = _read_weight_map(folder, index)
    shard_names = sorted(set(weight_map.values()))
    raise_problems(
        f"{index}: weight files it names are not in the folder, of {len(shard_names)} in all",
        [name for name in shard_names if not _exists(folder / name)],
        remedy=_DOWNLOAD_AGAIN,
    )
    shards = {name: _open_shard(folder, name) for name in shard_names}

    holder: dict[str, str] = {}
    problems = []
    for shard_name, shard in shards.items():
        for name in shard.names():
            if name in holder:
                problems.append(f"tensor {name!r} is in two files: {holder[name]} and {shard_name}")
            holder[name] = shard_name
    for name, shard_name in weight_map.items():
        if name not in shards[shard_name].header.tensors:
            elsewhere = f"it is in {holder[name]}" if name in holder else "it is in no file"
            problems.append(f"tensor {name!r} is not in {shard_name}: {elsewhere}")
    raise_problems(f"{index}: the index and the weight files disagree", problems, remedy=COPY_AGAIN)
    return FolderSource(folder, shards, index)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name too long for the file system
        return False


def _read_weight_map(folder: Path, index: Path) -> dict[str, str]:
    """Tensor name to file name; only plain names of safetensors files come through."""
    _check_stays_inside(folder, index)
    size = regular_file_size(index)
    if size > _MAX_INDEX_BYTES:
        raise InputError(f"{index}: {size} bytes, expected at most {_MAX_INDEX_BYTES}", remedy=COPY_AGAIN)
    try:
        with index.open("rb") as file:
            content = parse_json_object(file.read(_MAX_INDEX_BYTES), str(index))
    except OSError as error:
        raise InputError(f"{index}: cannot be read ({error})", remedy="check the permissions and the disk") from error
    weight_map: Any = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map (an object of tensor name: file name)", remedy=COPY_AGAIN)
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.isprintable() and not set(shard) & set("/\\:")
        if not plain or not shard.endswith(".safetensors") or len(shard) > 255:
            raise InputError(
                f"{index}: tensor {name[:200]!r} is in file {str(shard)[:200]!r}, expected a plain name of a "
                ".safetensors file in the same folder",
                remedy="do not trust this folder; get the model from its publisher",
            )
    return weight_map


def _open_shard(folder: Path, name: str) -> SafetensorsFile:
    _check_stays_inside(folder, folder / name)
    return SafetensorsFile(folder / name)


def _check_stays_inside(folder: Path, file: Path) -> None:
    """Raise InputError for a link that leads out of the folder: it could name any file of the user's."""
    try:
        target = file.resolve(strict=True)
    except FileNotFoundError:
        raise InputError(f"{file}: a link to a file that is missing", remedy=_DOWNLOAD_AGAIN) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, up to Python 3.12
        raise InputError(f"{file}: cannot be read ({error})", remedy="check the file and its permissions") from error
    root = _link_root(folder.resolve())
    if not target.is_relative_to(root):
        raise InputError(
            f"{file}: a link that leads out of {root}, to {target}",
            remedy="copy the file itself into the folder, or give the folder that holds it",
        )


def _link_root(folder: Path) -> Path:
    """How far links may lead: the folder, or in the hub's cache (models--*/snapshots/*) the model's whole entry."""
    for parent in folder.parents:
        if parent.name.startswith("models--") and folder.relative_to(parent).parts[0] == "snapshots":
            return parent
    return folder
