"""Where a model is on disk: a folder, a .gguf file, an embedded model, an alias or a repository on the hub.

Nothing heavy is imported before a model has to be made or downloaded.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal, cast

from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq.recipes.models import ModelAlias, find_alias, model_aliases

EMBEDDED: Final = "embedded"
TINY, TINY_OUTLIER = "tiny", "tiny-outlier"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*"]
_NOT_DOWNLOADED = ["original/*", "onnx/*", "consolidated*", "*.bin"]  # second copies of the weights
_MODELS = "`qoq models` lists the aliases"
_FORMAT = "give a folder in the format of Hugging Face, with config.json, *.safetensors and a tokenizer"
_ELSEWHERE = "download the folder on a machine that can (`hf download {hub_id} --local-dir FOLDER`) and give its path"


@dataclass(frozen=True)
class ModelLocation:
    """A model on disk.

    spec      what the user wrote
    name      a short name, fit for a folder
    path      the .gguf file for kind `gguf`, a folder with config.json otherwise
    kind      where it came from
    hub_id    repository, for kind `hub`
    revision  commit of the repository where known, otherwise the revision asked for
    """

    spec: str
    name: str
    path: Path
    kind: Literal["folder", "gguf", "embedded", "hub"]
    hub_id: str | None = None
    revision: str | None = None


def resolve_model(
    spec: str,
    *,
    revision: str | None = None,
    hub_revision: str | None = None,
    with_code: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> ModelLocation:
    """Find a model: an existing path wins, then the embedded models and aliases, then `org/name` on the hub.

    `revision` is refused for what is not on the hub; `hub_revision` is not used there. `with_code` fetches the model's
    own Python files too. The hub takes HF_TOKEN or the stored login. `note` is told what may surprise.

    Raises InputError when there is no such model or it cannot be had, EnvironmentProblem when the hub is out of reach.
    """
    path = Path(spec).expanduser()
    if spec and _exists(path):
        _refuse_revision(spec, revision)
        location = _local(spec, path)
        if spec.lower() in model_aliases():
            note(f"{spec} is the local folder {path.resolve()}, which wins over the alias")
        return location
    if spec.lower() in model_aliases():
        alias = find_alias(spec)
        if alias.refused is not None:
            raise InputError(f"{alias.name} ({alias.hub_id}) is not supported: {alias.refused}", remedy=_MODELS)
        if alias.hub_id is not None:
            note(f"{spec}: {alias.hub_id} from the hub or its cache")
            return _download(spec, alias.hub_id, revision or hub_revision, alias, with_code=with_code)
        _refuse_revision(spec, revision)
        folder = tiny_folder() if alias.name == TINY else _tiny_outlier_folder()
        return ModelLocation(spec, alias.name, folder, EMBEDDED)
    if not _looks_like_path(spec) and _HUB_ID.fullmatch(spec):
        note(f"{spec}: from the hub or its cache")
        return _download(spec, spec, revision or hub_revision, None, with_code=with_code)
    raise _unknown(spec, path)


def tiny_folder() -> Path:
    """The embedded model."""
    folder = Path(str(files("qoq_cli.demo").joinpath(TINY)))
    if not (folder / "config.json").is_file():
        raise EnvironmentProblem(
            f"the embedded model is missing from this installation ({folder})", remedy="install qoq again"
        )
    return folder


def builtin_text(kind: Literal["calibration", "evaluation"]) -> Path:
    """The text that came with the embedded model, held out from its training for `evaluation`."""
    return tiny_folder() / f"{kind}.txt"


def builtin_texts(kind: Literal["calibration", "evaluation"] = "calibration") -> dict[str, Path]:
    """Embedded texts by the name that `--calib` and `--ppl` take."""
    return {"builtin": builtin_text(kind)}


def cache_folder() -> Path:
    """Where qoq keeps what it can make again: QOQ_CACHE, or the user's cache folder."""
    chosen = os.environ.get("QOQ_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("qoq"))


def find_newest_checkpoint(root: Path) -> Path:
    """The folder directly under `root` (usually `checkpoints/`) whose manifest was written last.

    The manifest is written when a checkpoint is complete, so unfinished ones do not count. Raises InputError when there
    is none.
    """
    from qoq.formats.manifest import MANIFEST_NAME

    manifests = [path for path in root.glob(f"*/{MANIFEST_NAME}") if not path.parent.name.startswith(".")]
    if not manifests:
        raise InputError(
            f"no finished checkpoint under {root}/",
            remedy="make one with `qoq quantize MODEL`, or give a checkpoint or a model",
        )
    return max(manifests, key=lambda path: (path.stat().st_mtime_ns, path.parent.name)).parent


def _local(spec: str, path: Path) -> ModelLocation:
    if path.is_file() and path.suffix.lower() == ".gguf":
        return ModelLocation(spec, path.stem, path, "gguf")
    if path.is_file():
        raise InputError(
            f"{spec}: a file, expected a model folder or a .gguf file",
            remedy=f"give the folder: {path.parent}" if (path.parent / "config.json").is_file() else _FORMAT,
        )
    if not (path / "config.json").is_file():
        raise InputError(f"{spec}: the folder holds no config.json", remedy=_models_near(path))
    return ModelLocation(spec, path.resolve().name or "model", path, "folder")


def _models_near(folder: Path) -> str:
    """What to give instead of a folder that holds no model itself."""
    if (folder / ".qoq-work").is_dir():
        return "it holds an unfinished run: the same `qoq quantize` again completes it"
    inside = [path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json")]
    inside += folder.glob("*.gguf")
    if inside:
        return f"it holds other models: {', '.join(map(str, sorted(inside)[:3]))}"
    if folder.name.lower() in model_aliases():
        return f"a folder wins over the alias `{folder.name}`: run qoq from elsewhere, or rename the folder"
    return _FORMAT


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have, or a folder that may not be read
        return False


def _looks_like_path(spec: str) -> bool:
    return (
        spec.startswith((".", "/", "~", "checkpoints/"))
        or spec.endswith("/")
        or spec.count("/") > 1
        or "\\" in spec
        or spec.lower().endswith((".gguf", ".safetensors"))
    )


def _unknown(spec: str, path: Path) -> InputError:
    if _looks_like_path(spec):
        close = _close_paths(path)
        return InputError(
            f"{spec}: no such folder or file",
            remedy=f"did you mean {' or '.join(close)}?" if close else _existing_part(path),
        )
    near = [*difflib.get_close_matches(spec.lower(), model_aliases(), n=3, cutoff=0.6), *_close_paths(path)]
    return InputError(
        f"model {spec!r}: no folder, no .gguf file, no alias, and no hub id of the form org/name",
        remedy=(f"did you mean {' or '.join(near)}? " if near else "") + _MODELS,
    )


def _close_paths(path: Path) -> list[str]:
    """Folders and .gguf files beside `path` with a name close to its own."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or entry.suffix.lower() == ".gguf"]
    except OSError:
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)]


def _existing_part(path: Path) -> str | None:
    parent = next((parent for parent in path.parents if _exists(parent)), None)
    return None if parent is None or parent in (path.parent, Path()) else f"the path exists up to {parent}"


def _refuse_revision(spec: str, revision: str | None) -> None:
    if revision is not None:
        raise InputError(f"--revision {revision}: {spec} is not on the hub", remedy="leave --revision out")


def _tiny_outlier_folder() -> Path:
    """`tiny-outlier`, made in the cache when it is not there yet.

    The folder's name holds a digest of what it is made from, so that a new version of qoq makes it anew.
    """
    source = tiny_folder()
    maker = Path(str(files("qoq_cli.demo").joinpath("outliers.py")))
    folder = cache_folder() / f"{TINY_OUTLIER}-{_digest([maker, *sorted(source.iterdir())])}"
    if (folder / "config.json").is_file():
        return folder
    from qoq_cli.demo.outliers import make_tiny_outlier

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{TINY_OUTLIER}-") as temporary:
            made = make_tiny_outlier(source, Path(temporary) / TINY_OUTLIER)
            try:
                made.rename(folder)
            except OSError:
                if not (folder / "config.json").is_file():  # else another process was first, with the same bytes
                    raise
    except OSError as error:
        raise EnvironmentProblem(
            f"{TINY_OUTLIER}: cannot be written to the cache {folder.parent} ({error.strerror or error})",
            remedy="set QOQ_CACHE to a folder that can be written",
        ) from error
    return folder


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:12]


def _download(
    spec: str, hub_id: str, revision: str | None, alias: ModelAlias | None, *, with_code: bool
) -> ModelLocation:
    """Fetch a repository into the hub's cache, or find it there."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # huggingface_hub 1 raises the errors of httpx, version 2 those of httpx2; its own derive from the right ones.
    http_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    elsewhere = _ELSEWHERE.format(hub_id=hub_id)
    page = f"{constants.ENDPOINT}/{hub_id}"
    wanted = [*_DOWNLOADED, "*.py"] if with_code else _DOWNLOADED
    try:
        folder = Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=_NOT_DOWNLOADED)
        )
    except GatedRepoError as error:
        raise InputError(
            f"{hub_id}: the hub gives this model only to users who accepted its licence",
            remedy=f"accept it at {page}, then `hf auth login` (or set HF_TOKEN)",
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{hub_id}: no revision {revision!r}", remedy=f"branches, tags and commits: {page}/commits/main"
        ) from error
    except RepositoryNotFoundError as error:
        raise _missing(spec, hub_id, page) from error
    except HFValidationError as error:
        raise _unknown(spec, Path(spec)) from error
    except LocalEntryNotFoundError as error:
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        close = _close_paths(Path(spec)) if spec == hub_id else []
        hint = f"if a local folder was meant: {' or '.join(close)}; otherwise " if close else ""
        gated = "; the model is gated, so that machine needs `hf auth login`" if alias and alias.gated else ""
        raise EnvironmentProblem(
            f"{hub_id}: not (or not wholly) in the local cache, and {state}", remedy=hint + elsewhere + gated
        ) from error
    except (OSError, http_error) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in {401, 403}:
            raise InputError(
                f"{hub_id}: the hub refused access (HTTP {error.response.status_code})",
                remedy=f"check HF_TOKEN or log in again with `hf auth login`; the model's page is {page}",
            ) from error
        raise EnvironmentProblem(
            f"{hub_id}: the download failed ({type(error).__name__}: {error})".splitlines()[0],
            remedy=f"run again to go on where it stopped, or {elsewhere}; free space: {_free_space()}",
        ) from error
    _check_snapshot(hub_id, folder)
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    return ModelLocation(spec, alias.name if alias else hub_id.rpartition("/")[2], folder, "hub", hub_id, commit)


def _missing(spec: str, hub_id: str, page: str) -> InputError:
    close = _close_paths(Path(spec)) if spec == hub_id else []
    known = [alias.hub_id for alias in model_aliases().values() if alias.hub_id is not None]
    close += difflib.get_close_matches(hub_id, known, n=2, cutoff=0.8)
    hint = f"did you mean {' or '.join(close)}? " if close else "check the spelling; "
    return InputError(
        f"{hub_id}: no local folder of that name, and the hub shows no such model",
        remedy=f"{hint}a private model needs `hf auth login` (or HF_TOKEN); its page would be {page}",
    )


def _check_snapshot(hub_id: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{hub_id}: the repository holds no config.json",
            remedy=f"if it holds .gguf files: `hf download {hub_id} FILE.gguf --local-dir .`, then give the file",
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{hub_id}: the repository holds no .safetensors files",
            remedy="save the model anew with transformers: save_pretrained(FOLDER), and give the folder",
        )


def _free_space() -> str:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB at {folder}"
