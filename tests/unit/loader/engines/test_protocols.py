"""How to read: the quickest way that there is on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine_loader.engines import protocols
from engine_loader.engines.protocols import protocol_for, usable_protocols
from engine_loader.errors import EngineUnavailable, SourceUnreachable
from engine_registry import RankRecord
from tests.support.builders import a_record

HERE = "this boot"


@pytest.fixture(autouse=True)
def _this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "this_host", lambda: HERE)


def have(monkeypatch: pytest.MonkeyPatch, *usable: str) -> None:
    monkeypatch.setattr(protocols, "usable_protocols", lambda: usable)


def served(*ways: tuple[str, str]) -> Sequence[RankRecord]:
    return [
        a_record(rank=rank, protocol=protocol, fabric=fabric)
        for rank, (protocol, fabric) in enumerate(ways)
    ]


@pytest.mark.parametrize(
    ("ways", "protocol"),
    [
        ([("tcp", ""), ("rdma", "")], "rdma"),
        ([("tcp", ""), ("nvlink_intra", HERE)], "nvlink_intra"),
        ([("tcp", ""), ("nvlink_intra", "")], "nvlink_intra"),
        ([("tcp", ""), ("nvlink_intra", "another boot")], "tcp"),
        ([("tcp", ""), ("socket", "")], "socket"),
        ([("tcp", "")], "tcp"),
    ],
)
def test_the_quickest_that_a_source_is_served_over_is_chosen(
    monkeypatch: pytest.MonkeyPatch, ways: Sequence[tuple[str, str]], protocol: str
) -> None:
    have(monkeypatch, "nvlink_intra", "rdma", "socket", "tcp")
    assert protocol_for(served(*ways)) == protocol


def test_what_this_machine_lacks_is_not_chosen_and_all_of_it_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have(monkeypatch, "tcp")
    assert protocol_for(served(("rdma", ""), ("tcp", ""))) == "tcp"
    with pytest.raises(
        SourceUnreachable, match=r"/engines/qwen/0 is served over rdma; this machine has tcp"
    ):
        protocol_for(served(("rdma", "")))
    have(monkeypatch)
    with pytest.raises(SourceUnreachable, match="this machine has no way to read"):
        protocol_for(served(("tcp", "")))


def test_a_way_needs_both_its_device_and_an_engine_that_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(protocols, "can_be_had", lambda kernels, gpu: True)
    monkeypatch.setattr(protocols, "usable_devices", lambda: ("mlx5_0",))
    monkeypatch.setattr(protocols, "built_transports", lambda: ("IntraNodeNvlink", "Rdma", "Tcp"))
    assert usable_protocols() == ("cuda_ipc", "nvlink_intra", "rdma", "socket", "tcp")
    monkeypatch.setattr(protocols, "can_be_had", lambda kernels, gpu: False)
    assert usable_protocols() == ("nvlink_intra", "rdma", "socket", "tcp")
    monkeypatch.setattr(protocols, "usable_devices", lambda: ())
    monkeypatch.setattr(protocols, "built_transports", lambda: ("Rdma", "Tcp"))
    assert usable_protocols() == ("socket", "tcp")


def test_without_mooncake_there_is_what_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[str, ...]:
        raise EngineUnavailable("mooncake is not installed", "install it")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(protocols, "can_be_had", lambda kernels, gpu: True)
    monkeypatch.setattr(protocols, "usable_devices", lambda: ("mlx5_0",))
    monkeypatch.setattr(protocols, "built_transports", missing)
    assert usable_protocols() == ("cuda_ipc", "socket")
