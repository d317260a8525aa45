"""Where models are found, in which order, and what is said when there is none."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq_cli import model_location
from qoq_cli.model_location import (
    EMBEDDED,
    builtin_text,
    builtin_texts,
    cache_folder,
    find_newest_checkpoint,
    resolve_model,
    tiny_folder,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


class Hub:
    """Stands in for the hub: gives a snapshot, or raises `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.snapshot = make_model(cache / "snapshots" / COMMIT)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def download(self, repository: str, **options: Any) -> str:
        self.calls.append((repository, options))
        if self.error is not None:
            raise self.error
        return str(self.snapshot)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: Path) -> Hub:
    return Hub(monkeypatch, tmp_path / "hub")


def refusal(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """An error of the hub with the response that comes with it; httpx or httpx2, as the hub's version has it."""
    http: Any = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    response = http.Response(status, request=http.Request("GET", "https://hub.example/api"))
    return kind(f"{status} Client Error", response=response)


# ---- local paths


def test_a_local_folder_is_taken_as_it_is(here: Path) -> None:
    make_model(here / "models" / "mine")
    location = resolve_model("models/mine")
    assert (location.path, location.kind, location.name) == (Path("models/mine"), "folder", "mine")
    assert (location.hub_id, location.revision) == (None, None)
    assert resolve_model(str(here / "models" / "mine") + "/").name == "mine"


def test_the_current_folder_has_a_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_model(here / "mine"))
    assert resolve_model(".").name == "mine"


def test_a_gguf_file_is_taken(here: Path) -> None:
    (here / "small.Q4.GGUF").write_bytes(b"GGUF")
    location = resolve_model("small.Q4.GGUF")
    assert (location.path, location.kind, location.name) == (Path("small.Q4.GGUF"), "gguf", "small.Q4")


def test_a_local_folder_wins_over_alias_and_hub_and_says_so(here: Path, hub: Hub) -> None:
    notes: list[str] = []
    make_model(here / "qwen3-8b")
    make_model(here / "Qwen" / "Qwen3-8B")
    assert resolve_model("qwen3-8b", note=notes.append).kind == "folder"
    assert resolve_model("Qwen/Qwen3-8B", note=notes.append).kind == "folder"
    assert not hub.calls
    assert len(notes) == 1
    assert "wins over the alias" in notes[0]


def test_a_folder_without_a_model_names_those_inside(here: Path) -> None:
    make_model(here / "store" / "snapshots" / "abc")
    (here / "store" / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"store: the folder holds no config\.json") as caught:
        resolve_model("store")
    assert "store/small.gguf, store/snapshots/abc" in str(caught.value.remedy)
    (here / "tiny").mkdir()
    with pytest.raises(InputError) as caught:
        resolve_model("tiny")
    assert "wins over the alias" in str(caught.value.remedy)
    (here / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        resolve_model("empty")
    assert "config.json, *.safetensors" in str(caught.value.remedy)


def test_other_files_are_refused(here: Path) -> None:
    make_model(here / "mine")
    with pytest.raises(InputError, match=r"expected a model folder or a \.gguf file") as caught:
        resolve_model("mine/model.safetensors")
    assert "give the folder: mine" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "spec", ["./models/mime", "models/deep/mime", "checkpoints/mime", "/nowhere/mime", "mime.gguf"]
)
def test_missing_paths_are_not_looked_up_on_the_hub(here: Path, hub: Hub, spec: str) -> None:
    with pytest.raises(InputError, match="no such folder or file"):
        resolve_model(spec)
    assert not hub.calls


def test_close_names_are_suggested_for_a_missing_path(here: Path) -> None:
    make_model(here / "checkpoints" / "mine-w4a8kv4-g128")
    with pytest.raises(InputError) as caught:
        resolve_model("checkpoints/mine-w4a8kv4")
    assert caught.value.remedy == "did you mean checkpoints/mine-w4a8kv4-g128?"
    with pytest.raises(InputError) as caught:
        resolve_model("./checkpoints/other/deeper/model")
    assert caught.value.remedy == "the path exists up to checkpoints"


@pytest.mark.parametrize(("spec", "hint"), [("lama-3-8b", "llama-3-8b"), ("mein", "mine"), ("", "`qoq models`")])
def test_unknown_names_get_suggestions(here: Path, hub: Hub, spec: str, hint: str) -> None:
    make_model(here / "mine")
    with pytest.raises(InputError, match="no alias, and no hub id") as caught:
        resolve_model(spec)
    assert hint in str(caught.value.remedy)
    assert not hub.calls


@pytest.mark.parametrize("spec", ["a" * 5000, "a" * 300 + "/b"])
def test_names_that_no_file_can_have_are_no_crash(here: Path, hub: Hub, spec: str) -> None:
    hub.error = errors.HFValidationError("too long")
    with pytest.raises(InputError, match="no hub id of the form"):
        resolve_model(spec)


# ---- embedded models


def test_tiny_is_embedded(here: Path, hub: Hub) -> None:
    location = resolve_model("tiny")
    assert (location.kind, location.name, location.path) == (EMBEDDED, "tiny", tiny_folder())
    assert (location.path / "model.safetensors").is_file()
    assert builtin_text("calibration").read_text(encoding="utf-8").strip()
    assert builtin_texts("evaluation")["builtin"].read_text(encoding="utf-8").strip()
    assert builtin_texts()["builtin"] == builtin_text("calibration")
    assert not hub.calls


def test_tiny_outlier_is_made_once_in_the_cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQ_CACHE", str(here / "cache"))
    location = resolve_model("tiny-outlier")
    assert (location.kind, location.name) == (EMBEDDED, "tiny-outlier")
    assert location.path.parent == here / "cache"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in location.path.iterdir()}
    assert [path.name for path in (here / "cache").iterdir()] == [location.path.name]
    monkeypatch.setattr("qoq_cli.demo.outliers.make_tiny_outlier", None)  # not called again
    assert resolve_model("tiny-outlier") == location


def test_tiny_outlier_is_made_anew_when_its_source_changes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQ_CACHE", str(here / "cache"))
    monkeypatch.setattr("qoq_cli.demo.outliers.make_tiny_outlier", lambda source, out: make_model(out))
    monkeypatch.setattr(model_location, "tiny_folder", lambda: here / "source")
    make_model(here / "source")
    first = resolve_model("tiny-outlier").path
    (here / "source" / "config.json").write_text('{"changed": true}')
    assert resolve_model("tiny-outlier").path != first


def test_another_process_may_be_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQ_CACHE", str(here / "cache"))

    def make(source: Path, out: Path) -> Path:
        """Make it, and let another process finish the same in the meantime."""
        rivals = [path for path in (here / "cache").iterdir() if path.name.startswith(".")]
        assert len(rivals) == 1
        monkeypatch.setattr("qoq_cli.demo.outliers.make_tiny_outlier", lambda source, out: make_model(out))
        resolve_model("tiny-outlier")
        return make_model(out)

    monkeypatch.setattr("qoq_cli.demo.outliers.make_tiny_outlier", make)
    location = resolve_model("tiny-outlier")
    assert [path.name for path in (here / "cache").iterdir()] == [location.path.name]


def test_a_failed_making_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQ_CACHE", str(here / "cache"))

    def fail(source: Path, out: Path) -> Path:
        make_model(out)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qoq_cli.demo.outliers.make_tiny_outlier", fail)
    with pytest.raises(EnvironmentProblem, match="No space left") as caught:
        resolve_model("tiny-outlier")
    assert "QOQ_CACHE" in str(caught.value.remedy)
    assert not list((here / "cache").iterdir())


def test_an_unusable_cache_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_text("")
    monkeypatch.setenv("QOQ_CACHE", str(here / "file" / "cache"))
    with pytest.raises(EnvironmentProblem, match="cannot be written to the cache"):
        resolve_model("tiny-outlier")


def test_the_cache_is_the_users_unless_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QOQ_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder().name == "qoq"


def test_an_incomplete_installation_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_location, "files", lambda package: tmp_path)
    with pytest.raises(EnvironmentProblem, match="missing from this installation"):
        resolve_model("tiny")


# ---- hub


def test_aliases_are_downloaded_without_second_copies_of_the_weights(hub: Hub) -> None:
    notes: list[str] = []
    location = resolve_model("Llama-3-8B", note=notes.append)
    assert location.path == hub.snapshot
    assert (location.kind, location.name, location.hub_id) == ("hub", "llama-3-8b", "meta-llama/Meta-Llama-3-8B")
    assert location.revision == COMMIT
    ((repository, options),) = hub.calls
    assert repository == "meta-llama/Meta-Llama-3-8B"
    assert "*.py" not in options["allow_patterns"]
    files = "model-00001-of-00004.safetensors config.json tokenizer.json tokenizer.model merges.txt chat_template.jinja"
    copies = (
        "original/params.json consolidated.safetensors pytorch_model.bin onnx/config.json modeling_custom.py m.gguf"
    )
    chosen = huggingface_hub.utils.filter_repo_objects(
        [*files.split(), *copies.split()],
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(chosen) == files.split()
    assert len(notes) == 1
    assert "secret" not in notes[0]


def test_hub_ids_take_a_revision(hub: Hub) -> None:
    location = resolve_model("someone/model-1.5", revision="v2")
    assert (location.name, location.hub_id, location.revision) == ("model-1.5", "someone/model-1.5", COMMIT)
    assert hub.calls[0][1]["revision"] == "v2"


def test_an_unnamed_commit_leaves_the_revision_asked_for(hub: Hub) -> None:
    hub.snapshot = hub.snapshot.rename(hub.snapshot.with_name("folder"))
    assert resolve_model("someone/model", revision="v2").revision == "v2"


@pytest.mark.parametrize("spec", ["tiny", "mine"])
def test_a_revision_of_a_local_model_is_refused(here: Path, spec: str) -> None:
    make_model(here / "mine")
    with pytest.raises(InputError, match=f"--revision v2: {spec} is not on the hub"):
        resolve_model(spec, revision="v2")


def test_refused_aliases_name_the_reason(hub: Hub) -> None:
    with pytest.raises(InputError, match=r"mixtral-8x7b \(mistralai/Mixtral-8x7B-v0.1\) is not supported: .*experts"):
        resolve_model("mixtral-8x7b")
    assert not hub.calls


@pytest.mark.parametrize(
    ("error", "kind", "message", "remedy"),
    [
        (lambda: refusal(errors.GatedRepoError, 403), InputError, "accepted its licence", "hf auth login"),
        (lambda: refusal(errors.RepositoryNotFoundError, 404), InputError, "no such model", "check the spelling"),
        (lambda: refusal(errors.RepositoryNotFoundError, 401), InputError, "no such model", "HF_TOKEN"),
        (lambda: refusal(errors.RevisionNotFoundError, 404), InputError, "no revision 'v9'", "/commits/main"),
        (lambda: refusal(errors.HfHubHTTPError, 401), InputError, "refused access .HTTP 401.", "HF_TOKEN"),
        (lambda: refusal(errors.HfHubHTTPError, 503), EnvironmentProblem, "download failed", "run again"),
        (lambda: errors.LocalEntryNotFoundError("none"), EnvironmentProblem, "local cache", "give its path"),
        (lambda: ConnectionError("reset"), EnvironmentProblem, "ConnectionError: reset", "give its path"),
        (lambda: OSError(28, "No space left on device"), EnvironmentProblem, "No space left", "free space: "),
        (lambda: errors.HfHubHTTPError.__bases__[0]("cut off"), EnvironmentProblem, "cut off", "run again"),
    ],
)
def test_the_hubs_errors_become_ours(
    hub: Hub, error: Callable[[], Exception], kind: type[Exception], message: str, remedy: str
) -> None:
    hub.error = error()
    with pytest.raises(kind, match=message) as caught:
        resolve_model("someone/model", revision="v9")
    assert isinstance(caught.value, InputError | EnvironmentProblem)
    assert "someone/model" in caught.value.message
    assert remedy in str(caught.value.remedy)
    assert caught.value.__cause__ is hub.error


def test_offline_and_unreachable_are_told_apart(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.error = errors.LocalEntryNotFoundError("none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match="HF_HUB_OFFLINE is set") as caught:
        resolve_model("llama-3-8b")
    assert "gated" in str(caught.value.remedy)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(EnvironmentProblem, match="cannot be reached") as caught:
        resolve_model("qwen3-8b")
    assert "gated" not in str(caught.value.remedy)


@pytest.mark.parametrize("error", [lambda: refusal(errors.RepositoryNotFoundError, 404), lambda: None])
def test_a_mistyped_folder_that_looks_like_a_hub_id_is_suggested(
    here: Path, hub: Hub, error: Callable[[], Exception | None]
) -> None:
    make_model(here / "models" / "mine-7b")
    hub.error = error() or errors.LocalEntryNotFoundError("none")
    with pytest.raises((InputError, EnvironmentProblem)) as caught:
        resolve_model("models/mine-8b")
    assert "models/mine-7b" in str(caught.value)


def test_a_mistyped_hub_id_of_an_alias_is_suggested(hub: Hub) -> None:
    hub.error = refusal(errors.RepositoryNotFoundError, 404)
    with pytest.raises(InputError) as caught:
        resolve_model("meta-llama/Meta-Lama-3-8B")
    assert "did you mean meta-llama/Meta-Llama-3-8B" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("missing", "remedy"), [("config.json", "FILE.gguf"), ("model.safetensors", "save_pretrained")]
)
def test_a_repository_without_a_model_is_refused(hub: Hub, missing: str, remedy: str) -> None:
    (hub.snapshot / missing).unlink()
    with pytest.raises(InputError, match=r"the repository holds no (config\.json|\.safetensors)") as caught:
        resolve_model("someone/model")
    assert remedy in str(caught.value.remedy)


def test_a_real_process_without_a_network_answers_at_once(here: Path) -> None:
    """And importing the module has brought in nothing heavy."""
    probe = """
import json, sys, time
from qoq_cli.model_location import resolve_model
from qoq.recipes.errors import EnvironmentProblem
imported = sorted(sys.modules)
start = time.monotonic()
try:
    resolve_model("smollm2-135m")
except EnvironmentProblem as problem:
    print(json.dumps({"message": str(problem), "seconds": time.monotonic() - start, "imported": imported}))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(here)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", probe], env=environment, capture_output=True, text=True, check=True
    )
    answer = json.loads(result.stdout)
    assert "HF_HUB_OFFLINE is set" in answer["message"]
    assert "HuggingFaceTB/SmolLM2-135M" in answer["message"]
    assert answer["seconds"] < 5
    assert not {"torch", "transformers", "huggingface_hub", "numpy", "platformdirs"} & set(answer["imported"])


# ---- checkpoints


def test_the_newest_finished_checkpoint_is_found(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "older", "oldest")):
        manifest = make_model(tmp_path / name) / "qoq_manifest.json"
        manifest.write_text("{}")
        os.utime(manifest, (1e9 - age, 1e9 - age))
    make_model(tmp_path / "unfinished")
    (make_model(tmp_path / ".hidden") / "qoq_manifest.json").write_text("{}")
    assert find_newest_checkpoint(tmp_path) == tmp_path / "newest"


@pytest.mark.parametrize("root", ["empty", "missing"])
def test_no_checkpoint_is_an_error_with_a_next_step(tmp_path: Path, root: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no finished checkpoint under") as caught:
        find_newest_checkpoint(tmp_path / root)
    assert "qoq quantize" in str(caught.value.remedy)
