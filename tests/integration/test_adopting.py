"""Weights that outlive their process: held by its keeper, and adopted by another process. Real
processes that are killed, a real etcd, memory of the host.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations, product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from engine_loader import (
    Adopted,
    HeldUnusable,
    LoaderError,
    LoadOptions,
    Publication,
    PublishOptions,
    Shard,
    SocketEngine,
    adopt,
    arena_of,
    find_held,
    load,
    load_or_seed,
    publish,
)
from engine_loader.adopting import adopt as adopting
from engine_loader.adopting import finding
from engine_loader.errors import DigestMismatch, TensorsUnusable
from engine_loader.publishing.header import NBYTES
from engine_loader.sharing.pieces import Pieces
from engine_registry import Manifest, ModelIdentity, RankRecord, Registry
from engine_registry.errors import RegistryError
from engine_registry.etcd.client import Etcd
from engine_registry.etcd.local import LocalEtcd
from engine_registry.registration.descriptors import fetch
from engine_registry.registration.held import Kept, keepers_here
from engine_registry.schema.keyvalue import Put
from engine_registry.schema.record_format import encode
from tests.integration.conftest import Processes, line_of
from tests.support.arenas import Rank, arenas_of
from tests.support.processes.arena import CHANGING, MODEL, weights
from tests.support.signals import signal_and_wait
from tests.support.waiting import wait_until

Tensors = dict[str, torch.Tensor]
Start = Callable[..., Rank]


@pytest.fixture
def start(processes: Processes, shared_etcd: LocalEtcd, namespace: str) -> Iterator[Start]:
    """Keepers of ranks that were killed are killed at the end of the test."""
    keepers: list[int] = []

    def start(
        engine: str = "socket",
        hold_s: float = 60.0,
        etcd: LocalEtcd = shared_etcd,
        instance: str = "a",
    ) -> Rank:
        args = ("tests.support.processes.arena", etcd.endpoint, namespace, engine)
        rank = Rank(processes.start("-m", *args, str(hold_s), instance))
        keepers.append(rank.keeper)
        return rank

    yield start
    for keeper in keepers:
        with suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGKILL)


@pytest.fixture
def adopter(
    processes: Processes, shared_etcd: LocalEtcd, namespace: str
) -> Callable[[str], subprocess.Popen[str]]:
    args = ("-m", "tests.support.processes.adopter", shared_etcd.endpoint, namespace)
    return lambda how: processes.start(*args, how)


def zeros() -> Tensors:
    tensors = weights()
    for tensor in tensors.values():
        tensor.zero_()
    return tensors


def kept(registry: Registry) -> list[tuple[Kept, RankRecord]]:
    """What keepers have of the ranks of this test: those of other tests are on this host, too."""
    found = [(one, registry.record_at(one.key)) for one in keepers_here()]
    return [
        (one, record)
        for one, record in found
        if record is not None and record.incarnation == one.incarnation
    ]


def held(registry: Registry) -> list[RankRecord]:
    """The ranks of this test that are held, once their keepers have said so."""
    return [record for one, record in kept(registry) if one.held and record.held]


def kill(registry: Registry, rank: Rank) -> None:
    """The rank, and waits until it is held."""
    signal_and_wait(rank.pid, signal.SIGKILL)
    wait_until(lambda: bool(held(registry)))


def is_free(keeper: int) -> bool:
    try:
        return arenas_of(keeper) == 0
    except OSError:  # it has ended
        return True


def adopt_into(
    registry: Registry, tensors: Tensors | nn.Module, **options: object
) -> Adopted | None:
    return adopt(registry, MODEL, tensors, rank=0, world_size=1, **options)  # type: ignore[arg-type]


def shared_with(registry: Registry, tensors: Tensors | nn.Module) -> Adopted:
    found = adopt_into(registry, tensors, shared=True)
    assert found is not None
    return found


def offered(
    registry: Registry, engine: SocketEngine, tensors: Tensors, digests: bool | None = None
) -> Publication:
    """Its keeper holds them for a minute."""
    return publish(
        registry,
        engine,
        instance="a",
        rank=0,
        world_size=1,
        tensors=tensors,
        model=MODEL,
        options=PublishOptions(hold_s=60, digests=digests),
    )


def adopted_by(process: subprocess.Popen[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(line_of(process))
    return found


def added_to(found: Tensors) -> int:
    """By how much the tensors differ from the first ones, all alike and in all elements."""
    (added,) = {int(found[name].flatten()[0] - weights()[name].flatten()[0]) for name in CHANGING}
    for name, tensor in weights().items():
        assert torch.equal(found[name], tensor + added), name
        assert found[name].stride() == tensor.stride()
    return added


def inode_at(pid: int | str, addr: int) -> int:
    """Of the file that is mapped there."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        ends, _, _, _, inode, *_ = line.split()
        start, end = (int(each, 16) for each in ends.split("-"))
        if start <= addr < end:
            return int(inode)
    raise AssertionError(f"nothing is mapped at {addr:#x}")


