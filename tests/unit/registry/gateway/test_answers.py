"""What a gateway answers: never older than the question, looked up once for all who ask at the same
time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from engine_registry.errors import EtcdUnavailable, InstanceNotFound
from engine_registry.gateway.answers import Answers
from engine_registry.gateway.calls import Calls
from engine_registry.registration.writes import claim
from engine_registry.schema import manifest_format as manifests
from engine_registry.schema.keyvalue import Found, KeyValue, Range
from engine_registry.schema.record import RankRecord
from tests.support.builders import OTHER_INCARNATION, a_manifest, a_record
from tests.support.fake_etcd import FakeEtcd

T = TypeVar("T")


class SlowEtcd(FakeEtcd):
    """One that counts the records and manifests that are read, each of one part, and whose gets
    wait while `open` is cleared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.began = threading.Event()
        self.gets = 0
        self.manifests = 0

    def get(self, key: str, revision: int = 0) -> KeyValue | None:
        self.gets += 1
        self.began.set()
        self.open.wait(60)
        return super().get(key, revision)

    def read(self, ranges: Sequence[Range]) -> tuple[int, list[Found]]:
        self.manifests += sum(wanted.key.startswith("/manifests/") for wanted in ranges)
        return super().read(ranges)


def publish(etcd: FakeEtcd, replaces: str = "", **fields: Any) -> RankRecord:
    ref, parts = manifests.encode(a_manifest())
    record = replace(a_record(**fields), manifest=ref)
    claim(etcd, record, parts, etcd.grant(10), replaces)
    return record


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(main)


@pytest.fixture
def etcd() -> SlowEtcd:
    return SlowEtcd()


def answers(etcd: FakeEtcd, timeout_s: float = 10.0, **fields: Any) -> Answers:
    return Answers(etcd, Calls(2, "test"), timeout_s, **fields)


def test_a_rank_that_has_not_changed_is_rendered_once_but_looked_up_every_time(
    etcd: SlowEtcd,
) -> None:
    publish(etcd)
    etcd.gets = 0

    async def main() -> None:
        some = answers(etcd)
        assert await some.of("qwen", 0) is await some.of("qwen", 0)

    run(main())
    assert (etcd.gets, etcd.manifests) == (2, 1)


def test_a_request_while_a_look_is_under_way_gets_the_answer_of_one_that_began_later(
    etcd: SlowEtcd,
) -> None:
    publish(etcd, session_id="old:1")
    etcd.gets = 0

    async def main() -> tuple[bytes, list[bytes]]:
        some = answers(etcd)
        etcd.open.clear()
        etcd.began.clear()
        first = asyncio.create_task(some.of("qwen", 0))
        await asyncio.to_thread(etcd.began.wait, 10)
        etcd.open.set()
        publish(
            etcd, replaces=a_record().incarnation, incarnation=OTHER_INCARNATION, session_id="new:1"
        )
        etcd.gets = 0
        rest = await asyncio.gather(*(some.of("qwen", 0) for _ in range(50)))
        return await first, list(rest)

    _, rest = run(main())
    assert all(b"new:1" in body for body in rest)
    assert etcd.gets < 5


def test_a_client_that_goes_away_does_not_take_the_answer_from_the_others(etcd: SlowEtcd) -> None:
    publish(etcd)

    async def main() -> bytes:
        some = answers(etcd)
        etcd.open.clear()
        one, other = (asyncio.create_task(some.of("qwen", 0)) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        etcd.open.set()
        return await other

    assert b"10.0.0.1:15000" in run(main())


def test_an_etcd_that_hangs_is_answered_for_in_time(etcd: SlowEtcd) -> None:
    async def main() -> None:
        etcd.open.clear()
        try:
            with pytest.raises(EtcdUnavailable, match=r"has not answered within 0\.01 s"):
                await answers(etcd, 0.01).of("qwen", 0)
        finally:
            etcd.open.set()

    run(main())


def test_a_rank_that_is_not_there_is_not_found_every_time(etcd: SlowEtcd) -> None:
    async def main() -> None:
        some = answers(etcd)
        for _ in range(2):
            with pytest.raises(InstanceNotFound, match="/engines/qwen/0 is not registered"):
                await some.of("qwen", 0)
        publish(etcd)
        await some.of("qwen", 0)

    run(main())


def test_what_is_kept_is_bounded_and_the_rank_asked_for_last_stays(etcd: SlowEtcd) -> None:
    for rank in range(4):
        publish(etcd, rank=rank, world_size=4)

    async def main() -> None:
        some = answers(etcd)
        size = len(await some.of("qwen", 0))
        some = answers(etcd, cache_nbytes=3 * size)
        for rank in (0, 1, 2, 0, 3, 0):
            await some.of("qwen", rank)
        etcd.manifests = 0
        await some.of("qwen", 0)
        await some.of("qwen", 3)
        assert etcd.manifests == 0
        await some.of("qwen", 1)
        assert etcd.manifests == 1

    run(main())
