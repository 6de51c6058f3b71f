"""What a folder, an index or a file of weights means: the same for all that reads weights."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine_loader.errors import WeightsFileInvalid
from engine_loader.files.disk import read_into
from engine_loader.files.folder import files_of
from engine_loader.files.weights import read_weights

INDEX = "model.safetensors.index.json"


def save(path: Path, **values: float) -> Path:
    """A file with tensors of two elements that hold their value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.full((2,), float(value)) for name, value in values.items()}, path)
    return path


def write_index(folder: Path, places: object, name: str = INDEX) -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / name


def by_read_weights(path: Path, rank: int | None, names: str) -> dict[str, float]:
    return {name: tensor[0].item() for name, tensor in read_weights(path, rank).items()}


def by_read_into(path: Path, rank: int | None, names: str) -> dict[str, float]:
    tensors = {name: torch.zeros(2) for name in names}
    read_into(path, tensors, rank=rank)
    return {name: tensor[0].item() for name, tensor in tensors.items()}


Caplog = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
Read = Callable[[Path, int | None, str], dict[str, float]]
both_ways = pytest.mark.parametrize("read", [by_read_weights, by_read_into])


def names_of(paths: Path | list[Path], rank: int | None = None) -> list[str]:
    return [file.path.name for file in files_of(paths, rank)]


def refusal(path: Path) -> str:
    """Of the path, in one line, by each way of reading."""
    messages = set()
    for read in (by_read_weights, by_read_into):
        with pytest.raises(WeightsFileInvalid) as caught:
            read(path, None, "a")
        messages.add(str(caught.value))
    (message,) = messages
    assert "\n" not in message
    assert message.isprintable()
    return message


# -- which files -----------------------------------------------------------------------------------


def test_a_folder_means_its_files_in_order_and_no_hidden_ones(tmp_path: Path) -> None:
    others = [".a.safetensors", "._b.safetensors", ".a.safetensors.7.partial", "config.json"]
    for name in ("b.safetensors", "a.safetensors", *others):
        (tmp_path / name).touch()
    assert names_of(tmp_path) == ["a.safetensors", "b.safetensors"]


@both_ways
def test_of_a_folder_the_first_that_it_has_is_read(read: Read, tmp_path: Path) -> None:
    save(tmp_path / "some.safetensors", a=4)
    assert read(tmp_path, 1, "a") == {"a": 4}
    save(tmp_path / "model.safetensors", a=3)
    assert read(tmp_path, 1, "a") == {"a": 3}
    save(tmp_path / "part.safetensors", a=2)
    write_index(tmp_path, {"a": "part.safetensors"})
    assert read(tmp_path, 1, "a") == {"a": 2}
    save(tmp_path / "rank-1.safetensors", a=1)
    assert read(tmp_path, 1, "a") == {"a": 1}
    assert read(tmp_path, 0, "a") == read(tmp_path, None, "a") == {"a": 2}


@both_ways
def test_files_that_the_index_leaves_out_are_logged(
    read: Read, tmp_path: Path, caplog: Caplog
) -> None:
    save(tmp_path / "model-1.safetensors", a=1)
    save(tmp_path / "adapter_model.safetensors", lora=2)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not even weights")
    write_index(tmp_path, {"a": "model-1.safetensors"})
    with caplog.at_level(logging.WARNING, "engine_loader"):
        assert read(tmp_path, None, "a") == {"a": 1}
    (record,) = caplog.records
    assert f"{INDEX}, which decides, so these files are not read: adapter_" in record.getMessage()
    assert record.getMessage().endswith("; consolidated.safetensors")


def test_files_beside_a_whole_one_are_logged(tmp_path: Path, caplog: Caplog) -> None:
    save(tmp_path / "model.safetensors", a=1)
    save(tmp_path / "model.fp16.safetensors", a=2)
    assert names_of(tmp_path) == ["model.safetensors"]
    assert "these files are not read: model.fp16.safetensors" in caplog.text
    caplog.clear()
    save(tmp_path / "rank-3.safetensors", a=3)
    assert names_of(tmp_path, 3) == ["rank-3.safetensors"]
    assert caplog.text == ""  # those of other ranks are no surprise


@both_ways
def test_an_index_may_name_files_in_folders_below_it(read: Read, tmp_path: Path) -> None:
    save(tmp_path / "low" / "1.safetensors", a=1)
    save(tmp_path / "high" / "1.safetensors", b=2)
    write_index(tmp_path, {"a": "low/1.safetensors", "b": "./high/1.safetensors"})
    assert read(tmp_path, None, "ab") == {"a": 1, "b": 2}