def fds_of_this_process() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


def manifest_of(registry: Registry) -> tuple[RankRecord, Manifest]:
    (record,) = held(registry)
    return record, registry.manifest(record)


def overwrite(manifest: Manifest, addr: int, data: bytes) -> None:
    """In the memory that the keeper has."""
    (export,) = [one for one in manifest.exports if one.addr <= addr < one.end]
    pieces = Pieces.decode(export)
    (fd,) = fetch(pieces.place, pieces.first, 1)
    os.pwrite(fd, data, addr - export.addr)
    os.close(fd)


# -- adopted exactly
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["socket", "tcp", "host gpus"])
def test_a_new_process_has_the_weights_of_one_that_was_killed_where_they_are(
    registry: Registry, start: Start, engine: str
) -> None:
    rank = start(engine)
    rank.do("update")
    before = registry.resolve("a")[0]
    kill(registry, rank)
    found = zeros()
    objects = dict(found)
    adopted = adopt_into(registry, found)
    assert adopted is not None
    assert added_to(found) == 1
    assert (adopted.version, adopted.content) == (1, before.content)
    assert adopted.record.incarnation == before.incarnation
    assert adopted.verified
    assert not adopted.shared
    assert adopted.current
    assert adopted.nbytes == sum(one.nbytes for one in weights().values())
    assert all(found[name] is objects[name] for name in found)
    assert found["tied"].data_ptr() == found["tied too"].data_ptr()
    wait_until(partial(is_free, rank.keeper))
    assert kept(registry) == []


def test_nothing_is_copied(registry: Registry, start: Start) -> None:
    rank = start()
    kill(registry, rank)
    inodes = {
        os.stat(f"/proc/{rank.keeper}/fd/{fd}").st_ino
        for fd in os.listdir(f"/proc/{rank.keeper}/fd")
        if "memfd:arena" in os.readlink(f"/proc/{rank.keeper}/fd/{fd}")
    }
    found = zeros()
    adopt_into(registry, found)
    assert {inode_at("self", one.data_ptr()) for one in found.values() if one.numel()} < inodes


def test_what_is_adopted_is_published_with_the_same_content_and_adopted_again(
    registry: Registry, start: Start, adopter: Callable[[str], subprocess.Popen[str]]
) -> None:
    rank = start()
    rank.do("update")
    before = registry.resolve("a")[0]
    kill(registry, rank)
    content = []
    for _ in range(3):
        process = adopter("adopt")
        result = adopted_by(process)
        assert result["equal"]
        assert (result["added"], result["version"]) == ([1], 1)
        content.append(result["content"])
        assert process.stdin is not None
        process.stdin.write("publish\n")
        process.stdin.flush()
        assert line_of(process) == "publish\n"
        (record,) = registry.resolve("a", 60)
        assert record.content == before.content
        assert record.incarnation != before.incarnation
        with SocketEngine("127.0.0.1") as engine:
            loaded = zeros()
            load(registry, engine, "a", rank=0, tensors=loaded, timeout_s=60)
            assert added_to(loaded) == 1
        signal_and_wait(process.pid, signal.SIGKILL)
        wait_until(lambda: bool(held(registry)))
    assert set(content) == {before.content}


def a_model(device: str) -> nn.Sequential:
    first = nn.Linear(64, 64, device=device)
    last = nn.Linear(64, 64, device=device)
    last.weight = first.weight  # tied
    middle = nn.Linear(64, 32, device=device, dtype=torch.bfloat16)
    return nn.Sequential(first, nn.BatchNorm1d(64, device=device), middle, last)


