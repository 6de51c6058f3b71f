"""Weights files: read into one block each, written whole or not at all, byte for byte the same."""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine_loader import Shard
from engine_loader.errors import TensorsUnusable, WeightsFileInvalid
from engine_loader.files.memory import allocate, allocate_like, extent, shards_like
from engine_loader.files.weights import read_weights, write_weights
from engine_loader.files.whole_files import WholeFiles
from engine_loader.planning.whole import Whole
from engine_loader.tensors.dtypes import dtype_name
from engine_loader.tensors.regions import describe
from engine_registry.errors import InvalidField
from tests.support.builders import a_manifest, an_entry

# What safetensors can store of what torch has.
STORABLE = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


def content(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""


def same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape, content(found[name])) == (
            tensor.dtype,
            tensor.shape,
            content(tensor),
        ), name
    return True


def every_byte_value(dtype: torch.dtype) -> torch.Tensor:
    """All bit patterns that a byte can have, NaNs with payloads among them; for bool the two that
    are allowed.
    """
    pattern = torch.arange(256).remainder(2 if dtype is torch.bool else 256).to(torch.uint8)
    return pattern.view(dtype).view(2, -1)


@pytest.mark.parametrize("dtype", STORABLE, ids=str)
def test_every_dtype_is_byte_identical_after_reading_writing_and_reading(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    wanted = {
        "w": every_byte_value(dtype),
        "scalar": every_byte_value(dtype)[0, 1].clone(),
        "empty": torch.empty(0, 7, dtype=dtype),
    }
    save_file(wanted, tmp_path / "in.safetensors")
    first = read_weights([tmp_path / "in.safetensors"])
    assert same(first, wanted)
    write_weights(first, tmp_path / "out" / "rank-0.safetensors")
    assert same(read_weights([tmp_path / "out" / "rank-0.safetensors"]), wanted)


def test_each_file_is_read_into_one_region_of_its_own(tmp_path: Path) -> None:
    for number in range(2):
        save_file(
            {f"{number}.{name}": torch.rand(50) for name in "abc"},
            tmp_path / f"{number}.safetensors",
        )
    assert len(describe(read_weights([tmp_path])).regions) == 2


GOOD_HEADER = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not safetensors at all", id="text"),
        pytest.param(struct.pack("<Q", 1 << 60) + b"{}", id="absurd header"),
        pytest.param(
            struct.pack("<Q", len(GOOD_HEADER)) + GOOD_HEADER[:-5], id="cut in the header"
        ),
        pytest.param(
            struct.pack("<Q", len(GOOD_HEADER)) + GOOD_HEADER + b"\0" * 15, id="cut in the data"
        ),
        pytest.param(struct.pack("<Q", len(GOOD_HEADER)) + GOOD_HEADER + b"\0" * 17, id="too long"),
        pytest.param(b"PK\3\4" + b"\0" * 100, id="a torch archive"),
    ],
)
def test_a_file_that_is_no_whole_safetensors_file_is_refused_by_its_path(
    value: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(value)
    with pytest.raises(
        WeightsFileInvalid, match=re.escape(f"{path} cannot be read as safetensors: ")
    ) as caught:
        read_weights([path])
    assert caught.value.details == {"path": str(path)}


def test_a_tensor_in_two_files_is_refused_with_both_files(tmp_path: Path) -> None:
    a, b = (tmp_path / f"{name}.safetensors" for name in "ab")
    save_file({"w": torch.zeros(2), "v": torch.zeros(2)}, a)
    save_file({"w": torch.zeros(2), "u": torch.zeros(2)}, b)
    with pytest.raises(
        WeightsFileInvalid, match=re.escape(f"tensor 'w' is in {a} and in {b}: name one of them")
    ):
        read_weights([tmp_path])


def test_a_written_file_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for value in (1.0, 2.0):
        write_weights({"w": torch.full((3,), value)}, path)
    assert read_weights([path])["w"].tolist() == [2.0] * 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_half_way_leaves_the_file_of_before_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    write_weights({"w": torch.ones(3)}, path)

    def fill_the_disk(_: object, unfinished: Path, metadata: object) -> None:
        unfinished.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine_loader.files.writing.save_file", fill_the_disk)
    with pytest.raises(
        WeightsFileInvalid,
        match=re.escape(f"cannot write {path}: No space left on device"),
    ):
        write_weights({"w": torch.zeros(3)}, path)
    assert read_weights([path])["w"].tolist() == [1.0] * 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_a_folder_cannot_be_written_and_no_part_stays(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.mkdir()
    with pytest.raises(WeightsFileInvalid, match=re.escape(f"cannot write {path}")):
        write_weights({"w": torch.zeros(3)}, path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsFileInvalid, match="cannot write"):
        write_weights({"w": torch.zeros(3)}, tmp_path / "file" / "w.safetensors")


TIED = torch.zeros(4)


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param(
            {"w": torch.zeros(2, dtype=torch.complex128)}, id="a dtype that the format lacks"
        ),
        pytest.param({"a": TIED, "b": TIED}, id="tied"),
    ],
)
def test_tensors_that_the_format_cannot_hold_are_refused_as_a_file_that_cannot_be_written(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(WeightsFileInvalid, match="cannot write") as caught:
        write_weights(tensors, tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


# -- memory to load into
# --------------------------------------------------------------------------------------------------


def test_allocated_tensors_lie_in_order_in_one_block_with_no_gap_but_for_alignment() -> None:
    tensors = allocate(
        {
            "byte": (torch.uint8, (3,)),
            "empty": (torch.float64, (0, 5)),
            "half": (torch.bfloat16, (2,)),
            "scalar": (torch.complex128, ()),
            "last": (torch.uint8, (1,)),
        }
    )
    base = tensors["byte"].data_ptr()
    assert {
        name: tensors[name].data_ptr() - base for name in ("byte", "half", "scalar", "last")
    } == {
        "byte": 0,
        "half": 8,
        "scalar": 16,
        "last": 32,
    }
    assert [tuple(tensor.shape) for tensor in tensors.values()] == [(3,), (0, 5), (2,), (), (1,)]
    assert len(describe(tensors).regions) == 1


def test_memory_like_a_manifest_has_its_tensors_in_the_order_of_the_sources_memory() -> None:
    manifest = a_manifest(
        an_entry("late", addr=8192, nbytes=8, dtype="float32", shape=(2,)),
        an_entry("early", addr=4096, nbytes=6, dtype="float16", shape=(3, 1)),
        an_entry("empty", addr=0, nbytes=0, dtype="int64", shape=(0,)),
    )
    tensors = allocate_like(manifest)
    assert [
        (name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()
    ] == [
        ("empty", "int64", (0,)),
        ("early", "float16", (3, 1)),
        ("late", "float32", (2,)),
    ]


def test_a_shape_that_torch_cannot_have_is_refused_with_the_name_of_the_tensor() -> None:
    huge = an_entry("w", addr=0, nbytes=0, shape=(0, 1 << 63))
    with pytest.raises(
        TensorsUnusable, match=r"w: torch has no tensor of shape \[0, 9223372036854775808\]"
    ):
        allocate_like(a_manifest(huge))


def test_tensors_that_are_tied_in_the_source_get_memory_of_their_own_and_can_be_written(
    tmp_path: Path,
) -> None:
    weight = torch.rand(4)
    tensors = allocate_like(describe({"embed": weight, "head": weight}))
    for tensor in tensors.values():
        tensor.copy_(weight)
    write_weights(tensors, tmp_path / "w.safetensors")
    assert same(read_weights([tmp_path]), {"embed": weight, "head": weight})


def test_memory_that_is_there_is_used_again() -> None:
    large, small = (
        {"a": (torch.uint8, (3,)), "b": (torch.float32, (2,))},
        {"c": (torch.int16, (2,))},
    )
    assert (extent(large), extent(small), extent({})) == (12, 4, 0)
    memory = torch.empty(12, dtype=torch.uint8)
    assert (
        allocate(large, memory=memory)["a"].data_ptr()
        == allocate(small, memory=memory)["c"].data_ptr()
        == memory.data_ptr()
    )
    assert allocate({}, memory=memory) == {}


def test_the_shards_of_a_manifest_are_those_of_the_tensors_that_state_one() -> None:
    manifest = a_manifest(
        an_entry("opaque"), an_entry("box", nbytes=4, global_shape=(8,), offsets=(4,), opaque=False)
    )
    assert shards_like(manifest) == {"box": Shard((8,), (4,))}


# -- the files of a whole model
# --------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def write_model(
    folder: Path,
    *files: Mapping[str, torch.Tensor],
    force: bool = False,
    then: Callable[[], object] = lambda: None,
) -> WholeFiles:
    """`then`: what happens when all is written and nothing shows yet."""
    with WholeFiles(folder, force=force) as out:
        write_into(out, *files)
        then()
    return out


def write_into(out: WholeFiles, *files: Mapping[str, torch.Tensor]) -> None:
    out.begin(
        [
            [
                Whole(name, "float32", tuple(one.shape), one.nbytes, opaque=False)
                for name, one in file.items()
            ]
            for file in files
        ]
    )
    for file in files:
        out.write(file)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def two(value: float) -> list[dict[str, torch.Tensor]]:
    return [
        {"b": torch.full((3,), value), "c": torch.full((1,), value)},
        {"a": torch.full((2,), value)},
    ]


FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_model_in_one_file_needs_no_index(tmp_path: Path) -> None:
    out = write_model(tmp_path / "new" / "out", {"w": torch.ones(3)})
    assert out.paths == [tmp_path / "new" / "out" / "model.safetensors"]
    assert names(tmp_path / "new" / "out") == ["model.safetensors"]
    assert read_weights(out.paths)["w"].tolist() == [1.0] * 3


def test_a_model_in_several_files_has_an_index_that_leads_a_reader_to_every_tensor(
    tmp_path: Path,
) -> None:
    out = write_model(tmp_path, *two(1.0))
    assert [path.name for path in out.paths] == [*FILES, INDEX]
    assert names(tmp_path) == sorted([*FILES, INDEX])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 24},
        "weight_map": {"a": FILES[1], "b": FILES[0], "c": FILES[0]},
    }
    for name in set(index["weight_map"].values()):  # as transformers reads it
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {
                tensor for tensor, place in index["weight_map"].items() if place == name
            }


