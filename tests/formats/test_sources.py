"""Model folders: whole, half downloaded, in the hub's cache, and with links and names that lead elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qoq.formats.safetensors_file import TensorInfo
from qoq.formats.sources import TensorSource, open_folder, open_source
from qoq.recipes.errors import InputError
from qoq.recipes.families.llama import LLAMA

A, B, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"


def tensor(value: float) -> torch.Tensor:
    return torch.full((2, 3), value, dtype=torch.bfloat16)


def write_index(folder: Path, weight_map: object, **more: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map, **more}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": tensor(1), "z": tensor(3)}, folder / A)
    save_file({"y": tensor(2)}, folder / B)
    write_index(folder, {"x": A, "z": A, "y": B})
    return folder


def assert_is_xyz(source: TensorSource) -> None:
    assert source.names() == ["x", "y", "z"]
    assert [source.load(name)[0, 0].item() for name in source.names()] == [1, 2, 3]
    assert source.info("y") == TensorInfo(torch.bfloat16, (2, 3))


def test_sharded_folder(sharded: Path) -> None:
    source = open_source(sharded, LLAMA)
    assert_is_xyz(source)
    assert source.location == sharded
    assert source.files() == [sharded / A, sharded / B, sharded / INDEX]
    with pytest.raises(InputError, match="no tensor 'w'"):
        source.load("w")
    with pytest.raises(InputError, match="no tensor 'w'"):
        source.info("w")


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_single_file(tmp_path: Path, name: str) -> None:
    save_file({"y": tensor(2), "x": tensor(1), "z": tensor(3)}, tmp_path / name)
    (tmp_path / "pytorch_model.bin").touch()
    source = open_folder(tmp_path)
    assert_is_xyz(source)
    assert source.files() == [tmp_path / name]


def test_the_single_file_comes_before_an_index_as_in_transformers(sharded: Path) -> None:
    save_file({"w": tensor(1)}, sharded / "model.safetensors")
    source = open_folder(sharded)
    assert source.names() == ["w"]
    assert source.files() == [sharded / "model.safetensors"]


def test_a_tensor_that_the_index_leaves_out_is_still_there(sharded: Path) -> None:
    write_index(sharded, {"x": A, "y": B})
    assert_is_xyz(open_folder(sharded))


# ---- folders that are no model


def refused(path: Path, message: str, remedy: str = "") -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_folder(path)
    assert str(path) in caught.value.message
    assert remedy in (caught.value.remedy or "")
    assert caught.value.remedy


def test_missing_empty_or_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such file or folder", "check the path")
    refused(tmp_path, "the folder is empty")
    file = tmp_path / "model.safetensors"
    save_file({"x": tensor(1)}, file)
    refused(file, "expected a model folder, got a file", "give a Hugging Face model folder")


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    refused(tmp_path, "no weights")
    (tmp_path / "model.Q4_0.gguf").touch()
    refused(tmp_path, "no safetensors files", str(tmp_path / "model.Q4_0.gguf"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.PT"])
def test_only_pickles(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    refused(tmp_path, f"only pickle files \\({name}\\); loading a pickle runs", "convert to safetensors")


def test_adapter_and_several_files_without_an_index(tmp_path: Path) -> None:
    save_file({"x": tensor(1)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "is an adapter, not a whole model", "merge")
    save_file({"x": tensor(1)}, tmp_path / A)
    refused(tmp_path, "2 safetensors files .* but neither", INDEX)


# ---- the index


def test_half_a_download_lists_what_is_missing(sharded: Path) -> None:
    missing = [f"model-{i:05}-of-00005.safetensors" for i in (3, 4)]
    write_index(sharded, {"x": A, "z": A, "y": B, "p": missing[0], "q": missing[1], "r": missing[1]})
    (sharded / missing[1]).symlink_to("../blobs/absent")
    refused(sharded, f"of 4 in all \\(2\\):\n  - {missing[0]}\n  - {missing[1]}\n", "finish the download")


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    (sharded / B).write_bytes((sharded / B).read_bytes()[:-1])
    refused(sharded, f"{B}: .* 1 bytes are missing", "download it again")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../other/model.safetensors",
        "..",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "c:model.safetensors",
        "a\0.safetensors",
        "",
        "pytorch_model.bin",
        "x" * 300 + ".safetensors",
        7,
        None,
        ["a.safetensors"],
    ],
)
def test_shards_are_plain_names_in_the_folder(sharded: Path, name: object) -> None:
    (sharded.parent / "other").mkdir()
    save_file({"x": tensor(1)}, sharded.parent / "other" / "model.safetensors")
    write_index(sharded, {"x": name, "y": B})
    refused(sharded, "tensor 'x' is in file .* expected a plain name", "do not trust")


def test_a_name_too_long_for_the_file_system_is_missing(sharded: Path) -> None:
    write_index(sharded, {"x": "é" * 200 + ".safetensors"})
    refused(sharded, "are not in the folder")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object, got list"),
        ("{", "not valid JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        (f'{{"weight_map": {{"x": "{A}", "x": "{B}"}}}}', "the key 'x' occurs twice"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_index(sharded: Path, text: str, message: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, message)


def test_index_and_shards_disagree(sharded: Path) -> None:
    write_index(sharded, {"x": A, "z": B, "y": B, "w": A})
    refused(sharded, f"disagree \\(2\\):\n  - tensor 'z' is not in {B}: it is in {A}\n  - tensor 'w' .* in no file")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"y": tensor(2), "x": tensor(9)}, sharded / B)
    refused(sharded, f"tensor 'x' is in two files: {A} and {B}")


# ---- links


def test_the_hubs_cache_links_into_its_blobs(sharded: Path) -> None:
    cache = sharded.parent / "models--org--name"
    snapshot = cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name in (A, B, INDEX):
        (sharded / name).rename(cache / "blobs" / name[::-1])
        (snapshot / name).symlink_to(f"../../blobs/{name[::-1]}")
    source = open_folder(snapshot)
    assert_is_xyz(source)
    assert source.files() == [snapshot / A, snapshot / B, snapshot / INDEX]
    (sharded.parent / "link").symlink_to(snapshot)
    assert_is_xyz(open_folder(sharded.parent / "link"))  # the folder itself is the user's choice

    other = cache.parent / "models--org--other"
    other.mkdir()
    save_file({"y": tensor(2)}, other / "file")
    (snapshot / B).unlink()
    (snapshot / B).symlink_to("../../../models--org--other/file")
    refused(snapshot, f"{B}: a link that leads out of")


@pytest.mark.parametrize("name", [A, INDEX])
def test_links_out_of_the_folder_are_refused(sharded: Path, name: str) -> None:
    (sharded / name).rename(sharded.parent / "elsewhere")
    (sharded / name).symlink_to("../elsewhere")
    refused(sharded, f"{name}: a link that leads out of .*elsewhere", "copy the file")


def test_links_within_the_folder_and_in_circles(sharded: Path) -> None:
    (sharded / A).rename(sharded / "real")
    (sharded / A).symlink_to("real")
    assert_is_xyz(open_folder(sharded))
    (sharded / INDEX).unlink()
    (sharded / INDEX).symlink_to(INDEX)
    refused(sharded, f"{INDEX}: cannot be read|{INDEX}: a link to a file that is missing")


@pytest.mark.parametrize("place", ["other/snapshots/abc", "models--org--name/other/abc", "models--org--name"])
def test_what_only_resembles_the_cache_is_a_folder_like_any_other(sharded: Path, place: str) -> None:
    folder = sharded.parent / place
    folder.mkdir(parents=True)
    blob = folder.parents[place.count("/") - 1] / "blob" if "/" in place else sharded.parent / "blob"
    (sharded / A).rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    refused(folder, "a link that leads out of")