@both_ways
def test_an_index_decides_between_two_copies_of_a_tensor(read: Read, tmp_path: Path) -> None:
    save(tmp_path / "base.safetensors", a=1, b=1, c=1)
    save(tmp_path / "overlay.safetensors", a=2, c=2)
    places = {"a": "overlay.safetensors", "b": "base.safetensors", "c": "base.safetensors"}
    write_index(tmp_path, places)
    assert read(tmp_path, None, "abc") == {"a": 2, "b": 1, "c": 1}


@both_ways
def test_a_tensor_that_the_index_leaves_out_comes_from_its_file(read: Read, tmp_path: Path) -> None:
    save(tmp_path / "1.safetensors", a=1, extra=3)
    save(tmp_path / "2.safetensors", b=2)
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert read_weights(tmp_path)["extra"].tolist() == [3, 3]
    save(tmp_path / "2.safetensors", b=2, extra=4)
    assert "tensor 'extra' is in" in refusal(tmp_path)


def test_an_index_says_nothing_of_files_that_are_named_besides(tmp_path: Path) -> None:
    save(tmp_path / "model" / "1.safetensors", a=1)
    write_index(tmp_path / "model", {"a": "1.safetensors"})
    other = save(tmp_path / "other.safetensors", a=2)
    with pytest.raises(WeightsFileInvalid, match=r"'a' is in .*1\.safetensors and in .*other"):
        read_weights([tmp_path / "model", other])


@both_ways
def test_an_index_is_read_as_its_folder(read: Read, tmp_path: Path) -> None:
    save(tmp_path / "1.safetensors", a=1)
    save(tmp_path / "2.safetensors", b=2)
    write_index(tmp_path, {"a": "1.safetensors"})
    assert read(write_index(tmp_path, {"b": "2.safetensors"}, "mine.json"), None, "b") == {"b": 2}
    assert read(tmp_path / INDEX, None, "a") == read(tmp_path, None, "a") == {"a": 1}


def test_an_only_index_counts_whatever_its_name_and_several_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", a=1)
    save(tmp_path / "b.safetensors", a=2)
    write_index(tmp_path, {"a": "b.safetensors"}, "model.fp16.safetensors.index.json")
    assert names_of(tmp_path) == ["b.safetensors"]
    write_index(tmp_path, {"a": "a.safetensors"}, "model.fp8.safetensors.index.json")
    message = refusal(tmp_path)
    assert "has several indices: name one of them instead: model.fp16" in message
    write_index(tmp_path, {"a": "a.safetensors"})
    assert names_of(tmp_path) == ["a.safetensors"]


def test_several_paths_are_read_together_and_each_file_once(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / f"{name}.safetensors", **{name: 1})
    paths = [tmp_path / "b", tmp_path / "a" / "a.safetensors", tmp_path / "b" / "b.safetensors"]
    assert names_of(paths) == ["b.safetensors", "a.safetensors"]
    with pytest.raises(WeightsFileInvalid, match="no path of weights is given"):
        files_of([])


@both_ways
def test_the_links_of_a_hub_cache_lead_out_of_its_folder(read: Read, tmp_path: Path) -> None:
    blob = save(tmp_path / "blobs" / "abc", a=1)
    index = write_index(tmp_path / "blobs", {"a": "model-1.safetensors"})
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model-1.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (snapshot / INDEX).symlink_to(f"../../blobs/{index.name}")
    assert read(snapshot, None, "a") == {"a": 1}
    blob.unlink()
    message = refusal(snapshot)
    assert "model-1.safetensors, which model.safetensors.index.json names, is a link to" in message
    assert "../../blobs/abc, which does not exist: download the file again" in message


# -- what is refused -------------------------------------------------------------------------------


def missing_shard(folder: Path) -> None:
    save(folder / "1.safetensors", a=1)
    write_index(folder, {"a": "1.safetensors", "b": "2.safetensors"})


def lacking_shard(folder: Path) -> None:
    save(folder / "1.safetensors", a=1)
    write_index(folder, {"a": "1.safetensors", "b": "1.safetensors"})