def test_files_have_the_permissions_that_the_users_umask_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_model(tmp_path, *two(1.0))
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_nothing_shows_before_the_end(tmp_path: Path) -> None:
    seen: list[str] = []
    write_model(tmp_path, *two(1.0), then=lambda: seen.extend(names(tmp_path)))
    assert [name for name in seen if not name.startswith(".")] == []
    assert names(tmp_path) == sorted([*FILES, INDEX])


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_what_fails_half_way_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    def fail() -> None:
        raise failure

    for folder in (tmp_path / "new" / "out", tmp_path):
        before = names(tmp_path)
        with pytest.raises(failure):
            write_model(folder, *two(2.0), force=True, then=fail)
        assert names(tmp_path) == before
        write_model(tmp_path, {"w": torch.ones(3)}, force=True)
    assert names(tmp_path) == ["model.safetensors"]
    assert read_weights([tmp_path])["w"].tolist() == [1.0] * 3


def test_what_is_begun_again_forgets_what_was_written(tmp_path: Path) -> None:
    with WholeFiles(tmp_path) as out:
        write_into(out, *two(1.0))
        write_into(out, {"w": torch.ones(3)})
    assert names(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00009.safetensors", INDEX])
def test_a_model_that_is_there_is_refused_before_anything_is_done(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(
        InvalidField,
        match=re.escape(f"{tmp_path / name} is there already: choose another `out`, or `force`"),
    ):
        WholeFiles(tmp_path)
    assert names(tmp_path) == [name]


def test_a_model_that_comes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="is there already"):
        write_model(
            tmp_path, *two(1.0), then=lambda: (tmp_path / "model.safetensors").write_text("theirs")
        )
    assert names(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "theirs"


def test_with_force_no_file_of_the_model_before_stays_and_other_files_do(tmp_path: Path) -> None:
    others = ["config.json", "model.fp16.safetensors", "rank-0.safetensors"]
    for name in others:
        (tmp_path / name).touch()
    write_model(tmp_path, *two(1.0))
    write_model(tmp_path, {"w": torch.ones(3)}, force=True)
    assert names(tmp_path) == sorted(["model.safetensors", *others])
    write_model(tmp_path, *two(2.0), force=True)
    assert names(tmp_path) == sorted([*FILES, INDEX, *others])
    assert read_weights([tmp_path / name for name in FILES])["a"].tolist() == [2.0] * 2


@pytest.mark.parametrize("at", range(6))
def test_a_move_that_fails_puts_all_back_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    write_model(tmp_path, *two(1.0))
    moves = 0
    move = os.replace

    def fail_once(src: Path, dst: Path) -> None:
        nonlocal moves
        moves += 1
        if moves == at + 1:
            raise OSError(5, "Input/output error")
        move(src, dst)

    monkeypatch.setattr("engine_loader.files.whole_files.os.replace", fail_once)
    with pytest.raises(WeightsFileInvalid, match=r"cannot write .*/model.*: Input/output error"):
        write_model(tmp_path, *two(2.0), force=True)
    assert names(tmp_path) == sorted([*FILES, INDEX])
    assert read_weights([tmp_path / name for name in FILES])["a"].tolist() == [1.0] * 2


def test_a_file_that_is_missing_at_the_end_shows_none(tmp_path: Path) -> None:
    def remove_one() -> None:
        (hidden,) = tmp_path.glob(".*")
        (hidden / FILES[1]).unlink()

    with pytest.raises(WeightsFileInvalid, match=f"cannot write .*{FILES[1]}: "):
        write_model(tmp_path, *two(1.0), then=remove_one)
    assert names(tmp_path) == []


def test_a_folder_of_a_files_name_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InvalidField, match="is a folder, and would be replaced by a file"):
        WholeFiles(tmp_path, force=True)


def test_where_nothing_can_be_written_is_reported_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        WeightsFileInvalid, match=re.escape(f"cannot write {tmp_path / 'file' / 'out'}: ")
    ):
        WholeFiles(tmp_path / "file" / "out").__enter__()


def test_a_folder_that_was_made_for_files_that_cannot_be_written_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("engine_loader.files.hidden.tempfile.mkdtemp", refuse)
    with pytest.raises(WeightsFileInvalid, match=r"cannot write .*Permission denied"):
        WholeFiles(tmp_path / "new" / "out").__enter__()
    assert names(tmp_path) == []


def test_two_processes_may_write_into_one_folder_at_once_and_the_first_to_end_has_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidField, match="is there already"):
        write_model(tmp_path, {"w": torch.ones(3)}, then=lambda: write_model(tmp_path, *two(1.0)))
    assert names(tmp_path) == sorted([*FILES, INDEX])
