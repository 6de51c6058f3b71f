"""`fetch`: a running instance becomes files in one call, and mistakes leave nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine_loader import Engine, InProcessEngine, LoadOptions, MooncakeEngine, Progress, fetch
from engine_loader.errors import (
    EngineUnavailable,
    SourceUnreachable,
    VersionUnavailable,
    WeightsFileInvalid,
)
from engine_loader.files.weights import read_weights
from engine_registry import Registry
from engine_registry.errors import EtcdUnavailable, InstanceNotFound, InvalidField
from engine_registry.etcd.local import LocalEtcd
from tests.integration.test_full import Instance, assert_equal, shards_of, whole


@pytest.fixture
def new_engine() -> Iterator[Callable[[], Engine]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(MooncakeEngine("127.0.0.1"))


@pytest.fixture
def source(registry: Registry, new_engine: Callable[[], Engine]) -> Iterator[None]:
    """Two ranks that hold `whole()` between them."""
    with Instance(registry, new_engine, digests=True):
        yield


@pytest.mark.usefixtures("source")
def test_a_rank_becomes_the_file_of_that_rank(registry: Registry, tmp_path: Path) -> None:
    for rank in (0, 1):
        (path,) = fetch("a", tmp_path / "weights", rank=rank, registry=registry)
        assert path == tmp_path / "weights" / f"rank-{rank}.safetensors"
        assert_equal(read_weights(path), shards_of(whole(), rank)[0])


@pytest.mark.usefixtures("source")
def test_all_ranks_together_become_the_files_of_the_whole_model(
    registry: Registry, tmp_path: Path
) -> None:
    (path,) = fetch("a", str(tmp_path), registry=registry)
    assert path == tmp_path / "model.safetensors"
    assert_equal(read_weights(path), whole())
    *parts, index = fetch(
        "a", tmp_path, registry=registry, force=True, max_file_nbytes=3_000, show_progress=False
    )
    assert len(parts) > 1
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        each.name for each in (*parts, index)
    )
    assert_equal(read_weights(index), whole())


def test_endpoints_of_etcd_will_do(
    own_etcd: LocalEtcd, new_engine: Callable[[], Engine], tmp_path: Path
) -> None:
    with Registry.connect(own_etcd.endpoint) as registry, Instance(registry, new_engine, "b"):
        (path,) = fetch("b", tmp_path, rank=1, registry=own_etcd.endpoint)
    assert_equal(read_weights(path), shards_of(whole(), 1)[0])


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("rank", [0, None])
def test_progress_is_reported_and_nothing_is_drawn_where_there_is_no_terminal(
    registry: Registry, tmp_path: Path, rank: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Progress] = []
    options = LoadOptions(progress=seen.append, verify="digest")
    fetch("a", tmp_path, rank=rank, registry=registry, options=options)
    assert seen[-1].nbytes == seen[-1].total_nbytes > 0
    assert "a/0" not in capfd.readouterr().err


@pytest.mark.usefixtures("source")
def test_a_file_that_is_there_is_replaced_only_by_force(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "rank-0.safetensors"
    path.write_text("of somebody")
    with pytest.raises(InvalidField, match=f"{path} is there already: choose another `out`, or"):
        fetch("a", tmp_path, rank=0, registry=registry)
    assert path.read_text() == "of somebody"
    fetch("a", tmp_path, rank=0, registry=registry, force=True)
    assert_equal(read_weights(path), shards_of(whole(), 0)[0])


class Mistake(NamedTuple):
    options: dict[str, Any]
    error: type[Exception]
    says: str


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    "mistake",
    [
        Mistake({"rank": 2}, InvalidField, "rank 2 is not one of 'a': its ranks are 0 to 1"),
        Mistake({"rank": -1}, InvalidField, "rank -1 is not one of 'a': its ranks are 0 to 1"),
        Mistake({"source": "b", "timeout_s": 0}, InstanceNotFound, "'b' is not registered"),
        Mistake({"registry": "nonsense"}, InvalidField, "nonsense"),
        Mistake({"registry": "127.0.0.1:1"}, EtcdUnavailable, "cannot be reached"),
        Mistake({"protocol": "pigeon"}, EngineUnavailable, "protocol 'pigeon' is unknown"),
        Mistake(
            {"options": LoadOptions(partial=True)},
            InvalidField,
            "fetch does not take the option `partial`",
        ),
        Mistake({"options": LoadOptions(version=7)}, VersionUnavailable, "version 7 is not served"),
    ],
    ids=lambda mistake: mistake.says,
)
def test_a_mistake_leaves_no_folder(registry: Registry, tmp_path: Path, mistake: Mistake) -> None:
    given = {"source": "a", "rank": 0, "registry": registry, **mistake.options}
    with pytest.raises(mistake.error, match=mistake.says):
        fetch(given.pop("source"), tmp_path / "new" / "weights", **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("rank", [0, None])
def test_a_folder_that_takes_no_file_is_known_before_a_byte_moves(
    registry: Registry, tmp_path: Path, rank: int | None
) -> None:
    (tmp_path / "file").touch()
    moved: list[Progress] = []
    with pytest.raises(WeightsFileInvalid, match=f"cannot write {tmp_path / 'file'}"):
        fetch(
            "a",
            tmp_path / "file" / "below",
            rank=rank,
            registry=registry,
            options=LoadOptions(progress=moved.append),
        )
    assert moved == []


@pytest.mark.usefixtures("source")
def test_a_disk_that_is_full_is_known_before_a_byte_moves(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000))
    moved: list[Progress] = []
    with pytest.raises(
        WeightsFileInvalid, match=r"No space left on device: it takes [0-9]+ bytes, 1000 are free"
    ):
        fetch(
            "a",
            tmp_path / "new",
            rank=0,
            registry=registry,
            options=LoadOptions(progress=moved.append),
        )
    assert (moved, list(tmp_path.iterdir())) == ([], [])


def test_a_source_that_cannot_be_read_from_here_is_reported(
    registry: Registry, tmp_path: Path
) -> None:
    with (
        Instance(registry, InProcessEngine, "c"),
        pytest.raises(SourceUnreachable, match="/engines/c/0 is served over in_process"),
    ):
        fetch("c", tmp_path, rank=0, registry=registry)