def lfs_pointer(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (folder / "model.safetensors").write_text(pointer)


def lfs_index(folder: Path) -> None:
    lfs_pointer(folder)
    (folder / "model.safetensors").rename(folder / INDEX)


def dangling_link(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("../blobs/abc")


def dangling_index(folder: Path) -> None:
    (folder / INDEX).symlink_to("../blobs/abc")


def loop(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("model.safetensors")


def a_folder(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()


def a_folder_for_an_index(folder: Path) -> None:
    (folder / INDEX).mkdir()


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")


def nothing(folder: Path) -> None:
    (folder / "config.json").touch()


def gone(folder: Path) -> None:
    folder.rmdir()


def far_away(folder: Path) -> None:
    save(folder.parent / "outside.safetensors", a=1)
    write_index(folder, {"a": "../outside.safetensors"})


def absolute(folder: Path) -> None:
    write_index(folder, {"a": str(save(folder.parent / "outside.safetensors", a=1))})


def hidden_way_out(folder: Path) -> None:
    save(folder.parent / "outside.safetensors", a=1)
    write_index(folder, {"a": "sub/../../outside.safetensors"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing_shard, f"2.safetensors, which {INDEX} names, does not exist: download it"),
        (lacking_shard, f"1.safetensors lacks 1 tensor that {INDEX} says it holds: 'b': download"),
        (lfs_pointer, "model.safetensors is a git-lfs pointer: run `git lfs pull`"),
        (lfs_index, f"{INDEX} is a git-lfs pointer: run `git lfs pull`"),
        (dangling_link, "model.safetensors is a link to ../blobs/abc, which does not exist: do"),
        (dangling_index, f"{INDEX} is a link to ../blobs/abc, which does not exist: download"),
        (loop, "model.safetensors cannot be read: Too many levels of symbolic links"),
        (a_folder, "model.safetensors is a folder, not a file: put the safetensors file there"),
        (a_folder_for_an_index, f"{INDEX} is a folder, not a file"),
        (a_pipe, "model.safetensors is a device or a pipe, not a file"),
        (nothing, "holds no *.safetensors file: name the folder of the weights"),
        (gone, "does not exist: name a safetensors file, or a folder of them"),
        (far_away, "'../outside.safetensors' leads out of its folder"),
        (absolute, "outside.safetensors' leads out of its folder"),
        (hidden_way_out, "'sub/../../outside.safetensors' leads out of its folder"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line_with_its_remedy(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    damage(folder)
    message = refusal(folder)
    assert words in message
    assert str(folder) in message


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch: Patch) -> None:
    def refuse(_: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("engine_loader.files.folder.os.listdir", refuse)
    with pytest.raises(WeightsFileInvalid, match=f"{tmp_path} cannot be listed: Permission"):
        files_of(tmp_path)


@pytest.mark.parametrize("name", ["nul\0", "x" * 5000, "\ud800"], ids=["nul", "long", "no text"])
def test_a_path_that_no_system_has_is_refused(name: str) -> None:
    with pytest.raises(WeightsFileInvalid, match=r"is no path|File name too long"):
        files_of(name)


# -- an index that somebody made by hand -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no index of files, such as"),
        ("[]", "it has no weight_map that names a tensor"),
        ('{"weight_map": 3}', "it has no weight_map that names a tensor"),
        ('{"weight_map": {}}', "it has no weight_map that names a tensor"),
        ('{"weight_map": {"a": 3}}', "3 is no name of a file"),
        ('{"weight_map": {"a": ""}}', "'' is no name of a file"),
        ('{"weight_map": {"a": "\\u0000"}}', "is no name of a file"),
        ('{"weight_map": {"a": "\\ud800"}}', "'\\ud800' is no name of a file"),
        ('{"weight_map": {"a": "."}}', "is a folder, not a file"),
        ('{"weight_map": {"a": "1", "a": "2"}}', "it has two values for 'a'"),
        ('{"weight_map": {"a": "' + "x" * 5000 + '"}}', "cannot be read: File name too long"),
        ("[" * 100_000, "is no index of files, such as"),
    ],
)
def test_an_index_of_something_else_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    message = refusal(tmp_path)
    assert words in message
    assert str(tmp_path) in message


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
file_names = st.sampled_from(["1.safetensors", "sub/2.safetensors", "./1.safetensors", "sub", ".."])
weight_maps = st.dictionaries(st.sampled_from("abc") | st.text(), file_names | values)
indices: st.SearchStrategy[Any] = st.builds(dict, weight_map=weight_maps | values) | values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    save(folder / "1.safetensors", a=1, b=1)
    save(folder / "sub" / "2.safetensors", a=2, c=2)
    return folder


@given(indices)
def test_any_index_gives_what_it_names_or_one_error(folder: Path, content: Any) -> None:
    index = folder / INDEX
    index.write_text(json.dumps(content))
    try:
        found = by_read_weights(folder, None, "")
    except WeightsFileInvalid as exc:
        assert str(folder) in str(exc)  # noqa: PT017
        return
    for name, place in content["weight_map"].items():
        assert found[name] == (2 if "sub" in place else 1)