@pytest.mark.parametrize("names", ["of the state dict", "of parameters and buffers"])
def test_a_module_on_the_meta_device_has_the_weights_and_keeps_its_parameters(
    registry: Registry, names: str
) -> None:
    """Those of a rank of this process."""
    model, new = a_model("cpu"), a_model("meta")
    tensors: Tensors = dict(model.state_dict(keep_vars=True))
    arena_of(tensors).close()
    if names != "of the state dict":
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parameters = dict(new.named_parameters())
    with (
        SocketEngine("127.0.0.1") as engine,
        offered(registry, engine, tensors),
        shared_with(registry, new),
    ):
        assert {name: id(one) for name, one in new.named_parameters()} == {
            name: id(one) for name, one in parameters.items()
        }
        assert new[3].weight is new[0].weight
        for name, tensor in model.state_dict().items():
            assert torch.equal(new.state_dict()[name], tensor), name
        assert isinstance(new[0].weight, nn.Parameter)
        assert new[0].weight.requires_grad


@dataclass(frozen=True)
class Made:
    """A tensor, which a second name may stand for; or a slice of it, where it has memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: int  # of its dimensions in memory
    other: str  # nothing, `tied` or `slice`

    def tensors(self, name: str, device: str) -> Tensors:
        orders = [*permutations(range(len(self.shape)))]
        order = orders[self.order % len(orders)]
        tensor = torch.zeros([self.shape[dim] for dim in order], dtype=self.dtype, device=device)
        tensor = tensor.permute([order.index(dim) for dim in range(len(order))]).clone(
            memory_format=torch.preserve_format
        )
        if self.other == "tied":
            return {name: tensor, f"{name} too": tensor}
        if self.other == "slice" and device != "meta" and is_flat(tensor):
            return {name: tensor, f"{name} too": tensor.view(-1)[1:]}
        return {name: tensor}


def is_flat(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.numel() > 1


MADE = st.builds(
    Made,
    st.sampled_from([torch.uint8, torch.bool, torch.int16, torch.bfloat16, torch.complex64]),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.integers(0, 5),
    st.sampled_from(["", "tied", "slice"]),
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(MADE, min_size=1, max_size=6), st.sampled_from(["cpu", "meta"]))
def test_whatever_the_tensors_are_they_have_the_same_bytes_strides_and_ties(
    registry: Registry, made: list[Made], device: str
) -> None:
    def tensors(device: str) -> Tensors:
        found: Tensors = {}
        for number, one in enumerate(made):
            found |= one.tensors(f"t{number}", device)
        return found

    names = tensors(device).keys()
    published = {name: one for name, one in tensors("cpu").items() if name in names}
    arena_of(published).close()
    for number, tensor in enumerate(published.values()):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + number)
    new = tensors(device)
    strides = {name: tensor.stride() for name, tensor in new.items()}
    with (
        SocketEngine("127.0.0.1") as engine,
        offered(registry, engine, published),
        shared_with(registry, new) as sharing,
    ):
        assert sharing.verified
        first = next((name for name, one in published.items() if one.numel()), "")
        for name, tensor in published.items():
            assert new[name].device == tensor.device
            assert torch.equal(new[name], tensor)
            assert new[name].stride() == strides[name]
            if tensor.numel():
                ahead = new[name].data_ptr() - new[first].data_ptr()
                assert ahead == tensor.data_ptr() - published[first].data_ptr()


# -- refused
# --------------------------------------------------------------------------------------------------


def test_a_rank_that_was_killed_inside_an_update_is_not_adopted(
    registry: Registry, start: Start
) -> None:
    rank = start()
    rank.do("begin")
    signal_and_wait(rank.pid, signal.SIGKILL)
    wait_until(partial(is_free, rank.keeper))
    found = zeros()
    assert adopt_into(registry, found) is None
    assert not found["matrix"].any()


def test_a_header_that_says_updating_is_torn_and_the_memory_is_let_go(
    registry: Registry, start: Start
) -> None:
    """The rank ended before its keeper had heard of the update."""
    rank = start()
    kill(registry, rank)
    record, manifest = manifest_of(registry)
    overwrite(manifest, record.header_addr + 24, b"\x01")
    found = zeros()
    with pytest.raises(HeldUnusable, match="were being changed") as caught:
        adopt_into(registry, found)
    assert caught.value.details == {"key": record.key, "reason": "torn"}
    assert not found["matrix"].any()
    wait_until(partial(is_free, rank.keeper))
    assert adopt_into(registry, found) is None


def test_a_version_and_a_content_that_are_newer_than_the_record_are_those_of_the_header(
    registry: Registry, start: Start
) -> None:
    """The rank ended before its keeper had heard of them."""
    rank = start()
    kill(registry, rank)
    record, manifest = manifest_of(registry)
    overwrite(manifest, record.header_addr + 24, (2 * 7).to_bytes(8, "little") + b"\xcd" * 16)
    adopted = adopt_into(registry, zeros())
    assert adopted is not None
    assert (adopted.version, adopted.content) == (7, "cd" * 16)
    assert adopted.record.version == 0


def test_memory_with_another_header_is_let_go(registry: Registry, start: Start) -> None:
    rank = start()
    kill(registry, rank)
    record, manifest = manifest_of(registry)
    overwrite(manifest, record.header_addr, bytes(NBYTES))
    with pytest.raises(HeldUnusable):
        adopt_into(registry, zeros())
    wait_until(partial(is_free, rank.keeper))


def test_a_byte_that_has_changed_is_found_by_digests_and_the_memory_is_let_go(
    registry: Registry, start: Start
) -> None:
    rank = start()
    kill(registry, rank)
    record, manifest = manifest_of(registry)
    (entry,) = [one for one in manifest.tensors if one.name == "matrix"]
    overwrite(manifest, entry.addr + 1000, b"\x99")
    found = zeros()
    with pytest.raises(HeldUnusable, match="not what it has published") as caught:
        adopt_into(registry, found)
    assert caught.value.details == {
        "key": record.key,
        "reason": "digests",
        "problems": ["matrix"],
    }
    assert not found["matrix"].any()
    wait_until(partial(is_free, rank.keeper))


def test_without_verification_nobody_looks_at_digests(registry: Registry, start: Start) -> None:
    kill(registry, start())
    _, manifest = manifest_of(registry)
    (entry,) = [one for one in manifest.tensors if one.name == "matrix"]
    overwrite(manifest, entry.addr + 1000, b"\x99")
    found = zeros()
    adopted = adopt_into(registry, found, verify=False)
    assert adopted is not None
    assert not adopted.verified
    assert not torch.equal(found["matrix"], weights()["matrix"])


def other(change: str) -> Tensors:
    tensors = zeros()
    if change == "name":
        tensors["other"] = tensors.pop("matrix")
    elif change == "missing":
        del tensors["short"]
    elif change == "dtype":
        tensors["matrix"] = torch.zeros(64, 48, dtype=torch.float64)
    elif change == "shape":
        tensors["matrix"] = torch.zeros(48, 64)
    elif change == "strides":
        tensors["transposed"] = torch.zeros(48, 64, dtype=torch.int16)
    elif change == "tie":
        tensors["tied too"] = torch.zeros(300, 100)
    elif change == "lazy":
        tensors["matrix"] = nn.LazyLinear(3).weight
    return tensors


def test_other_tensors_are_refused_and_the_memory_stays_held(
    registry: Registry, start: Start
) -> None:
    kill(registry, start())
    for change in ("name", "missing", "dtype", "shape", "strides", "tie", "lazy"):
        with pytest.raises(HeldUnusable) as caught:
            adopt_into(registry, other(change))
        assert caught.value.details["reason"] == "tensors", change
        assert caught.value.details["problems"], change
    found = zeros()
    assert adopt_into(registry, found) is not None
    assert added_to(found) == 0


def test_an_adopter_that_is_killed_before_it_has_finished_leaves_the_weights_to_another(
    registry: Registry, start: Start, adopter: Callable[[str], subprocess.Popen[str]]
) -> None:
    kill(registry, start())
    for _ in range(2):
        process = adopter("hang")
        assert line_of(process) == "hangs\n"
        found = zeros()
        with pytest.raises(HeldUnusable) as caught:
            adopt_into(registry, found)
        assert caught.value.details["reason"] == "gone"
        signal_and_wait(process.pid, signal.SIGKILL)

    def is_adopted() -> bool:
        with suppress(HeldUnusable):
            return adopt_into(registry, found) is not None
        return False

    wait_until(is_adopted)
    assert added_to(found) == 0


# -- which ranks are found
# --------------------------------------------------------------------------------------------------

AXES = {
    "model": (MODEL, ModelIdentity("in an arena", revision="2")),
    "rank": (0, 1),
    "world_size": (1, 2),
    "topology": (None, {"tp": (0, 1)}),
}


def test_a_rank_is_found_only_where_model_rank_world_size_and_topology_are_equal(
    registry: Registry, start: Start
) -> None:
    kill(registry, start())
    for model, rank, world_size, topology in product(*AXES.values()):
        if rank >= world_size:  # type: ignore[operator]
            continue
        found = find_held(
            registry,
            model,  # type: ignore[arg-type]
            rank=rank,  # type: ignore[arg-type]
            world_size=world_size,  # type: ignore[arg-type]
            topology=topology,  # type: ignore[arg-type]
        )
        equal = (model, rank, world_size, topology) == (MODEL, 0, 1, None)
        assert (found is not None) is equal, (model, rank, world_size, topology)


def test_a_rank_that_lives_or_that_nobody_holds_is_not_adopted(
    registry: Registry, start: Start
) -> None:
    rank = start()
    assert adopt_into(registry, zeros()) is None
    rank.do("close")
    assert adopt_into(registry, zeros()) is None
    assert is_free(rank.keeper)


def test_a_rank_that_was_killed_while_etcd_was_away_is_adopted_when_it_is_back(
    own_etcd: LocalEtcd, namespace: str, start: Start
) -> None:
    rank = start(etcd=own_etcd)
    own_etcd.pause()
    signal_and_wait(rank.pid, signal.SIGKILL)
    wait_until(lambda: any(one.held and one.pid == rank.keeper for one in keepers_here()))
    own_etcd.resume()
    with Registry.connect(own_etcd.endpoint, namespace=namespace, timeout_s=60) as registry:
        found = zeros()
        assert adopt_into(registry, found) is not None
        assert added_to(found) == 0


def test_weights_whose_keeper_is_killed_too_are_gone(
    registry: Registry, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = start()
    kill(registry, rank)
    before = find_held(registry, MODEL, rank=0, world_size=1)
    assert before is not None
    signal_and_wait(rank.keeper, signal.SIGKILL)
    found = zeros()
    assert adopt_into(registry, found) is None
    monkeypatch.setattr(adopting, "find_each", lambda *_: iter([before]))
    with pytest.raises(HeldUnusable) as caught:
        adopt_into(registry, found)
    assert caught.value.details["reason"] == "gone"
    assert not found["matrix"].any()


def kill_all(registry: Registry, ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        signal_and_wait(rank.pid, signal.SIGKILL)
    wait_until(lambda: len(held(registry)) == len(ranks))


def test_of_replicas_that_are_held_each_process_has_one(registry: Registry, start: Start) -> None:
    kill_all(registry, [start(instance=f"replica-{number}") for number in range(3)])

    def adopted(_: int) -> tuple[str, int] | None:
        found = zeros()
        try:
            got = adopt_into(registry, found)
        except HeldUnusable:  # others are taking all
            return None
        return (got.record.instance, added_to(found)) if got is not None else None

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(adopted, range(4)))
    wanted = [(f"replica-{number}", 0) for number in range(3)]
    assert sorted(one for one in got if one is not None) == wanted
    assert held(registry) == []


def test_a_replica_that_is_of_no_use_leaves_its_place_to_another(
    registry: Registry, start: Start
) -> None:
    ranks = [start(instance=f"replica-{number}") for number in range(3)]
    ranks[1].do("update")
    ranks[2].do("offer others")
    kill_all(registry, ranks)
    found = zeros()
    adopted = adopt_into(registry, found)
    assert adopted is not None
    assert (adopted.record.instance, added_to(found)) == ("replica-1", 1)
    wait_until(lambda: is_free(ranks[1].keeper))
    assert {record.instance for record in held(registry)} == {"replica-0", "replica-2"}


def test_what_is_held_on_another_device_is_left_to_others(
    registry: Registry, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(registry, start())
    here = keepers_here()
    elsewhere = [replace(one, devices=("GPU-of-another-rank",)) for one in here]
    with monkeypatch.context() as patch:
        patch.setattr(finding, "keepers_here", lambda: elsewhere)
        assert adopt_into(registry, zeros()) is None
        assert adopt_into(registry, {"matrix": torch.empty(64, 48, device="meta")}) is None
        cpu = torch.device("cpu")
        assert find_held(registry, MODEL, rank=0, world_size=1) is not None
        assert find_held(registry, MODEL, rank=0, world_size=1, device=cpu) is None
    assert find_held(registry, MODEL, rank=0, world_size=1, device=torch.device("cpu")) is not None


def test_ranks_of_another_namespace_are_not_found(
    registry: Registry, start: Start, shared_etcd: LocalEtcd
) -> None:
    kill(registry, start())
    with Registry.connect(shared_etcd.endpoint, namespace="/elsewhere") as other:
        assert adopt_into(other, zeros()) is None
    assert adopt_into(registry, zeros()) is not None


# -- what a publication that is held does
# --------------------------------------------------------------------------------------------------


def test_tensors_outside_of_arenas_cannot_be_held_and_are_named(registry: Registry) -> None:
    tensors = {"in": torch.zeros(3), "out": torch.zeros(3), "none": torch.empty(0)}
    with SocketEngine("127.0.0.1") as engine, arena_of([tensors["in"]]):
        with pytest.raises(TensorsUnusable, match="1 tensors lie in memory that goes") as caught:
            offered(registry, engine, tensors)
    assert caught.value.details["problems"] == ["out"]
    assert "arena_of" in caught.value.remedy


def test_other_tensors_that_cannot_be_held_are_refused_and_nothing_has_changed(
    registry: Registry,
) -> None:
    tensors = {"in": torch.zeros(3)}
    with (
        SocketEngine("127.0.0.1") as engine,
        arena_of(tensors),
        offered(registry, engine, tensors) as publication,
    ):
        with pytest.raises(TensorsUnusable, match="memory that goes with this process"):
            publication.replace({"out": torch.zeros(3)})
        assert not publication.paused
        assert publication.version == 0
        others = {"in too": torch.ones(3)}
        arena_of(others).close()
        publication.replace(others)
        with shared_with(registry, {"in too": torch.zeros(3)}):
            assert publication.version == 1


@pytest.mark.parametrize("digests", [None, True, False])
def test_held_weights_have_digests_unless_they_are_not_wanted(
    registry: Registry, digests: bool | None
) -> None:
    tensors = {"in": torch.zeros(3)}
    with (
        SocketEngine("127.0.0.1") as engine,
        arena_of(tensors),
        offered(registry, engine, tensors, digests=digests) as publication,
    ):
        manifest = registry.manifest(publication.record)
        assert (manifest.digests is not None) is (digests is not False)
        assert len(manifest.exports) == 2 + (digests is not False)


def test_boxes_and_values_go_with_the_weights(registry: Registry, start: Start) -> None:
    rank = start()
    rank.do("box")
    kill(registry, rank)
    with pytest.raises(HeldUnusable, match="matrix: another part of the whole is held"):
        adopt_into(registry, zeros(), shards={"matrix": Shard((128, 48), (0, 0))})
    adopted = adopt_into(registry, zeros())  # which say nothing of boxes
    assert adopted is not None
    assert adopted.version == 1
    options = PublishOptions(version=5)
    with (
        SocketEngine("127.0.0.1") as engine,
        adopted.publish(registry, engine, instance="b", options=options) as publication,
    ):
        manifest = registry.manifest(publication.record)
        assert manifest.values == {"step": 7}
        (matrix,) = [entry for entry in manifest.tensors if entry.name == "matrix"]
        assert (matrix.opaque, matrix.global_shape, matrix.offsets) == (False, (128, 48), (64, 0))
        assert (publication.content, publication.version) == (adopted.content, 5)
        half = {"matrix": torch.zeros(64, 48)}
        load(
            registry,
            engine,
            "b",
            rank=0,
            tensors=half,
            shards={"matrix": Shard((128, 48), (64, 0))},
            timeout_s=60,
            options=LoadOptions(partial=True),
        )
        assert torch.equal(half["matrix"], weights()["matrix"])


def test_a_replica_is_held_once_it_has_loaded_all(registry: Registry, start: Start) -> None:
    with SocketEngine("127.0.0.1") as engine:
        tensors = weights()
        for name in CHANGING:
            tensors[name].add_(3)
        with publish(
            registry,
            engine,
            instance="source",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
            options=PublishOptions(digests=True, version=3),
        ) as source:
            rank = start()
            rank.do("close")
            rank.do("load")
            registry.resolve("b", 60)
            kill(registry, rank)
            found = zeros()
            adopted = adopt_into(registry, found)
            assert adopted is not None
            assert adopted.record.instance == "b"
            assert (adopted.version, adopted.content) == (3, source.content)
            assert added_to(found) == 3


def test_a_publication_that_was_paused_and_updated_is_held_as_it_is_then(
    registry: Registry, start: Start
) -> None:
    rank = start()
    rank.do("pause")
    assert is_free(rank.keeper)
    rank.do("resume")
    rank.do("update")
    kill(registry, rank)
    found = zeros()
    adopted = adopt_into(registry, found)
    assert adopted is not None
    assert adopted.version == 1
    assert added_to(found) == 1


def test_a_rank_that_was_paused_is_not_held(registry: Registry, start: Start) -> None:
    rank = start()
    rank.do("pause")
    signal_and_wait(rank.pid, signal.SIGKILL)
    wait_until(lambda: not registry.instances())
    assert adopt_into(registry, zeros()) is None


def test_tensors_that_have_changed_since_are_not_published_with_the_old_content(
    registry: Registry, start: Start
) -> None:
    kill(registry, start())
    found = zeros()
    adopted = adopt_into(registry, found)
    assert adopted is not None
    found["matrix"].add_(1)
    with SocketEngine("127.0.0.1") as engine:
        with pytest.raises(DigestMismatch, match="1 tensors of a/0 have other bytes"):
            adopted.publish(registry, engine, instance="a")
        found["matrix"].sub_(1)
        with adopted.publish(registry, engine, instance="a") as publication:
            assert publication.content == adopted.content


@pytest.mark.parametrize("how", ["at once", "by a start", "by a start, later"])
def test_what_was_adopted_is_published_though_etcd_does_not_know_of_the_death(
    registry: Registry, start: Start, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """As where etcd was away at the death, and came back as the keeper ended."""
    rank = start()
    (alive,) = registry.ranks("a")
    kill(registry, rank)
    found = zeros()
    options = PublishOptions(hold_s=60)
    with ExitStack() as stack:
        engine = stack.enter_context(SocketEngine("127.0.0.1"))
        raw = stack.enter_context(closing(Etcd(registry.config)))

        def revive(*_: object, **__: object) -> None:
            wait_until(lambda: raw.get(alive.key) is None)
            raw.commit([], [Put(alive.key, encode(alive), raw.grant(60))])

        monkeypatch.setattr(adopting.log, "info", revive)  # as the last that `adopt` does
        if how == "at once":
            adopted = adopt_into(registry, found)
            assert adopted is not None
            given = adopted.publish(registry, engine, instance="a", options=options)
        else:
            seeded = load_or_seed(
                registry,
                engine,
                MODEL,
                found,
                rank=0,
                world_size=1,
                instance="a",
                fallback=lambda: pytest.fail("it reads"),
                publish_later=how == "by a start, later",
                publish=options,
            )
            published = seeded.publish(found) if seeded.publication is None else seeded.publication
            assert published is not None
            given = published
        stack.enter_context(given)
        assert [one.incarnation for one in registry.ranks("a")] == [given.record.incarnation]


# -- memory is free again
# --------------------------------------------------------------------------------------------------


def test_memory_is_free_when_it_has_been_held_for_so_long(registry: Registry, start: Start) -> None:
    rank = start("socket", 1.0)
    kill(registry, rank)
    wait_until(partial(is_free, rank.keeper))
    assert adopt_into(registry, zeros()) is None


def test_memory_is_free_when_the_last_adopted_tensor_is_gone(
    registry: Registry, start: Start
) -> None:
    rank = start()
    kill(registry, rank)
    found = zeros()
    adopted = adopt_into(registry, found)
    assert adopted is not None
    wait_until(partial(is_free, rank.keeper))
    inode = inode_at("self", found["matrix"].data_ptr())
    assert f" {inode} " in Path("/proc/self/maps").read_text()
    del found, adopted
    assert f" {inode} " not in Path("/proc/self/maps").read_text()
    assert inode not in [os.stat(f"/proc/self/fd/{fd}").st_ino for fd in fds_of_this_process()]


# -- shared
# --------------------------------------------------------------------------------------------------


def test_weights_of_a_rank_that_lives_are_shared_until_it_changes_them(
    registry: Registry, start: Start
) -> None:
    rank = start()
    found = zeros()
    shared = adopt_into(registry, found, shared=True)
    assert shared is not None
    with shared:
        assert added_to(found) == 0
        assert (shared.shared, shared.current, shared.verified) == (True, True, True)
        ((keeper, _),) = kept(registry)
        assert (keeper.held, keeper.sharers) == (False, 1)
        with (
            SocketEngine("127.0.0.1") as engine,
            pytest.raises(LoaderError, match="cannot be published"),
        ):
            shared.publish(registry, engine, instance="b")
        rank.do("update")
        assert not shared.current
        assert added_to(found) == 1  # the memory is the same
    again = adopt_into(registry, zeros(), shared=True)
    assert again is not None
    assert again.version == 1
    again.close()
    assert not again.current


def test_shared_weights_cannot_be_written_to(
    registry: Registry, start: Start, adopter: Callable[[str], subprocess.Popen[str]]
) -> None:
    start()
    process = adopter("share")
    assert adopted_by(process)["equal"]
    assert process.stdin is not None
    process.stdin.write("write\n")
    process.stdin.flush()
    assert process.wait(60) == -signal.SIGSEGV
    found = zeros()
    with shared_with(registry, found):
        assert added_to(found) == 0
        with (
            SocketEngine("127.0.0.1") as engine,
            pytest.raises(TensorsUnusable, match="its memory is read-only"),
        ):
            load(registry, engine, "a", rank=0, tensors=found, timeout_s=60)


def test_weights_that_are_held_can_be_shared_and_adopted_afterwards(
    registry: Registry, start: Start
) -> None:
    kill(registry, start())
    shared, own = zeros(), zeros()
    with shared_with(registry, shared) as sharing:
        assert adopt_into(registry, own) is not None
        assert not sharing.current
        assert added_to(shared) == added_to(own) == 0


# -- killed at any moment
# --------------------------------------------------------------------------------------------------


def adopted_or_refused(registry: Registry, rank: Rank, key: str) -> str:
    """What comes of the rank, whose process has ended."""

    def is_settled() -> bool:
        record = registry.record_at(key)
        return record is None or bool(record.ended)

    wait_until(is_settled)
    found = zeros()
    outcome = "not held"
    with suppress(HeldUnusable):
        outcome = "refused"
        adopted = adopt_into(registry, found)
        outcome = "not held"
        if adopted is not None:
            assert adopted.verified
            assert added_to(found) == adopted.version
            return "adopted"
    assert not found["matrix"].any()
    return outcome


def kill_idle(registry: Registry, rank: Rank, number: int) -> str:
    time.sleep(0.001 * number)
    signal_and_wait(rank.pid, signal.SIGKILL)
    return adopted_or_refused(registry, rank, "/engines/a/0")


def kill_serving(registry: Registry, rank: Rank, number: int) -> str:
    begun, over = threading.Event(), threading.Event()

    def read() -> None:
        with SocketEngine("127.0.0.1", same_host=False) as engine:
            while not over.is_set():
                with suppress(LoaderError, RegistryError):
                    load(registry, engine, "a", rank=0, tensors=zeros(), timeout_s=0)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert begun.wait(60)
        return kill_idle(registry, rank, number)
    finally:
        over.set()
        reader.join(60)


def kill_loading(registry: Registry, rank: Rank, number: int) -> str:
    with SocketEngine("127.0.0.1") as engine:
        tensors = weights()
        with publish(
            registry,
            engine,
            instance="source",
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
            options=PublishOptions(digests=True),
        ):
            rank.do("close")
            rank.do("load")
            time.sleep(0.01 * number)
            signal_and_wait(rank.pid, signal.SIGKILL)
            return adopted_or_refused(registry, rank, "/engines/b/0")


def kill_updating(registry: Registry, rank: Rank, number: int) -> str:
    rank.do("updates")
    return kill_idle(registry, rank, number)


KILLS = {
    "idle": kill_idle,
    "serving": kill_serving,
    "loading": kill_loading,
    "updating": kill_updating,
}


@pytest.mark.parametrize(
    "kills", [pytest.param(3, id="3"), pytest.param(25, id="25", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("when", KILLS)
def test_whenever_a_rank_is_killed_its_weights_are_adopted_exactly_or_refused(
    registry: Registry, start: Start, when: str, kills: int
) -> None:
    found = [KILLS[when](registry, start(), number) for number in range(kills)]
    if when in ("idle", "serving"):
        assert found == ["adopted"] * kills
